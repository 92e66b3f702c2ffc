"""Fake model built from a config alone, synthetic rows, and tracking of live tensor bytes.

    live(t) = Σ bytes of the storages referenced at t, each counted once;  peak = max over t

Workspace that a kernel allocates and frees internally is not counted.
"""

from __future__ import annotations

import contextlib
import copy
import random
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.prepare.encoder import PreparedData
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.fast.plan import uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import build_task_model, keep_heads, load_tokenizer
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.quantization import build_quantization_config, packs_experts
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream.architectures import can_pack
from ftlevel.models.upstream.fake import OperationWatch, fake_parameters, pack_fake, storage_of
from ftlevel.models.upstream.quantizers import quantize_shape
from ftlevel.models.upstream.tensors import direct_tensors
from ftlevel.tasks import BaseTask
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.resolve import SyntheticBatch
from ftlevel.training.plan.run import Run

_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "no_rope_layers",
    "layers_block_type",
    "moe_layer_freq",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "activation_sparsity_pattern",
)
"""Config fields that may be lists with one entry per layer."""

_LAYER_INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
"""Config fields that list the indices of layers of one kind."""


@dataclass(frozen=True)
class FakeModel:
    """Model of fake tensors and its fast step; `packed` has names of quantized linear layers."""

    model: Any
    fast: FastStep | None
    packed: set[str]

    def close(self) -> None:
        """Remove the fast step, which replaces functions in modules of transformers."""
        if self.fast is not None:
            self.fast.remove()


def create_fake_model(run: Run, layers: Sequence[int] | None) -> FakeModel:
    """Returns the run's model on fake CPU tensors, with `layers` of each stack (None: all)."""
    model_info, method = run.model, METHODS[run.config.method.kind]
    compute_dtype = DTYPES[model_info.dtype]
    model_config = with_layers(model_info.config, layers)
    meta = build_task_model(model_config, model_info.auto_class)
    meta.to(compute_dtype if method.is_adapter else DTYPES["float32"])
    meta.tie_weights()
    quantization = build_quantization_config(model_info.quant, compute_dtype, model_info.heads)
    if quantization is not None:
        args = model_config, model_info.auto_class, model_info.source
        quantization = keep_heads(quantization, *args)
        quantize_shape(meta, quantization)
    base = replace(run.base, targets=targets_in(meta, run.base.targets, layers))
    spec = method.initialization.without_weights(run.config.method)
    fused = uses_fused_layers(
        run.config.method, run.config.speed, model_info.quant.kind, model_info.device
    )
    model = apply_method(meta, spec, base, fused=fused)
    _fill_vectors(model)
    # One worker is simulated; the others allocate the same.
    fast = FastStep(model, replace(run.fast, workers=1)) if run.fast.enabled else None
    packed = _pack_weights(model, compute_dtype, quantization)
    fake_parameters(model)
    model.to = lambda *_, **__: model  # fake tensors cannot be moved
    return FakeModel(model, fast, packed)


def targets_in(
    model: torch.nn.Module, targets: Sequence[str], layers: Sequence[int] | None
) -> list[str]:
    """Returns the new names of `targets` in `model`, which has only `layers` of the original."""
    tree = ModuleTree(model)
    names = []
    for name in targets:
        stack = next((stack for stack in tree.blocks if name.startswith(f"{stack}.")), None)
        if stack is None or layers is None:
            names.append(name)
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in layers:
            names.append(f"{stack}.{layers.index(int(number))}.{rest}")
    return [name for name in names if name in tree.modules]


def _pack_weights(model: Any, compute: Any, quantization: Any) -> set[str]:
    packed: set[str] = set()
    if quantization is not None:
        packed = pack_fake(model, compute, quantization if packs_experts(quantization) else None)
    for module in filter(can_pack, model.modules()):
        if any(weight.dtype == torch.float32 for weight in module.parameters()):
            from ftlevel.models.upstream.experts import assume_even_experts

            assume_even_experts(module.config)
    return packed


