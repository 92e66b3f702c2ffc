"""`--resume` compares the inputs of a run byte for byte; `--allow-change` accepts changes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir

ROWS = [{"prompt": f"the value {i}", "completion": f"it is {i} {i * i}"} for i in range(24)]


def store_truncation_and_padding() -> None:
    """Add truncation and padding to the tokenizer file, as in all-MiniLM-L6-v2."""
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
def interrupted_run(original_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Restore the directory of the interrupted run and change to it."""
    folder = original_dir.with_name("begun")
    shutil.rmtree(folder)
    shutil.copytree(original_dir, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def original_dir(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a four-step run that was interrupted after step 2."""
    folder = tmp_path_factory.mktemp("same-run") / "begun"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_and_interrupt(tiny_model_dir)
    shutil.copytree(folder, folder.with_name("pristine"))
    return folder.with_name("pristine")


def train_and_interrupt(tiny_model_dir: ModelDir) -> None:
    shutil.copytree(tiny_model_dir("llama", chat=True), "model")
    store_truncation_and_padding()
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert run([
        "train", "--quiet", "--model", "model", "--dataset", "rows.jsonl", "--batch-size", "4",
        "--max-steps", "4", "--save-steps", "2", "--output-dir", "run", "--no-verify-fast",
    ]) == 0  # fmt: skip
    shutil.rmtree("run/checkpoints/checkpoint-4")  # as if killed after step 2
    for name in ("run/adapter", "run/summary.json"):
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def change_config(**fields: Any) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flip_weight_bit() -> None:
    path = Path("model/model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def change_template() -> None:
    path = Path("model/chat_template.jinja")
    path.write_text("{# another #}" + path.read_text())


def swap_tokens() -> None:
    path = Path("model/tokenizer.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[], None], str]] = {
    "weight bit": (flip_weight_bit, "model.safetensors was "),
    "rms_norm_eps": (lambda: change_config(rms_norm_eps=1e-3), "model.config.rms_norm_eps was"),
    "rope_theta": (
        lambda: change_config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "model.config.rope_parameters.rope_theta was",
    ),
    "hidden_act": (lambda: change_config(hidden_act="gelu"), "model.config.hidden_act was"),
    "template": (change_template, "model.chat_template was"),
    "tokens": (swap_tokens, "was"),
    "rows": (
        lambda: Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1]))),
        "data.fingerprint (rows) was",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_changed_input_is_rejected(interrupted_run: Path, cli: Cli, name: str) -> None:
    change, message = CHANGES[name]
    change()
    error = cli.fails("train --quiet --output-dir run --resume")
    assert "not the same run" in error
    assert message in error
    assert not (interrupted_run / "run/adapter").exists()


def test_allow_change_accepts_config_change(interrupted_run: Path, cli: Cli) -> None:
    change_config(rms_norm_eps=1e-3)
    command = ["train", "--quiet", "--output-dir", "run", "--resume", "--allow-change"]
    error = cli.fails(*command, "model.config.rms_norm_epsilon")
    assert "no such field. Did you mean 'model.config.rms_norm_eps'?" in error
    assert (
        "model.config.rms_norm_eps is 0.001 from here on"
        in cli.run(*command, "model.config.rms_norm_eps").err
    )
    summary = json.loads((interrupted_run / "run/summary.json").read_text())
    (change,) = summary["changed_on_resume"]
    assert (change["step"], change["field"]) == (2, "model.config.rms_norm_eps")
    assert change["is"] == 1e-3


def test_allowed_optimizer_settings_are_used(interrupted_run: Path, cli: Cli) -> None:
    command = ["train", "--quiet", "--output-dir", "run", "--resume", "--learning-rate", "0.5",
               "--weight-decay", "0.25", "--set", "train.adam_beta1=0.75"]  # fmt: skip
    names = ("learning_rate", "weight_decay", "adam_beta1")
    cli(*command, *(f"--allow-change=train.{name}" for name in names))
    state = torch.load("run/checkpoints/checkpoint-4/optimizer.pt", weights_only=True)
    settings = [(g["weight_decay"], g["betas"][0], g["initial_lr"]) for g in state["param_groups"]]
    assert settings == [(0.25, 0.75, 0.5), (0.0, 0.75, 0.5)], "the last group has biases and norms"
    (rate,) = (r["learning_rate"] for r in load_log() if r["step"] == 3)
    assert rate == 0.25, "linear decay: half of the new rate at step 3 of 4"


def load_log() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_lost_predictions_before_training_are_named(interrupted_run: Path, cli: Cli) -> None:
    command = [
        "train", "--model", "model", "--dataset", "rows.jsonl", "--batch-size", "4",
        "--max-steps", "4", "--save-steps", "2", "--no-verify-fast", "--validation-split", "0.2",
        "--eval-on-start", "--output-dir", "evaluated",
    ]  # fmt: skip
    message = "predictions before training are lost by --resume"
    columns = []
    for resume in ([], ["--resume"]):
        assert (message in cli.run(*command, *resume).err) == bool(resume)
        text = Path("evaluated/validation.jsonl").read_text()
        columns.append(json.loads(text.splitlines()[0]).keys())
        shutil.rmtree("evaluated/checkpoints/checkpoint-4")  # as if killed after step 2
        shutil.rmtree("evaluated/adapter")
        Path("evaluated/summary.json").unlink()
    assert columns[0] - columns[1] == {"base_loss", "base_tokens", "base_tokens_right"}
    log = Path("evaluated/metrics.jsonl").read_text().splitlines()
    assert json.loads(log[0])["step"] == 0


def test_allow_change_accepts_changed_weights(interrupted_run: Path, cli: Cli) -> None:
    flip_weight_bit()
    identity = interrupted_run / "run/checkpoints/identity.json"
    before = json.loads(identity.read_text())["model.fingerprint of model.safetensors"]
    command = ["train", "--quiet", "--output-dir", "run", "--resume"]
    assert (
        "model.fingerprint of model.safetensors is "
        in cli.run(*command, "--allow-change model.fingerprint").err
    )
    (change,) = json.loads((interrupted_run / "run/summary.json").read_text())["changed_on_resume"]
    assert change["was"] == before != change["is"]
    assert change["is"] in identity.read_text()


def test_irrelevant_config_fields_may_change(interrupted_run: Path, cli: Cli) -> None:
    change_config(transformers_version="4.0.0", _name_or_path="elsewhere")
    cli("train --quiet --output-dir run --resume")


def test_checkpoint_waits_for_digests_of_base(
    interrupted_run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = []

    def hash_slowly(_: Any) -> dict[str, str]:
        time.sleep(1)
        return {"model.fingerprint of model.safetensors": "abc"}

    monkeypatch.setattr("ftlevel.training.resume.hash_base", hash_slowly)
    monkeypatch.setattr(
        "ftlevel.artifacts.checkpoints.certify",
        lambda path: identities.append((path.parent / "identity.json").read_text()),
    )
    cli("train --quiet run/config.yaml --output-dir new")
    assert all('"abc"' in text for text in identities)
    assert len(identities) == 2
