"""Load a run's base model, apply the method and fast step, shard it, and digest its frozen weights.

FSDP2 shards the model across processes.

    D = Σᵢ m(xᵢ + (i + 1) · φ)  mod 2⁶⁴,   m(z) = s(s(z, 32) · a, 29),   s(z, n) = z ⊕ (z >>> n)

D is the digest of a tensor's bytes as 64-bit words xᵢ, with the odd constants φ and a of SplitMix64
(Steele, Lea and Flood, 2014). m is bijective, so two different tensors have the same sum with
probability 2⁻⁶⁴. The digest is computed on the tensor's device and detects faults, not forgeries.
SHA-256 would copy every weight to the host and hash only 0.5 GB/s there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.pytorch_utils import Conv1D

from ftlevel.config import QuantConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.events import Listener
from ftlevel.fast.likelihoods import base_model
from ftlevel.fast.plan import uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.methods.base import InitializationInputs
from ftlevel.models.hardware import DTYPES, exact_float32, use_expandable_segments
from ftlevel.models.loading import check_finite, check_missing, load_model
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.quantization import build_quantization_config, get_quantization_config
from ftlevel.models.upstream.quantizers import carry_quant_states, scales_of
from ftlevel.models.upstream.shards import LazyWeights, local_shard, whole
from ftlevel.models.upstream.tensors import inner_tensors
from ftlevel.trained.adapt import (
    apply_method,
    copy_initial_state,
    load_initial_weights,
    train_in_float32,
)
from ftlevel.training.memory import set_checkpointing
from ftlevel.training.plan.run import PlannedModel, Run
from ftlevel.training.processes import started_processes
from ftlevel.training.trainer import FtlevelTrainer

_MATRIX = 2  # dimensions


def shard(
    model: Any,
    device: str,
    *,
    keeps_unsharded: bool,
    dtype: torch.dtype,
    slices: LazyWeights | None = None,
) -> None:
    """Shard `model` (modified) with FSDP2; this process's shard is placed on this process's device.

    Tensors that a method adds and trains stay whole in every process; `--method full` shards
    everything. Each block is a unit, so a device stores its shard and at most one whole block. With
    `keeps_unsharded`, gathered blocks are kept until backward (ZeRO-2), else gathered again
    (ZeRO-3). `slices` reads this process's shard of the weights; None if all weights are loaded.
    """
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    replicated = replicated_parameters(model)
    for parameter in replicated:
        parameter.data = parameter.data.to(mesh.device_type)
    blocks = blocks_of(model)
    precision, reshards = MixedPrecisionPolicy(), not keeps_unsharded

    def shard_unit(
        modules: list[Any],
        nested: Sequence[Any],
        reshard_after_forward: bool,
        mp_policy: MixedPrecisionPolicy,
    ) -> None:
        """Shard and gather `modules` together; submodules in `nested` are sharded already."""
        for module in modules:
            carry_quant_states(module, nested)
        load = slices.defer(modules, keep=replicated) if slices is not None else None
        fully_shard(
            modules,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=mp_policy,
            ignored_params=replicated,
        )
        if load is not None:
            load()

    for block in blocks:
        layers = get_cast_layers(block, dtype, replicated)
        if layers:
            cast = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            shard_unit(layers, (), reshards, cast)
        shard_unit([block], layers, reshards, precision)
    # Embeddings, head and final norm belong to the root unit, gathered once per micro-batch.
    shard_unit([model], blocks, False, precision)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device_type)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    _reshard_after_inference(model)


def _reshard_after_inference(model: Any) -> None:
    """Make `model` (modified) reshard its parameters after a forward pass without gradients.

    FSDP2 leaves modules with `reshard_after_forward=False` unsharded until backward. If no backward
    pass follows and one process reads the state dict, only that process would reshard, and its next
    forward pass would not match the others'. `generate` reshards after its last token.
    """
    generate, is_generating = getattr(model, "generate", None), False

    def reshard(*_: Any) -> None:
        if is_generating or torch.is_grad_enabled():
            return
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def generate_and_reshard(*arguments: Any, **options: Any) -> Any:
        nonlocal is_generating
        is_generating = True
        try:
            return cast("Any", generate)(*arguments, **options)
        finally:
            is_generating = False
            reshard()

    model.register_forward_hook(reshard)
    if generate is not None:
        model.generate = generate_and_reshard


def replicated_parameters(model: Any) -> set[torch.nn.Parameter]:
    """Returns the parameters that every process stores whole: adapters, frozen norms and biases.

    Norms and biases are a ten-thousandth of a model, and the fast step reads them directly, without
    calling their modules.
    """
    small = {p for p in model.parameters() if not p.requires_grad and p.dim() < _MATRIX}
    return small if base_model(model) is model else small | set(trainable_parameters(model))


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """Returns the transformer blocks of `model`, those of encoder and decoder in one list."""
    tree = ModuleTree(base_model(model))
    return [block for stack in tree.blocks for block in tree.modules[stack].children()]


def get_cast_layers(
    block: torch.nn.Module, dtype: torch.dtype, replicated: set[torch.nn.Parameter]
) -> list[Any]:
    """Returns the linear layers of `block` with sharded trainable weights wider than `dtype`.

    Autocast would keep a cast copy of each until backward: a full 16-bit model per process. Their
    weights are gathered in `dtype` instead. Norms and embeddings are unchanged, as with autocast.
    """
    return [
        module
        for module in block.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module.weight.requires_grad
        and module.weight not in replicated
        and module.weight.dtype.itemsize > dtype.itemsize
    ]


def is_sharded(model: Any) -> bool:
    """Whether FSDP2 shards `model`."""
    return isinstance(model, FSDPModule)


def trainable_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Returns the trainable parameters of `model`."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gather(model: Any, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and full CPU value of every tensor of the sharded `model`.

    All processes must iterate together; those with `keep` False gather too, but get nothing.
    """
    seen: dict[int, Tensor] = {}  # preserves tied tensors
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            gathered = whole(tensor.detach())
            seen[id(tensor)] = gathered.cpu() if keep else gathered.new_empty(0)
        if keep:
            yield name, seen[id(tensor)]


