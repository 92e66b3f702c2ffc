"""transformers' 4-bit quantizer, which packs the experts of a mixture too, each as it is loaded.

By transformers' own doors: a quantization config and a quantizer that are registered, and a forward
of experts. A checkpoint is never stored so.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ftlevel.models.upstream.experts.forward import IMPLEMENTATION, state_of
from ftlevel.models.upstream.experts.which import BLOCK, NAMES, can_pack

METHOD = "bitsandbytes_with_experts"


@register_quantization_config(METHOD)
class ExpertsConfig(BitsAndBytesConfig):
    """4 bits for linears and for experts."""

    def __init__(self, **settings: Any) -> None:
        """Take the settings of `BitsAndBytesConfig`."""
        super().__init__(**settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Packs what `Bnb4BitHfQuantizer` packs, and experts.

    Attributes:
        states: name of an experts' tensor → what bitsandbytes needs to read its codes.
    """

    def __init__(self, quantization_config: Any, **settings: Any) -> None:
        """Take the config, and whatever transformers adds."""
        super().__init__(quantization_config, **settings)
        self.states: dict[str, Any] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **settings: Any) -> bool:
        """Whether the tensor is a quantized linear's or of experts that can be packed."""
        owner, _, name = param_name.rpartition(".")
        if name in NAMES:
            module = model.get_submodule(owner)
            return param_name in self.states or can_pack(module)
        needs: bool = super().param_needs_quantization(model, param_name, **settings)
        return needs

    def is_serializable(self) -> bool:
        """Whether transformers may save the model: nothing reads packed experts back."""
        return False

    def get_quantize_ops(self) -> Any:
        """Return what packs a tensor."""
        return _Pack(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **settings: Any) -> Any:
        """Have the packed experts multiplied by ours (`model` is mutated)."""
        for name, state in self.states.items():
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            packed = module._parameters[last]
            replace_parameter_4bit_prequantized(
                module, last, state.as_dict(packed=True), packed.device
            )
            module.parametrizations[last].original.quant_state = state_of(module, last)
        if self.states:
            model.set_experts_implementation(IMPLEMENTATION)
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES  # as other libraries ask
        return super()._process_model_after_weight_loading(model, **settings)


class _Pack(ConversionOps):
    """Packs one tensor: experts here, a linear's by transformers."""

    def __init__(self, quantizer: ExpertsQuantizer, linears: Any) -> None:
        self.quantizer, self.linears = quantizer, linears

    def convert(self, input_dict: dict[str, Any], **settings: Any) -> dict[str, torch.Tensor]:
        """Return the packed tensors by their names."""
        config = self.quantizer.quantization_config
        made: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            if name.rpartition(".")[2] not in NAMES:
                made |= self.linears.convert({name: value}, **settings)
                continue
            weight = value[0] if isinstance(value, list) else value
            packed, self.quantizer.states[name] = bnb.quantize_4bit(
                weight.contiguous(),
                blocksize=BLOCK,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
            )
            made[name] = torch.nn.Parameter(packed, requires_grad=False)
        return made
