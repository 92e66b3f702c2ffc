"""Ask a trained model what its task is: one adapter or several, with the base beside them.

A conversation with a model: history, streaming, and adapters that change in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ftlevel.artifacts.row_sinks import to_cell
from ftlevel.config import GenerateConfig, build_section
from ftlevel.data.encoding.chat import Turn
from ftlevel.data.encoding.encode import chat_prompt_ids, prompt_ids
from ftlevel.data.formats.detect import Format, NoFormatError
from ftlevel.data.prepare.inference import Questions, open_rows
from ftlevel.data.sources.lines import is_packed, is_pipe, keep_pipe, plain_name, unpack
from ftlevel.data.sources.readers.files import READERS, Reading, is_pattern, match_files
from ftlevel.data.sources.readers.refused import refuse_media_columns
from ftlevel.data.sources.readers.text import tell_format
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.answers import MOST_SHOWN, Ask, answer
from ftlevel.evaluation.scoring import Writing
from ftlevel.models.hardware import autocast
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import quiet_libraries
from ftlevel.tasks.base import BaseTask, Reply
from ftlevel.trained.adapter_set import BASE, AdapterSet, load_adapter_set
from ftlevel.trained.load import Trained


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        prompt: as given.
        text: what the trained model says, in words.
        base: the same from the base model; None if it was not asked.
        scores: class or word → probability; empty where there are none.
        tags: each word with its tag; empty but for token classification.
        adapter: which adapter said it.
        dtype: precision that it was computed in.
    """

    prompt: str
    text: str
    base: str | None
    scores: dict[str, float]
    tags: list[tuple[str, str]]
    adapter: str
    dtype: str


def generate(
    name: str | None, prompts: Sequence[str], **settings: Any
) -> tuple[list[Answer], list[str]]:
    """Let the run, adapter or model `name` answer `prompts`.

    Args:
        name: a run directory, an adapter directory, or a model; None with `adapters` or
            `adapters_dir`.
        prompts: a list, or a column of a frame; the run's own prompt format is put around each.
        settings: fields of `GenerateConfig`.

    Returns:
        An answer for each prompt and adapter, in order, and notes for the user.

    Raises:
        InputError: something cannot be loaded.
        ConfigError: `compare_base` where there is no adapter to switch off; no context for a
            question; no mask to fill in.
    """
    return answer_all(build_section(GenerateConfig, {"name": name, **settings}), list(prompts))


def answer_all(
    config: GenerateConfig, prompts: Sequence[str], file: Path | None = None
) -> tuple[list[Answer], list[str]]:
    """Load what `config` names and let it answer; see `generate`.

    Args:
        config: who answers, and how.
        prompts: what is asked.
        file: of more: a prompt a line, or rows, which are asked by their columns.
    """
    with quiet_libraries():
        if file is not None and not _has_rows(file):
            files = match_files(str(file), "txt") if is_pattern(str(file)) else [file]
            prompts, file = (
                [*prompts, *(line for each in files for line in _read_lines(each))],
                None,
            )
        adapters = load_adapter_set(config)
        if config.compare_base and not adapters.has_base:
            raise ConfigError(
                f"--compare-base: {config.name} has no adapter that could be switched off. "
                "Ask the base model by itself: ftlevel generate MODEL --prompt …"
            )
        ask = Ask(prompts, config.context, writing_of(config), config.batch_size)
        if file is not None:
            first = next(iter(adapters.voices.values()))
            ask, shown = _with_rows(ask, file, first.task, config)
            prompts = [*prompts, *shown]
        replies = {name: ask_voice(adapters, name, ask) for name in adapters.voices}
        base = ask_voice(adapters, BASE, ask) if config.compare_base else None
    dtypes = {name: trained.dtype for name, trained in adapters.voices.items()}
    return list(_answers(prompts, replies, base, dtypes)), adapters.notes


def _has_rows(path: Path) -> bool:
    """Whether a file of prompts is read as rows; a text is a prompt a line."""
    suffix = Path(plain_name(path.name)).suffix.lower()
    if suffix not in READERS and is_pipe(path):
        suffix = (tell_format(keep_pipe(path), ()) or (".txt", ""))[0]
        return suffix in (".jsonl", ".json")
    return suffix in READERS and suffix != ".txt"


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text with something in them.

    Raises:
        InputError: it cannot be read.
    """
    try:
        plain = unpack(path) if is_packed(path) else path
        plain = keep_pipe(path) if is_pipe(path) else plain
        lines = plain.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}.") from None
    return [line for line in lines if line.strip()]


def _with_rows(
    ask: Ask, path: Path, task: BaseTask, config: GenerateConfig
) -> tuple[Ask, list[str]]:
    """Return `ask` with the rows of a file, and what each is shown as.

    Raises:
        InputError: the columns do not say what to ask, or a row cannot be asked.
    """
    ignored = config.ignore_columns
    source, _ = open_rows(str(path), Reading(ignored=ignored))
    try:
        shape = task.find_questions(source.leading, config.columns, rows=source.first)
    except NoFormatError:
        if "prompt" not in source.leading:
            raise
        shape = Format(task.name, "prompt", lambda roles: roles.text("prompt"),
                       {"prompt": "prompt"})  # fmt: skip
    refuse_media_columns(shape.unused, source.first, str(path))
    rows = list(Questions(source, shape))
    if bad := [f"{row.place}: {row.fault}. Fix the row." for row in rows if row.fault]:
        raise InputError(bad[:MOST_SHOWN])
    role = next((role for role in _SHOWN if role in shape.columns), next(iter(shape.columns)))
    shown = [to_cell(row.row.get(shape.columns[role])) for row in rows]
    if shape.name == "prompt" and isinstance(rows[0].question, str):
        return replace(ask, prompts=[*ask.prompts, *shown]), shown
    return replace(
        ask, questions=[row.question for row in rows], places=[row.place for row in rows]
    ), shown


_SHOWN = ("question", "prompt", "instruction", "messages", "conversations")
"""Roles of which the first that a row has is shown as what was asked."""


def writing_of(config: GenerateConfig) -> Writing:
    """Return how text is generated."""
    return Writing(
        config.max_new_tokens, config.num_beams, config.temperature, config.top_p, config.seed
    )


def ask_voice(adapters: AdapterSet, name: str, ask: Ask) -> list[Reply]:
    """Return what the adapter called `name`, or the base, says to each prompt."""
    with (
        adapters.speaking(name) as trained,
        torch.no_grad(),
        autocast(trained.device, trained.dtype),
    ):
        return answer(trained, ask)


def _answers(
    prompts: Sequence[str],
    replies: dict[str, list[Reply]],
    base: list[Reply] | None,
    dtypes: dict[str, str],
) -> Iterator[Answer]:
    for index, prompt in enumerate(prompts):
        for name, said in replies.items():
            reply = said[index]
            beside = base[index].text if base else None
            yield Answer(prompt, reply.text, beside, reply.scores, reply.tags, name, dtypes[name])


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
