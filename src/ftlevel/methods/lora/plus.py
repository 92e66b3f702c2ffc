"""LoRA+ (Hayou et al., 2024): B learns faster than A, by groups of the optimizer."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.lora import LoraSpec


def build_optimizer(spec: LoraSpec, model: Any, arguments: Any) -> Any:
    """Return LoRA+'s optimizer if a ratio is asked for; None leaves the choice to Trainer.

    PEFT gives B, and every vector such as a head's bias, `lora_plus_ratio` times A's rate.

    Args:
        spec: the method's.
        model: with a LoRA.
        arguments: the run's `TrainingArguments`.
    """
    if spec.lora_plus_ratio is None:
        return None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    rate = settings.pop("lr")
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=rate,
        loraplus_lr_ratio=spec.lora_plus_ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **settings,
    )
