"""Check on short batches that the parts of the fast step do not change a model's results.

Packed sequences must not affect each other, as by convolutions or recurrent states. The last block
may skip only tokens that do not affect the loss. The chunked head must give the model's logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import is_out_of_memory
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.likelihoods import (
    PooledTokens,
    SupervisedTokens,
    TokenSelector,
    base_model,
    supervised_loss,
)
from ftlevel.fast.packing import PackedLayout, UnsupportedModelError, using_layout
from ftlevel.fast.prefixes import SharedPrefix, create_prefix_tree, using_prefix
from ftlevel.fast.pruning import get_prunable_layers
from ftlevel.fast.recompute import using_generator
from ftlevel.models.hardware import autocast, eval_mode, evaluating, has_forced_tf32
from ftlevel.models.module_tree import get_blocks, linear_size
from ftlevel.models.upstream.fake import map_leaves
from ftlevel.models.upstream.quantizers import with_float_inputs
from ftlevel.objectives import Objective, TokenObjective

LENGTHS = 16, 12
"""Tokens of the two test rows."""

PREFIX_LENGTH = 7
"""Tokens of the test rows that form a shared prefix."""

NOISE, COARSE = 1e-5, 1e-2
"""Maximum relative difference of the same values in another batch, in float32 and in 16 bits."""

_EXACT, _ROUNDED = 1e-4, 1e-1
"""Maximum relative difference of states in float32, and in 16 bits."""

_MAX_NOISE = 2.0
"""Maximum median rounding error of packed states, relative to that of padded states."""


def has_exact_products(device: str, dtype: str) -> bool:
    """Returns whether products in `dtype` are those of float32: not of 16 bits or TF32."""
    return dtype == "float32" and not has_forced_tf32(device)


@dataclass(frozen=True)
class StepCheck:
    """Base class of checks that run the model on two short test rows and restore its mode.

    The test rows are two prefixes of the longest of the first 100 `rows`.
    """

    model: Any
    last_block: nn.Module
    rows: Sequence[Encoded]
    pad_id: int
    device: str
    dtype: str

    @functools.cached_property
    def pair(self) -> list[Encoded]:
        """The two test rows, with label 0; the second is a shorter prefix of the first."""
        sequences = (sequence for row in self.rows[:100] for sequence in row.sequences)
        row = max(sequences, key=lambda sequence: len(sequence.input_ids))
        return [_truncate(row, length, 0) for length in LENGTHS]

    @property
    def _is_exact(self) -> bool:
        return has_exact_products(self.device, self.dtype)

    def batch_of(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Returns the padded batch of `rows` on the device, without labels."""
        batch = Collator(self.pad_id)(rows)
        del batch["labels"]
        return {name: value.to(self.device) for name, value in batch.items()}


def _evaluated(compare: Callable[[PackingCheck], str]) -> Callable[[PackingCheck], str]:
    @functools.wraps(compare)
    def run(self: PackingCheck) -> str:
        try:
            with evaluating(self.model, self.device, self.dtype), with_float_inputs(self.model):
                return compare(self)
        except NotImplementedError as error:
            return str(error)
        except (RuntimeError, TypeError) as error:  # e.g. of a kernel; it would end the run later
            if is_out_of_memory(error):
                raise
            return f"its packed attention does not run here ({str(error).strip().splitlines()[0]})"

    return run


