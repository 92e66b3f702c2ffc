"""Every kind of model reference × every PEFT task type × every command.

Each cell works as plain PEFT and transformers do, or is refused with a reason that is true. CI runs
a fixed sample of the cells, and `make sweeps` all of them.
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

from ftlevel.cli.app import run
from ftlevel.trained.resolve import resolve_model
from tiny_models import save_tiny
from trained_things import LABELS, THINGS, TYPES, load_peft, make_things

Things = Callable[[str], dict[str, Path]]
COMMANDS = ("evaluate", "predict", "generate", "merge", "export", "train", "quantize")
_WHOLE = ("merged", "quantized")
_WRITES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
SCORED = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Whose scores CI compares."""
CELLS = [(thing, kind, command) for thing in THINGS for kind in TYPES for command in COMMANDS]


def in_sample(thing: str, kind: str, command: str) -> bool:
    """Whether a cell runs in CI: half of plain PEFT's adapters, and each other pair with one."""
    numbers = THINGS.index(thing), list(TYPES).index(kind), COMMANDS.index(command)
    if thing == "peft" and (kind == "SEQ_CLS" or sum(numbers) % 2):
        return True
    return sum(numbers) % len(TYPES) == 0


def cells() -> list[Any]:
    """Return all cells as parameters; those beyond the sample have the marker `sweep`."""
    return [
        pytest.param(*cell, marks=[] if in_sample(*cell) else pytest.mark.sweep) for cell in CELLS
    ]


