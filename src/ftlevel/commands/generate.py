"""`generate`: outputs of one or several adapters and of the base, for prompts or in a chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ftlevel.artifacts.row_sinks import to_cell
from ftlevel.config import GenerateConfig, build_section
from ftlevel.data.encoding.chat import Turn
from ftlevel.data.encoding.prompts import encode_chat_prompt, encode_prompt
from ftlevel.data.formats.detect import Format, NoFormatError
from ftlevel.data.prepare.inference import Prompts, open_rows
from ftlevel.data.sources.lines import cache_pipe, decompress, is_compressed, is_pipe, plain_name
from ftlevel.data.sources.readers import READERS, ReadOptions, is_pattern, match_files
from ftlevel.data.sources.readers.text import TextLines, detect_file_format
from ftlevel.data.sources.streams import refuse_media_columns, wrap_read_errors
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.answers import MAX_SHOWN, AnswerRequest, predict_inputs
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import silence_loggers
from ftlevel.tasks.base import BaseTask, Prediction
from ftlevel.trained.adapter_set import BASE, AdapterSet, load_adapter_set
from ftlevel.trained.generation import GenerationOptions, batches, cut_at_stop
from ftlevel.trained.model_ref import LoadedModel


@dataclass(frozen=True)
class GeneratedText:
    """Output for one prompt; `base` is the base model's output, `tags` are (word, tag) pairs."""

    prompt: str
    text: str
    base: str | None
    scores: dict[str, float]
    tags: list[tuple[str, str | None]]
    adapter: str
    dtype: str


def generate(
    name: str | None, prompts: Sequence[str], **settings: Any
) -> tuple[list[GeneratedText], list[str]]:
    """Generate outputs of the run, adapter or model `name` for `prompts`.

    Args:
        name: run directory, adapter directory or model; None with `adapters` or `adapters_dir`.
        prompts: a text, a list or a data frame column; the run's prompt format is applied to each.
        settings: fields of `GenerateConfig`.

    Returns:
        A `GeneratedText` per prompt and adapter, in order, and notes for the user.

    Raises:
        InputError: a model or a file cannot be loaded.
        ConfigError: `compare_base` without an adapter, a question without context, or a prompt
            without [MASK].
    """
    is_one = isinstance(prompts, str) or hasattr(prompts, "columns")
    texts: list[Any] = [prompts] if is_one else list(prompts)
    for prompt in texts:
        if not isinstance(prompt, str):
            raise ConfigError(
                f"a prompt is of type {type(prompt).__name__}. Pass texts: a list, or one column "
                "of a DataFrame."
            )
    return generate_answers(build_section(GenerateConfig, {"name": name, **settings}), texts)


def generate_answers(
    config: GenerateConfig, prompts: Sequence[str], file: Path | None = None
) -> tuple[list[GeneratedText], list[str]]:
    """Generate outputs for `prompts`, then for the lines or rows of `file`; see `generate`."""
    if config.against is not None:
        return _generate_both(config, config.against, prompts, file)
    with silence_loggers():
        if file is not None and not _has_rows(file):
            files = match_files(str(file), "txt") if is_pattern(str(file)) else [file]
            if not (lines := [line for each in files for line in _load_lines(each)]):
                raise InputError(f"--prompts {file} has no line with text. Use a file of prompts.")
            prompts, file = [*prompts, *lines], None
        adapters = load_adapter_set(config)
        if config.compare_base and not adapters.has_base:
            raise ConfigError(
                f"--compare-base: {config.name} has no adapter that could be disabled. "
                "Use the base model itself: ftlevel generate MODEL --prompt …"
            )
        request = AnswerRequest(
            prompts, config.context, build_generation_options(config), config.batch_size
        )
        if file is not None:
            first = next(iter(adapters.models.values()))
            request, texts = _add_rows(request, file, first.task, config)
            prompts = [*prompts, *texts]
        by_adapter = {
            name: generate_predictions(adapters, name, request) for name in adapters.models
        }
        base = generate_predictions(adapters, BASE, request) if config.compare_base else None
    outputs = [
        GeneratedText(
            prompt,
            reply.text,
            base[index].text if base else None,
            reply.scores,
            reply.tags,
            name,
            adapters.models[name].dtype,
        )
        for index, prompt in enumerate(prompts)
        for name, predictions in by_adapter.items()
        for reply in (predictions[index],)
    ]
    return outputs, adapters.notes


