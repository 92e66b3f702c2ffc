"""`transformers.Trainer` with a loss averaged over all targets of an optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.store import token_counts
from ftlevel.data.prepare.samplers import (
    LengthGroupedSampler,
    RowsWithPadding,
    StepShardSampler,
)
from ftlevel.errors import ConfigError, is_out_of_memory
from ftlevel.fast.likelihoods import compute_full_loss, compute_shared_prefix, supervised_loss
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.parallel_workers import ParallelWorkers
from ftlevel.fast.prefixes import SharedPrefix
from ftlevel.fast.step import FastStep
from ftlevel.methods.rates import HeadRate, set_head_rate
from ftlevel.models.hardware import autocast
from ftlevel.models.upstream.libraries import move_batches, shared_order
from ftlevel.objectives import Objective, TrainingLoss
from ftlevel.training.memory import StepReducer
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes


def get_train_data(run: Run) -> tuple[Any, Sampler[int] | None]:
    """Returns the training rows and their sampler, the same in all processes.

    The sampler is None for Trainer's random sampler.
    """
    train, rows, seed = run.config.train, run.data.train, run.config.train.order_seed
    if (order := run.hooks.create_order(run)) is not None:
        return RowsWithPadding(rows) if run.data.sets else rows, order
    if train.train_sampling_strategy == "random":
        if not train.num_processes and not run.hooks.needs_order:
            return rows, None
        return rows, shared_order()(rows, generator=torch.Generator(), data_seed=seed)
    return rows, LengthGroupedSampler(token_counts(rows), train.rows_per_step, seed)


def create_dataloader(
    rows: Any,
    order: Any,
    args: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    lengths: Sequence[int] | None = None,
) -> Any:
    """Returns this process's data loader; the loaders of all processes have equally many batches.

    Batches are moved to the device like those of Trainer's loader of a single process. With
    `lengths`, the rows of a step are divided by tokens (see `StepShardSampler`). Missing batches
    are replaced by batches of padding rows, with `is_padding` set.
    """
    sampler = StepShardSampler(
        order, args.train_batch_size, args.world_size, args.process_index, lengths
    )

    def collate_with_padding(samples: list[Any]) -> dict[str, Any]:
        batch = collate(samples)
        return {**batch, "is_padding": True} if samples[0].row < 0 else batch

    loader = DataLoader(
        RowsWithPadding(rows),
        batch_sampler=sampler,
        collate_fn=collate_with_padding,
        pin_memory=args.dataloader_pin_memory,
    )
    return move_batches(loader, args)


@contextlib.contextmanager
def keep_settings(optimizer: Any, *others: str) -> Iterator[None]:
    """Keep the configured options of `optimizer` while the `with` block loads a saved state.

    Kept are weight decay and similar options, and `others`. A new initial rate scales `lr`.
    """
    names = {"initial_lr", "weight_decay", "betas", "eps", "momentum", *others}
    groups = [{k: v for k, v in group.items() if k in names} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        if "initial_lr" in group.keys() & settings.keys():
            group["lr"] *= settings["initial_lr"] / group["initial_lr"]
        group.update(settings)


class FtlevelTrainer(Trainer):
    """Trainer with its own loss, target count and evaluation.

    The loss of an optimizer step is the sum over its targets (tokens, words, rows, span ends),
    divided by their number in all micro-batches. T5, BART and the classification models of
    transformers 5.24 average within a micro-batch and ignore `num_items_in_batch`.

    With a fast step, a Trainer batch has all rows of an optimizer step, and this class splits it
    into micro-batches. Row order, steps, schedule and resume are those of Trainer.

    Attributes:
        tokens_seen: tokens of the training rows, without padding.
        tokens_computed: positions computed by the blocks, with padding; shared prefixes count once.
        penalty: function of the model that the method adds to the loss, or None. It affects
            gradients, not the logged loss.
        loss: label smoothing, class weights and focal loss, which evaluation does not use.
        head_rate: learning rate of new heads, and their names; None if it is that of all modules.
        smaller: `StepReducer` for steps that do not fit into memory.
        step_rows: indices of the training rows in the current optimizer step.
        replaces_nonfinite: whether the log has the previous step's loss in place of NaN or inf.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        loss: TrainingLoss | None = None,
        evaluator: Any = None,
        penalty: Callable[[Any], Tensor] | None = None,
        fast: FastStep | None = None,
        order: Sampler[int] | None = None,
        head_rate: HeadRate | None = None,
        processes: Processes = Processes(),  # noqa: B008 - frozen
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.head_rate = head_rate
        self.processes = processes
        self.objective = objective
        self.loss = loss or TrainingLoss()
        self.penalty = penalty
        self.evaluator = evaluator
        self.fast = fast
        self.order = order
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.tokens_computed = 0
        self.smaller = StepReducer(self)
        self.warn: Callable[[str], None] = lambda _: None
        self.note: Callable[[dict[str, Any]], None] = lambda _: None
        self.step_rows: list[int] = []
        self.replaces_nonfinite = False
        self._is_padding = False
        self._last_loss = 0.0
        self._step_loss: Tensor | None = None
        # Cached, because iterating over a model's modules takes longer than some of its layers.
        self._trained: list[Tensor] = []
        self._operations_per_token = 0
        self._in_training = False
        self._compute_dtype = ""  # empty: autocast as prepared by accelerate
        self.current_gradient_accumulation_steps = 1  # of a step outside of training
        self.model_accepts_loss_kwargs = True  # our loss divides by num_items_in_batch

    def create_optimizer(self, *arguments: Any, **settings: Any) -> torch.optim.Optimizer:
        """Create Trainer's or the method's optimizer, and set the head learning rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments, **settings)
        if self.head_rate is not None:
            set_head_rate(optimizer, self.model, self.head_rate)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # reduce_lr_on_plateau sets none
        return optimizer

    def forget_optimizer(self) -> None:
        """Free gradients and optimizer state, which take three times the memory of the adapter."""
        self.model.zero_grad(set_to_none=True)
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order or super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> Any:
        """Returns Trainer's data loader; with several processes, that of this process."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        # Batches without the fast step are padded, those of one process; lengths of completions
        # are not known.
        is_divided_by_tokens = self.fast is not None and not self.objective.samples
        lengths = token_counts(getattr(rows, "rows", rows)) if is_divided_by_tokens else None
        return create_dataloader(rows, self.order, self.args, self.data_collator, lengths)

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **settings)

    def _evaluate(self, trial: Any, ignored: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # On resume, the first evaluation is one that the interrupted run has missed.
        skip_scheduler &= self.state.global_step == 0
        metrics: dict[str, float] = super()._evaluate(trial, ignored, skip_scheduler)
        return metrics

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Returns the loss of the batch, and accumulates the gradients of all micro-batches."""
        if self._step_loss is None:
            self.step_rows = []
        while True:
            rows = inputs.pop("rows", ())
            try:
                loss = self.compute_batch(model, inputs, num_items_in_batch)
                break
            except Exception as error:
                if not (is_out_of_memory(error) and self.smaller.can_reduce(inputs)):
                    raise
            inputs = self.smaller.reduce(model, rows, inputs)
        for part in inputs.get("micro_batches", [inputs]):
            if not self._is_padding:
                self.tokens_seen += part["attention_mask"].sum().to(self.args.device)
        self.step_rows += [row.row for row in rows if row.row >= 0]
        previous = self._step_loss
        self._step_loss = loss.detach() if previous is None else previous + loss.detach()
        if self.replaces_nonfinite and not bool(torch.isfinite(loss)):
            return torch.full_like(loss, self._last_loss)
        return loss

    def take_step_loss(self) -> Tensor:
        """Returns and resets the loss that the optimizer step has accumulated (a scalar)."""
        loss, self._step_loss = self._step_loss, None
        if loss is None:
            return torch.zeros(())
        if self.replaces_nonfinite and bool(torch.isfinite(loss)):
            self._last_loss = float(loss) / self.args.gradient_accumulation_steps
        return loss

    def drop_gradient(self) -> None:
        """Set gradients to None, so that the next optimizer step changes nothing."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def restore(self, checkpoint: Path) -> None:
        """Load weights and optimizer state, but not learning rates, from `checkpoint`."""
        self._load_from_checkpoint(str(checkpoint))
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        with keep_settings(self.optimizer, "lr"):
            self.optimizer.load_state_dict(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with keep_settings(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def compute_batch(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Returns the loss of a batch and accumulates gradients; does not change `tokens_seen`."""
        self._is_padding = bool(inputs.pop("is_padding", False))
        inputs = self.on_device(inputs)
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        micro_batches = [(part.pop("layout"), part) for part in inputs["micro_batches"]]
        calls = self.num_forward_passes(len(micro_batches))
        self.current_gradient_accumulation_steps = calls
        for layout, part in micro_batches:
            self.tokens_computed += layout.tokens if layout else part["input_ids"].numel()
        if inputs["in_parallel"] and self.fast is not None and self.fast.workers is not None:
            prefix = inputs.get("shared_prefix")
            return self._in_parallel(
                self.fast.workers, model, micro_batches, prefix, num_items_in_batch
            )
        losses, is_padding = [], self._is_padding
        for number in range(calls):
            layout, part = micro_batches[number % len(micro_batches)]
            self._is_padding = is_padding or number >= len(micro_batches)
            is_last = number == calls - 1
            sync_context = contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)
            with sync_context, using_layout(layout):
                losses.append(super().training_step(model, dict(part), num_items_in_batch))
        self._is_padding = is_padding
        return torch.stack(losses).sum()

    def num_forward_passes(self, count: int) -> int:
        """Returns how often to call the model for `count` micro-batches; sharded ones need more."""
        return count

    def _in_parallel(
        self,
        workers: ParallelWorkers,
        model: Any,
        micro_batches: list[tuple[PackedLayout | None, dict[str, Tensor]]],
        shared_prefix: dict[str, Any] | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Backpropagate micro-batches in parallel on a CPU; returns the summed loss (a scalar)."""
        if not self._in_training:  # model.training does not reflect submodules
            model.train()
            self._in_training = True

        def compute(batch: dict[str, Tensor]) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(
                    model, batch, num_items_in_batch=num_items_in_batch
                )
                return loss

        self._trained = self._trained or [p for p in model.parameters() if p.requires_grad]
        # Drawn from torch's generator, which is restored on resume.
        seed = int(torch.randint(2**62, ())) if workers.is_random else None
        prefix = self._shared_prefix(model, **shared_prefix) if shared_prefix else None
        losses = workers.backward(compute, micro_batches, self._trained, seed, prefix)
        return torch.stack(losses).sum()

    def _shared_prefix(self, model: Any, layout: PackedLayout, **batch: Tensor) -> SharedPrefix:
        fast: Any = self.fast
        self.tokens_computed += layout.tokens
        with self.compute_loss_context_manager():
            return compute_shared_prefix(fast.cross_entropy, model, layout, batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the micro-batch's summed loss / the optimizer step's target count (a scalar)."""
        mask, labels = inputs["attention_mask"], inputs["labels"]
        outputs = None
        if self.fast is not None and self.fast.cross_entropy is not None and not return_outputs:
            total = supervised_loss(
                self.fast.cross_entropy,
                model,
                self.objective,
                inputs,
                smoothing=self.loss.smoothing,
            )
        else:
            total, labels, outputs = compute_full_loss(
                model, self.objective, inputs, mask, self.loss
            )
        count = num_items_in_batch
        if count is None:
            count = self.objective.training_count(labels, self.loss)
        loss = (total * 0 if self._is_padding else total / count).sum()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if self.penalty is not None and model.training:
            extra = self.penalty(self.accelerator.unwrap_model(model))
            if extra is not None:
                loss = loss + (extra - extra.detach()) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        """Returns the autocast context of a forward pass."""
        if self._compute_dtype:
            return autocast(self.args.device.type, self._compute_dtype)
        return super().compute_loss_context_manager()

    @contextlib.contextmanager
    def standalone_steps(self, dtype: str) -> Iterator[None]:
        """In the `with` block, compute steps in `dtype` outside training; restores token counts.

        The loss is not scaled as float16 training does, and processes exchange nothing.
        """
        seen, computed = self.tokens_seen.clone(), self.tokens_computed
        scaler, self.accelerator.scaler = self.accelerator.scaler, None
        self._compute_dtype = dtype
        try:
            yield
        finally:
            self._compute_dtype, self._in_training = "", False
            self.accelerator.scaler = scaler
            self.tokens_seen, self.tokens_computed = seen, computed

    @property
    def is_standalone(self) -> bool:
        """Whether the current step is computed inside `standalone_steps`."""
        return bool(self._compute_dtype)

    def with_targets(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """Returns the rows of a step on `rows`: themselves, or what subclasses make of them."""
        return list(rows)

    def collate_step(self, rows: list[Any]) -> dict[str, Any]:
        """Returns the batch of a step on `rows`, as the data loader yields it."""
        batch: dict[str, Any] = self.data_collator(rows)
        return batch

    def restore_batch(self, checkpoint: Path) -> None:
        """Load what a subclass saved in `checkpoint` for further steps on the same rows."""

    def create_callbacks(self, output_dir: RunDirectory, checkpoint: Path | None) -> list[Any]:
        """Returns callbacks of a subclass; `checkpoint` is the one to resume from, or None."""
        return []

    def gather_failures(self) -> None:
        """Exchange between processes what a subclass reports at the end of a run."""

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a collated batch with its tensors and layouts moved to the training device."""
        return dict(send_to_device(batch, self.args.device, non_blocking=True))

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | int | None:
        """Returns the number of targets of an optimizer step, over all processes.

        Trainer counts labels other than -100: wrong for spans, regression and multi-label rows.
        """
        if not batch_samples:
            return None
        self.prepare_step(batch_samples, device)
        total = self.count_targets(batch_samples, device)
        shared = self.args.world_size > 1 and self.args.average_tokens_across_devices
        return self._sum_over_processes(total) if shared else total

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(value.reshape(1, -1))
        return gathered.sum(0).reshape(value.shape)

    def prepare_step(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Compute what the losses of a step need before its micro-batches; by default, nothing."""

    def prepare_plain(self, batches: Sequence[Any], rows: Sequence[Any], collate: Any) -> None:
        """Modify the `batches` of a plain step on `rows`, as `prepare_step` and `compute_loss` do.

        `collate` returns a list of batches of further rows.
        """

    def count_targets(self, batches: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Returns the number or weight of this process's targets in `batches`; padding has none."""
        num_targets = [
            self.objective.training_count(part["labels"], self.loss) * (not batch.get("is_padding"))
            for batch in batches
            for part in batch.get("micro_batches", [batch])
        ]
        return torch.stack([count.to(device) for count in num_targets]).sum(0)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns Trainer's FLOP estimate, summed over the micro-batches."""
        batches = inputs.get("micro_batches", [inputs])
        if not self._operations_per_token:
            operations = int(super().floating_point_ops(batches[0]))
            self._operations_per_token = operations // batches[0]["input_ids"].numel()
        return self._operations_per_token * sum(part["input_ids"].numel() for part in batches)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Returns the evaluator's metrics, and logs them as Trainer does."""
        if self.evaluator is None:
            raise ConfigError(
                "a callback set should_evaluate, and there are no validation rows to evaluate. Add "
                "--validation-split 0.05, or drop the callback."
            )
        self._in_training = False
        # All processes use the same metrics, so that best model and early stopping agree.
        local_scores = self.evaluator(self.model)
        scores = self.processes.from_first(lambda: local_scores)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
