"""`merge`: equal bytes to PEFT's `merge_and_unload`, or correct values where PEFT is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ftlevel import MergeConfig, merge
from ftlevel.errors import InputError, RunError
from tiny_models import AUTO_CLASSES, HEADS, build_batch, compute_logits

TinyModelDir = Callable[..., Path]
TASK_TYPES = {
    "causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "seqcls": "SEQ_CLS", "tokcls": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
}  # fmt: skip
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def load(folder: Path, head: str, dtype: Any = "auto", **options: Any) -> Any:
    """Load a model; a missing head is initialized with seed 0."""
    torch.manual_seed(0)
    auto_class = getattr(transformers, AUTO_CLASSES[head])
    return auto_class.from_pretrained(folder, dtype=dtype, **options).eval()


def save_base(model: Any, source: Path, folder: Path, **settings: Any) -> Path:
    """Save `model` with the tokenizer of `source`."""
    model.save_pretrained(folder, **settings)
    for path in source.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def save_adapter(base: Path, folder: Path, head: str, config: Any, **options: Any) -> Path:
    """Save an adapter of `config` on `base` with random values."""
    model = load(base, head, **options)
    config.task_type = TASK_TYPES.get(head)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.float() + torch.randn(parameter.shape) * 0.05
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merge_adapter(adapter: Path, out: Path, **options: Any) -> Path:
    merge(MergeConfig(adapters=[str(adapter)], output_dir=out, verify=False, **options))
    return out


def edit_tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEARS, **settings})


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal(actual: Path, expected: Path) -> None:
    """Compare names, dtypes and bytes of all tensors of two checkpoints."""
    first, second = load_tensors(actual), load_tensors(expected)
    assert set(first) == set(second)
    for name, tensor in second.items():
        assert first[name].dtype == tensor.dtype, name
        assert torch.equal(first[name], tensor), name


def assert_merge_equals_peft(
    base: Path, tmp_path: Path, head: str, config: Any, dtype: str = "auto"
) -> None:
    """Compare ftlevel's merge with PEFT's in float32, cast once to the stored dtype."""
    classes = {"num_labels": 3} if head in ("seqcls", "tokcls") else {}
    adapter = save_adapter(base, tmp_path / "adapter", head, config, **classes)
    model = load(base, head, torch.float32, **classes)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    stored = AutoConfig.from_pretrained(base).dtype if dtype == "auto" else getattr(torch, dtype)
    merged.to(stored).save_pretrained(tmp_path / "peft")
    assert_equal(merge_adapter(adapter, tmp_path / "ftlevel", dtype=dtype), tmp_path / "peft")
    reloaded = load(tmp_path / "ftlevel", head)
    assert reloaded.config.architectures == merged.config.architectures


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora_config(),
    "all-linear": lambda: lora_config(target_modules="all-linear"),
    "rslora": lambda: lora_config(use_rslora=True),
    "dora": lambda: lora_config(use_dora=True),
    "patterns": lambda: lora_config(
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp.up_proj": 6},
        alpha_pattern={r"layers\.0\.self_attn.v_proj": 3},
    ),
    "some-layers": lambda: lora_config(layers_to_transform=[1]),
    "bias-all": lambda: lora_config(bias="all"),
    "norm-in-full": lambda: lora_config(modules_to_save=["norm"]),
    "embedding": lambda: lora_config(target_modules=["embed_tokens", "q_proj"]),
    "embedding-in-full": lambda: lora_config(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lambda: lora_config(trainable_token_indices=[1, 2, 9]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=8),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "boft": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj", "up_proj"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj", "up_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=100),
    "miss": lambda: peft.MissConfig(target_modules=["q_proj", "up_proj"], r=12),
    "miss-bat": lambda: peft.MissConfig(target_modules=["q_proj"], r=16, init_weights="bat"),
    "shira": lambda: peft.ShiraConfig(target_modules=["q_proj", "up_proj"], r=4),
    "hira": lambda: peft.HiraConfig(target_modules=["q_proj", "up_proj"], r=4),
    "gralora": lambda: peft.GraloraConfig(target_modules=["q_proj", "up_proj"], r=4, hybrid_r=2),
    "c3a": lambda: peft.C3AConfig(target_modules=["q_proj", "up_proj"], block_size=16),
    "ln-tuning": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, dtype, marks=[] if at % 2 == wide else pytest.mark.sweep)
        for at, form in enumerate(CONFIGS)
        for wide, dtype in enumerate(("float32", "bfloat16"))
    ],
)
def test_merge_is_bit_for_bit_equal_to_peft(form, dtype, tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    if dtype == "bfloat16":
        base = save_base(load(base, "causal", torch.bfloat16), base, tmp_path / "base")
    assert_merge_equals_peft(base, tmp_path, "causal", CONFIGS[form]())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merge_to_other_dtype_rounds_once(dtype, tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    if dtype == "float32":
        base = save_base(load(base, "causal", torch.bfloat16), base, tmp_path / "base")
    assert_merge_equals_peft(base, tmp_path, "causal", lora_config(), dtype)


FAMILIES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "gpt2": ("gpt2", "causal", lambda: lora_config(target_modules=["c_attn", "c_proj"], bias="all",
                                                   fan_in_fan_out=True)),
    "gpt2-dora": ("gpt2", "causal", lambda: lora_config(target_modules=["c_attn"], use_dora=True,
                                                        bias="lora_only", fan_in_fan_out=True)),
    "bert-head": ("bert", "seqcls", lambda: lora_config(
        target_modules=["query", "dense"], bias="all", modules_to_save=["pooler", "classifier"])),
    "bert-tags": ("bert", "tokcls", lambda: lora_config(target_modules=["query"])),
    "roberta-qa": ("roberta", "qa", lambda: lora_config(target_modules=["value"])),
    "deberta": ("deberta-v2", "seqcls", lambda: lora_config(
        target_modules=["query_proj"], modules_to_save=["pooler", "classifier"])),
    "t5": ("t5", "seq2seq", lambda: lora_config(target_modules=["q", "wo"])),
    "bart": ("bart", "seq2seq", lambda: lora_config(target_modules=["q_proj", "fc1"], bias="all")),
    "mixtral": ("mixtral", "causal", lambda: lora_config(target_modules=["q_proj"])),
    "mixtral-experts": ("mixtral", "causal", lambda: lora_config(
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "qwen3-moe-experts": ("qwen3_moe", "causal", lambda: lora_config(
        target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])),
    "phi3": ("phi3", "causal", lambda: lora_config(target_modules=["qkv_proj", "gate_up_proj"])),
    "gpt_neox": ("gpt_neox", "causal", lambda: lora_config(target_modules=["query_key_value"])),
    "opt": ("opt", "causal", lambda: lora_config(target_modules=["q_proj", "fc2"])),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_merge_of_model_families_equals_peft(case, tiny_model_dir, tmp_path):
    family, head, config = FAMILIES[case]
    assert_merge_equals_peft(tiny_model_dir(family, HEADS[family][0]), tmp_path, head, config())


_QKV = {"vocab_size": 704, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
SPLIT: dict[str, tuple[str, dict[str, Any]]] = {
    "nomic_bert": ("mlm", _QKV),
    "jina_embeddings_v3": ("mlm", _QKV),
    "gte": ("mlm", _QKV),
    "sarvam_moe": ("causal", {**_QKV, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 1,
                              "moe_intermediate_size": 32, "num_experts": 4}),
}  # fmt: skip


@pytest.mark.parametrize("targets", ["o_proj", "q_proj", "q_proj k_proj v_proj", "all-linear"])
@pytest.mark.parametrize("model_type", SPLIT)
def test_stored_tensor_that_is_several_in_the_model(model_type, targets, tiny_model_dir, tmp_path):
    """transformers joins queries, keys and values of these models when it saves them."""
    head, settings = SPLIT[model_type]
    auto_class = getattr(transformers, AUTO_CLASSES[head])
    torch.manual_seed(1)
    model = auto_class.from_config(AutoConfig.for_model(model_type, **settings))
    base = save_base(model, tiny_model_dir("llama"), tmp_path / "base")
    stored, names = load_tensors(base), model.state_dict().keys()
    assert any(name.endswith("q_proj.weight") for name in names)
    assert not any("q_proj" in name for name in stored)
    config = lora_config(target_modules=targets if "-" in targets else targets.split())
    assert_merge_equals_peft(base, tmp_path, head, config)


@pytest.mark.parametrize(
    ("family", "config", "untied"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, True),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}, True),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, False),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}, True),
        ("gpt2", {"target_modules": ["c_attn"]}, False),
    ],
)
def test_tied_weights_are_untied_if_adapter_trains_one(
    family, config, untied, tiny_model_dir, tmp_path
):
    base = tiny_model_dir(family, tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", "causal", lora_config(**config))
    out, batch = merge_adapter(adapter, tmp_path / "out"), build_batch(family)
    expected = compute_logits(PeftModel.from_pretrained(load(base, "causal"), adapter), batch)
    actual = compute_logits(load(out, "causal"), batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is not untied


def test_merge_keeps_shards_of_base(tiny_model_dir, tmp_path):
    source = tiny_model_dir("llama")
    save_base(load(source, "causal"), source, tmp_path / "base", max_shard_size="100KB")
    assert_merge_equals_peft(tmp_path / "base", tmp_path, "causal", lora_config())
    index = "model.safetensors.index.json"
    actual = json.loads((tmp_path / "ftlevel" / index).read_text())["weight_map"]
    assert actual == json.loads((tmp_path / "base" / index).read_text())["weight_map"]
    assert len(set(actual.values())) > 3


@pytest.mark.parametrize("in_bfloat16", ["base", "adapter"])
def test_update_is_added_in_float32(in_bfloat16, tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    if in_bfloat16 == "base":
        base = save_base(load(base, "causal", torch.bfloat16), base, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", "causal", lora_config())
    if in_bfloat16 == "adapter":
        edit_tensors(adapter, lambda t: t.update({name: t[name].bfloat16() for name in t}))
    merged = load_tensors(merge_adapter(adapter, tmp_path / "out", dtype="float32"))
    name = "model.layers.1.self_attn.q_proj"
    saved = load_file(adapter / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    expected = load_tensors(base)[f"{name}.weight"].float() + b @ a * 6 / 4
    torch.testing.assert_close(merged[f"{name}.weight"], expected)


@pytest.mark.parametrize(("family", "modules"), [("llama", LINEARS), ("gpt2", ["c_attn"])])
def test_merge_that_changes_nothing_raises(family, modules, tiny_model_dir, tmp_path):
    config = lora_config(target_modules=modules)  # GPT-2's layers have biases
    adapter = save_adapter(tiny_model_dir(family), tmp_path / "adapter", "causal", config)
    edit_tensors(adapter, lambda t: [t[name].mul_(1e-20) for name in t if "lora_B" in name])
    with pytest.raises(RunError, match=r"the merge changed nothing: .* Use --dtype float32"):
        merge_adapter(adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(min(t)), "1 weights of the adapter are missing"),
        (lambda t: t.update(stray=torch.zeros(2)), "1 match no module of .* model, such as stray"),
    ],
)
def test_adapter_with_missing_or_stray_tensors_raises(change, message, tiny_model_dir, tmp_path):
    adapter = save_adapter(tiny_model_dir("llama"), tmp_path / "adapter", "causal", lora_config())
    edit_tensors(adapter, change)
    with pytest.raises(InputError, match=message):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_missing_in_base_and_adapter_raises(tiny_model_dir, tmp_path):
    base = tiny_model_dir("bert")  # a masked language model without a pooler
    config = lora_config(target_modules=["query"], modules_to_save=["classifier"])
    adapter = save_adapter(base, tmp_path / "adapter", "seqcls", config, num_labels=3)
    with pytest.raises(InputError, match=r"lacks 2 weights .*: bert.pooler.dense.weight"):
        merge_adapter(adapter, tmp_path / "out")