def with_layers(config: Any, layers: Sequence[int] | None) -> Any:
    """Returns a copy of `config` reduced to the given `layers` of each stack; None keeps all."""
    config = copy.deepcopy(config)  # the fast step sets the attention in it
    if layers is None:
        return config
    for owner in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in _PER_LAYER:
            if isinstance(kinds := getattr(owner, name, None), list | tuple):
                _set(owner, name, [kinds[at] for at in layers if at < len(kinds)])
        for name in _LAYER_INDICES:
            if isinstance(numbers := getattr(owner, name, None), list | tuple):
                _set(owner, name, [new for new, old in enumerate(layers) if old in numbers])
        if isinstance(dense := getattr(owner, "first_k_dense_replace", None), int):
            owner.first_k_dense_replace = sum(at < dense for at in layers)
        for name in _DEPTHS:
            if isinstance(getattr(owner, name, None), int):
                _set(owner, name, len(layers))
    return config


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError):  # a property, as Jamba's layers_block_type
        setattr(config, name, value)


def _fill_vectors(model: torch.nn.Module) -> None:
    new_parameters: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        parameters, _ = direct_tensors(module)
        for name, tensor in parameters.items():
            if tensor is not None and tensor.dim() < 2:
                if id(tensor) not in new_parameters:
                    ones = torch.ones(tensor.shape, dtype=tensor.dtype)
                    new_parameters[id(tensor)] = (
                        tensor,
                        torch.nn.Parameter(ones, requires_grad=tensor.requires_grad),
                    )
                parameters[name] = new_parameters[id(tensor)][1]


def get_block_signatures(run: Run, layers: Sequence[int] | None = None) -> list[list[Any]]:
    """Returns the signature of each block, in one list per stack of blocks (encoder, decoder).

    A signature has parameter shapes, per-layer config values and adapted modules. Blocks with equal
    signatures need equal memory.
    """
    config = with_layers(run.model.config, layers)
    model = build_task_model(config, run.model.auto_class)
    tree, targets = ModuleTree(model), set(targets_in(model, run.base.targets, layers))
    text = config.get_text_config()
    values = [getattr(text, name, None) for name in _PER_LAYER]
    return [
        [
            (
                [(name, tuple(p.shape)) for name, p in block.named_parameters()],
                [k[at] for k in values if isinstance(k, list | tuple) and at < len(k)],
                [name for name, _ in block.named_modules() if f"{stack}.{at}.{name}" in targets],
            )
            for at, block in enumerate(tree.modules[stack].children())
        ]
        for stack in tree.blocks
    ]


SYNTHETIC_ROWS = "synthetic rows"  # source of rows if no dataset is named
MAX_LENGTH = 1024
"""Tokens per synthetic row, if neither --max-length nor the model sets a lower limit."""

_PAD = 0


def create_synthetic_rows(
    data: DataConfig, num_rows: int
) -> Callable[[BaseTask, str, Any], PreparedData]:
    """Returns a function that creates `num_rows` (≥ 1) random rows of maximum length."""

    def make(task: BaseTask, kind: str, model_config: Any) -> PreparedData:  # noqa: ARG001
        positions = max_positions(model_config) or MAX_LENGTH
        max_length = data.max_length
        length = max_length if isinstance(max_length, int) else min(MAX_LENGTH, positions)
        vocab_size, draw = model_config.get_text_config().vocab_size, random.Random(0)
        rows = [
            task.synthetic_row([draw.randrange(3, vocab_size) for _ in range(length)], row)
            for row in range(num_rows)
        ]
        info = {
            "name": SYNTHETIC_ROWS,
            "train_rows": num_rows,
            "labels": list(task.synthetic_labels),
            "problem_type": None,
            "overlong": data.overlong,
            "fingerprint": "",
            "target_language": None,
            "tokens": num_rows * length,
            "supervised": sum(row.supervised for row in rows),
            **task.synthetic_info,
        }
        table = Table(rows=[], lines=[], source=SYNTHETIC_ROWS, unit="row")
        message = "no --dataset: all as long as --max-length"
        return PreparedData(
            rows,
            [],
            None,
            length,
            table,
            info,
            [Choice("rows", f"synthetic, {length:,} tokens each", message)],
        )

    return make


