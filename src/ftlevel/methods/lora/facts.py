"""Rows and rules of LoRA's variants, and the optimizer of LoRA+ (Hayou et al., 2024)."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.lora import PISSA, LoraSpec
from ftlevel.methods.facts import CONV1D, MERGES, QUANTIZED, MethodFacts, Rule, rows

_LLAMA_7B = 19_988_480


def _form(
    name: str, flags: str, trains: str, paper: str, fields: dict[str, Any], count: int = _LLAMA_7B
) -> MethodFacts:
    """Return the row of a LoRA variant, which QLoRA also supports."""
    return MethodFacts(
        name, "lora", f"--method lora {flags}", trains, MERGES, paper, count, fields, ("qlora",)
    )


FACTS = (
    MethodFacts(
        "lora", "lora", "--method lora", "two thin matrices beside every linear", MERGES,
        "Hu et al., 2021, arXiv:2106.09685", _LLAMA_7B,
    ),
    MethodFacts(
        "qlora", "qlora", "--method qlora", "LoRA on a 4- or 8-bit base", MERGES,
        "Dettmers et al., 2023, arXiv:2305.14314", _LLAMA_7B,
    ),
    _form(
        "dora", "--dora", "LoRA, and the length of every column apart",
        "Liu et al., 2024, arXiv:2402.09353", {"use_dora": True}, 21_348_352,
    ),
    _form(
        "rslora", "--rslora", "LoRA, scaled by alpha / √r",
        "Kalajdzievski, 2023, arXiv:2312.03732", {"use_rslora": True},
    ),
    _form(
        "lora+", "--lora-plus-ratio 16", "LoRA, whose B learns faster",
        "Hayou et al., 2024, arXiv:2402.12354", {"lora_plus_ratio": ...},
    ),
    _form(
        "gaussian", "--init gaussian", "LoRA, A drawn from N(0, 1/r)",
        "Hu et al., 2021, section 4.1", {"init_lora_weights": "gaussian"},
    ),
    _form(
        "orthogonal", "--init orthogonal", "LoRA, A and B orthogonal", "PEFT",
        {"init_lora_weights": "orthogonal"},
    ),
    _form(
        "pissa", "--init pissa", "LoRA, begun at the weights' largest singular vectors",
        "Meng et al., 2024, arXiv:2404.02948", {"init_lora_weights": PISSA},
    ),
    _form(
        "olora", "--init olora", "LoRA, begun at the weights' QR factors",
        "Büyükakyüz, 2024, arXiv:2406.01775", {"init_lora_weights": "olora"},
    ),
    _form(
        "loftq", "--init loftq", "LoRA, begun at what 4 bits took from the weights",
        "Li et al., 2023, arXiv:2310.08659", {"init_lora_weights": "loftq"},
    ),
    _form(
        "eva", "--init eva",
        "LoRA, begun at the inputs' main directions, ranks where they explain most",
        "Paischer et al., 2024, arXiv:2410.07170", {"init_lora_weights": "eva"},
    ),
    _form(
        "experts", "--set method.target_parameters=experts",
        "LoRA, and the same on every expert of a mixture", "PEFT", {"target_parameters": ...},
    ),
)  # fmt: skip

RULES = (
    Rule(
        rows("qlora"), "it is LoRA on a quantized base, and --quant is none",
        "Use --quant 4bit or 8bit, or --method lora.", quants=frozenset({"none"}),
    ),
    Rule(
        rows("dora"), "PEFT cannot read 8-bit weights for the magnitude",
        "Use --quant 4bit, or drop --dora.", quants=frozenset({"8bit"}),
    ),
    Rule(
        rows("pissa", "olora"),
        "it takes its start out of the base's weights, and what is left would be quantized anew",
        "Use --init default, or drop --quant.", quants=QUANTIZED,
    ),
    Rule(
        rows("loftq"), "it begins at what 4-bit quantization took from the weights, and there is "
        "nothing of it here", "Use --quant 4bit, or --init pissa.", quants=frozenset({"none"}),
    ),
    Rule(
        rows("loftq"), "8-bit quantization takes next to nothing from the weights",
        "Use --quant 4bit, or --init default.", quants=frozenset({"8bit"}),
    ),
    Rule(
        rows("orthogonal"), "PEFT draws its start in the type of the weights, which is an integer",
        "Use --init default, or drop --quant.", quants=QUANTIZED,
    ),
    Rule(
        rows("olora"), "its linears are Conv1D, whose transposed weight PEFT factors as it lies",
        "Use --init pissa.", families=CONV1D, quants=frozenset({"none"}),
    ),
    Rule(
        rows("eva"), "encoder and decoder see other inputs, and EVA takes one mask for both",
        "Use --init pissa or default.", kinds=frozenset({"encoder-decoder"}),
    ),
    Rule(
        rows("eva"), "some of its linears see other rows than those of the input, where EVA looks",
        "Use --init pissa or default.", families=frozenset({"deberta-v2", "opt"}),
    ),
    Rule(
        rows("experts"), "it has no experts in one tensor",
        "Drop method.target_parameters; --target-modules all-linear reaches every linear.",
        experts=False,
    ),
)  # fmt: skip


def build_optimizer(spec: LoraSpec, model: Any, arguments: Any) -> Any:
    """Return LoRA+'s optimizer if `lora_plus_ratio` is set; None uses Trainer's default.

    As in PEFT, B and all vectors, such as biases of heads, get `lora_plus_ratio` times A's rate.
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
