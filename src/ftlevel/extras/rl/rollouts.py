"""Sample groups of completions of prompts, and score them with rewards or a teacher."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.turns import Message, parse_turns
from ftlevel.errors import InputError
from ftlevel.evaluation.answers import InferenceModel, predict_rows
from ftlevel.evaluation.decoding import (
    get_attention_limitation,
    get_cache_limitation,
    get_decoder_error,
    max_error,
)
from ftlevel.evaluation.intervals import ExampleRecord, select_metrics
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.extras.rl.config import RlConfig, unknown_reward
from ftlevel.extras.rl.losses import combine_rewards
from ftlevel.extras.rl.objective import PolicyGradient
from ftlevel.extras.rl.paged_sampling import (
    PagedSampler,
    count_rows_in_memory,
    get_paged_error,
    sample_in_memory,
    select_paged_attention,
)
from ftlevel.extras.rl.rewards import Prompt, Rewards
from ftlevel.extras.rl.rows import UNKNOWN, CompletionRow, TokenLogps, create_completion_row
from ftlevel.extras.rl.sampling import (
    Completion,
    GenerateSampler,
    GroupSampler,
    Noise,
    SamplingOptions,
)
from ftlevel.extras.rl.server import ServerSampler
from ftlevel.extras.rl.trust import allow_reward_files
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.likelihoods import base_model, compute_token_likelihoods
from ftlevel.fast.packing import using_layout
from ftlevel.models.hardware import autocast, evaluating, free_memory_bytes
from ftlevel.tasks.base import OutputOptions
from ftlevel.trained.generation import GenerationOptions, cut_at_stop, stop_ids
from ftlevel.trained.model_ref import PLAIN, LoadedModel, ModelRef
from ftlevel.trained.resolve import compute_fingerprint, resolve_model, resolve_reference

EVAL_STEP = 1 << 40
"""`step` that seeds sampling in evaluations, the same before and after training."""

BEFORE = EVAL_STEP - 1
"""`step` that seeds sampling in the check before training."""

State = Mapping[str, Any]  # fields of `trainer_state`, for reward functions
_START: State = vars(TrainerState(max_steps=1))  # in checks and evaluations; a share of steps is 0


@dataclass
class Group:
    """The completions of one prompt.

    `scores` is `(completions, functions)`, NaN where a reward does not apply; `rewards` is
    `(completions,)`. With a teacher, `teacher_logps` are its log-probabilities of the tokens, and
    the reward is the mean log-ratio per token, an estimate of minus the reverse KL. `extra` and
    `metrics` were logged by reward functions; the first group has the metrics of all.
    """

    row: Any
    completions: list[Completion]
    texts: list[str]
    scores: np.ndarray
    rewards: np.ndarray
    teacher_logps: list[list[float]] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def to_rows(self) -> list[CompletionRow]:
        """Returns a row per completion, for training, with log-probabilities of the sampler."""
        return [
            create_completion_row(
                self.row.input_ids,
                completion.ids,
                self.row.row,
                number,
                [(0.0, 0.0, UNKNOWN, UNKNOWN, logp) for logp in completion.logps],
            )
            for number, completion in enumerate(self.completions)
        ]

    def compare(self, teacher_logps: list[list[float]]) -> None:
        """Set `teacher_logps`; set each reward to the mean log-ratio of teacher and sampler."""
        self.teacher_logps = teacher_logps
        pairs = zip(teacher_logps, self.completions, strict=True)
        self.rewards = np.array([np.mean(np.subtract(logps, own.logps)) for logps, own in pairs])

    def to_json(self) -> dict[str, Any]:
        """Returns the group as a line of rollouts.jsonl."""
        return {
            "row": self.row.row,
            "prompt": self.row.prompt,
            "completions": [
                {
                    **{name: values[at] for name, values in self.extra.items() if at < len(values)},
                    "text": text,
                    "tokens": len(completion.ids),
                    "ended": completion.ended,
                    "reward": None if np.isnan(reward) else float(reward),
                    "scores": [None if np.isnan(score) else float(score) for score in scores],
                }
                for at, (text, completion, reward, scores) in enumerate(
                    zip(self.texts, self.completions, self.rewards, self.scores, strict=True)
                )
            ],
        }


Sampler = GroupSampler | GenerateSampler | PagedSampler

LOGP_TOLERANCE = {"float32": 1e-3}
"""Mean difference of log-probabilities by dtype, in nats, that rounding explains."""
_COARSE = 0.15


def select_sampler(
    model: Any,
    tokenizer: Any,
    kind: str,
    method: str,
    dtype: str,
    prompt: Sequence[int],
    paged_attention: str | None,
) -> tuple[Callable[[], Sampler], Choice | None]:
    """Returns a function that opens a sampler of `model`, and the choice if it is not the decoder.

    `paged_attention` is the attention of continuous batching, "" if this GPU has none, and None for
    ftlevel's decoder. If the sampler is wrong on `prompt`, `generate` is used. Call this in eval
    mode under `torch.no_grad`.
    """
    if paged_attention is None:
        decode = partial(GroupSampler, model, tokenizer)
        reason = get_cache_limitation(model, kind, method)
        if not reason:
            with contextlib.closing(decode()) as decoder:
                reason = get_decoder_error(decoder, model, prompt, max_error(dtype), forks=True)
        if not reason:
            return decode, None
        reason = f"the decoder cannot serve this model: {reason}"
    elif paged_attention:
        paged = partial(PagedSampler, model, tokenizer, paged_attention, dtype)
        tolerance = LOGP_TOLERANCE.get(dtype, _COARSE)
        reason = get_attention_limitation(model, kind, method) or get_paged_error(
            paged, model, prompt, tolerance
        )
        if not reason:
            return paged, Choice("sampler", "continuous batching", "auto: flash attention")
        reason = f"continuous batching cannot serve this model: {reason}"
    else:
        reason = "continuous batching needs flash attention (16 bits, an Ampere GPU or later)"
    return partial(GenerateSampler, model, tokenizer), Choice(
        "sampler", "transformers' generate", reason
    )


class Rollouts:
    """Samples completions from `model` (its attention is replaced meanwhile) and scores them.

    Scores come from `rewards`, token log-probabilities from a `teacher`. `sampler` is the chosen
    sampler and the reason; None before the first completion, and with ftlevel's own decoder.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: RlConfig,
        rewards: Any,
        seed: int,
        *,
        kind: str,
        method: str,
        device: str,
        dtype: str,
        get_position: Callable[[int], str],
        teacher: TokenLogps | None = None,
        server: ServerSampler | None = None,
    ) -> None:
        self._teacher, self._server = teacher, server
        self._model, self._tokenizer = model, tokenizer
        self.settings, self.rewards = config, rewards
        self._seed, self._get_position = seed, get_position
        self._kind, self._method, self._device, self._dtype = kind, method, device, dtype
        self._open: Callable[[], Sampler] | None = None
        self.sampler: Choice | None = None
        self.warn: Callable[[str], None] = warnings.warn
        self._most_rows = sys.maxsize  # what fitted after running out of memory
        self._options = SamplingOptions(
            config.num_generations,
            config.temperature,
            config.max_completion_length,
            tuple(stop_ids(model, tokenizer)),
            config.stop,
        )

    def for_rows(self, get_position: Callable[[int], str]) -> Rollouts:
        """Returns a copy with the same model for other rows, located by `get_position`."""
        rollouts = copy.copy(self)
        rollouts._get_position = get_position
        return rollouts

    def with_model(self, model: LoadedModel) -> Rollouts:
        """Returns a copy that samples from `model`, with the same rewards and random numbers."""
        rollouts = copy.copy(self)
        rollouts._model, rollouts._open, rollouts.sampler = model.model, None, None
        rollouts._method, rollouts._dtype = model.ref.card.method, model.dtype
        return rollouts

    def __call__(self, step: int, rows: Sequence[Any], state: State = _START) -> list[Group]:
        """Returns a `Group` per prompt row; `step` seeds sampling, rewards receive `state`."""
        groups = self._score(rows, self._sample(step, rows), state)
        if self._teacher is not None:
            completions = [group.to_rows() for group in groups]
            logps = iter(self._teacher([row for rows in completions for row in rows]))
            for group in groups:
                group.compare([next(logps) for _ in group.completions])
        return groups

    def _sample(self, step: int, rows: Sequence[Any]) -> list[list[Completion]]:
        if not rows:
            return []
        prompts, noise = [row.input_ids for row in rows], Noise(self._seed, step)
        numbers = [row.row for row in rows]
        if self._server is not None:
            return self._server.sample(prompts, numbers, self._options, noise)
        with evaluating(self._model, self._device, self._dtype):
            if self._open is None:
                self._open, self.sampler = select_sampler(
                    self._model,
                    self._tokenizer,
                    self._kind,
                    self._method,
                    self._dtype,
                    max(prompts, key=len),
                    self._get_paged_attention(),
                )
            with contextlib.closing(self._open()) as sampler:
                return self._sample_in_memory(sampler, prompts, numbers, noise)

    def _get_paged_attention(self) -> str | None:
        if self._device != "cuda":
            return None
        return select_paged_attention(self._model, self._dtype)

    def _sample_in_memory(
        self, sampler: Sampler, prompts: Sequence[list[int]], rows: Sequence[int], noise: Noise
    ) -> list[list[Completion]]:
        options = self._options
        if self._device == "cuda":
            config, memory = base_model(self._model).config, free_memory_bytes("cuda")
            tokens = max(map(len, prompts)) + options.max_new_tokens
            count = count_rows_in_memory(config, self._dtype, tokens, memory)
            count = min(count, len(prompts) * options.count, self._most_rows)
            options = replace(options, most_rows=count)
        groups, count = sample_in_memory(sampler, prompts, rows, options, noise, self.warn)
        if count < options.most_rows:
            self._most_rows = count
        return groups

    def _score(
        self, rows: Sequence[Any], sampled: Sequence[Sequence[Completion]], state: State
    ) -> list[Group]:
        flat = [completion for group in sampled for completion in group]
        row_of_completion = [row for row, group in zip(rows, sampled, strict=True) for _ in group]
        texts = [self.text(completion) for completion in flat]
        row_columns = [row.columns for row in row_of_completion]
        names = list(dict.fromkeys(name for own in row_columns for name in own))
        scores: Any = []
        logged: dict[str, dict[str, Any]] = {"metrics": {}, "extra": {}}
        if flat and self.rewards is not None:
            scores = self.rewards.score(
                [row.prompt for row in row_of_completion],
                texts,
                [completion.ids for completion in flat],
                {name: [own.get(name) for own in row_columns] for name in names},
                where=[self._get_position(row.row) for row in row_of_completion],
                state=state,
            )
            logged = self.rewards.logged
        weights = self.rewards.weights if self.rewards is not None else []
        values = np.array(scores, np.float64).reshape(len(flat), len(weights))  # None: NaN
        totals = combine_rewards(
            torch.from_numpy(values), torch.tensor(weights, dtype=torch.float64)
        ).numpy()
        groups, begin = list[Group](), 0
        for row, own in zip(rows, sampled, strict=True):
            part = slice(begin, begin + len(own))
            extra = {name: column[part] for name, column in logged["extra"].items()}
            metrics = {} if groups else logged["metrics"]
            groups.append(
                Group(row, list(own), texts[part], values[part], totals[part], None, extra, metrics)
            )
            begin = part.stop
        return groups

    def text(self, completion: Completion) -> str:
        """Returns the text of a completion, up to its stop text."""
        text = str(self._tokenizer.decode(completion.ids, skip_special_tokens=True))
        return cut_at_stop(text, self.settings.stop)


