from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from ftlevel.config import SPECS
from ftlevel.errors import ConfigError
from ftlevel.methods import (
    METHOD_INFO,
    METHODS,
    RULES,
    check_supported,
    get_possible_rules,
    get_rule,
)
from ftlevel.methods.base import Method
from ftlevel.methods.support_table import Cell
from ftlevel.models.families import FAMILIES
from matrix_cells import RERANK, TinyCell, build_cells, expected_error, run_cell
from sampling import every
from unit.models.meta_models import tiny_config
from unit.models.tiny_configs import TINY

ROOT = Path(__file__).resolve().parents[3]

METHOD_ERRORS = [
    ("oft", Cell("", "gpt2", "decoder", "text-generation", "none", False),
     "--method oft cannot be used with gpt2: PEFT does not support Conv1D layers. "
     "Use --method lora, or --quant 4bit, which replaces Conv1D by linear layers."),
    ("lokr", Cell("", "llama", "decoder", "text-generation", "4bit", False),
     "--method lokr cannot be used with --quant 4bit: PEFT multiplies the update with packed 4-bit "
     "weights. Use --quant 8bit, or --method lora."),
    ("full", Cell("", "bert", "encoder", "text-classification", "8bit", False),
     "--method full cannot be used with --quant 8bit: quantized weights receive no gradients. "
     "Use --method qlora, or drop --quant."),
]  # fmt: skip

VARIANT_ERRORS = [
    ({"init_lora_weights": "pissa_niter_4"}, "llama", "4bit",
     "--init pissa cannot be used with --quant 4bit: it subtracts its initialization from the "
     "base's weights, and the result would be quantized again. Use --init default, or "
     "drop --quant."),
    ({"use_dora": True}, "llama", "8bit",
     "--dora cannot be used with --quant 8bit: PEFT cannot read 8-bit weights for the magnitude. "
     "Use --quant 4bit, or drop --dora."),
    ({"init_lora_weights": "olora"}, "gpt2", "none",
     "--init olora cannot be used with gpt2: its linear layers are Conv1D, and PEFT factorizes "
     "their weight without transposing it. Use --init pissa."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "base", "text"), METHOD_ERRORS)
def test_unsupported_method_raises_with_reason(kind, base, text):
    with pytest.raises(ConfigError) as caught:
        check_supported(SPECS[kind](), base)
    assert str(caught.value) == text


@pytest.mark.parametrize(("fields", "family", "quant", "text"), VARIANT_ERRORS)
def test_unsupported_lora_variant_raises_with_reason(fields, family, quant, text):
    cell = Cell("", family, "decoder", "text-generation", quant, False)
    with pytest.raises(ConfigError) as caught:
        check_supported(SPECS["lora"](**fields), cell)
    assert str(caught.value) == text


def test_error_names_encoder_decoder():
    base = Cell("", "t5", "encoder-decoder", "summarization", "none", False)
    with pytest.raises(ConfigError, match="--init eva cannot be used with t5, an encoder-decoder"):
        check_supported(SPECS["lora"](init_lora_weights="eva"), base)


def test_every_rule_names_existing_rows_and_applies_to_a_cell():
    for rule in RULES:
        assert rule.rows <= set(METHOD_INFO)
        assert all(rule in get_possible_rules(Cell(row)) for row in rule.rows)


def test_partially_specified_cell_has_no_definite_rule():
    assert get_rule(Cell("oft")) is None
    assert get_rule(Cell("oft", "gpt2")) is None  # a quantized one works
    assert get_rule(Cell("oft", "gpt2", quant="none")) is not None
    assert [rule.condition for rule in get_possible_rules(Cell("oft"))] == [
        "with gpt2 and without --quant"
    ]


@pytest.mark.parametrize("family", TINY)
def test_support_table_agrees_with_get_error(family):
    for kind, method in METHODS.items():
        if type(method).get_error is not Method.get_error:
            cell = Cell(kind, family, FAMILIES[family].kind, None, "none")
            error = method.get_error(SPECS[kind](), tiny_config(family), "", "", "none")
            assert bool(error) == (get_rule(cell) is not None), error


def test_lora_like_methods_are_always_supported():
    for cell in build_cells():
        if cell.row in ("lora", "ia3", "vera", "ln-tuning", "adalora"):
            assert expected_error(cell) is None


OWN_TUNERS = ("adapter", "prefix", "prompt", "p-tuning")
"""Methods whose layers are not PEFT's, so that each quantization is tried."""


def choose_sample() -> list[TinyCell]:
    """Return supported cells that cover each row and quantization, each family and head.

    Each head is covered for every kind of model.
    """
    supported = [cell for cell in build_cells() if expected_error(cell) is None]

    def keys_of(cell):
        return {
            ("row", cell.row), ("family", cell.family), ("head", cell.head, cell.kind),
            ("quant", cell.quant), ("row", cell.row, cell.quant),
        }  # fmt: skip

    uncovered = {key for cell in supported for key in keys_of(cell)}
    sample = []
    for cell in supported:
        missing = uncovered & keys_of(cell)
        required = {("row", cell.row), ("family", cell.family)}
        if cell.row in OWN_TUNERS:
            required.add(("row", cell.row, cell.quant))
        if len(missing) >= 2 or missing & required:
            sample.append(cell)
            uncovered -= missing
    return sample


SAMPLE = choose_sample()


def test_sample_covers_rows_families_tasks_and_kinds():
    assert {c.row for c in SAMPLE} >= {n for n, info in METHOD_INFO.items() if info.method in SPECS}
    assert {c.family for c in SAMPLE} >= set(tiny_models.FAMILIES)
    assert len(SAMPLE) <= 80
    assert {cell.kind for cell in SAMPLE if cell.head == RERANK} == {"encoder", "decoder"}


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_supported_cell_trains_and_reloads(cell):
    assert run_cell(cell) > 0


@pytest.mark.parametrize(
    "row", every(2, [name for name in METHOD_INFO if name not in ("pissa", "olora")])
)
def test_every_row_trains_on_bfloat16_base(row):
    family = "mixtral" if row == "experts" else "llama"
    quant = "4bit" if row == "qlora" else "none"
    cell = TinyCell(row, family, "seqcls", ("text-classification",), quant, "bfloat16")
    assert run_cell(cell) > 0


def test_generated_pages_are_up_to_date(capsys):
    import write_docs

    assert write_docs.main(["--check"]) == 0, capsys.readouterr().out
