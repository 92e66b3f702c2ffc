"""How far two models agree on the same rows, and what the rounding of a precision alone does.

The models are never in memory together: the scores of the first are kept, at most `MOST_TARGETS`
of them, which for a vocabulary of 128,000 is a quarter of a gigabyte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.scoring import batches
from ftlevel.models.hardware import autocast
from ftlevel.models.upstream.tensors import own_tensors
from ftlevel.task import Objective

MOST_TARGETS = 512
_BATCH = 4


@dataclass(frozen=True)
class Scores:
    """What a model says of the rows.

    Attributes:
        logits: one tensor a batch, `(targets, choices)` in float32 on the CPU.
        loss: mean over the targets of the rows that were asked, in nats (of a regression, the
            squared error).
        targets: how many targets `logits` has.
    """

    logits: list[torch.Tensor]
    loss: float
    targets: int

    def first(self, batches: int) -> Scores:
        """Return the scores of the first batches alone."""
        kept = self.logits[:batches]
        return Scores(kept, self.loss, sum(map(len, kept)))


@dataclass(frozen=True)
class Agreement:
    """How far a model is from another; the other one is the reference.

    Attributes:
        max_difference: largest |logit difference|.
        mean_difference: mean |logit difference|.
        scale: largest |logit| of the reference.
        kl: mean KL divergence of its choice from the reference's, in nats.
        top1: share of targets with the same first choice.
        loss: its loss.
        loss_reference: the reference's loss.
        targets: how many targets were compared.
    """

    max_difference: float
    mean_difference: float
    scale: float
    kl: float
    top1: float
    loss: float
    loss_reference: float
    targets: int


@dataclass(frozen=True)
class Probe:
    """Rows, and how a model is asked about them.

    Attributes:
        rows: encoded rows.
        objective: what the models are trained on.
        pad_id: id of the padding token.
        device: torch device type.
    """

    rows: Sequence[Encoded]
    objective: Objective
    pad_id: int
    device: str

    def score(self, model: Any, dtype: str) -> Scores:
        """Return what `model`, in eval mode, says of the rows, computing in `dtype`."""
        kept, count, loss, total = [], 0, 0.0, 0
        collate, objective = Collator(self.pad_id), self.objective
        with torch.no_grad(), autocast(self.device, dtype):
            for rows in batches(self.rows, _BATCH):
                batch = {name: value.to(self.device) for name, value in collate(rows).items()}
                inputs, labels = objective.split(batch)
                logits = objective.logits(model(**inputs))
                loss += objective.loss_sum(logits, labels, batch["attention_mask"]).item()
                total += int(objective.count(labels))
                scores = objective.choices(logits, labels, batch["attention_mask"])
                scores = scores[: MOST_TARGETS - count].float().cpu()
                count += len(scores)
                kept.append(scores)
                if count == MOST_TARGETS:
                    break
        return Scores(kept, loss / max(total, 1), count)


def compare(reference: Scores, found: Scores) -> Agreement:
    """Return how far `found` is from `reference`; both are of the same rows."""
    largest = total = scale = divergence = 0.0
    same = numbers = 0
    for first, second in zip(reference.logits, found.logits, strict=True):
        difference = (second - first).abs()
        largest = max(largest, difference.max().item() if difference.numel() else 0.0)
        scale = max(scale, first.abs().max().item() if first.numel() else 0.0)
        total += difference.sum(dtype=torch.float64).item()
        numbers += difference.numel()
        p, q = functional.log_softmax(first, -1), functional.log_softmax(second, -1)
        divergence += functional.kl_div(q, p, log_target=True, reduction="sum").item()
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
    return Agreement(
        largest, total / max(numbers, 1), scale, divergence / max(reference.targets, 1),
        same / max(reference.targets, 1), found.loss, reference.loss, reference.targets,
    )  # fmt: skip


@contextlib.contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Let `model` compute in float32 inside the block, on the weights that it has.

    Each module's weights are widened while it runs and no longer: a model in bfloat16 needs no more
    memory than one module's for it.
    """
    narrow: dict[torch.nn.Module, dict[str, Any]] = {}

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        own, _ = own_tensors(module)
        narrow[module] = dict(own)
        for name, weight in narrow[module].items():
            if weight is not None and weight.is_floating_point():
                own[name] = torch.nn.Parameter(weight.float(), requires_grad=False)
        return tuple(_widened(value) for value in inputs)  # T5 narrows what its wo is given

    def restore(module: torch.nn.Module, _: Any, __: Any) -> None:
        own_tensors(module)[0].update(narrow.pop(module))

    hooks = []
    for module in model.modules():
        if own_tensors(module)[0]:
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
