"""Trainer that samples completions with the current weights before each optimizer step.

accelerate reads one batch ahead, so a batch from the data loader has prompts only. Completions are
sampled when the step begins, once for `num_iterations` steps.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts.checkpoints import step_of
from ftlevel.artifacts.run_directory import ROLLOUTS, RunDirectory
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import RunError
from ftlevel.extras.rl.losses import PolicyLoss
from ftlevel.extras.rl.objective import PolicyGradient
from ftlevel.extras.rl.rollouts import Group, Rollouts, compute_token_logps
from ftlevel.extras.rl.rows import CompletionRow, create_completion_row, stand_in_completions
from ftlevel.extras.rl.server import using_weights
from ftlevel.extras.rl.step import (
    GroupStatistics,
    Rollout,
    RolloutFile,
    compute_metrics,
    compute_statistics,
    create_training_rows,
    has_signal,
)
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.hardware import trim_heap
from ftlevel.training.trainer import FtlevelTrainer

_FILE_NAME = "rollout-{rank}.pt"
"""File of a checkpoint with a rollout that serves further steps."""


class RepeatedSteps(Sampler[int]):
    """Sampler that repeats the `step_size` rows of each optimizer step `repeats` times.

    The last step of an epoch is filled with the epoch's first rows. `base` yields the rows.
    """

    def __init__(self, base: Sampler[int], step_size: int, repeats: int) -> None:
        self.base, self._step_size, self._repeats = base, step_size, repeats

    def __len__(self) -> int:
        num_steps = -(-len(self.base) // self._step_size)  # type: ignore[arg-type]
        return num_steps * self._step_size * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = list(self.base)
        for begin in range(0, len(order), self._step_size):
            step = order[begin : begin + self._step_size]
            repeated = order * math.ceil(self._step_size / len(order))
            step += repeated[: self._step_size - len(step)]
            for _ in range(self._repeats):
                yield from step


def collate_prompts(rows: Sequence[Encoded]) -> dict[str, Any]:
    """Returns a batch of prompts only; the completions are sampled later."""
    return {"prompts": list(rows)}


class _StepStatistics:
    """Sums of loss statistics and of log-probability differences from the sampler, for a step."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def watch(self, loss: PolicyLoss, logps: torch.Tensor, signals: torch.Tensor) -> None:
        is_sampled = ~signals[:, 4].isnan()  # stand-ins were not
        diff = torch.where(is_sampled, logps - signals[:, 4], 0.0).abs()
        sums = loss.clipped.float(), loss.kl, diff.sum(), is_sampled.sum().float()
        self._parts.append((*sums, diff.max()))

    def take(self) -> tuple[list[float], float]:
        """Returns sums [clipped, kl, difference, tokens] and the maximum difference; resets all."""
        batches, self._parts = self._parts, []
        if not batches:
            return [0.0] * 4, 0.0
        stacked = torch.stack([torch.stack([v.double().cpu() for v in part]) for part in batches])
        return stacked[:, :4].sum(0).tolist(), float(stacked[:, 4].max())


class SaveRollout(TrainerCallback):
    """Callback that calls `save` with each checkpoint's directory, for rollouts of `--task rl`."""

    def __init__(self, save: Callable[[Path], None], checkpoint_dir: Path) -> None:
        self._save = save
        self._output_dir = checkpoint_dir

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write this process's rollout into the checkpoint."""
        self._save(self._output_dir / f"checkpoint-{state.global_step}")


