"""Preference training: a text model learns from answer pairs or from labeled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.preference import LOSSES, SMOOTHING, PreferenceConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded, PromptFormat, choose_format
from ftlevel.data.formats.detect import Format, fits
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError
from ftlevel.task import Objective
from ftlevel.tasks.base import BaseTask, TokenDecoder
from ftlevel.tasks.preferences.formats import JUDGED_SHAPES, PAIR_SHAPES
from ftlevel.tasks.preferences.objective import build_preferences
from ftlevel.tasks.preferences.rows import (
    ContrastedRows,
    LabeledAnswerRow,
    PairRow,
    PreferenceEncoder,
    ReferencedRows,
    build_pair_row,
    check_answers,
    check_pairs,
)
from ftlevel.tasks.text import TASKS as TEXT_TASKS
from ftlevel.tasks.text import TextTask

if TYPE_CHECKING:
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.gate.checks import Mask
    from ftlevel.data.prepare.encoder import Encoder, EncodingContext, PreparedData
    from ftlevel.data.prepare.loading import LoadedExamples
    from ftlevel.models.sources import ModelSource


_HIDDEN = ("loss", "reference")
"""Options that the log line of the loss omits."""


@dataclass(frozen=True)
class AnswerTask(BaseTask):
    """Base class of the preference and reward tasks; `scored` ones give each answer a scalar."""

    settings: PreferenceConfig = field(default_factory=PreferenceConfig)
    smoothing: float = 0.0

    scored: ClassVar[bool] = False

    def configured(self, options: Mapping[str, Any]) -> AnswerTask:
        """Returns the task with the loss of a configuration or model card."""
        values = dict(options.get("preference", {}))
        smoothing = values.pop("smoothing", 0.0)
        settings = PreferenceConfig(**values)
        if settings.facts.smoothed and not smoothing:
            smoothing = SMOOTHING
        return replace(self, settings=settings, smoothing=smoothing)

    @property
    def encoding_options(self) -> Mapping[str, Any]:
        """Options outside the data section that change the encoded rows."""
        return {"loss": self.settings.loss, "referenced": self.settings.is_referenced}

    def find_format(
        self, columns: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Find the format of `columns`; suggest `--loss kto` for single labeled answers."""
        loss, is_mapped = self.settings.loss, config.columns or config.format
        if self.settings.facts.paired and not is_mapped and not fits(columns, PAIR_SHAPES):
            if fits(columns, JUDGED_SHAPES):
                raise InputError(
                    f"--loss {loss} needs pairs of answers, and these rows have one rated answer "
                    f"each. Use --loss kto."
                )
            half = {"chosen", "rejected"} & {column.lower() for column in columns}
            if len(half) == 1:
                present, missing = half.copy().pop(), ({"chosen", "rejected"} - half).pop()
                raise InputError(
                    f"there is a column {present!r}, and no {missing!r}: --task {self.name} "
                    f"needs pairs of answers. Use --map {missing}=COLUMN."
                )
        task = (
            self
            if self.settings.facts.paired
            else replace(self, shapes=(*JUDGED_SHAPES, *PAIR_SHAPES))
        )
        return BaseTask.find_format(task, columns, config, rows)

    def read_columns(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Load the format unchanged."""
        return format_, []

    def prompt_format(self, format_: Format, kind: str, tokenizer: Any) -> PromptFormat | None:
        """Returns the prompt format for models of `kind`."""
        return choose_format(tokenizer, kind, self.instruction, self.answer_cue)

    def encode_as(
        self, encoder: Encoder, examples: Sequence[Any], table: Table, *, scored: bool
    ) -> FittedRows:
        """Encode encoded pairs or labeled answers."""
        if encoder.prompt_format is None:
            raise TypeError("judged answers have a prompt format")
        settings, seq2seq = self.settings, encoder.kind == "encoder-decoder"
        encode = PreferenceEncoder(
            encoder.tokenizer,
            encoder.prompt_format,
            encoder.kind,
            settings.loss == "kto",
            scored,
            settings.is_referenced,
        )
        fitted = encoder.fit(encoder.collect(encode, examples), table)
        return encoder.fit_targets(fitted, table) if seq2seq else fitted

    def check_rows(self, rows: Sequence[Encoded]) -> Mapping[str, Mask]:
        """Returns pairs with equal answers, and pairs that contradict a previous one."""
        return check_pairs(rows)

    def check_examples(self, examples: Sequence[Any]) -> Sequence[tuple[str, int, str]]:
        """Returns findings about the labels of the whole set."""
        return check_answers(examples, self.settings.loss or "dpo")

    def facts(self, loaded: LoadedExamples) -> Mapping[str, Any]:
        """Returns the loss and its hyperparameters."""
        return {"preference": self.options}

    def describe_rows(self, loaded: LoadedExamples, facts: Mapping[str, Any]) -> list[Choice]:
        """Returns the number of targets, and the loss."""
        values = {name: value for name, value in self.options.items() if name not in _HIDDEN}
        if "beta" in values:
            values["beta"] = self.settings.effective_beta
        if "simpo_gamma" in values:
            values["simpo_gamma"] = self.settings.margin
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:g}"
            if isinstance(value, float | int)
            else f"{name.replace('_', ' ')} {value}"
            for name, value in values.items()
        )
        return [Choice("loss", self.settings.loss, shown), *super().describe_rows(loaded, facts)]

    @property
    def options(self) -> dict[str, Any]:
        """Loss and its hyperparameters, as in a model card."""
        read = ("loss", *LOSSES[self.settings.loss or "dpo"].reads)
        values = {name: getattr(self.settings, name) for name in read}
        return values | ({"smoothing": self.smoothing} if self.settings.facts.smoothed else {})

    def card_options(self, config: DataConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the loss and its hyperparameters."""
        return {"preference": facts["preference"]}

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic row: three quarters of `ids` as prompt, the rest as answers."""
        prompt, reference = len(ids) - max(1, len(ids) // 4), () if self.scored else (0.0, 0.0)
        labels, answer = ([IGNORED] * prompt + ids[prompt:]), ids[: len(ids) - prompt]
        if not self.settings.facts.paired:
            return LabeledAnswerRow(ids, labels, row, {}, prompt, row % 2, reference)
        one = Encoded(ids, labels, row)
        two = Encoded(ids[:prompt] + answer, labels[:prompt] + answer, row)
        pair = build_pair_row(one, two, prompt, 0.0, scored=self.scored)
        return replace(pair, reference=reference)

    def show_label(self, row: Encoded, names: Sequence[str]) -> str:
        """Returns the token ranges of prompt and answers, or the label."""
        if isinstance(row, PairRow):
            first = row.prompt + row.chosen
            return (
                f"prompt: tokens 1-{row.prompt}, preferred: {row.prompt + 1}-{first}, "
                f"rejected: {first + 1}-{len(row.input_ids)}"
            )
        return (
            ("desirable" if row.desirable else "undesirable")
            if isinstance(row, LabeledAnswerRow)
            else ""
        )


@dataclass(frozen=True)
class PreferenceTask(AnswerTask, TextTask):
    """Task of a policy model, which generates text."""

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        """Returns the defaults without a model card: the prompt format, DPO without a reference."""
        alone = {"preference": {"loss": "dpo", "reference": "none"}}
        return {**super().card_defaults(source, model_config, tokenizer, kind), "options": alone}

    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Build the objective of the loss in `facts`."""
        task = self.configured(facts) if "preference" in facts else self
        return build_preferences(task.settings, task.smoothing, kind)

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode prompts with two answers, or with one labeled answer."""
        return self.encode_as(encoder, examples, table, scored=False)

    def finish_data(
        self, prepared: PreparedData, config: DataConfig, context: EncodingContext
    ) -> PreparedData:
        """Returns `prepared` with contrast answers, if the loss is kto."""
        if self.settings.loss != "kto":
            return prepared
        max_length, held_out = prepared.max_length, prepared.validation
        return replace(
            prepared,
            train=ContrastedRows(prepared.train, max_length),
            validation=ContrastedRows(held_out, max_length) if len(held_out) else held_out,
        )

    def evaluation_rows(
        self, rows: Sequence[Encoded], config: DataConfig, context: EncodingContext
    ) -> Sequence[Encoded]:
        """Returns rows with contrast answers, if the loss is kto."""
        if self.settings.loss != "kto":
            return rows
        return ContrastedRows(rows, max(row.length for row in rows))

    def with_reference(self, rows: Sequence[Encoded], reference: Any) -> Sequence[Encoded]:
        """Returns `rows` with reference log-probabilities `(rows, 2)`; None for no reference."""
        return ReferencedRows(rows, reference)

    def show_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns the target at each token; the first token of each answer shows its label."""
        targets = super().show_targets(row, names, kind, decoder)
        if not isinstance(row, PairRow) or row.is_apart:
            return targets
        for start, name in ((row.prompt, "preferred"), (row.prompt + row.chosen, "rejected")):
            first = next((at for at in range(start, len(targets)) if targets[at] is not None), None)
            if first is not None:
                targets[first] = name
        return targets


_TEXT = next(task for task in TEXT_TASKS if task.name == "text-generation")
_SHARED = {f.name: getattr(_TEXT, f.name) for f in fields(TextTask)}

TASKS = (
    PreferenceTask(
        **_SHARED | {"name": "preference", "shapes": PAIR_SHAPES, "headline": "reward_accuracy"}
    ),
)
