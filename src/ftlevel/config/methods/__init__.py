"""One spec a method: the fields a user may set, with the defaults of its paper.

`MethodConfig` is a union told apart by `kind`, so that a field of another method is an error.
Field names are those of the method's `peft` config.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ftlevel.config.methods.adalora import AdaloraSpec
from ftlevel.config.methods.bottleneck import AdapterSpec
from ftlevel.config.methods.full import FullSpec
from ftlevel.config.methods.ia3 import Ia3Spec
from ftlevel.config.methods.ln_tuning import LnTuningSpec
from ftlevel.config.methods.lora import LoraSpec, QloraSpec
from ftlevel.config.methods.lycoris import LohaSpec, LokrSpec
from ftlevel.config.methods.orthogonal import BoftSpec, OftSpec
from ftlevel.config.methods.prefix import PrefixSpec
from ftlevel.config.methods.soft_prompt import PromptSpec, PTuningSpec
from ftlevel.config.methods.vera import VeraSpec
from ftlevel.config.sections import Section

MethodConfig = Annotated[
    LoraSpec
    | QloraSpec
    | AdaloraSpec
    | Ia3Spec
    | VeraSpec
    | OftSpec
    | BoftSpec
    | LohaSpec
    | LokrSpec
    | AdapterSpec
    | PrefixSpec
    | PromptSpec
    | PTuningSpec
    | LnTuningSpec
    | FullSpec,
    Field(discriminator="kind"),
]

SPECS: dict[str, type[Section]] = {
    "lora": LoraSpec,
    "qlora": QloraSpec,
    "adapter": AdapterSpec,
    "prefix": PrefixSpec,
    "prompt": PromptSpec,
    "p-tuning": PTuningSpec,
    "adalora": AdaloraSpec,
    "ia3": Ia3Spec,
    "vera": VeraSpec,
    "oft": OftSpec,
    "boft": BoftSpec,
    "loha": LohaSpec,
    "lokr": LokrSpec,
    "ln-tuning": LnTuningSpec,
    "full": FullSpec,
}
"""Every method by its name, in the order in which they are listed to users."""

DEFAULT_LEARNING_RATE: dict[str, float] = {
    "lora": 2e-4,  # QLoRA, table 9
    "qlora": 2e-4,
    "adapter": 3e-4,  # the middle of Houlsby et al.'s sweep, section 3.2
    "prefix": 1e-2,  # the top of P-tuning v2's range, which trains plain vectors too
    "prompt": 3e-2,
    "p-tuning": 5e-3,
    "adalora": 1e-3,  # within the range of AdaLoRA's on GLUE
    "ia3": 3e-3,  # (IA)³'s recipe, T-Few
    "vera": 4e-3,  # within the range of VeRA's on GLUE
    "oft": 4e-4,
    "boft": 4e-4,
    "loha": 1e-3,
    "lokr": 1e-3,
    "ln-tuning": 1e-3,
    "full": 2e-5,  # BERT, appendix A.3
}
"""Learning rate where the user gives none; from the paper where one is named."""

_PROJECTED_LEARNING_RATE = 1e-3


def default_learning_rate(method: Section) -> float:
    """Return the learning rate of a method where the user gives none.

    What plain vectors need is too much for the MLP of a projected prefix: at 1e-2 its tanh
    saturates and it learns nothing.
    """
    if isinstance(method, PrefixSpec) and method.prefix_projection:
        return _PROJECTED_LEARNING_RATE
    kind: str = method.kind  # type: ignore[attr-defined]  # every method has one
    return DEFAULT_LEARNING_RATE[kind]


__all__ = [
    "DEFAULT_LEARNING_RATE",
    "SPECS",
    "AdaloraSpec",
    "AdapterSpec",
    "BoftSpec",
    "FullSpec",
    "Ia3Spec",
    "LnTuningSpec",
    "LohaSpec",
    "LokrSpec",
    "LoraSpec",
    "MethodConfig",
    "OftSpec",
    "PTuningSpec",
    "PrefixSpec",
    "PromptSpec",
    "QloraSpec",
    "VeraSpec",
    "default_learning_rate",
]
