"""What each method is, as data: what it trains, how it is asked for, its paper, whether it merges.

A row is a method or a form of one: DoRA is LoRA with a switch, and has limits of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.sections import Section


@dataclass(frozen=True)
class MethodFacts:
    """One row.

    Attributes:
        name: the row's name.
        kind: the `--method` that it belongs to.
        flags: how it is asked for.
        trains: what is trained.
        merges: how it becomes part of the weights; empty if it cannot.
        paper: where it was published.
        fields: the spec's fields that make the form, by dotted name; none for a method itself.
        llama_7b: parameters that it trains on Llama-2-7B by default.
    """

    name: str
    kind: str
    flags: str
    trains: str
    merges: str
    paper: str
    llama_7b: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, spec: Section) -> bool:
        """Whether a run with `spec` is of this row."""
        values = {"kind": self.kind, **self.fields}
        if self.kind == "lora":  # its forms are those of qlora too
            values["kind"] = ("lora", "qlora") if self.fields else "lora"
        return all(_same(getattr(spec, name, None), value) for name, value in values.items())


def _same(found: Any, wanted: Any) -> bool:
    if wanted is ...:  # any value but none
        return found is not None
    return found in wanted if isinstance(wanted, tuple) else found == wanted


_EXACT = "yes"
_PISSA = ("pissa", "pissa_niter_4", "pissa_niter_16")
_LORA_7B = 19_988_480

FACTS: dict[str, MethodFacts] = {
    row.name: row
    for row in (
        MethodFacts(
            "lora", "lora", "--method lora", "two thin matrices beside every linear", _EXACT,
            "Hu et al., 2021, arXiv:2106.09685", _LORA_7B,
        ),
        MethodFacts(
            "qlora", "qlora", "--method qlora", "LoRA on a 4- or 8-bit base", _EXACT,
            "Dettmers et al., 2023, arXiv:2305.14314", _LORA_7B,
        ),
        MethodFacts(
            "dora", "lora", "--method lora --dora", "LoRA, and the length of every column apart",
            _EXACT, "Liu et al., 2024, arXiv:2402.09353", 21_348_352, {"use_dora": True},
        ),
        MethodFacts(
            "rslora", "lora", "--method lora --rslora", "LoRA, scaled by alpha / √r", _EXACT,
            "Kalajdzievski, 2023, arXiv:2312.03732", _LORA_7B, {"use_rslora": True},
        ),
        MethodFacts(
            "lora+", "lora", "--method lora --lora-plus-ratio 16", "LoRA, whose B learns faster",
            _EXACT, "Hayou et al., 2024, arXiv:2402.12354", _LORA_7B, {"lora_plus_ratio": ...},
        ),
        MethodFacts(
            "gaussian", "lora", "--method lora --init gaussian", "LoRA, A drawn from N(0, 1/r)",
            _EXACT, "Hu et al., 2021, section 4.1", _LORA_7B, {"init_lora_weights": "gaussian"},
        ),
        MethodFacts(
            "orthogonal", "lora", "--method lora --init orthogonal", "LoRA, A and B orthogonal",
            _EXACT, "PEFT", _LORA_7B, {"init_lora_weights": "orthogonal"},
        ),
        MethodFacts(
            "pissa", "lora", "--method lora --init pissa",
            "LoRA, begun at the weights' largest singular vectors", _EXACT,
            "Meng et al., 2024, arXiv:2404.02948", _LORA_7B, {"init_lora_weights": _PISSA},
        ),
        MethodFacts(
            "olora", "lora", "--method lora --init olora", "LoRA, begun at the weights' QR factors",
            _EXACT, "Büyükakyüz, 2024, arXiv:2406.01775", _LORA_7B, {"init_lora_weights": "olora"},
        ),
        MethodFacts(
            "loftq", "lora", "--method lora --init loftq",
            "LoRA, begun at what 4 bits took from the weights", _EXACT,
            "Li et al., 2023, arXiv:2310.08659", _LORA_7B, {"init_lora_weights": "loftq"},
        ),
        MethodFacts(
            "eva", "lora", "--method lora --init eva",
            "LoRA, begun at the inputs' main directions, ranks where they explain most", _EXACT,
            "Paischer et al., 2024, arXiv:2410.07170", _LORA_7B, {"init_lora_weights": "eva"},
        ),
        MethodFacts(
            "experts", "lora", "--method lora --set method.target_parameters=experts",
            "LoRA, and the same on every expert of a mixture", _EXACT, "PEFT", _LORA_7B,
            {"target_parameters": ...},
        ),
        MethodFacts(
            "adalora", "adalora", "--method adalora", "LoRA, its rank pruned by importance",
            _EXACT, "Zhang et al., 2023, arXiv:2303.10512", 29_985_408,
        ),
        MethodFacts(
            "ia3", "ia3", "--method ia3", "a factor for each key, value and inner feature", _EXACT,
            "Liu et al., 2022, arXiv:2205.05638", 614_400,
        ),
        MethodFacts(
            "vera", "vera", "--method vera", "two vectors beside every linear", _EXACT,
            "Kopiczko et al., 2024, arXiv:2310.11454", 1_417_216,
        ),
        MethodFacts(
            "oft", "oft", "--method oft", "a rotation of every linear's input", _EXACT,
            "Qiu et al., 2023, arXiv:2306.07280; 2025, arXiv:2506.19847", 17_649_664,
        ),
        MethodFacts(
            "boft", "boft", "--method boft", "a rotation of every linear's input, in small blocks",
            _EXACT, "Liu et al., 2024, arXiv:2311.06243", 5_914_624,
        ),
        MethodFacts(
            "loha", "loha", "--method loha", "a product of two low-rank updates", _EXACT,
            "Hyeon-Woo et al., 2022, arXiv:2108.06098", 39_976_960,
        ),
        MethodFacts(
            "lokr", "lokr", "--method lokr", "a Kronecker product as update", _EXACT,
            "Yeh et al., 2024, arXiv:2309.14859", 1_331_200,
        ),
        MethodFacts(
            "adapter", "adapter", "--method adapter", "two small layers inside every block", "",
            "Houlsby et al., 2019, arXiv:1902.00751", 134_496_256,
        ),
        MethodFacts(
            "prefix", "prefix", "--method prefix", "keys and values in every attention", "",
            "Li and Liang, 2021, arXiv:2101.00190", 5_242_880,
        ),
        MethodFacts(
            "prompt", "prompt", "--method prompt", "embeddings before the input", "",
            "Lester et al., 2021, arXiv:2104.08691", 81_920,
        ),
        MethodFacts(
            "p-tuning", "p-tuning", "--method p-tuning",
            "embeddings before the input, from a small network", "",
            "Liu et al., 2021, arXiv:2103.10385", 50_425_856,
        ),
        MethodFacts(
            "ln-tuning", "ln-tuning", "--method ln-tuning", "the norm layers", _EXACT,
            "Zhao et al., 2024, arXiv:2312.11420", 266_240,
        ),
        MethodFacts(
            "full", "full", "--method full", "every weight", "is a model already",
            "Devlin et al., 2019, arXiv:1810.04805, appendix A.3", 6_738_415_616,
        ),
        MethodFacts(
            "linear-probe", "full", "--method full --set method.freeze_base=true",
            "the new head only", "is a model already",
            "Alain and Bengio, 2016, arXiv:1610.01644", 8_192, {"freeze_base": True},
        ),
    )
}  # fmt: skip
"""Every row by its name, in the order in which they are shown."""


def rows_of(spec: Section) -> list[MethodFacts]:
    """Return the rows that a run with `spec` is of: its method and its forms."""
    return [row for row in FACTS.values() if row.matches(spec)]