def load_tokenizer_or_default(source: ModelSource) -> Any:
    """Load the tokenizer of `source`; if it has none, returns an object with padding id 0."""
    try:
        return load_tokenizer(source)
    except InputError:
        return SimpleNamespace(
            pad_token_id=_PAD,
            pad_token="",
            eos_token_id=_PAD,
            eos_token="",
            bos_token_id=None,
            chat_template=None,
            name_or_path=source.name,
        )


def create_synthetic_batch(
    data: DataConfig, source: ModelSource, card: str | None, num_rows: int, tokenizer: Any = None
) -> SyntheticBatch:
    """Returns substitutes for an estimate: a GPU named `card` and `num_rows` random rows.

    With `card` None, this machine's device is used; with `num_rows` = 0, the real data.
    """
    return SyntheticBatch(
        source=source,
        device=None if card is None else Choice("device", "cuda", f"planned for {card}"),
        tokenizer=tokenizer or (load_tokenizer_or_default(source) if num_rows else None),
        rows=create_synthetic_rows(data, num_rows) if num_rows else None,
    )


ACTIVATIONS, WORKSPACE, LOGITS = "activations", "workspace", "logits"
KEYS_AND_VALUES, PACKED = "keys and values", "packed weights"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
WEIGHTS, QUANTIZED, ADAPTER = "weights", "quantized weights", "adapter"
CASTS = "weights in 16 bits"
"""16-bit copies of trained weights that autocast keeps for the backward pass."""

FORWARD, BACKWARD, FIRST_BLOCK, UPDATE = "forward", "backward", "end of backward", "optimizer step"

_PART_BY_PHASE = {FORWARD: ACTIVATIONS, UPDATE: OPTIMIZER}


class LiveMemoryTracker(OperationWatch):  # type: ignore[no-untyped-call]  # torch's
    """Context manager that counts the bytes of live tensors by category.

    The phase `moment` sets the category of new tensors: activations in FORWARD, optimizer in
    UPDATE, else workspace. Before UPDATE, float tensors `(…, vocab_size)` are logits. `peaks` maps
    each phase to bytes by category at its peak, and is updated only while `is_counting`.
    """

    def __init__(self, vocab_size: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.moment = FORWARD
        self.peaks: dict[str, Counter[str]] = {}
        self.is_counting = True
        self._vocab_size = vocab_size
        # Lists of one: the finalizer reads the part after the storage is freed.
        self._parts: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
        self._alive: Counter[str] = Counter()
        self._total = 0
        self._max_total: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes of all tensors that are live now."""
        return self._total

    def has_tensor(self, tensor: Tensor) -> bool:
        """Returns whether the storage of `tensor` is counted."""
        return storage_of(tensor) in self._parts

    def add(self, tensor: Tensor, part: str) -> None:
        """Count the storage of `tensor` in category `part`, and no longer in its former one."""
        storage = storage_of(tensor)
        size, category = storage.nbytes(), self._parts.get(storage)
        if category is None:
            category = self._parts[storage] = [part]
            weakref.finalize(storage, self._remove, category, size)
        else:
            self._remove(category, size)
            category[0] = part
        self._alive[part] += size
        self._total += size
        self._update_peak()

    def _remove(self, category: list[str], size: int) -> None:
        self._alive[category[0]] -= size
        self._total -= size

    def _update_peak(self) -> None:
        if self.is_counting and self._total > self._max_total[self.moment]:
            self._max_total[self.moment] = self._total
            self.peaks[self.moment] = Counter({k: v for k, v in self._alive.items() if v})

    def on_result(self, tensor: Tensor) -> None:
        """Count the storage of an operation's result, unless it is counted already."""
        if not self.has_tensor(tensor):
            self.add(tensor, self._get_part(tensor))

    def on_cast(self, tensor: Tensor, result: Tensor) -> None:
        """Count `result`, which is `tensor` in another dtype, as CASTS if `tensor` is a weight."""
        if self._parts.get(storage_of(tensor)) == [WEIGHTS] and not self.has_tensor(result):
            self.add(result, CASTS)

    def _get_part(self, tensor: Tensor) -> str:
        is_scores = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        if is_scores and tensor.is_floating_point() and self.moment != UPDATE:
            return LOGITS
        return _PART_BY_PHASE.get(self.moment, WORKSPACE)