def _generate_both(
    config: GenerateConfig, against: str, prompts: Sequence[str], file: Path | None
) -> tuple[list[GeneratedText], list[str]]:
    """Generate outputs of the model `config.name` and of `against`, alternating for each prompt."""
    first = config.model_copy(update={"against": None})
    nothing: dict[str, Any] = {"adapters": {}, "adapters_dir": None, "chosen": []}
    second = first.model_copy(
        update={**nothing, "name": against, "base_model": None, "compare_base": False}
    )
    outputs, notes = list[list[GeneratedText]](), list[str]()
    for side in (first, second):
        answers, more = generate_answers(side, prompts, file)
        if side.name and len({answer.adapter for answer in answers}) == 1:
            answers = [replace(answer, adapter=side.name) for answer in answers]
        outputs.append(answers)
        notes += more
    size = len(outputs[0]) // max(1, len(outputs[1]))  # several adapters may answer each prompt
    pairs = zip(batches(outputs[0], size), outputs[1], strict=True)
    return [answer for own, other in pairs for answer in (*own, other)], notes


def _has_rows(path: Path) -> bool:
    suffix = Path(plain_name(path.name)).suffix.lower()
    if suffix not in READERS and is_pipe(path):
        suffix = (detect_file_format(cache_pipe(path), ()) or (".txt", ""))[0]
        return suffix in (".jsonl", ".json")
    return suffix in READERS and suffix != ".txt"


def _load_lines(path: Path) -> list[str]:
    shown = f"--prompts {path}"
    with wrap_read_errors(path, shown):
        file = decompress(path) if is_compressed(path) else path
        file = cache_pipe(path) if is_pipe(path) else file
    with wrap_read_errors(file, shown):
        return [line.rstrip("\r\n") for line in TextLines(file) if line.strip()]


def _add_rows(
    request: AnswerRequest, path: Path, task: BaseTask, config: GenerateConfig
) -> tuple[AnswerRequest, list[str]]:
    """Returns `request` with the rows of the file, and the text to print as prompt of each row."""
    source, _ = open_rows(str(path), ReadOptions(ignored=config.ignore_columns))
    try:
        shape = task.get_query_format(source.leading, config.columns, rows=source.first)
    except NoFormatError:
        if "prompt" not in source.leading:
            raise
        shape = Format(
            task.name, "prompt", lambda roles: roles.text("prompt"), {"prompt": "prompt"}
        )
    refuse_media_columns(shape.unused, source.first, str(path))
    rows = list(Prompts(source, shape))
    if faults := [f"{row.location}: {row.fault}. Fix the row." for row in rows if row.fault]:
        raise InputError(faults[:MAX_SHOWN])
    name = next(
        (name for name in _PROMPT_COLUMNS if name in shape.columns), next(iter(shape.columns))
    )
    texts = [to_cell(row.row.get(shape.columns[name])) for row in rows]
    if shape.name == "prompt" and isinstance(rows[0].question, str):
        return replace(request, prompts=[*request.prompts, *texts]), texts
    return replace(
        request, questions=[row.question for row in rows], locations=[row.location for row in rows]
    ), texts


_PROMPT_COLUMNS = ("question", "prompt", "instruction", "messages", "conversations")
"""Columns printed as the prompt; the first one present is used."""


def build_generation_options(config: GenerateConfig) -> GenerationOptions:
    """Returns the decoding settings in `config` as options for generation."""
    return GenerationOptions(
        config.max_new_tokens, config.num_beams, config.temperature, config.top_p, config.seed
    )


def generate_predictions(
    adapters: AdapterSet, name: str, request: AnswerRequest
) -> list[Prediction]:
    """Returns an output for each prompt of `request` by the adapter `name`, or by the base."""
    with adapters.active_adapter(name) as trained, trained.inference():
        return predict_inputs(trained, request)