def apply_fast_step(model: Any, run: Run, listener: Listener) -> FastStep | None:
    """Apply the fast step, if enabled, to `model` (modified); warns of unsupported parts."""
    if not run.fast.enabled:
        return None
    fast = FastStep(model, run.fast)
    args = (run.data.train, run.model.pad_id, run.model.device, run.model.dtype)
    with exact_float32():
        reasons = (*fast.check(*args), fast.check_cross_entropy(run.objective, *args))
        fast.prune_last_layer(run.objective, *args)
    for reason in filter(None, reasons):
        listener.warn(f"{run.model.family}: {reason}.")
    return fast


def get_speed_info(trainer: FtlevelTrainer, failure: str, comparison: Any) -> dict[str, Any]:
    """Returns the `speed` section of summary.json.

    `failure`: as in `FastPlan`; `comparison`: a `StepComparison`, or None if there was none.
    """
    if failure:
        return {"fast": False, "reason": failure}
    if trainer.fast is None:
        return {"fast": False}
    plan = trainer.fast.plan
    return {
        "fast": True,
        "packed": plan.packs,
        "chunked_cross_entropy": plan.chunked_cross_entropy,
        "prefixes_shared": plan.prefix_tree,
        "fused_norms_and_glus": trainer.fast.norm_glu.count if trainer.fast.norm_glu else 0,
        "liger_kernel": plan.liger_kernel,
        "pruned_linears": trainer.fast.pruned_linears,
        "parallel_workers": plan.workers,
        "tokens_per_micro_batch": plan.tokens // plan.workers,
        "chosen_for_bytes": plan.memory or None,
        "made_smaller_for_memory": trainer.smaller.done,
        "tokens_computed": trainer.tokens_computed,
        "tokens_in_rows": int(trainer.tokens_seen),
        "verified": asdict(comparison) if comparison else None,
    }


_PHI = 0x9E3779B97F4A7C15 - 2**64
_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SHIFTS = 32, 29

_CPU_CHUNK = 1 << 15
"""Words per chunk: 256 KiB and two copies fit into a core's cache."""

_GPU_CHUNK = 1 << 23
"""Words per chunk: 64 MiB take a GPU longer than the kernel launches."""


@dataclass(frozen=True)
class TensorHash:
    """Data type, shape and 64-bit digest of a tensor's bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: int


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Mapping[str, TensorHash]:
    """Returns name → hash of each tensor; synchronizes with the device only once.

    Of a sharded tensor, only this process's part is hashed.
    """
    local = [(name, local_shard(tensor.detach())) for name, tensor in tensors]
    sums = [(name, tensor, _hash(tensor)) for name, tensor in local]
    if not sums:
        return {}
    values = torch.stack([value.cpu() for _, _, value in sums]).tolist()
    return {
        name: TensorHash(tensor.dtype, tuple(tensor.shape), value)
        for (name, tensor, _), value in zip(sums, values, strict=True)
    }


def base_name(name: str) -> str:
    """Returns a parameter's name without the parts added by PEFT."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def hash_tensor(tensor: Tensor) -> TensorHash:
    """Returns dtype, shape and 64-bit digest of `tensor`."""
    return hash_tensors([("", tensor)])[""]


