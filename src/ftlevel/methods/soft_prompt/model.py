"""The tuner: puts a `SoftPromptLayer` around the stack that takes a model's tokens."""

from __future__ import annotations

import torch

from ftlevel.methods.soft_prompt.config import SoftPromptConfig
from ftlevel.methods.soft_prompt.layer import Role, SoftPromptLayer
from ftlevel.methods.soft_prompt.stacks import find_stacks
from ftlevel.methods.wrapping import WrappingTuner


class SoftPromptModel(WrappingTuner):
    """Prompt tuning and P-tuning of a pretrained model.

    An encoder-decoder gets its prompt in the encoder, and the decoder attends to what the encoder
    makes of it (Lester et al., 2021, section 2).
    """

    prefix: str = "soft_prompt_"
    tuner_layer_cls = SoftPromptLayer

    def find_modules(self) -> list[str]:
        """Return the full names of the stack, or of encoder and decoder."""
        return find_stacks(self.model)

    def fill(self, layer: SoftPromptLayer, adapter_name: str, config: SoftPromptConfig) -> None:
        """Add a prompt to `layer` (mutated)."""
        stacks = find_stacks(self.model)
        role: Role = "whole"
        if len(stacks) == 2:
            decoder = self.model.get_submodule(stacks[1])
            role = "decoder" if decoder in (layer, layer.base_layer) else "encoder"
        layer.add_prompt(adapter_name, config, role)

    @torch.no_grad()
    def fold(self, adapter_name: str = "default") -> None:
        """Replace the encoder of a prompt by what it computes (in place).

        "In the inference, we only need the output embedding h and can discard the LSTM head" (Liu
        et al., 2021, section 3.2).
        """
        for layer in self.layers():
            training = layer.training
            layer.eval()  # no dropout between the layers of an LSTM
            layer.fold(adapter_name)
            layer.train(training)
        self.peft_config[adapter_name].encoder = "none"
