"""Tuner that adds a `SoftPromptLayer` to a model's layer stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftlevel.methods.soft_prompt.layer import Role, SoftPromptConfig, SoftPromptLayer
from ftlevel.methods.soft_prompt.stacks import find_stacks
from ftlevel.methods.virtual_tokens import VirtualTokenTuner

NAME = "soft_prompt"
"""Attribute name of the layer in its stack."""


class SoftPromptModel(VirtualTokenTuner):
    """Prompt tuning and P-tuning.

    In an encoder-decoder the prompt is in the encoder, and the decoder attends to its states
    (Lester et al., 2021, section 2).
    """

    prefix: str = "soft_prompt_"
    tuner_layer_cls = SoftPromptLayer

    def find_modules(self) -> list[str]:
        """Return the full names of the layer stack, or of encoder and decoder.

        A model without a head is named by its `ModuleList`, as PEFT cannot target the whole model.
        """
        lists = (n for n, part in self.model.named_modules() if isinstance(part, nn.ModuleList))
        return find_stacks(self.model) or [*lists][:1]

    def inject_adapter(
        self,
        *args: Any,
        state_dict: Any = None,  # noqa: ARG002 - PEFT would look for stacks among its keys
        **kwargs: Any,
    ) -> None:
        """Add an adapter; `state_dict` is ignored, as the config determines the targets."""
        super().inject_adapter(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: SoftPromptConfig,
        adapter_name: str,
        target: Any,
        target_name: str,  # noqa: ARG002 - PEFT's signature
        parent: nn.Module,  # noqa: ARG002 - PEFT's signature
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        """Add a prompt to `target` (mutated); raises `ValueError` without input embeddings."""
        if isinstance(target, nn.ModuleList):
            target = self.model
        if not hasattr(target, "get_input_embeddings"):
            raise ValueError(
                f"{current_key} takes no tokens, and a soft prompt stands among them. Leave "
                "target_modules out, or name the stack of layers that has the embedding."
            )
        if not hasattr(target, NAME):
            target.add_module(NAME, SoftPromptLayer(target))
        layer = getattr(target, NAME)
        stacks = find_stacks(self.model)
        role: Role = "whole"
        if len(stacks) == 2:
            role = "decoder" if current_key == stacks[1] else "encoder"
        layer.add_prompt(adapter_name, peft_config, target, role)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def unload(self) -> nn.Module:
        """Return the base model without prompts."""
        for stack in [module for module in self.model.modules() if hasattr(module, NAME)]:
            getattr(stack, NAME).leave()
            delattr(stack, NAME)
        return super().unload()

    @torch.no_grad()
    def fold(self, adapter_name: str = "default") -> None:
        """Replace the encoder of a prompt by its output (in place)."""
        for layer in self.layers():
            training = layer.training
            layer.eval()  # no dropout between the layers of an LSTM
            layer.fold(adapter_name)
            layer.train(training)
        self.peft_config[adapter_name].encoder = "none"
