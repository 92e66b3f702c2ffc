"""The normal form computes the same as the adapter, in PEFT and in readers without its config."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import ftlevel.extras.serving.adapters as adapters_module
from export_cases import create_ids
from ftlevel.errors import InputError, RunError
from ftlevel.extras.serving.config import ExportConfig
from ftlevel.extras.serving.exporting import export
from ftlevel.merging.normal_form import PLAIN_FORMS
from ftlevel.methods.lora_conversion import LoraConversion
from ftlevel.methods.merging import get_merge_error
from served_cases import CASES, peft_logits, write_adapter
from tiny_models import save_tiny

SUPPORTED = [name for name, case in CASES.items() if case.rank is not None]
UNSUPPORTED = [name for name, case in CASES.items() if case.rank is None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", tie_word_embeddings=True)


def write(model: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return export(ExportConfig(model=str(model), out=out, **settings)).summary["adapters"][0]


@pytest.mark.parametrize("name", SUPPORTED)
def test_peft_logits_of_normal_form_match_adapter(base, tmp_path, name):
    case = CASES[name]
    adapter = write_adapter(base, tmp_path / "adapter", case.settings)
    expected, ids = peft_logits(base, adapter, create_ids()), create_ids()
    summary = write(adapter, tmp_path / "out", format="peft", verify=False)
    assert summary["rank"] == case.rank
    assert summary["way"] == ("the probe" if name == "delora" else "its file")
    actual = peft_logits(base, tmp_path / "out", ids)
    effect = float((expected - peft_logits(base, None, ids)).abs().max())
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert effect > 100 * float((actual - expected).abs().max())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (case.rank, case.rank)
    assert not {"rank_pattern", "alpha_pattern"} & {key for key, value in config.items() if value}


@pytest.mark.parametrize("name", [name for name in SUPPORTED if CASES[name].needs_conversion])
def test_naive_reader_of_normal_form_is_correct(base, tmp_path, name):
    """Compare W + alpha / r · B · A of the file's tensors with PEFT's logits of the run."""
    adapter = write_adapter(base, tmp_path / "adapter", CASES[name].settings)
    write(adapter, tmp_path / "out", format="peft", verify=False)
    expected = peft_logits(base, adapter, create_ids())
    errors = {}
    for path in (adapter, tmp_path / "out"):
        errors[path.name] = float((_read_naively(base, path) - expected).abs().max())
    bound = 1e-4 * float(expected.abs().max())
    assert errors["out"] <= bound
    assert errors["adapter"] > 10 * bound  # as saved by PEFT, such a reader gets wrong outputs


def _read_naively(base: Path, adapter: Path) -> torch.Tensor:
    import transformers

    config = json.loads((adapter / "adapter_config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            model.get_submodule(name).weight += config["lora_alpha"] / len(a) * b @ a
        logits: torch.Tensor = model.eval()(create_ids()).logits[0]
    return logits


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_adapter_raises_and_writes_nothing(base, tmp_path, name):
    adapter = write_adapter(base, tmp_path / "adapter", CASES[name].settings)
    with pytest.raises(InputError, match=CASES[name].error):
        write(adapter, tmp_path / "out", format="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_wrong_output_is_detected_and_deleted(base, tmp_path, monkeypatch):
    adapter = write_adapter(base, tmp_path / "adapter", CASES["rslora"].settings)
    original_save = adapters_module.save_normal_form

    def save_modified(path: Path, *arguments: Any) -> None:
        original_save(path, *arguments)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        first = min(tensors)
        save_file({**tensors, first: tensors[first] * 1.01}, file, {"format": "pt"})

    monkeypatch.setattr(adapters_module, "save_normal_form", save_modified)
    with pytest.raises(RunError, match="what was written is not adapter: read back"):
        write(adapter, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_resized_vocabulary_raises(base, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    adapter_config = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(adapter_config))
    with pytest.raises(InputError, match="trained with 712 tokens and its base has 704"):
        write(tmp_path / "adapter", tmp_path / "out", format="peft")


@pytest.mark.parametrize(
    ("family", "head", "settings", "task"),
    [
        ("gpt2", "causal", {"target_modules": ["c_attn", "c_fc"], "use_rslora": True,
                            "fan_in_fan_out": True}, "CAUSAL_LM"),
        ("gpt2", "causal", {"target_modules": ["c_proj"], "init_lora_weights": "pissa",
                            "fan_in_fan_out": True}, "CAUSAL_LM"),
        ("bert", "seqcls", {"target_modules": ["query", "value"], "use_rslora": True}, "SEQ_CLS"),
        ("t5", "seq2seq", {"target_modules": ["q", "v", "wo"], "use_rslora": True},
         "SEQ_2_SEQ_LM"),
    ],
)  # fmt: skip
def test_normal_form_of_other_model_families(tmp_path, family, head, settings, task):
    import transformers

    from tiny_models import AUTO_CLASSES

    base_dir = save_tiny(tmp_path / "base", family, head)
    model = getattr(transformers, AUTO_CLASSES[head]).from_pretrained(base_dir)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type=task, **settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    summary = write(tmp_path / "adapter", tmp_path / "out", format="peft")
    check = summary["check"]
    assert check["max_difference"] <= 1e-5 * check["largest_logit"] + 1e-6
    assert check["effect"] > 1e-3


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("OLoRA", "Export it as plain LoRA first"),  # PEFT ignores case here
        ("corda", "Save it again with path_initial_model_for_weight_conversion"),
    ],
)
def test_adapters_whose_initialization_changed_base_are_not_merged(init, message):
    assert message in get_merge_error({"peft_type": "LORA", "init_lora_weights": init})


def test_normal_forms_csv_lists_every_peft_type():
    """docs/normal_forms.csv, measured by scripts/normal_forms.py, has a row for every type."""
    table = Path(__file__).parents[3] / "docs" / "normal_forms.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = {"BOTTLENECK", "PREFIX_KV", "SOFT_PROMPT"}
    assert {row["peft_type"] for row in rows} == {
        str(getattr(kind, "value", kind)) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING
    } | ours
    for row in rows:
        assert bool(row["rank"]) != bool(row["why"]), row
        if row["rank"]:
            assert float(row["difference"]) <= 1e-4 * float(row["largest"]), row
        if PLAIN_FORMS.get(row["peft_type"], LoraConversion()).error:
            assert row["way"] == "refused", row
