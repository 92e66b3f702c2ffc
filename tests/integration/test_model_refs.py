"""Every kind of model reference × every PEFT task type × every command.

Each cell works, or is rejected with the expected message. CI runs a fixed sample of the cells, and
`make sweeps` all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.trained.resolve import resolve_model
from model_ref_cases import LABELS, REF_KINDS, TYPES, create_refs, load_peft_model
from run_files import ModelDir
from tiny_models import save_tiny

CreateRefs = Callable[[str], dict[str, Path]]
COMMANDS = ("evaluate", "predict", "generate", "merge", "export", "train", "quantize")
_MODELS = ("merged", "quantized")
_GENERATIVE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
COMPARED_LOSSES = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Task types whose losses are compared in CI."""
CELLS = [
    (ref_kind, kind, command) for ref_kind in REF_KINDS for kind in TYPES for command in COMMANDS
]


def is_in_sample(ref_kind: str, kind: str, command: str) -> bool:
    """Whether a cell runs in CI: half of the cells of PEFT adapters, one of each other pair."""
    numbers = REF_KINDS.index(ref_kind), list(TYPES).index(kind), COMMANDS.index(command)
    if ref_kind == "peft" and (kind == "SEQ_CLS" or sum(numbers) % 2):
        return True
    return sum(numbers) % len(TYPES) == 0


def cells() -> list[Any]:
    """Return all cells as parameters; those beyond the sample have the marker `sweep`."""
    return [
        pytest.param(*cell, marks=[] if is_in_sample(*cell) else pytest.mark.sweep)
        for cell in CELLS
    ]