def compute_token_logps(
    model: Any,
    objective: PolicyGradient,
    batches: Iterable[tuple[Sequence[int], Mapping[str, Any]]],
    head: ChunkedCrossEntropy | None = None,
) -> dict[int, list[float]]:
    """Returns row index → log-probabilities of the completion's tokens, without gradients.

    Each of `batches` is a list of row indices, and these rows collated on the model's device.
    `head` computes the language head in chunks; without it, all logits are stored.
    """
    logps: dict[int, list[float]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for indices, batch in batches:
                inputs = {name: value for name, value in batch.items() if name != "layout"}
                is_packed_here = "layout" in batch  # else the caller may have set a layout
                with using_layout(batch["layout"]) if is_packed_here else contextlib.nullcontext():
                    each, owners = compute_token_likelihoods(
                        head, model, objective, inputs, objective.temperature
                    )
                lengths = owners.bincount(minlength=len(indices)).tolist()
                chunks = torch.split(each, lengths)
                logps |= {i: part.tolist() for i, part in zip(indices, chunks, strict=True)}
    finally:
        model.train(was_training)
    return logps


def score_rows(
    model: Any,
    objective: PolicyGradient,
    rows: Sequence[CompletionRow],
    pad_id: int,
    device: str,
    dtype: str,
) -> list[list[float]]:
    """Returns the token log-probabilities of each completion, with one row per forward pass."""
    collate = Collator(pad_id)
    batches = (
        ([at], {name: value.to(device) for name, value in collate([row]).items()})
        for at, row in enumerate(rows)
    )
    with autocast(device, dtype):
        logps = compute_token_logps(model, objective, batches)
    return [logps[at] for at in range(len(rows))]


_TAIL = 8  # tokens


def open_rewards(
    config: RlConfig,
    device: str,
    tokenizer: Any,
    rows: Sequence[Any],
    get_position: Callable[[int], str],
) -> Rewards:
    """Create the rewards of `config` for the prompts `rows`; loads no weights.

    The caller has checked the files of reward functions (`trust`), which are imported here.
    `get_position` returns file and line of a table row. Raises ConfigError if a reward does not
    exist, or the rows lack a column or a reference answer for it.
    """
    allow_reward_files(config.rewards)
    end = str(tokenizer.decode(rows[0].input_ids[-_TAIL:])).rstrip()
    rewards = Rewards(
        config, partial(open_reward_model, device=device), opens_think=end.endswith("<think>")
    )
    rewards.check_columns(rows[0].columns)
    rewards.check_rows([row.columns for row in rows], lambda at: get_position(rows[at].row))
    return rewards


def open_teacher(
    name: str, objective: PolicyGradient, kind: str, tokenizer: Any, device: str, dtype: str
) -> TokenLogps:
    """Returns a function from completions to their log-probabilities by the teacher `name`.

    Loads the weights. Raises InputError if the teacher does not exist, or its tokenizer is not
    `tokenizer`.
    """
    reference = resolve_reference("--teacher", name, kind, tokenizer, device)
    model = reference.ref.load(device, dtype).model
    return partial(
        score_rows, model, objective, pad_id=tokenizer.pad_token_id, device=device, dtype=dtype
    )


@dataclass(frozen=True)
class RewardEvaluator(Evaluator):
    """Evaluator that samples completions for the first `generated_rows` prompts with `rollouts`."""

    rollouts: Rollouts | None = None

    def with_model(self, model: LoadedModel) -> RewardEvaluator:
        """Returns a copy that samples from `model`."""
        if self.rollouts is None:
            raise TypeError("rewards need rollouts")
        return replace(self, dtype=model.dtype, rollouts=self.rollouts.with_model(model))

    def for_other(self, model: LoadedModel, encode: Callable[[], Any]) -> RewardEvaluator:
        """Returns a copy that samples from `model`, as for the evaluated model."""
        return self.with_model(model)

    def get_warnings(self) -> Sequence[str]:
        """Returns which rewards failed."""
        rewards = self.rollouts.rewards if self.rollouts is not None else None
        return list(rewards.describe_failures()) if rewards is not None else []

    def __call__(self, model: Any, record: ExampleRecord | None = None) -> dict[str, float]:
        """Returns the metrics of the model in `rollouts`; `model` is not used."""
        record = record or self.begin_record()
        if self.rollouts is None:
            raise TypeError("rewards need rollouts")
        meter, sample = self.objective.meter(), partial(self.rollouts, EVAL_STEP)
        for group in self.divide(sample, self.rows[: self.generated_rows]):
            values: Any = values_of(group)
            meter.update(values, group.texts, [group.row])
            if record is not None:
                record.add_samples(group.row, values, group.texts)
                first = group.to_rows()[0]
                record.sampled.append(Encoded(first.input_ids, first.labels, first.row))
        return select_metrics(meter.compute(float("nan")), self.metrics)


def values_of(group: Group) -> np.ndarray:
    """Returns (completions, 3 + functions): reward, length, 1 if it ended, score per function."""
    lengths = [len(completion.ids) for completion in group.completions]
    ended = [completion.ended for completion in group.completions]
    return np.column_stack([group.rewards, lengths, ended, group.scores])


REWARD_TASK = "reward"


@dataclass
class TrainedRewardModel:
    """A run, adapter or model that scores answers; weights are loaded by the first `score`."""

    ref: ModelRef
    device: str
    fingerprint: str
    _loaded: LoadedModel | None = field(default=None, repr=False)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Returns the score of each completion; NaN for one that the model cannot score."""
        from ftlevel.extras.preference.formats import LabeledCompletion  # has reward models

        if self._loaded is None:
            self._loaded = self.ref.load(self.device)
        questions = [
            LabeledCompletion(_turns(prompt), (Message("assistant", text),), True, row)
            for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        model = InferenceModel(self._loaded, GenerationOptions(0), None, truncate=True)
        with model.inference():
            replies, _ = predict_rows(model, questions, OutputOptions())
        return [math.nan if reply is None else float(reply.columns[""]) for reply in replies]


def open_reward_model(name: str, device: str) -> TrainedRewardModel:
    """Resolve a reward model; InputError if it does not exist, or is for a different task."""
    label = f"--reward {name}"
    try:
        ref = resolve_model(name, device=device, label=label)
    except InputError as error:
        if "/" in name or not re.search("no such directory|does not exist", str(error)):
            raise
        raise InputError(unknown_reward(name)) from None
    if ref.card.method == PLAIN and ref.card.task == "text-classification":
        ref = resolve_model(name, REWARD_TASK, device=device, label=label)
    if ref.card.task != REWARD_TASK:
        raise InputError(
            f"{label} was trained for {ref.card.task}, and a reward model has one score. Name a "
            "run of --task reward."
        )
    return TrainedRewardModel(ref, device, compute_fingerprint(ref))


def _turns(prompt: Prompt) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(parse_turns(prompt, "prompt", needs_assistant=False))
