"""EVA (Paischer et al., 2024): LoRA's A begins in the directions in which training rows vary most.

One pass over batches of training rows gives each linear's inputs; ranks go where they explain most.
"""

from __future__ import annotations

from typing import Any

import torch

from ftlevel.models.hardware import autocast


def start_from_data(model: Any, batches: Any, device: str, dtype: str) -> None:
    """Set A, ranks and scales of every LoRA of `model` (mutated) from the inputs on `batches`.

    Afterwards its config says the default start, as whoever loads the adapter has nothing to redo.

    Args:
        model: a `PeftModel` with one LoRA, fresh.
        batches: of training rows, as `StartInputs.batches` gives them.
        device: torch device type.
        dtype: compute precision's name.
    """
    from peft import initialize_lora_eva_weights

    training = model.training
    model.eval()
    with autocast(device, dtype):
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=_forward,
            prepare_model_inputs_fn=_supervised_positions,
            show_progress_bar=False,
        )
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None
    model.train(training)


def _forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask")})


def _supervised_positions(batch: dict[str, torch.Tensor], _: Any) -> torch.Tensor:
    """Return (n, 2) positions of tokens that are real and, in generation, supervised."""
    return batch["supervised"].nonzero()
