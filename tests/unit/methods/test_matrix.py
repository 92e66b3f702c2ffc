from __future__ import annotations

import itertools
import sys
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
from matrix_cells import QUANTS, RERANK, TinyCell, build_cells, expected_refusal, run_cell
from sampling import every
from unit.models.meta_models import tiny_config
from unit.models.tiny_configs import TINY

ROOT = Path(__file__).resolve().parents[3]

REFUSALS = [
    ("oft", Cell("", "gpt2", "decoder", "text-generation", "none", False),
     "--method oft cannot be used with gpt2: PEFT cannot rotate its Conv1D layers. "
     "Use --method lora, or --quant 4bit, which replaces Conv1D by linear layers."),
    ("lokr", Cell("", "llama", "decoder", "text-generation", "4bit", False),
     "--method lokr cannot be used with --quant 4bit: PEFT multiplies the update with packed 4-bit "
     "weights. Use --quant 8bit, or --method lora."),
    ("full", Cell("", "bert", "encoder", "text-classification", "8bit", False),
     "--method full cannot be used with --quant 8bit: quantized weights receive no gradients. "
     "Use --method qlora, or drop --quant."),
]  # fmt: skip

FORM_REFUSALS = [
    ({"init_lora_weights": "pissa_niter_4"}, "llama", "4bit",
     "--init pissa cannot be used with --quant 4bit: it takes its initialization out of the base's "
     "weights, and what is left would be quantized again. Use --init default, or drop --quant."),
    ({"use_dora": True}, "llama", "8bit",
     "--dora cannot be used with --quant 8bit: PEFT cannot read 8-bit weights for the magnitude. "
     "Use --quant 4bit, or drop --dora."),
    ({"init_lora_weights": "olora"}, "gpt2", "none",
     "--init olora cannot be used with gpt2: its linear layers are Conv1D, and PEFT factorizes "
     "their weight without transposing it. Use --init pissa."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "base", "text"), REFUSALS)
def test_refusal_of_a_method(kind, base, text):
    with pytest.raises(ConfigError) as caught:
        check_supported(SPECS[kind](), base)
    assert str(caught.value) == text


@pytest.mark.parametrize(("fields", "family", "quant", "text"), FORM_REFUSALS)
def test_refusal_of_a_form_of_lora(fields, family, quant, text):
    with pytest.raises(ConfigError) as caught:
        check_supported(
            SPECS["lora"](**fields), Cell("", family, "decoder", "text-generation", quant, False)
        )
    assert str(caught.value) == text


def test_an_encoder_decoder_is_named_as_one():
    base = Cell("", "t5", "encoder-decoder", "summarization", "none", False)
    with pytest.raises(ConfigError, match="--init eva cannot be used with t5, an encoder-decoder"):
        check_supported(SPECS["lora"](init_lora_weights="eva"), base)


def test_every_rule_is_of_rows_that_there_are_and_refuses_a_cell():
    for rule in RULES:
        assert rule.rows <= set(METHOD_INFO)
        assert all(rule in get_possible_rules(Cell(row)) for row in rule.rows)


def test_an_open_cell_is_refused_only_where_all_of_it_is():
    assert get_rule(Cell("oft")) is None
    assert get_rule(Cell("oft", "gpt2")) is None  # a quantized one works
    assert get_rule(Cell("oft", "gpt2", quant="none")) is not None
    assert [rule.condition for rule in get_possible_rules(Cell("oft"))] == [
        "with gpt2 and without --quant"
    ]


@pytest.mark.parametrize("family", TINY)
def test_the_table_says_what_the_methods_find_out_themselves(family):
    for kind, method in METHODS.items():
        if type(method).get_error is not Method.get_error:
            cell = Cell(kind, family, FAMILIES[family].kind, None, "none")
            own = method.get_error(SPECS[kind](), tiny_config(family), "", "", "none")
            assert bool(own) == (get_rule(cell) is not None), own


def test_lora_is_never_refused():
    for cell in build_cells():
        if cell.row in ("lora", "ia3", "vera", "ln-tuning", "adalora"):
            assert expected_refusal(cell) is None


def choose_sample() -> list[TinyCell]:
    """Choose cells that claim yes.

    Each row, family and quantization comes up, and each head on every kind of model.
    """
    claims = [cell for cell in build_cells() if expected_refusal(cell) is None]
    left = dict.fromkeys(
        [("row", cell.row) for cell in claims]
        + [("family", cell.family) for cell in claims]
        + [("head", cell.head, cell.kind) for cell in claims]
        + [("quant", cell.quant) for cell in claims],
        1,
    )
    for row, quant in itertools.product(METHOD_INFO, QUANTS):
        left[("row", row, quant)] = 1
    sample = []
    for cell in claims:
        sides = [("row", cell.row), ("family", cell.family), ("head", cell.head, cell.kind),
                 ("quant", cell.quant), ("row", cell.row, cell.quant)]  # fmt: skip
        missing = sum(left[side] > 0 for side in sides)
        if missing >= 2 or left[("row", cell.row)] > 0 or left[("family", cell.family)] > 0:
            sample.append(cell)
            for side in sides:
                left[side] -= 1
    return sample


SAMPLE = choose_sample()


def test_the_sample_has_everything():
    for values, wanted in (
        (
            [cell.row for cell in SAMPLE],
            [n for n, facts in METHOD_INFO.items() if facts.method in SPECS],
        ),
        ([cell.family for cell in SAMPLE], tiny_models.FAMILIES),
        ([task for cell in SAMPLE for task in cell.tasks], {t for c in SAMPLE for t in c.tasks}),
    ):
        assert set(values) >= set(wanted)
    assert len(SAMPLE) <= 80
    assert {cell.kind for cell in SAMPLE if cell.head == RERANK} == {"encoder", "decoder"}


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_cell_that_claims_yes_trains_and_reloads(cell):
    assert run_cell(cell) > 0


@pytest.mark.parametrize(
    "row", every(2, [name for name in METHOD_INFO if name not in ("pissa", "olora")])
)
def test_every_row_on_a_base_in_bfloat16(row):
    family = "mixtral" if row == "experts" else "llama"
    quant = "4bit" if row == "qlora" else "none"
    cell = TinyCell(row, family, "seqcls", ("text-classification",), quant, "bfloat16")
    assert run_cell(cell) > 0


def test_the_page_is_up_to_date(capsys):
    import write_docs

    assert write_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_nothing_heavy_is_imported():
    import subprocess

    code = (
        "import sys, ftlevel.methods, ftlevel.commands.list_methods\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