@pytest.fixture(scope="module")
def things(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Things:
    """Return a function that makes each thing of a task type, once."""

    def base(kind: str) -> Path:
        own = TYPES[kind]
        more = {"num_labels": 2} if own.head == "seqcls" else {}  # other than the adapters have
        return tiny_model_dir(own.family, own.head, **more)

    return cache(
        lambda kind: (
            {"base": base(kind)}
            | make_things(kind, base(kind), tmp_path_factory.mktemp("things") / kind)
        )
    )


def refusal(thing: str, kind: str, command: str) -> str:
    """Return why a cell cannot work; empty where it works."""
    if command == "merge" and thing in _WHOLE:
        return "is a whole model already"
    if command == "quantize" and thing not in _WHOLE:
        return "is an adapter, and only whole models are quantized. Use ftlevel merge"
    if command == "quantize" and thing == "quantized":
        return "is already quantized (4bit nf4)"
    if command == "export" and kind not in _WRITES:
        return f"was trained for {TYPES[kind].task}, and a .gguf file is for programs that write"
    if command == "export" and thing == "quantized":
        return "is stored quantized (4bit nf4)"
    if command == "export" and kind == "SEQ_2_SEQ_LM":
        return "t5 is not among the families that ftlevel writes as GGUF"
    return ""


def command_line(kind: str, command: str, name: Path, folder: Path, out: Path) -> list[str]:
    """Return the command that is given `name`; it writes to `out`."""
    rows, asked = folder / "rows.jsonl", folder / "asked.jsonl"
    short = ("--max-new-tokens", "4")
    words: dict[str, tuple[Any, ...]] = {
        "evaluate": (name, "--dataset", rows, "--resamples", "0", *short, "--json"),
        "predict": (name, "--dataset", asked, "--output", out / "answers.jsonl", *short, "--json"),
        "generate": (name, *TYPES[kind].prompt, *short, "--json"),
        "merge": (name, "--out", out / "merged", "--rows", "4", "--json"),
        "export": (name, "--out", out / "model.gguf", "--json"),
        "quantize": (name, "--quant", "4bit", "--no-measure", "--out", out / "quantized", "--json"),
        "train": ("--adapter", name, "--dataset", rows, "--max-steps", "1", "--output-dir",
                  out / "run", "--json"),
    }  # fmt: skip
    return [command, *map(str, words[command])]


@pytest.mark.parametrize(("thing", "kind", "command"), cells())
def test_each_command_takes_it_or_says_why_not(
    thing: str,
    kind: str,
    command: str,
    things: Things,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = things(kind)
    capsys.readouterr()
    folder = made["run"].parent
    code = run(command_line(kind, command, made[thing], folder, tmp_path))
    said = capsys.readouterr()
    if reason := refusal(thing, kind, command):
        assert code == 2
        assert reason in said.err
        assert not list(tmp_path.iterdir())
        return
    assert code == 0, said.err
    told = json.loads(said.out)
    if command in ("evaluate", "predict"):
        assert told["task"] == TYPES[kind].task
    if command == "merge":
        assert told["verified"]


@pytest.mark.parametrize("kind", TYPES)
def test_a_plain_peft_adapter_is_the_model_that_plain_peft_loads(kind: str, things: Things) -> None:
    made = things(kind)
    ref = resolve_model(str(made["peft"]), device="cpu", dtype="float32")
    assert (ref.kind, ref.task) == ("peft", TYPES[kind].task)
    labels = [f"LABEL_{i}" for i in range(LABELS)] if "_CLS" in kind else []
    assert ref.labels == labels
    inputs = {"input_ids": torch.randint(10, 400, (2, 12))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kind == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    loaded, plain = ref.load("cpu"), load_peft(kind, made["peft"], made["base"])
    ours = loaded.model
    names = ("start_logits", "end_logits") if kind == "QUESTION_ANS" else ("logits",)
    with torch.no_grad():
        found, expected = ours(**inputs), plain(**inputs)
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
        with loaded.without_adapter():
            assert not torch.equal(ours(**inputs)[names[0]], expected[names[0]])


def test_a_plain_model_has_the_task_of_its_head(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    heads = {("bert", "seqcls"): "text-classification", ("bert", "tokcls"): "token-classification",
             ("bert", "qa"): "question-answering", ("bert", "mlm"): "masked-lm",
             ("qwen2", None): "text-generation", ("t5", None): "text-generation"}  # fmt: skip
    for (family, head), task in heads.items():
        assert resolve_model(str(tiny_model_dir(family, head)), device="cpu").task == task
    bare = save_tiny(tmp_path / "bare", "bert", "mlm")
    transformers.AutoModel.from_pretrained(bare).save_pretrained(bare)
    assert resolve_model(str(bare), device="cpu").task == "embedding", "a model without a head"


@pytest.mark.parametrize(
    "thing", ["run", *(pytest.param(t, marks=pytest.mark.sweep) for t in ("peft", "merged")),
              "quantized"],
)  # fmt: skip
def test_a_precision_that_the_user_names(
    thing: str, things: Things, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On float and on bitsandbytes weights; the run was trained in float32."""
    made, losses = things("CAUSAL_LM"), {}
    for command in ("evaluate", "predict", "generate"):
        for dtype in ("float32", "bfloat16"):
            out = tmp_path / f"{command}-{dtype}"
            out.mkdir()
            line = command_line("CAUSAL_LM", command, made[thing], made["run"].parent, out)
            capsys.readouterr()
            assert run([*line, "--dtype", dtype]) == 0
            told = json.loads(capsys.readouterr().out)
            assert (told["answers"][0] if command == "generate" else told)["dtype"] == dtype
            if command == "evaluate":
                losses[dtype] = told["metrics"]["loss"]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=1e-2)
    assert run(["generate", str(made[thing]), "--prompt", "a", "--dtype", "float16",
                "--device", "cpu"]) == 2  # fmt: skip
    assert "--dtype float16 cannot be used on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in SCORED else pytest.mark.sweep) for k in TYPES]
)
def test_run_checkpoint_adapter_and_merged_score_alike(
    kind: str, things: Things, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made, losses = things(kind), {}
    for thing in ("run", "checkpoint", "adapter", "merged"):
        capsys.readouterr()
        line = command_line(kind, "evaluate", made[thing], made["run"].parent, tmp_path)
        assert run([*line, "--no-base", "--max-generate-samples", "1"] if kind in _WRITES
                   else [*line, "--no-base"]) == 0  # fmt: skip
        losses[thing] = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert losses["run"] == losses["checkpoint"] == losses["adapter"]
    assert losses["merged"] == pytest.approx(losses["run"], rel=1e-4)