@pytest.fixture(scope="module")
def refs(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> CreateRefs:
    """Return a function that creates the references of a task type, once."""

    def base(kind: str) -> Path:
        task_type = TYPES[kind]
        overrides = (
            {"num_labels": 2} if task_type.head == "seqcls" else {}
        )  # differs from the adapters
        return tiny_model_dir(task_type.family, task_type.head, **overrides)

    return cache(
        lambda kind: (
            {"base": base(kind)}
            | create_refs(kind, base(kind), tmp_path_factory.mktemp("things") / kind)
        )
    )


def expected_error(ref_kind: str, kind: str, command: str) -> str:
    """Return the expected error message of a cell, or an empty string."""
    if command == "merge" and ref_kind in _MODELS:
        return "is a whole model already"
    if command == "quantize" and ref_kind not in _MODELS:
        return "is an adapter, and only whole models are quantized. Use ftlevel merge"
    if command == "quantize" and ref_kind == "quantized":
        return "is already quantized (4bit nf4)"
    if command == "export" and kind not in _GENERATIVE:
        return f"was trained for {TYPES[kind].task}, and a .gguf file is for programs that write"
    if command == "export" and ref_kind == "quantized":
        return "is stored quantized (4bit nf4)"
    if command == "export" and kind == "SEQ_2_SEQ_LM":
        return "t5 is not among the families that ftlevel writes as GGUF"
    return ""


def command_line(kind: str, command: str, name: Path, folder: Path, out: Path) -> list[str]:
    """Return the arguments of `command` for the model `name`; outputs go to `out`."""
    rows, inputs = folder / "rows.jsonl", folder / "asked.jsonl"
    short = ("--max-new-tokens", "4")
    arguments: dict[str, tuple[Any, ...]] = {
        "evaluate": (name, "--dataset", rows, "--resamples", "0", *short, "--json"),
        "predict": (name, "--dataset", inputs, "--output", out / "answers.jsonl", *short, "--json"),
        "generate": (name, *TYPES[kind].prompt, *short, "--json"),
        "merge": (name, "--out", out / "merged", "--rows", "4", "--json"),
        "export": (name, "--out", out / "model.gguf", "--json"),
        "quantize": (name, "--quant", "4bit", "--no-measure", "--out", out / "quantized", "--json"),
        "train": ("--adapter", name, "--dataset", rows, "--max-steps", "1", "--output-dir",
                  out / "run", "--json"),
    }  # fmt: skip
    return [command, *map(str, arguments[command])]


@pytest.mark.parametrize(("ref_kind", "kind", "command"), cells())
def test_command_supports_reference_or_reports_error(
    ref_kind: str,
    kind: str,
    command: str,
    refs: CreateRefs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = refs(kind)
    capsys.readouterr()
    folder = paths["run"].parent
    code = run(command_line(kind, command, paths[ref_kind], folder, tmp_path))
    captured = capsys.readouterr()
    if reason := expected_error(ref_kind, kind, command):
        assert code == 2
        assert reason in captured.err
        assert not list(tmp_path.iterdir())
        return
    assert code == 0, captured.err
    result = json.loads(captured.out)
    if command in ("evaluate", "predict"):
        assert result["task"] == TYPES[kind].task
    if command == "merge":
        assert result["verified"]


@pytest.mark.parametrize("kind", TYPES)
def test_plain_peft_adapter_logits_match_peft(kind: str, refs: CreateRefs) -> None:
    paths = refs(kind)
    ref = resolve_model(str(paths["peft"]), device="cpu", dtype="float32")
    assert (ref.kind, ref.task) == ("peft", TYPES[kind].task)
    labels = [f"LABEL_{i}" for i in range(LABELS)] if "_CLS" in kind else []
    assert ref.labels == labels
    inputs = {"input_ids": torch.randint(10, 400, (2, 12))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kind == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    loaded, reference = ref.load("cpu"), load_peft_model(kind, paths["peft"], paths["base"])
    ours = loaded.model
    names = ("start_logits", "end_logits") if kind == "QUESTION_ANS" else ("logits",)
    with torch.no_grad():
        actual, expected = ours(**inputs), reference(**inputs)
        for name in names:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
        with loaded.without_adapter():
            assert not torch.equal(ours(**inputs)[names[0]], expected[names[0]])


def test_task_of_model_is_inferred_from_head(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    heads = {("bert", "seqcls"): "text-classification", ("bert", "tokcls"): "token-classification",
             ("bert", "qa"): "question-answering", ("bert", "mlm"): "masked-lm",
             ("qwen2", None): "text-generation", ("t5", None): "text-generation"}  # fmt: skip
    for (family, head), task in heads.items():
        assert resolve_model(str(tiny_model_dir(family, head)), device="cpu").task == task
    without_head = save_tiny(tmp_path / "bare", "bert", "mlm")
    transformers.AutoModel.from_pretrained(without_head).save_pretrained(without_head)
    assert resolve_model(str(without_head), device="cpu").task == "embedding", (
        "a model without a head"
    )


@pytest.mark.parametrize(
    "ref_kind", ["run", *(pytest.param(t, marks=pytest.mark.sweep) for t in ("peft", "merged")),
              "quantized"],
)  # fmt: skip
def test_dtype_option_sets_precision(
    ref_kind: str, refs: CreateRefs, cli: Cli, tmp_path: Path
) -> None:
    """Applies to floating-point and bitsandbytes weights; the run was trained in float32."""
    paths, losses = refs("CAUSAL_LM"), {}
    for command in ("evaluate", "predict", "generate"):
        for dtype in ("float32", "bfloat16"):
            out = tmp_path / f"{command}-{dtype}"
            out.mkdir()
            line = command_line("CAUSAL_LM", command, paths[ref_kind], paths["run"].parent, out)
            result = cli.json(*line, f"--dtype {dtype}")
            assert (result["answers"][0] if command == "generate" else result)["dtype"] == dtype
            if command == "evaluate":
                losses[dtype] = result["metrics"]["loss"]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=1e-2)
    error = cli.fails(f"generate {paths[ref_kind]} --prompt a --dtype float16 --device cpu")
    assert "--dtype float16 cannot be used on the CPU" in error


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in COMPARED_LOSSES else pytest.mark.sweep) for k in TYPES],
)
def test_run_checkpoint_adapter_and_merged_model_have_equal_loss(
    kind: str, refs: CreateRefs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths, losses = refs(kind), {}
    for ref_kind in ("run", "checkpoint", "adapter", "merged"):
        capsys.readouterr()
        line = command_line(kind, "evaluate", paths[ref_kind], paths["run"].parent, tmp_path)
        assert run([*line, "--no-base", "--max-generate-samples", "1"] if kind in _GENERATIVE
                   else [*line, "--no-base"]) == 0  # fmt: skip
        losses[ref_kind] = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert losses["run"] == losses["checkpoint"] == losses["adapter"]
    assert losses["merged"] == pytest.approx(losses["run"], rel=1e-4)
