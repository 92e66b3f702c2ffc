"""The fast step: what of it a model, a task and a method can use, and putting it onto a model.

Every part gives the numbers of the plain step. A model that a part does not know how to serve is
served without it, and the reason is shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.data.collate import Collator
from ftlevel.data.encode import Encoded
from ftlevel.engine.packing_check import find_leak
from ftlevel.models.module_tree import find_blocks
from ftlevel.speed import attention
from ftlevel.speed.blocks import PackedBlocks
from ftlevel.speed.head import Observe, TargetHead
from ftlevel.speed.layout import Layout
from ftlevel.speed.passes import cut_passes
from ftlevel.tasks.objectives import Objective, Tokens

VIRTUAL_TOKENS = ("prefix", "prompt", "p-tuning")
"""Methods whose rows hold more than the text."""

FEWEST_TOKENS = 1024
"""A pass is filled up to this many tokens whatever the batch size: less is slow."""

MOST_CPU_TOKENS = 2048
"""On a CPU a pass gains nothing from more tokens, and holds their activations."""


@dataclass(frozen=True)
class FastPlan:
    """Which parts of the fast step a run uses.

    Attributes:
        enabled: whether the rows of a step are cut into passes by their tokens.
        packs: whether a pass has no padding.
        heads: whether a language head is computed on targets only.
        tokens: most tokens of a pass.
        choices: lines for the screen.
    """

    enabled: bool = False
    packs: bool = False
    heads: bool = False
    tokens: int = 0
    choices: list[Choice] = field(default_factory=list)


def plan_fast(
    config: TrainConfig, meta: Any, kind: str, objective: Objective, device: str, max_length: int
) -> FastPlan:
    """Return the parts that the model of shape `meta` can use (its attention is set).

    Args:
        config: the configuration.
        meta: the model on the meta device.
        kind: of the model.
        objective: what it is trained on.
        device: torch device type.
        max_length: longest row in tokens.
    """
    speed = config.speed
    if not speed.fast:
        return FastPlan(choices=[Choice("step", "plain", "--no-fast")])
    tokens = _tokens_per_pass(config, device, max_length)
    why_padded = _why_padded(config, meta, kind)
    heads = speed.target_head and has_target_head(meta, objective)
    layout = "packed, no padding" if not why_padded else f"padded by length ({why_padded})"
    parts = [layout] + (["head on targets only"] if heads else [])
    reason = f"up to {tokens:,} tokens a pass"
    return FastPlan(True, not why_padded, heads, tokens, [Choice("step", ", ".join(parts), reason)])


def _tokens_per_pass(config: TrainConfig, device: str, max_length: int) -> int:
    if config.speed.tokens_per_pass != "auto":
        return config.speed.tokens_per_pass
    tokens = max(config.train.per_device_train_batch_size * max_length, FEWEST_TOKENS)
    return min(tokens, max(MOST_CPU_TOKENS, max_length)) if device == "cpu" else tokens


def _why_padded(config: TrainConfig, meta: Any, kind: str) -> str:
    """Return why rows cannot be packed; empty where they can."""
    family = meta.config.model_type
    if not config.speed.pack:
        return "speed.pack is off"
    if config.model.attn_implementation not in ("auto", "sdpa"):
        return f"attention is {config.model.attn_implementation}"
    if config.method.kind in VIRTUAL_TOKENS:
        return f"{config.method.kind} puts virtual tokens into every row"
    if kind == "encoder-decoder" or not find_blocks(meta):
        return f"{family} has not one stack of blocks"
    if getattr(meta.config, "layerdrop", 0):
        return f"{family} skips layers at random"
    if not _takes_attention(meta):
        return f"{family} has an attention of its own"
    meta.set_attn_implementation("sdpa")  # the config is the one that the weights are loaded with
    return ""


def _takes_attention(model: Any) -> bool:
    """Give `model` the attention of documents (mutated); return whether it took it."""
    if model.config._attn_implementation != "sdpa":
        return False
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return bool(model.config._attn_implementation == attention.NAME)


def has_target_head(model: Any, objective: Objective | None) -> bool:
    """Whether `model` has a language head that can be computed on targets only."""
    if not isinstance(objective, Tokens) or model.get_output_embeddings() is None:
        return False
    return not objective.feeds_labels or hasattr(model, "prepare_decoder_input_ids_from_labels")


class StepCollator:
    """Turn the rows of an optimizer step into passes, each a padded batch with its layout.

    Args:
        pad_id: as of `Collator`.
        plan: the parts in use.
    """

    def __init__(self, pad_id: int, plan: FastPlan) -> None:
        self._collate = Collator(pad_id)
        self._plan = plan

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, list[dict[str, Any]]]:
        """Return `passes`, what `Collator` returns and a `layout` (None where rows are padded)."""
        lengths = [len(row.input_ids) for row in rows]
        parts = cut_passes(lengths, self._plan.tokens, is_padded=not self._plan.packs)
        return {"passes": [self._pass([rows[i] for i in part]) for part in parts]}

    def _pass(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        batch = self._collate(rows)
        layout = Layout.of_rows(batch["attention_mask"]) if self._plan.packs else None
        return {**batch, "layout": layout}


class FastStep:
    """The parts of a plan on a model.

    Attributes:
        plan: the parts in use.
        head: the language head on targets only, or None.

    Args:
        model: a model, with or without an adapter (mutated until `remove`).
        plan: the parts.
    """

    def __init__(self, model: Any, plan: FastPlan) -> None:
        self.plan = plan
        self._model = model
        self._base = base_model(model)
        self._blocks: PackedBlocks | None = None
        if plan.packs:
            if not _takes_attention(self._base):
                raise TypeError(f"{type(self._base).__name__} did not take {attention.NAME}")
            self._blocks = PackedBlocks(find_blocks(self._base))
        self.head = TargetHead(self._base) if plan.heads else None

    def check_packing(self, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str) -> str:
        """Return why the rows cannot be packed after all, and then pad them; empty if they can.

        Args:
            rows: as of `find_leak`.
            pad_id: as of `find_leak`.
            device: torch device type.
            dtype: compute precision's name.
        """
        if self._blocks is None:
            return ""
        last = find_blocks(self._base)[-1]
        leak = find_leak(self._model, last, rows, pad_id, device, dtype)
        if leak:
            self.plan = replace(self.plan, packs=False)
            self._pad_again()
        return leak

    def _pad_again(self) -> None:
        if self._blocks is not None:
            self._blocks.remove()
            self._blocks = None
            self._base.set_attn_implementation("sdpa")

    def remove(self) -> None:
        """Leave the model as it was."""
        if self.head is not None:
            self.head.remove()
        self._pad_again()


def base_model(model: Any) -> Any:
    """Return the transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextlib.contextmanager
def target_head(model: Any, objective: Objective | None) -> Iterator[TargetHead | None]:
    """Give the head of `model` inside the block, or None where targets have no language head."""
    base = base_model(model)
    head = TargetHead(base) if has_target_head(base, objective) else None
    try:
        yield head
    finally:
        if head is not None:
            head.remove()


def target_loss(
    head: TargetHead,
    model: Any,
    objective: Objective,
    batch: dict[str, torch.Tensor],
    observe: Observe | None = None,
) -> torch.Tensor:
    """Return the loss of a batch summed over its targets, its head computed on these alone.

    Args:
        head: the head of `model`.
        model: what is called.
        objective: what it is trained on.
        batch: inputs and labels.
        observe: is given scores and targets.
    """
    if not isinstance(objective, Tokens):
        raise TypeError("a language head predicts tokens")
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if objective.feeds_labels:
        base = base_model(model)
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    at, targets = objective.locate(labels)
    return head.loss_sum(lambda: model(**inputs), at, targets, observe)