class Chat:
    """Conversation with the adapter `active_adapter`.

    Prompts include earlier messages if the model has a chat template and no fixed instruction.
    `num_dropped` counts earlier messages dropped because the prompt would be too long.
    """

    def __init__(self, config: GenerateConfig) -> None:
        with silence_loggers():
            self.adapters: AdapterSet = load_adapter_set(config)
        self.generation = build_generation_options(config)
        self.active_adapter = next(iter(self.adapters.models))
        self.messages: list[Turn] = []
        self.num_dropped = 0
        for trained in self.adapters.models.values():
            if not trained.task.generates_text:
                raise ConfigError(
                    f"--chat is for models that write text, and this one does {trained.task.name}. "
                    "Use --prompt."
                )

    def switch(self, name: str) -> None:
        """Make the adapter `name`, or the base, reply; raises ConfigError for unknown names."""
        with self.adapters.active_adapter(name):
            self.active_adapter = name

    def reset(self) -> None:
        """Clear the history."""
        self.messages, self.num_dropped = [], 0

    @property
    def uses_history(self) -> bool:
        """Whether prompts include earlier messages."""
        with self.adapters.active_adapter(self.active_adapter) as trained:
            return _uses_history(trained)

    def reply(self, text: str, on_text: Callable[[str], None]) -> str:
        """Returns the reply to `text`; `on_text` is called with each piece as it is generated."""
        self.messages.append({"role": "user", "content": text})
        try:
            reply = self._answer(text, on_text)
        except BaseException:  # an interrupted reply leaves no message behind
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def _answer(self, text: str, on_text: Callable[[str], None]) -> str:
        with (
            silence_loggers(),
            self.adapters.active_adapter(self.active_adapter) as trained,
            trained.inference(),
        ):
            options = replace(self.generation, stop_texts=trained.task.stop_texts)
            ids = torch.tensor([self._prompt(trained, text)], device=trained.device)
            output_ids = trained.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=_CallbackStreamer(trained, on_text),
                **options.arguments(trained.model, trained.tokenizer),
            )[0]
        ids = output_ids if trained.kind == "encoder-decoder" else output_ids[ids.shape[1] :]
        reply = str(trained.tokenizer.decode(ids, skip_special_tokens=True))
        return cut_at_stop(reply, options.stop_texts).strip()

    def _prompt(self, trained: LoadedModel, text: str) -> list[int]:
        """Returns the token ids of the prompt, without the oldest messages if those do not fit."""
        if trained.ref.prompt_format is None:
            raise TypeError("a model that writes text has a prompt format")
        if not _uses_history(trained):
            return encode_prompt(trained.tokenizer, trained.ref.prompt_format, text)
        positions = max_positions(trained.model.config)
        limit = None if positions is None else positions - self.generation.max_new_tokens
        while True:
            turns = trained.ref.prompt_format.with_system(self.messages)
            ids = encode_chat_prompt(trained.tokenizer, turns)
            if limit is None or len(ids) <= limit or len(self.messages) == 1:
                return ids
            self.messages = self.messages[2:]  # a question and the answer
            self.num_dropped += 2


def _uses_history(trained: LoadedModel) -> bool:
    prompt_format = trained.ref.prompt_format
    return (
        prompt_format is not None
        and prompt_format.kind == "chat-template"
        and not prompt_format.instruction
    )


class _CallbackStreamer(TextStreamer):
    def __init__(self, trained: LoadedModel, on_text: Callable[[str], None]) -> None:
        is_decoder = trained.kind == "decoder"
        super().__init__(trained.tokenizer, skip_prompt=is_decoder, skip_special_tokens=True)
        self._on_text, self._stop_texts = on_text, trained.task.stop_texts
        self._started, self._pending = False, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass the text up to a stop text to `on_text`, without whitespace at its start.

        Last characters that may begin a stop text are held back until more text follows.
        """
        text = self._pending + text
        shown = cut_at_stop(text, self._stop_texts)
        if shown == text and not stream_end:
            ends = [stop[:size] for stop in self._stop_texts for size in range(1, len(stop))]
            size = max((len(end) for end in ends if text.endswith(end)), default=0)
            shown = text[: len(text) - size]
        self._pending = text[len(shown) :]
        shown = shown if self._started else shown.lstrip()
        if shown:
            self._started = True
            self._on_text(shown)
