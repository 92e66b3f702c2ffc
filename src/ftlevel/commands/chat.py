"""A conversation with a model: history, streaming, and adapters that change in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from ftlevel.commands.generate import writing_of
from ftlevel.config import GenerateConfig
from ftlevel.data.encoding.chat import Turn
from ftlevel.data.encoding.prompts import chat_prompt_ids, prompt_ids
from ftlevel.errors import ConfigError
from ftlevel.models.hardware import autocast
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import quiet_libraries
from ftlevel.trained.adapter_set import AdapterSet, load_adapter_set
from ftlevel.trained.load import Trained


class Chat:
    """A conversation.

    What was said before is part of the prompt where the adapter has a chat template and no
    instruction of its own; otherwise it was trained on single prompts, and each is asked alone.

    Attributes:
        adapters: who can speak.
        speaker: who does.
        messages: what was said.
        forgotten: how many messages were dropped because the model's positions were full.
    """

    def __init__(self, config: GenerateConfig) -> None:
        with quiet_libraries():
            self.adapters: AdapterSet = load_adapter_set(config)
        self.writing = writing_of(config)
        self.speaker = next(iter(self.adapters.voices))
        self.messages: list[Turn] = []
        self.forgotten = 0
        for trained in self.adapters.voices.values():
            if not trained.task.writes_text:
                raise ConfigError(
                    f"--chat is for models that write text, and this one does {trained.task.name}. "
                    "Use --prompt."
                )

    def switch(self, name: str) -> None:
        """Let the adapter called `name`, or the base, go on.

        Raises:
            ConfigError: there is no such adapter.
        """
        with self.adapters.speaking(name):
            self.speaker = name

    def reset(self) -> None:
        """Forget what was said."""
        self.messages, self.forgotten = [], 0

    @property
    def remembers(self) -> bool:
        """Whether earlier messages are part of the prompt."""
        with self.adapters.speaking(self.speaker) as trained:
            return _remembers(trained)

    def say(self, text: str, hear: Callable[[str], None]) -> str:
        """Return the answer to `text`; `hear` is given it piece by piece as it is written."""
        self.messages.append({"role": "user", "content": text})
        try:
            said = self._answer(text, hear)
        except BaseException:  # an answer that was broken off leaves no question behind
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": said})
        return said

    def _answer(self, text: str, hear: Callable[[str], None]) -> str:
        with (
            quiet_libraries(),
            self.adapters.speaking(self.speaker) as trained,
            torch.no_grad(),
            autocast(trained.device, trained.dtype),
        ):
            ids = torch.tensor([self._prompt(trained, text)], device=trained.device)
            written = trained.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=_Pieces(trained.tokenizer, hear, is_decoder=trained.kind == "decoder"),
                **self.writing.arguments(trained.tokenizer),
            )[0]
        answer = written if trained.kind == "encoder-decoder" else written[ids.shape[1] :]
        return str(trained.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def _prompt(self, trained: Trained, text: str) -> list[int]:
        """Return the ids of the prompt; the oldest messages go where there is no room."""
        if trained.prompt_format is None:
            raise TypeError("a model that writes text has a prompt format")
        if not _remembers(trained):
            return prompt_ids(trained.tokenizer, trained.prompt_format, text)
        positions = max_positions(trained.model.config)
        room = None if positions is None else positions - self.writing.max_new_tokens
        while True:
            turns = trained.prompt_format.with_system(self.messages)
            ids = chat_prompt_ids(trained.tokenizer, turns)
            if room is None or len(ids) <= room or len(self.messages) == 1:
                return ids
            self.messages = self.messages[2:]  # a question and its answer
            self.forgotten += 2


def _remembers(trained: Trained) -> bool:
    form = trained.prompt_format
    return form is not None and form.kind == "chat-template" and not form.instruction


class _Pieces(TextStreamer):
    """Gives text to a listener instead of printing it."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None], *, is_decoder: bool) -> None:
        super().__init__(tokenizer, skip_prompt=is_decoder, skip_special_tokens=True)
        self._hear = hear
        self._began = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        """Pass a piece on; white space before the first word is left out."""
        text = text if self._began else text.lstrip()
        if text:
            self._began = True
            self._hear(text)
