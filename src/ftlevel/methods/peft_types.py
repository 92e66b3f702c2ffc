"""Registration of our own tuners in PEFT."""

from __future__ import annotations


def ensure_registered() -> None:
    """Make PEFT know the tuners of ftlevel; a second call does nothing.

    Needed before one is built or loaded. Imports peft.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    from ftlevel.methods.bottleneck.config import BOTTLENECK, BottleneckConfig
    from ftlevel.methods.bottleneck.model import BottleneckModel
    from ftlevel.methods.prefix.config import PREFIX_KV, PrefixKvConfig
    from ftlevel.methods.prefix.model import PrefixModel
    from ftlevel.methods.soft_prompt.config import SOFT_PROMPT, SoftPromptConfig
    from ftlevel.methods.soft_prompt.model import SoftPromptModel

    for peft_type, config, model in (
        (BOTTLENECK, BottleneckConfig, BottleneckModel),
        (PREFIX_KV, PrefixKvConfig, PrefixModel),
        (SOFT_PROMPT, SoftPromptConfig, SoftPromptModel),
    ):
        if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
            register_peft_method(name=peft_type.value.lower(), config_cls=config, model_cls=model)
