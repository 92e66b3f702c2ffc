"""Bad input to `train`: one line, exit 2, before weights load, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import Cli
from run_files import ModelDir, write_rows

ROWS = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(8)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with only a data file, where loading weights fails."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    import ftlevel.training.model as engine

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(engine, "load_model", fail)
    return tmp_path


def get_error(arguments: list[str], cli: Cli) -> str:
    """Run `train`, which must fail, and return its one-line error."""
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    captured = cli.run("train --quiet", *arguments, code=2)
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("ftlevel: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model/here"],
         "--model no/such/model/here does not exist."),
        (["--model", "./gone"], "--model ./gone does not exist."),
        (["--model", "owner/name"], "--model owner/name: no such directory, not in the local "
                                    "cache, and HF_HUB_OFFLINE is set."),
        (["--model", "builtin:tiny-lama"], "tiny-lama"),
        (["--set", "model.revision=main"], "revision main cannot be used with --model "
                                           "builtin:tiny-llama, which is a local model. Drop the "
                                           "revision, or use a Hub id."),
        (["--model", "rows.jsonl"], "--model rows.jsonl is a file."),
        (["--model", "gone.gguf"], "--model gone.gguf does not exist."),
        (["--dataset", "row.jsonl"], "Did you mean 'rows.jsonl'"),
        (["--dataset", "rows.jsonl", "--task", "summarization", "--map", "document=body"],
         "'body'"),
        (["--dataset", "rows.jsonl", "--task", "text-classification"], "label"),
        (["--target-modules", "q_projj"],
         "--target-modules: 'q_projj' matches no module of builtin:tiny-llama."),
        (["--target-modules", "q_proj,foo_proj"], "--target-modules: 'foo_proj' matches no module"),
        (["--method", "ia3", "--target-modules", "lm_head"], "lm_head"),
        (["--dtype", "float16", "--device", "auto"],
         "--dtype float16 cannot be used on the CPU."),
        (["--max-length", "4096"], "--max-length 4,096 is beyond the model's 1,024 positions."),
        (["--dataset", "rows.jsonl", "--max-length", "9"], "8 of 8 rows are longer than 9 tokens"),
        (["--output-dir", "x" * 256], f"{'x' * 256}: File name too long. Name a shorter path."),
        (["--warmup-steps", "5", "--lr-scheduler-type", "constant"],
         "--lr-scheduler-type constant: it has no warm-up. Use constant_with"),
        (["--output-dir", "rows.jsonl"], "rows.jsonl is the name of a file"),
        (["--output-dir", "."], "--output-dir . exists and is not empty."),
        (["--output-dir", ".", "--overwrite"], "--overwrite .: it is not a run of ftlevel"),
        (["--output-dir", ".", "--resume"], "--output-dir . is not a run"),
        (["--output-dir", "gone", "--resume", "--set", "train.seed=1"], "gone"),
        (["--lora-r", "0"], "--lora-r: 0 is out of range"),
        (["--learning-rate", "nan"], "--learning-rate: nan cannot be used"),
        (["--learning-rate", "inf"], "--learning-rate: inf cannot be used"),
        (["--lr", "10"], "--lr: 10.0 is out of range"),
        (["--epochs", "0"], "--epochs: 0.0 is out of range"),
        (["--batch-size", "0"], "--batch-size: 0 is out of range"),
        (["--lora-dropout", "1"], "--lora-dropout: 1.0 is out of range"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_rejected(
    folder: Path, arguments: list[str], message: str, cli: Cli
) -> None:
    assert message in get_error(arguments, cli)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp', "bad.jsonl:2"),
        ('{"prompt": "caf\u00e9", "completion": "b"}\n'.encode("latin-1"), "bad.jsonl:1"),
        ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "UTF-16"),
        (b'{"prompt": "a", "completion": "b"}\n["a", "b"]\n', "bad.jsonl:2"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n', "bad.jsonl:2"),
        (b'{"prompt": "a", "completion": null}\n', "bad.jsonl:1"),
    ],
)
def test_invalid_file_error_names_line(
    folder: Path, content: bytes, message: str, cli: Cli
) -> None:
    (folder / "bad.jsonl").write_bytes(content)
    assert message in get_error(["--dataset", "bad.jsonl"], cli)


def test_single_label_is_rejected(folder: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    write_rows(folder / "one.jsonl", [{"text": "a b", "label": "x"}, {"text": "c", "label": "x"}])
    error = get_error(
        ["--dataset", "one.jsonl", "--task", "text-classification", "--model",
         str(tiny_model_dir("bert"))],
        cli,
    )  # fmt: skip
    assert "'label'" in error
    assert "two" in error or "2" in error


def test_encoder_is_rejected_for_text_generation(
    folder: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    error = get_error(["--dataset", "rows.jsonl", "--model", str(tiny_model_dir("bert"))], cli)
    assert error.startswith("--task text-generation cannot be used with bert, which is an encoder")


def test_gradient_checkpointing_of_albert_is_rejected(
    folder: Path, cli: Cli, tiny_model_dir: ModelDir
) -> None:
    model = tiny_model_dir("albert", "mlm")
    arguments = ["--model", str(model), "--task", "masked-lm", "--dataset", "rows.txt"]
    (folder / "rows.txt").write_text("one line\nanother line\n")
    message = get_error([*arguments, "--gradient-checkpointing"], cli)
    assert message.startswith("--gradient-checkpointing cannot be used with albert: ")


def test_layerdrop_is_disabled(folder: Path, cli: Cli, tiny_model_dir: ModelDir) -> None:
    model = tiny_model_dir("bart", encoder_layerdrop=0.5)
    arguments = ["--model", str(model), "--task", "summarization", "--dataset", "rows.jsonl"]
    arguments += ["--map", "document=prompt", "--map", "summary=completion", "--dry-run"]
    captured = cli.run("train", *arguments)
    assert (
        "layers: none is skipped (the model has encoder_layerdrop 0.5)"
        in captured.out + captured.err
    )


def test_rows_beyond_positions_are_rejected_with_remedy(
    folder: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    write_rows(folder / "long.jsonl", [{"text": "word " * 2000}])
    error = get_error(["--dataset", "long.jsonl", "--model", str(tiny_model_dir("gpt2"))], cli)
    assert "1 of 1 rows are longer than" in error
    assert "--overlong drop" in error


def test_pickled_weights_are_rejected(folder: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    source = tiny_model_dir("llama")
    model = folder / "pickled"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((source / name).read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    error = get_error(["--model", "pickled", "--dataset", "rows.jsonl"], cli)
    assert "only pickled weights (pytorch_model.bin)" in error


def test_dry_run_writes_nothing(folder: Path, cli: Cli) -> None:
    out = cli("train --dataset rows.jsonl --dry-run")
    assert sorted(p.name for p in folder.iterdir()) == ["rows.jsonl"]
    assert "trainable: 135,680 of" in out
    assert "nothing was trained or written" in out
