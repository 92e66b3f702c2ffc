"""Registration of our own tuners in PEFT."""

from __future__ import annotations

from typing import Any


def register_tuner(peft_type: Any, config: type, model: type) -> None:
    """Make PEFT know a tuner of ours by its type; a second call does nothing."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=peft_type.value.lower(), config_cls=config, model_cls=model)