class RlTrainer(FtlevelTrainer):
    """Trainer that samples completions of `prompts` and trains on them by their rewards.

    Attributes:
        keep: function (step, groups) that writes this process's sampled groups to rollouts.jsonl.
        bound: mean log-probability difference of sampler and trainer above which the run stops.
    """

    objective: PolicyGradient
    data_collator: Any

    def __init__(
        self, *, rollouts: Rollouts, prompts: Sequence[Any], bound: float, **arguments: Any
    ) -> None:
        self.statistics = _StepStatistics()
        arguments["objective"] = replace(arguments["objective"], watch=self.statistics.watch)
        super().__init__(**arguments)
        self.rollouts, self.bound = rollouts, bound
        rollouts.warn = lambda message: self.warn(message)
        self.rl_config = rollouts.settings
        self.keep: Callable[[int, Sequence[Group]], None] = lambda _step, _groups: None
        self._prompts = prompts
        self._block: Rollout | None = None
        self._unlogged: list[dict[str, float]] = []  # metrics of steps
        self._batches_left = 0
        self._start_time = 0.0
        trainable = self._trainable() if self.rl_config.beta else []
        self._start = [p.detach().clone() for p in trainable]

    def gather_failures(self) -> None:
        """Exchange the failures of reward functions between processes."""
        if self.rollouts.rewards is not None:
            self.rollouts.rewards.gather_failures(self.processes.all_gather)

    def create_callbacks(self, output_dir: RunDirectory, checkpoint: Path | None) -> list[Any]:
        """Open rollouts.jsonl; returns the callback that saves the rollout with checkpoints.

        On resume, groups sampled after `checkpoint` are dropped.
        """
        self.keep = file = RolloutFile(output_dir.path / ROLLOUTS, self.processes)
        file.rewind(step_of(checkpoint) if checkpoint else 0)
        return [SaveRollout(self.save_rollout, output_dir.checkpoints)]

    # ---- batches of prompts

    def collate_step(self, rows: list[Any]) -> dict[str, Any]:
        """Returns a batch of prompts only."""
        return collate_prompts(rows)

    def get_train_dataloader(self) -> Any:
        """Returns batches of prompts without completions."""
        collate, self.data_collator = self.data_collator, collate_prompts
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def prepare_step(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Replace the prompts of a step by completions to train on (`batches` are modified)."""
        if "prompts" not in batches[0]:  # stand-ins of a check
            super().prepare_step(batches, device)
            return
        prompts = [row for batch in batches for row in batch["prompts"] if row.row >= 0]
        step, times = self.state.global_step, self.rl_config.num_iterations
        self._start_time = time.perf_counter()
        if self._block is None or step % times == 0:
            self._block = self.sample_rollout(step - step % times, prompts)
        self._batches_left = len(batches)
        rows = self._block.rows
        rows = [row.on_policy() for row in rows] if step % times == 0 else rows
        for number, batch in enumerate(batches):
            part: list[Encoded] = list(rows[number :: len(batches)])
            first = batch["prompts"][0]
            batch.clear()
            batch.update(self.on_device(self.data_collator(part or [no_loss(first)])))
        self._in_training = False

    def with_targets(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """Returns `num_generations` synthetic completions of maximum length for each prompt."""
        count, tokens = self.rl_config.num_generations, self.rl_config.max_completion_length
        return [
            completion
            for row in rows
            for completion in stand_in_completions(row.input_ids, row.row, count, tokens)
        ]

    def sample_rollout(self, step: int, prompts: Sequence[Any]) -> Rollout:
        """Returns the rollout for this process's `prompts`, sampled with the current weights."""
        start = time.perf_counter()
        config, names = self.rl_config, self.rl_config.reward_names
        trim_heap()  # holes that activations leave do not fit the sampler's cache
        groups = self._sample(step, prompts)
        sampled = self._gather_statistics(groups)
        used, all_groups = groups, sampled
        if config.dynamic_sampling:
            used, all_groups = self._sample_more(step, groups, sampled)
        metrics = compute_metrics(sampled, names)
        metrics["sampling_s"] = time.perf_counter() - start
        needs_old = config.num_iterations > 1 or (config.beta and config.loss == "rloo")
        old = self.token_logps if needs_old else None
        reference = self._reference_logps if config.beta else None
        arguments = (config, old, reference, self.processes.all_gather)
        rows = create_training_rows(used, all_groups, *arguments) if all_groups else []
        self.keep(step, groups)
        trim_heap()
        return Rollout(rows, metrics)

    def _sample(self, step: int, prompts: Sequence[Any]) -> list[Group]:
        state = {**vars(self.state), "log_history": self.state.log_history[-1000:]}
        return self.processes.in_all(lambda: self.rollouts(step, prompts, state))

    def _gather_statistics(self, groups: Sequence[Group]) -> list[GroupStatistics]:
        statistics = [compute_statistics(group, self.rl_config) for group in groups]
        return [group for part in self.processes.all_gather(statistics) for group in part]

    def _sample_more(
        self, step: int, groups: list[Group], sampled: list[GroupStatistics]
    ) -> tuple[list[Group], list[GroupStatistics]]:
        """Sample groups of further prompts, in place of groups whose rewards are all equal.

        At most `dynamic_sampling` prompts are drawn in all processes, in an order set by seed and
        step. `groups` and `sampled` (modified) are extended. Returns this process's groups and the
        statistics of all processes' groups, only those to train on.
        """
        size, budget = len(sampled), self.rl_config.dynamic_sampling
        used_rows = {statistics.row for statistics in sampled}
        order = [
            row for row in range(len(self._prompts)) if self._prompts[row].row not in used_rows
        ]
        random.Random(f"{self.args.seed} {step}").shuffle(order)
        while True:
            statistics = [group for group in sampled if has_signal(group)]
            missing = min(size - len(statistics), budget, len(order))
            if missing <= 0:
                break
            selected, order, budget = order[:missing], order[missing:], budget - missing
            rank, world_size = self.processes.world.rank, self.processes.count
            new_groups = self._sample(
                step, [self._prompts[row] for row in selected[rank::world_size]]
            )
            groups += new_groups
            sampled += self._gather_statistics(new_groups)
        rows = {each.row for each in statistics}
        return [group for group in groups if group.row.row in rows], statistics

    # ---- log-probabilities

    def token_logps(self, rows: Sequence[CompletionRow]) -> list[list[float]]:
        """Returns the log-probabilities of each row's completion tokens, computed as in a step."""
        head = self.fast.cross_entropy if self.fast is not None else None
        batches = ((indices, self.on_device(batch)) for indices, batch in self._split(rows))
        try:
            with self.compute_loss_context_manager():
                logps = compute_token_logps(self.model, self.objective, batches, head)
        finally:
            self._in_training = False
        return [logps[index] for index in range(len(rows))]

    def _split(self, rows: Sequence[CompletionRow]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        if isinstance(self.data_collator, StepCollator):
            yield from self.data_collator.split(rows) if rows else ()
        else:
            collate = Collator(self.data_collator.pad_id)
            yield from (([index], collate([row])) for index, row in enumerate(rows))

    def _reference_logps(self, rows: Sequence[CompletionRow]) -> list[list[float]]:
        with using_weights(self._trainable(), self._start):
            return self.token_logps(rows)

    def _trainable(self) -> list[torch.Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # ---- the step

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns the loss of the batch; after a step's last batch, completes that step's log."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.is_standalone:
            self._batches_left -= 1
            if not self._batches_left:
                self._finish_step()
        return loss

    def _finish_step(self) -> None:
        gathered = self.processes.all_gather(self.statistics.take())
        clipped, kl, diff, tokens = (sum(part[0][at] for part in gathered) for at in range(4))
        max_diff = max(part[1] for part in gathered)
        metrics = dict(self._block.metrics) if self._block is not None else {}
        is_sampled = self.state.global_step % self.rl_config.num_iterations == 0
        if tokens:
            metrics["clipped"] = clipped / tokens
            if self.rl_config.beta or self.objective.teacher:
                metrics["kl"] = kl / tokens
        if tokens and is_sampled:
            metrics["sampler_difference"] = mean = diff / tokens
            check_sampler(mean, max_diff, self.bound, f"step {self.state.global_step + 1}")
        seconds = time.perf_counter() - self._start_time
        sampling, sampled = metrics.pop("sampling_s", 0.0), metrics.pop("completion_tokens", 0.0)
        metrics["sampled_tokens_per_s"] = round(sampled / max(sampling, 1e-9), 1)
        sampling *= is_sampled
        metrics["trained_tokens_per_s"] = round(tokens / max(seconds - sampling, 1e-9), 1)
        metrics["sampling_share"] = round(min(1.0, sampling / max(seconds, 1e-9)), 4)
        self._unlogged.append(metrics)

    def count_targets(
        self,
        batches: list[dict[str, Any]],
        device: torch.device,
    ) -> torch.Tensor:
        """Returns 1, because the rows' weights already normalize the loss over all processes."""
        return torch.ones((), device=device)

    def _sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Log Trainer's values together with the mean metrics of the steps since the last log."""
        if "loss" in logs:
            steps, self._unlogged = self._unlogged, []
            names = dict.fromkeys(name for metrics in steps for name in metrics)
            means = {name: fmean(m[name] for m in steps if name in m) for name in names}
            logs = {**logs, **means, **logs}  # a reward function may log any name
        super().log(logs, *arguments, **settings)

    # ---- resume

    def save_rollout(self, checkpoint: Path) -> None:
        """Write the current rollout into `checkpoint` if later steps will train on it again."""
        if self._block is None or self.state.global_step % self.rl_config.num_iterations == 0:
            return
        rows = [(r.input_ids, r.prompt, r.row, r.number, r.values) for r in self._block.rows]
        state = {"rows": rows, "metrics": self._block.metrics}
        torch.save(state, checkpoint / _FILE_NAME.format(rank=self.processes.world.rank))

    def restore_batch(self, checkpoint: Path) -> None:
        """Load the rollout that `save_rollout` wrote into `checkpoint`, if any."""
        path = checkpoint / _FILE_NAME.format(rank=self.processes.world.rank)
        if not path.exists():
            return
        state: Mapping[str, Any] = torch.load(path, weights_only=True)
        rows = [
            create_completion_row(ids[:prompt], ids[prompt:], row, number, values)
            for ids, prompt, row, number, values in state["rows"]
        ]
        self._block = Rollout(rows, dict(state["metrics"]))


def no_loss(prompt: Any) -> CompletionRow:
    """Returns a row of `prompt` with zero loss, for a process without completions to train on."""
    row = next(iter(stand_in_completions(prompt.input_ids, prompt.row)))
    zero = [(0.0, 0.0, *signal[2:]) for signal in row.values]
    return replace(row, values=tuple(zero))


def check_sampler(mean: float, max_diff: float, bound: float, label: str) -> None:
    """Raise RunError if `mean`, of |log-probability by sampler − by trainer|, exceeds `bound`."""
    if mean <= bound:
        return
    raise RunError(
        f"{label}: log-probabilities of the sampled tokens differ by {mean:.2g} nats a token "
        f"between sampler and trainer (largest {max_diff:.2g}), and rounding explains {bound:.2g}. "
        "The completions were sampled from other weights, at another temperature or from another "
        "prompt than is trained. Please report it with the command; --no-fast trains plainly."
    )