def _hash(tensor: Tensor) -> Tensor:
    if parts := inner_tensors(tensor):  # of a tensor subclass
        return _hash(torch.stack([_hash(part).cpu() for part in parts]))
    data = tensor.contiguous().view(-1).view(torch.uint8)
    size = _CPU_CHUNK if data.device.type == "cpu" else _GPU_CHUNK
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), 8 * size):
        total += _hash_chunk(data[start : start + 8 * size], start // 8)
    return total


def _hash_chunk(chunk: Tensor, first: int) -> Tensor:
    """Returns the digest of `chunk` (bytes), a part of a tensor from 64-bit word `first` on."""
    if len(chunk) % 8:
        chunk = torch.cat([chunk, chunk.new_zeros(8 - len(chunk) % 8)])
    if chunk.storage_offset() % 8:
        chunk = chunk.clone()
    x = chunk.view(torch.int64)
    z = x + _keys(len(x), chunk.device)
    z.add_(_wrapped(first * _PHI))
    for shift, factor in zip(_SHIFTS, (_FACTOR, 1), strict=True):
        high = (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        z.bitwise_xor_(high)
        if factor != 1:
            z.mul_(factor)
    return z.sum()


@lru_cache(maxsize=4)
def _keys(num_words: int, device: torch.device) -> Tensor:
    return torch.arange(1, num_words + 1, device=device).mul_(_PHI)


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


_TRAINED_COPY = ".modules_to_save.default."  # PEFT's, for a fully trained module


@dataclass(frozen=True)
class PreparedModel:
    """A model ready for training.

    Attributes:
        model: the base with the method applied.
        initial_state: name → initial tensor that `save_adapter` needs; may be empty.
        digests: hashes of the base's tensors at load time, by their names in the base.
    """

    model: Any
    initial_state: dict[str, Any]
    fast: FastStep | None
    digests: Mapping[str, TensorHash]


def load_training_model(run: Run, listener: Listener) -> PreparedModel:
    """Load the base, apply the method and the fast step, and set up gradient checkpointing."""
    use_expandable_segments(run.model.device)
    shards = run.config.train.shard != "none"
    is_full = not METHODS[run.config.method.kind].is_adapter
    if shards:
        model = load_sharded(run, listener)
    else:
        base = load_base(run)
        digests = {} if is_full else hash_tensors(base.named_parameters())
        model = apply_run_method(base, run)
        initialize_adapter(model, run)
    if is_full or shards:  # of this process's part
        digests = hash_tensors(
            (base_name(n), p) for n, p in model.named_parameters() if not p.requires_grad
        )
    fast = apply_fast_step(model, run, listener)
    set_checkpointing(model, run)
    return PreparedModel(model, copy_initial_state(model, run.config.method), fast, digests)


def apply_run_method(base: Any, run: Run) -> Any:
    """Apply the run's method to `base` (modified) and return the result."""
    config, model = run.config, run.model
    fused = uses_fused_layers(config.method, config.speed, model.quant.kind, model.device)
    return apply_method(base, config.method, run.base, fused=fused and not run.fast.failure)


def initialize_adapter(model: Any, run: Run) -> None:
    """Initialize the adapter of `model` (modified), or load the weights of `--adapter` into it."""
    if run.adapter is None:
        initialize_method(model, run)
    else:
        load_initial_weights(model, run.adapter.directory)


def load_sharded(run: Run, listener: Listener) -> Any:
    """Load the model, apply the method and shard it; a process reads only its shard if possible."""
    reason = get_full_load_reason(run)
    slices = None if reason else LazyWeights()
    local_run = replace(run, model=with_host_device(run.model, slices))
    model = apply_run_method(load_base(local_run, slices), run)
    if slices is not None and (computed := find_computed_tensor(model, slices)):
        reason = f"{computed} is computed from weights of another dtype in the checkpoint"
        del model
        slices = None
        local_run = replace(run, model=with_host_device(run.model, slices))
        model = apply_run_method(load_base(local_run), run)
    initialize_adapter(model, local_run)
    dtype, keeps_unsharded = DTYPES[run.model.dtype], run.config.train.shard == "grads"
    shard(model, run.model.device, keeps_unsharded=keeps_unsharded, dtype=dtype, slices=slices)
    if slices is not None:
        tensors = [(base_name(n), local_shard(p)) for n, p in model.named_parameters()]
        for name, linear in model.named_modules():
            tensors += [(base_name(f"{name}.weight"), scales) for scales in scales_of(linear)]
        started_processes().in_all(lambda: check_finite(tensors, run.model.source.label))
        if slices.converted:
            reason = (
                f"except {slices.converted[0]} and similar tensors, computed from several of "
                f"its tensors"
            )
    loaded_part = "whole by each process" if slices is None else "its own rows by each process"
    listener.choices("train", [Choice("base read", loaded_part, reason)])
    return model


def find_computed_tensor(model: Any, slices: LazyWeights) -> str:
    """Load the weights that the method of `model` (modified) copies, and check other tensors.

    Returns the name of one that was computed from weights that are not loaded yet; "" for none.
    """
    if not hasattr(model, "peft_config"):
        return ""
    names = slices.fill(model, lambda name: base_name(name).replace(_TRAINED_COPY, "."))
    return next(iter(names), "")


def get_full_load_reason(run: Run) -> str:
    """Returns why each process must read all base weights, not only its shard; else empty."""
    model_info, initialization = run.model, METHODS[run.config.method.kind].initialization
    if get_quantization_config(model_info.config) is not None:
        return "it is stored quantized, with scales of whole weights"
    if model_info.quant.kind != "none" and getattr(run.config.method, "use_dora", False):
        return "DoRA's magnitudes are norms of whole weights"
    if model_info.quant.experts:
        return "experts of a mixture are quantized whole"
    if model_info.source.gguf_file:
        return "rows of a .gguf file cannot be read separately"
    if model_info.source.trust_remote_code:
        return "--trust-remote-code: its code may load weights differently"
    if initialization.without_weights(run.config.method) != run.config.method:
        return "the method's initialization may use it"
    return ""


def with_host_device(model_info: PlannedModel, slices: LazyWeights | None) -> PlannedModel:
    """Returns `model_info` with device CPU, so that weights are loaded into host memory.

    Returns it unchanged if `slices` is None and weights are to be quantized on the device.
    """
    on_device = model_info.quant.kind != "none" and slices is None
    return model_info if on_device else replace(model_info, device="cpu")


def load_base(run: Run, slices: LazyWeights | None = None) -> Any:
    """Load the base model for training; new heads are initialized with the run's seed.

    With `slices` (modified), weights are only registered there, to be read after sharding.
    """
    from transformers import set_seed

    set_seed(run.config.train.seed)
    model_info, is_full = run.model, not METHODS[run.config.method.kind].is_adapter
    compute_dtype = DTYPES[model_info.dtype]
    model, missing = load_model(
        model_info.source,
        model_info.config,
        model_info.auto_class,
        dtype=DTYPES["float32"] if is_full else compute_dtype,
        device=model_info.device,
        quantization=build_quantization_config(model_info.quant, compute_dtype, model_info.heads),
        attn_implementation=run.config.model.attn_implementation,
        slices=slices,
    )
    check_missing(missing, model_info.new_modules, model_info.source.label)
    return model


def initialize_method(model: Any, run: Run) -> None:
    """Initialize the adapter of `model` (modified) as its method does, such as EVA from data."""
    size, seed = run.config.train.per_device_train_batch_size, run.config.train.seed
    pad_id, device = run.model.pad_id, run.model.device
    inputs = InitializationInputs(
        batches=lambda: ShuffledBatches(run.data.train, pad_id, size, seed, device),
        float_weights=lambda: float_weights(run),
        device=device,
        dtype=run.model.dtype,
    )
    method = run.config.method
    METHODS[method.kind].initialization.initialize(model, method, inputs)
    train_in_float32(model)


class ShuffledBatches:
    """Collated batches of `rows` in a random order that is the same at each iteration.

    Each batch has a boolean mask `supervised` (batch, seq). It marks all tokens but padding; in
    generation tasks, only tokens with labels.
    """

    def __init__(
        self, rows: Sequence[Encoded], pad_id: int, size: int, seed: int, device: str
    ) -> None:
        self.rows = list(rows)
        random.Random(seed).shuffle(self.rows)
        self.size, self.device = size, device
        self.collate = Collator(pad_id)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.size):
            batch = self.collate(self.rows[start : start + self.size])
            batch = {name: value.to(self.device) for name, value in batch.items()}
            mask, labels = batch["attention_mask"].bool(), batch.get("labels")
            if labels is not None and labels.shape == mask.shape:
                mask &= labels != IGNORED
            yield {**batch, "supervised": mask}


def float_weights(run: Run) -> Callable[[str], Tensor]:
    """Load the unquantized base on the CPU; returns a function: linear layer → weight (out, in)."""
    base = load_base(replace(run, model=replace(run.model, device="cpu", quant=QuantConfig())))

    def weight_of(name: str) -> Tensor:
        linear = base.get_submodule(name)
        weight: Tensor = linear.weight
        return weight if isinstance(linear, torch.nn.Linear) else weight.T  # GPT-2's Conv1D

    return weight_of
