"""Messages show the built-in model's name instead of its path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import ftlevel
from ftlevel.cli.app import run
from ftlevel.models.sources import builtin_path

INSTALLATION = str(Path(ftlevel.__file__).parent)
MODEL = "builtin:tiny-llama"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write rows, and PEFT adapters whose base is the path of the built-in model."""
    import peft
    import transformers

    monkeypatch.chdir(tmp_path)
    for name, row in (
        ("text", {"text": "a b"}),
        ("label", {"text": "a b", "label": "x"}),
        ("tools", {"messages": CHAT, "tools": TOOLS}),
    ):
        Path(f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(builtin_path("tiny-llama"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained("plain")
    shutil.copytree("plain", "classes")
    settings = json.loads(Path("plain/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"].startswith(INSTALLATION)
    Path("classes/adapter_config.json").write_text(json.dumps(settings | {"task_type": "SEQ_CLS"}))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["train", "--model", MODEL, "--dataset", "text.jsonl", "--target-modules", "q"], 2),
        (["train", "--model", MODEL, "--dataset", "text.jsonl", "--chat-template", "gemma"], 2),
        (["train", "--model", MODEL, "--dataset", "tools.jsonl"], 2),
        (["train", "--adapter", "plain", "--dataset", "text.jsonl", "--lora-r", "3"], 2),
        (["train", "--adapter", "classes", "--dataset", "label.jsonl"], 2),
        (["evaluate", MODEL, "--dataset", "label.jsonl", "--task", "text-classification"], 2),
        (["evaluate", "classes", "--dataset", "label.jsonl"], 2),
        (["evaluate", "plain", "--dataset", "text.jsonl", "--resamples", "0"], 0),
        (["predict", "classes", "--dataset", "label.jsonl"], 2),
        (["generate", "classes", "--prompt", "a"], 2),
        (["generate", MODEL, "--adapter", f"a={MODEL}", "--prompt", "a"], 2),
        (["merge", "classes", "--out", "merged"], 2),
        (["merge", MODEL, "--out", "merged"], 2),
        (["export", MODEL, "--format", "merged", "--out", "exported"], 2),
        (["export", "plain", "--out", "model.gguf", "--dry-run"], 0),
        (["quantize", "classes", "--quant", "4bit", "--out", "quantized"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("data_dir")
def test_installation_path_is_not_printed(
    command: Sequence[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(list(command)) == code
    captured = capsys.readouterr()
    assert INSTALLATION not in captured.out + captured.err
