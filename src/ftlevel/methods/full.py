"""Training weights of the base itself: full fine-tuning, linear probing, LN-tuning."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.other import FullSpec, LnTuningSpec
from ftlevel.methods.base import Base, MergeInfo, Method, StepSupport
from ftlevel.methods.lora_conversion import LoraConversion
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import MERGES, QUANTIZED, MethodInfo, Rule, rows, single_row

_PRETRAINED_HEAD = frozenset(
    {"text-generation", "summarization", "translation", "masked-lm", "preference"}
)
_IS_A_MODEL = "is a model already"


class Full(Method):
    """Full fine-tuning, and linear probing (`freeze_base`), which trains only the head."""

    info = (
        *single_row(
            "full",
            "every weight",
            _IS_A_MODEL,
            "Devlin et al., 2019, arXiv:1810.04805, appendix A.3",
            6_738_415_616,
        ),
        MethodInfo(
            "linear-probe",
            "full",
            "--method full --set method.freeze_base=true",
            "the new head only",
            _IS_A_MODEL,
            "Alain and Bengio, 2016, arXiv:1610.01644",
            8_192,
            {"freeze_base": True},
        ),
    )
    rules = (
        Rule(
            rows("full", "linear-probe"),
            "quantized weights receive no gradients",
            "Use --method qlora, or drop --quant.",
            quants=QUANTIZED,
        ),
        Rule(
            rows("linear-probe"),
            "its head is the pretrained one, so there is no new head to train",
            "Drop method.freeze_base, or use --method lora.",
            tasks=_PRETRAINED_HEAD,
        ),
        Rule(
            rows("linear-probe"),
            "an embedding model has no head to train",
            "Drop method.freeze_base, or use --method lora.",
            tasks=frozenset({"embedding"}),
        ),
    )
    step = StepSupport(workers=lambda _: "full would hold a gradient for every weight and pass")

    def rates(self, spec: FullSpec) -> Rates:
        """Returns the default learning rates, which depend on whether the base is frozen."""
        if spec.freeze_base:
            source = "a hundredth for wide features"
            return Rates(small=1e-1, large=1e-3, source=source, is_heads=True)
        return Rates(
            small=1e-4,
            large=1e-5,
            source="chosen so that BERT gets 2e-5, appendix A.3",
            # T5's own rate; it scales weights differently.
            by_architecture={"encoder-decoder": 1e-3},
        )

    def format_spec(self, spec: FullSpec) -> str:
        """Returns whether all weights or the head is trained, as text."""
        return "the head is trained" if spec.freeze_base else "every weight is trained"

    def trains_base(self, spec: FullSpec) -> bool:
        """Returns whether more than the head is trained."""
        return not spec.freeze_base

    def unfreeze(self, spec: FullSpec, base: Base, model: Any) -> None:
        """Unfreeze the weights that affect the loss; with `freeze_base`, only those of heads."""
        model.requires_grad_(not spec.freeze_base)
        for name in base.unused:
            model.get_submodule(name).requires_grad_(False)
        for name in base.heads if spec.freeze_base else ():
            model.get_submodule(name).requires_grad_(True)


class LnTuning(Method):
    """LN-tuning: trains only the weights and biases of norm layers, as a PEFT adapter."""

    info = single_row(
        "ln-tuning", "the norm layers", MERGES, "Zhao et al., 2024, arXiv:2312.11420", 266_240
    )
    rate = Rates(
        small=5e-3, large=1e-3, source="not measured", by_architecture={"encoder-decoder": 1e-2}
    )
    merge_info = MergeInfo(
        ("LN_TUNING",),
        lora_conversion=LoraConversion(error="trains norms, which are no matrices. Merge it"),
    )

    def build(self, spec: LnTuningSpec, base: Base) -> Any:
        """Returns `peft.LNTuningConfig`; `base.targets` are the norm layers."""
        from peft import LNTuningConfig

        return LNTuningConfig(**base.shared)

    def default_target_modules(self, spec: LnTuningSpec, model: Any) -> list[str]:
        """Returns the full names of all norm layers outside heads, sorted."""
        from ftlevel.models.module_tree import ModuleTree

        return sorted(ModuleTree(model).norm_names())


METHODS = {"full": Full(), "ln-tuning": LnTuning()}