class PackingCheck(StepCheck):
    """Checks that packed and padded rows give the same results in a model with packed blocks."""

    def uses_global_generator(self) -> bool:
        """Returns whether a forward pass in training mode draws from torch's global generator."""
        batch, training = self.batch_of(self.pair), self.model.training
        layout, before = PackedLayout.from_mask(batch["attention_mask"]), torch.get_rng_state()
        self.model.train()
        try:
            with (
                torch.no_grad(),
                using_generator(0),
                using_layout(layout),
                autocast(self.device, self.dtype),
            ):
                self.model(**batch)
            return not torch.equal(before, torch.get_rng_state())
        finally:
            torch.set_rng_state(before)
            self.model.train(training)

    @_evaluated
    def get_packing_error(self) -> str:
        """Returns why rows cannot be packed; empty if they can."""
        first, second = self.pair
        batch = self.batch_of(self.pair)
        padded = self.batch_of([replace(first, input_ids=first.input_ids[::-1]), second])
        layout, mask = PackedLayout.from_mask(batch["attention_mask"]), batch["attention_mask"] != 0
        packed, other = self._states(batch, layout), self._states(padded, layout)
        # The second row may differ by the order of sums only when its neighbor changes.
        bound = NOISE if self._is_exact else COARSE
        if not relative_difference(other[1][mask[1]], packed[1][mask[1]]) < bound:
            return "packed rows attend to each other"
        if self._is_different(batch, lambda: self._states(batch, layout), mask):
            return "packed rows give different values than padded ones"
        return ""

    @_evaluated
    def get_prefix_tree_error(self) -> str:
        """Returns why a prefix tree cannot be used; empty if it can."""
        pair = self.pair[::-1]
        batch = self.batch_of(pair)
        mask = batch["attention_mask"] != 0
        tree = create_prefix_tree([row.input_ids for row in pair], min_length=1).to(self.device)
        if self._is_different(batch, lambda: self._states(batch, tree), mask):
            return "shared prefixes give different values than rows of their own"
        return ""

    @_evaluated
    def get_shared_prefix_error(self) -> str:
        """Returns why a prefix cannot be computed before all micro-batches; empty if it can."""
        pair = self.pair[::-1]
        batch = self.batch_of(pair)
        first = {name: value[:1, :PREFIX_LENGTH] for name, value in batch.items()}

        def compute() -> Tensor:
            prefix = SharedPrefix(PREFIX_LENGTH)
            with using_prefix(prefix):
                self._states(first, PackedLayout.from_mask(first["attention_mask"]))
                prefix.close()
                ids = [row.input_ids for row in pair]
                tree = create_prefix_tree(ids, 1, PREFIX_LENGTH).to(self.device)
                return self._states(batch, tree)

        mask = batch["attention_mask"] != 0
        mask[:, :PREFIX_LENGTH] = False
        if self._is_different(batch, compute, mask):
            return "outputs change after a shared prefix of an earlier micro-batch"
        return ""

    def _is_different(
        self, batch: dict[str, Tensor], compute: Callable[[], Tensor], mask: Tensor
    ) -> bool:
        """Returns whether states `compute()` differ, in `mask`, from those of the padded `batch`.

        States are outputs of the last block. In decoders, a few very large states cancel out in the
        last blocks, so 16-bit errors are large. They are mere rounding if float32 states agree and
        the median 16-bit errors are similar.
        """
        states, expected = compute(), self._states(batch, None)
        if self._is_exact:
            return not relative_difference(states[mask], expected[mask]) < _EXACT
        if relative_difference(states[mask], expected[mask]) < _ROUNDED:
            return False
        with in_float32(get_blocks(base_model(self.model)), self.device):
            exact, reference = compute(), self._states(batch, None)
        bound = _EXACT if has_exact_products(self.device, "float32") else COARSE
        if not relative_difference(exact[mask], reference[mask]) < bound:
            return True
        errors, expected_errors = (median_errors(s, reference, mask) for s in (states, expected))
        return not (errors < _MAX_NOISE * expected_errors).all()

    def _states(self, batch: dict[str, Tensor], layout: PackedLayout | None) -> Tensor:
        outputs: list[Tensor] = []

        def collect(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
            states = output if isinstance(output, Tensor) else output[0]
            if layout is not None and not layout.is_single_row:
                states = layout.unpack(states)
            outputs.append(states.float())

        with self.last_block.register_forward_hook(collect), using_layout(layout):
            self.model(**batch)
        return outputs[-1]


@contextmanager
def in_float32(blocks: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Run `blocks` in float32 inside the `with` block; a block is cast only while it runs."""
    before, stack = dict[Any, Tensor](), ExitStack()

    def enter(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        stack.enter_context(autocast(device, "float32"))  # what follows the blocks needs autocast
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                before[tensor] = tensor.data
                tensor.data = tensor.data.float()
        return map_leaves(_upcast, (args, kwargs))

    def leave(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        while before:
            tensor, data = before.popitem()
            tensor.data = data
        stack.close()

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(
                block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            )
            hooks.enter_context(block.register_forward_hook(leave, always_call=True))
        yield


def _upcast(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if is_float else value


def _truncate(row: Encoded, size: int, labels: Any) -> Encoded:
    extras = {name: values[:size] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:size], labels=labels, extras=extras)


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """Returns ‖values − expected‖ / ‖expected‖, computed in float32."""
    values, expected = values.float(), expected.float()
    return ((values - expected).norm() / expected.norm()).item()


def median_errors(values: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    """Returns each row's median of ‖value − expected‖ / ‖expected‖ over tokens in `mask`."""
    per_token = (values - expected).norm(dim=-1) / expected.norm(dim=-1)
    return torch.stack([own[at].median() for own, at in zip(per_token, mask, strict=True)])


MIN_TOKENS = 6
"""Minimum tokens of the test rows, so that some lie between the needed ones."""

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


class PruningCheck(StepCheck):
    """Finds the tokens that the last block must compute, and its layers that can skip others."""

    def __call__(self, objective: Objective) -> tuple[TokenSelector | None, list[nn.Module]]:
        """Returns a selector of the tokens needed after the last block, and its prunable layers.

        The latter are linear layers of the block that may skip all other tokens. Returns (None, [])
        if every token may be needed or gradients fail, (selector, []) if the block runs twice.
        """
        batch = self.batch_of(self.pair)
        try:
            with eval_mode(self.model), autocast(self.device, self.dtype):
                select = self._select_tokens(objective, batch)
                return (select, self._select_layers(batch)) if select else (None, [])
        except RuntimeError:
            return None, []

    def _select_tokens(
        self, objective: Objective, batch: dict[str, Tensor]
    ) -> TokenSelector | None:
        if objective.predicts_tokens:
            return SupervisedTokens(objective)
        if not objective.per_row:
            return None
        outputs: list[Tensor] = []

        def cut(block: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001 - a hook
            states = output if isinstance(output, Tensor) else output[0]
            outputs.append(states.detach().requires_grad_())
            states = outputs[-1].clone()
            return states if isinstance(output, Tensor) else (states, *output[1:])

        with self.last_block.register_forward_hook(cut):
            with torch.enable_grad():
                logits = objective.logits(self.model(**batch))
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), outputs[-1:])
        has_gradient = gradient.abs().amax(-1).flatten() != 0
        indices = has_gradient.nonzero()[:, 0]
        candidates = [PooledTokens(last, self.pad_id) for last in (False, True)]
        return next(
            (end for end in candidates if torch.equal(torch.unique(end(batch)), indices)), None
        )

    def _select_layers(self, batch: dict[str, Tensor]) -> list[nn.Module]:
        layout = PackedLayout.from_mask(batch["attention_mask"])
        if layout.tokens < MIN_TOKENS:
            return []
        indices = torch.tensor([0, layout.tokens - 1])
        layout = replace(layout, needed=indices).to(self.device)
        with self._calls() as calls, using_layout(layout), torch.no_grad():
            self.model(**batch)
        if len(calls) != 1:
            return []
        with using_layout(layout):
            return get_prunable_layers(
                self.last_block, *calls[0], layout, get_linear_layers(self.last_block)
            )

    @contextmanager
    def _calls(self) -> Iterator[list[CallArguments]]:
        """Yields a list to which each call of the last block appends its packed arguments."""
        calls: list[CallArguments] = []

        def collect(block: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - a hook
            positional = [None if isinstance(value, Cache) else value for value in args]
            keyword_args = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
            calls.append((tuple(positional), keyword_args))  # a cache would append the tokens twice

        with self.last_block.register_forward_pre_hook(collect, with_kwargs=True):
            yield calls


def get_linear_layers(module: nn.Module) -> list[nn.Module]:
    """Returns the linear layers of `module`; a layer with adapters counts as one."""
    if linear_size(module) is not None:
        return [module]
    return [linear for child in module.children() for linear in get_linear_layers(child)]


def get_cross_entropy_error(
    head: ChunkedCrossEntropy,
    model: Any,
    objective: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    dtype: str,
) -> str:
    """Returns why `head` cannot replace the model's own head and loss; empty if it can."""
    objective = objective.of_tokens
    batch = {k: v.to(device) for k, v in Collator(pad_id)(_labeled_pair(rows, objective)).items()}
    inputs, labels = objective.split(batch)
    chunks: list[Tensor] = []
    try:
        with eval_mode(model), torch.no_grad(), autocast(device, dtype):
            expected, _ = objective.targets(objective.logits(model(**inputs)), labels)
            supervised_loss(head, model, objective, batch, lambda logits, _: chunks.append(logits))
    except UnsupportedModelError as error:
        return str(error)
    logits, bound = torch.cat(chunks), NOISE if has_exact_products(device, dtype) else COARSE
    if logits.shape != expected.shape or not relative_difference(logits, expected) < bound:
        return "its logits are changed beyond what its config describes"
    return ""


def _labeled_pair(rows: Sequence[Encoded], objective: TokenObjective) -> list[Encoded]:
    pair = []
    first = rows[0].sequences[0], rows[min(1, len(rows) - 1)].sequences[0]
    for row, length in zip(first, LENGTHS, strict=True):
        labels = row.input_ids[:length]
        if objective.feeds_labels:
            row_labels = row.labels[:length] if isinstance(row.labels, list | tuple) else ()
            labels = [int(label) for label in row_labels]
        pair.append(_truncate(row, length, labels))
    return pair
