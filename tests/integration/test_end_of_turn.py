"""The end of a chat turn stops generation in every program, also where it is not the EOS token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import Cli
from export_cases import exportable_model
from ftlevel.cli.app import run
from ftlevel.trained.generation import added_stops
from run_files import ModelDir, read_json

pytestmark = pytest.mark.usefixtures("work_dir")

END = {
    "gemma3_text": "<end_of_turn>",
    "phi3": "<|end|>",
    "qwen2": "<|im_end|>",
    "llama": "<|eot_id|>",
}
_SLIDING = ["sliding_attention"] * 2  # llama.cpp's Gemma has a full layer after five
QUESTION = [{"role": "user", "content": "the file"}]


def base_of(tiny_model_dir: ModelDir, folder: Path, family: str) -> Path:
    """Return a tiny base model whose EOS is not the end of a turn, as of published families."""
    overrides: dict[str, Any] = {}
    if family == "gemma3_text":
        overrides["layer_types"] = _SLIDING
    model = exportable_model(tiny_model_dir, folder, family, **overrides)
    base = shutil.copytree(model, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if family == "qwen2":
        tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    if family == "llama":
        names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    path = base / "generation_config.json"
    path.write_text(json.dumps({**read_json(path), "eos_token_id": tokenizer.eos_token_id}))
    return base


def train(base: Path, family: str, *options: str) -> None:
    template = {"gemma3_text": "gemma", "qwen2": "qwen", "llama": "llama-3"}.get(family)
    if template is None:
        Path("phi.jinja").write_text(
            "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
    row = {"messages": [*QUESTION, {"role": "assistant", "content": "is here"}]}
    Path("rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    assert run(["train", "--model", str(base), "--dataset", "rows.jsonl", "--output-dir", "run",
                "--chat-template", template or "phi.jinja", "--max-steps", "30",
                "--quiet", *options]) == 0  # fmt: skip


def generate(model: Path | str) -> list[int]:
    """Return the token ids that plain transformers writes with the model's own settings."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: list[int] = loaded.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    return ids[inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", END)
def test_merged_model_stops_at_end_of_turn(
    family: str, tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    base = base_of(tiny_model_dir, tmp_path, family)
    train(base, family, "--learning-rate", "0.02")
    cli("merge run --out merged --quiet")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    end = tokenizer.convert_tokens_to_ids(END[family])
    ids = generate("merged")
    assert ids[-1] == end
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "is here"
    config = read_json("merged/generation_config.json")
    assert config["eos_token_id"] == [tokenizer.eos_token_id, end]
    assert f"`{END[family]}`" in Path("merged/README.md").read_text()
    text = Path("run/README.md").read_text()
    assert f"eos_token_id=[{tokenizer.eos_token_id}, {end}]" in text


def test_full_fine_tuning_and_its_quantized_model_stop_at_end_of_turn(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    base = base_of(tiny_model_dir, tmp_path, "gemma3_text")
    train(base, "gemma3_text", "--method", "full", "--learning-rate", "0.005", "--save-steps", "20")
    command = ["quantize", "run/adapter", "--quant", "8bit", "--no-measure", "--out", "small", "-q"]
    cli(*command)
    end = AutoTokenizer.from_pretrained("run/adapter").convert_tokens_to_ids("<end_of_turn>")
    assert generate("run/adapter")[-1] == end
    assert "`<end_of_turn>`" in Path("run/README.md").read_text()
    for path in ("run/adapter", "run/checkpoints/checkpoint-20", "small"):
        config = read_json(Path(path, "generation_config.json"))
        assert config["eos_token_id"] == [1, end], path


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_gguf_file_names_end_of_turn(family: str, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    base = base_of(tiny_model_dir, tmp_path, family)
    train(base, family, "--learning-rate", "0.02")
    command = ["export", "run", "--for", "ollama", "--out", "mine.gguf", "--quiet"]
    assert run(command) == 0
    end = AutoTokenizer.from_pretrained("run/adapter").convert_tokens_to_ids(END[family])
    fields: Any = GGUFReader("mine.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    assert f'PARAMETER stop "{END[family]}"' in Path("mine.Modelfile").read_text()


def test_recorded_answers_stop_at_end_of_turn(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    """llama.cpp, which stops there, returns them; a wrong answer is in the output of --json."""
    pytest.importorskip("xllamacpp")
    base = base_of(tiny_model_dir, tmp_path, "llama")
    train(base, "llama", "--learning-rate", "0.02")
    command = ["export", "run", "--for", "llama.cpp", "--format", "gguf", "--out", "mine.gguf"]
    cli(*command, "--outtype f32 --quiet")
    served = read_json("mine.served.json")
    end = AutoTokenizer.from_pretrained("run/adapter").convert_tokens_to_ids("<|eot_id|>")
    answers = [prompt["trained"] for prompt in served["adapters"][0]["prompts"]]
    assert all(end not in answer["ids"][:-1] for answer in answers)
    assert any(answer["ids"][-1] == end for answer in answers)
    check = ["check-served", "mine.gguf", "--in", "llama.cpp", "--json"]
    assert cli.json(*check)["verdict"] == "as trained"
    for answer in answers:
        answer["ids"] = [7 + index for index in answer["ids"]]
    Path("mine.served.json").write_text(json.dumps(served))
    result = json.loads(cli.run(*check, code=1).out)
    assert (result["verdict"], result["exit_code"]) == ("something else", 1)
    assert result["adapters"][0]["weights"]["answers"]
    assert "answers neither as trained" in result["error"]


@pytest.mark.parametrize(("eos", "added"), [(2, {}), ([2], {}), (None, {"</s>": 2})])
def test_eos_that_no_file_names_is_added(eos: Any, added: dict[str, int]) -> None:
    tokenizer = SimpleNamespace(
        chat_template=None, eos_token_id=2, convert_ids_to_tokens={2: "</s>"}.__getitem__
    )
    assert added_stops(eos, tokenizer) == added
