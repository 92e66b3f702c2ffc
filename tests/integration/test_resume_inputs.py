"""`--resume` compares the inputs of a run byte for byte; `--allow-change` accepts changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run

ROWS = [{"prompt": f"the value {i}", "completion": f"it is {i} {i * i}"} for i in range(24)]


def store_truncation() -> None:
    """Store the tokenizer with truncation and padding, as that of all-MiniLM-L6-v2 is."""
    path = Path("model/tokenizer.json")
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": content["added_tokens"][0]["content"],
    }  # fmt: skip
    path.write_text(json.dumps(content))


@pytest.fixture
def begun(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the run, as it was left, and change into it."""
    folder = pristine.with_name("begun")
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def pristine(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the folder of a run of four steps that was broken off after the second."""
    folder = tmp_path_factory.mktemp("same-run") / "begun"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _begin(tiny_model_dir)
    shutil.copytree(folder, folder.with_name("pristine"))
    return folder.with_name("pristine")


def _begin(tiny_model_dir: Callable[..., Path]) -> None:
    shutil.copytree(tiny_model_dir("llama", chat=True), "model")
    store_truncation()
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert run([
        "train", "--quiet", "--model", "model", "--dataset", "rows.jsonl", "--batch-size", "4",
        "--max-steps", "4", "--save-steps", "2", "--output-dir", "run", "--no-verify-fast",
    ]) == 0  # fmt: skip
    shutil.rmtree("run/checkpoints/checkpoint-4")  # as if it had been killed after the second
    for name in ("run/adapter", "run/summary.json"):
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def change_config(**fields: Any) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def one_bit() -> None:
    path = Path("model/model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def other_template() -> None:
    path = Path("model/chat_template.jinja")
    path.write_text("{# another #}" + path.read_text())


def swapped_tokens() -> None:
    path = Path("model/tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[], None], str]] = {
    "a bit of the weights": (one_bit, "model.safetensors was "),
    "rms_norm_eps": (lambda: change_config(rms_norm_eps=1e-3), "model.config.rms_norm_eps was"),
    "rope_theta": (
        lambda: change_config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "model.config.rope_parameters.rope_theta was",
    ),
    "hidden_act": (lambda: change_config(hidden_act="gelu"), "model.config.hidden_act was"),
    "template": (other_template, "model.chat_template was"),
    "tokens": (swapped_tokens, "was"),
    "rows": (
        lambda: Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1]))),
        "data.fingerprint was",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_something_else(
    begun: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, said = CHANGES[name]
    change()
    assert run(["train", "--quiet", "--output-dir", "run", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "not the same run" in error
    assert said in error
    assert not (begun / "run/adapter").exists()


def test_a_run_goes_on_with_what_may_change(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(rms_norm_eps=1e-3)
    wish = ["train", "--quiet", "--output-dir", "run", "--resume", "--allow-change"]
    assert run([*wish, "model.config.rms_norm_epsilon"]) == 2
    assert "no such field. Did you mean 'model.config.rms_norm_eps'?" in capsys.readouterr().err
    assert run([*wish, "model.config.rms_norm_eps"]) == 0
    assert "model.config.rms_norm_eps is 0.001 from here on" in capsys.readouterr().err
    summary = json.loads((begun / "run/summary.json").read_text())
    (change,) = summary["changed_on_resume"]
    assert (change["step"], change["field"]) == (2, "model.config.rms_norm_eps")
    assert change["is"] == 1e-3


def test_a_run_of_a_version_without_some_settings_goes_on(begun: Path) -> None:
    path = begun / "run/checkpoints/origin.json"
    origin = json.loads(path.read_text())
    del origin["data.gate"]["label_typo"]
    later = ("rl.", "embedding.", "reranking.")
    path.write_text(json.dumps({k: v for k, v in origin.items() if not k.startswith(later)}))
    wish = ["train", "--quiet", "--output-dir", "run", "--resume"]
    assert run([*wish, "--set", "data.gate.label_typo=stop"]) == 2, "it was the default"
    assert run(wish) == 0


def test_a_run_goes_on_with_bytes_of_the_base_that_may_change(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_bit()
    before = (begun / "run/checkpoints/base.json").read_text()
    wish = ["train", "--quiet", "--output-dir", "run", "--resume"]
    assert run([*wish, "--allow-change", "model.fingerprint"]) == 0
    assert "model.fingerprint of model.safetensors is " in capsys.readouterr().err
    (change,) = json.loads((begun / "run/summary.json").read_text())["changed_on_resume"]
    assert change["was"] == json.loads(before)["model.safetensors"] != change["is"]
    assert change["is"] in (begun / "run/checkpoints/base.json").read_text()
    (begun / "run/checkpoints/base.json").unlink()
    assert run(wish) == 0
    assert "so only samples of them are compared" in capsys.readouterr().err


def test_what_says_nothing_of_the_numbers_may_be_another(begun: Path) -> None:
    change_config(transformers_version="4.0.0", _name_or_path="elsewhere")
    assert run(["train", "--quiet", "--output-dir", "run", "--resume"]) == 0
