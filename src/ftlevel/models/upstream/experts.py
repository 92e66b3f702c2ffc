"""4-bit experts: a forward that dequantizes one expert at a time, and transformers' quantizer.

transformers' parametrization dequantizes all experts of a block together, and autograd keeps them
until the backward pass. Checkpoints are never stored in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes import matmul_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ftlevel.models.upstream.architectures import BLOCK, NAMES, can_pack

IMPLEMENTATION = "ftlevel_packed"
"""Value of `config._experts_implementation`."""
_EVEN = "ftlevel_packed_even"

Count = Callable[[Tensor, int], list[int]]
"""(expert of each row, number of experts) -> rows per expert."""


def get_rows_per_expert(experts: Tensor, number: int) -> list[int]:
    """Returns how many rows each of `number` experts gets; `experts` has each row's expert."""
    return torch.bincount(experts, minlength=number).tolist()


def split_evenly(experts: Tensor, number: int) -> list[int]:
    """Returns equal row counts for `number` experts (± 1); `experts` may be a fake tensor."""
    return [len(experts) * (i + 1) // number - len(experts) * i // number for i in range(number)]


def state_of(module: Any, name: str) -> Any:
    """Returns bitsandbytes' `QuantState` of a packed expert tensor."""
    return module.parametrizations[name][0].quant_state


def forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    count: Count = get_rows_per_expert,
) -> Tensor:
    """Returns the output `(tokens, hidden)` of packed experts, as in transformers' own forward.

    `self` is the module of the experts, `hidden_states` is `(tokens, hidden)`. `top_k_index` and
    `top_k_weights` are the experts and routing weights of each token, `(tokens, k)`. `count`
    computes the rows per expert.
    """
    tokens, k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = count(experts, self.num_experts)
    rows = hidden_states[order // k]
    up = _multiply(self, NAMES[0], rows, counts)
    down = _multiply(self, NAMES[1], self._apply_gate(up), counts)
    weighted = down * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    output = weighted[inverse].view(tokens, k, -1).sum(dim=1)
    return output.to(hidden_states.dtype)


def _multiply(module: Any, name: str, rows: Tensor, counts: list[int]) -> Tensor:
    """Returns `rows` times weights `name`: `counts[i]` rows with those of expert i, in order."""
    if not hasattr(module, "parametrizations"):  # unpacked tensors without values
        outputs = [
            torch.nn.functional.linear(part, weight)
            for part, weight in zip(torch.split(rows, counts), getattr(module, name), strict=True)
        ]
        return torch.cat(outputs)
    rows = rows.to(state_of(module, name).dtype)
    outputs = [
        matmul_4bit(part, packed.t(), quant_state=weight)
        for part, (packed, weight) in zip(
            torch.split(rows, counts), _one_by_one(module, name), strict=True
        )
        if len(part)
    ]
    return torch.cat(outputs)


def _one_by_one(module: Any, name: str) -> Iterator[tuple[Tensor, Any]]:
    state = state_of(module, name)
    number, *shape = state.shape
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    weight = module.parametrizations[name].original.view(number, -1, 1)
    for index, absmax in enumerate(scales.float().view(number, -1)):
        kwargs = (state.code, state.blocksize, state.quant_type, state.dtype)
        yield weight[index], bnb.QuantState(absmax, torch.Size(shape), *kwargs)


def assume_even_experts(config: Any) -> None:
    """Make models of `config` (modified) route equally many rows to all experts."""
    config._experts_implementation = _EVEN


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
ALL_EXPERTS_FUNCTIONS.register(_EVEN, partial(forward, count=split_evenly))


METHOD = "bitsandbytes_with_experts"


@register_quantization_config(METHOD)
class ExpertsConfig(BitsAndBytesConfig):
    """Config of a 4-bit quantization of linear layers and experts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """4-bit quantizer that also packs experts; `states` maps tensor names to `QuantState`s."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.states: dict[str, Any] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Returns whether the tensor is of a linear layer to quantize or of packable experts."""
        owner, _, name = param_name.rpartition(".")
        if name in NAMES:
            return param_name in self.states or can_pack(model.get_submodule(owner))
        return super().param_needs_quantization(model, param_name, **kwargs)

    def is_serializable(self) -> bool:
        """Returns False: packed experts cannot be reloaded."""
        return False

    def get_quantize_ops(self) -> Any:
        """Returns the operation that packs a tensor."""
        return _Pack(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Switch packed experts to ftlevel's forward (`model` is modified)."""
        for name, state in self.states.items():
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            replace_parameter_4bit_prequantized(
                module, last, state.as_dict(packed=True), module._parameters[last].device
            )
            module.parametrizations[last].original.quant_state = state_of(module, last)
        if self.states:
            model.set_experts_implementation(IMPLEMENTATION)
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES  # checked by other libraries
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Pack(ConversionOps):
    """Packs expert tensors; passes linear layers on to transformers."""

    def __init__(self, quantizer: ExpertsQuantizer, linears: Any) -> None:
        self.quantizer, self.linears = quantizer, linears

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        config = self.quantizer.quantization_config
        tensors: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if name.rpartition(".")[2] not in NAMES:
                tensors |= self.linears.convert({name: value}, **kwargs)
                continue
            weight = value[0] if isinstance(value, list) else value
            packed, self.quantizer.states[name] = bnb.quantize_4bit(
                weight.contiguous(),
                blocksize=BLOCK,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
            )
            tensors[name] = torch.nn.Parameter(packed, requires_grad=False)
        return tensors
