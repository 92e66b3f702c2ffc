"""Tests of checkpoints whose weights do not match config.json or are not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from ftlevel.config import QuantConfig
from ftlevel.errors import InputError
from ftlevel.models.loading import (
    build_task_model,
    get_new_poolers,
    label_overrides,
    load_config,
    load_model,
    load_tokenizer,
)
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import resolve_source

ModelDir = Callable[..., Path]
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copy_with_weights(tmp_path: Path, tiny_model_dir: ModelDir) -> Callable[..., Path]:
    """Return a factory that copies a tiny model and edits its weights."""

    def copy_model(edit: Callable[[dict[str, torch.Tensor]], None], *kind: str) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(tiny_model_dir(*(kind or ("llama",))), directory)
        path = directory / "model.safetensors"
        weights = load_file(path)
        edit(weights)
        save_file(weights, path, metadata={"format": "pt"})
        return directory

    return copy_model


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def load(directory: Path, kind: str = "none", auto_class: str = "", **overrides: Any) -> Any:
    source = resolve_source(str(directory))
    quantization = build_quantization_config(QuantConfig(kind=kind), torch.float32, [])  # type: ignore[arg-type]
    return load_model(
        source, load_config(source, **overrides), auto_class or "AutoModelForCausalLM",
        dtype=torch.float32, device="cpu", quantization=quantization,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_nonfinite_weight_raises_with_name(copy_with_weights, number, kind):
    directory = copy_with_weights(lambda weights: weights[UP_PROJ][0].__setitem__(0, float(number)))
    with pytest.raises(InputError, match=f"NaN or infinity in 1 of its tensors: {UP_PROJ}"):
        load(directory, kind)


def test_large_finite_weights_are_accepted(copy_with_weights):
    """Their sum exceeds the limit for a weight; the values themselves do not."""
    model, missing = load(copy_with_weights(lambda weights: weights[UP_PROJ].fill_(9e9)))
    assert missing == []
    assert bool((model.get_parameter(UP_PROJ) == torch.tensor(9e9)).all())


def test_implausibly_large_weight_raises_with_name(copy_with_weights):
    directory = copy_with_weights(lambda weights: weights[UP_PROJ][0].__setitem__(0, 3e38))
    with pytest.raises(InputError, match=rf"1 of its tensors, .*: {UP_PROJ} \(3e\+38\)"):
        load(directory)


def test_weight_shape_mismatch_raises_with_name(copy_with_weights):
    directory = copy_with_weights(lambda weights: weights.update({UP_PROJ: torch.zeros(3, 5)}))
    with pytest.raises(InputError, match=f"such as {UP_PROJ}: 3 x 5 in the checkpoint, 128 x 64"):
        load(directory)


def test_extra_layers_in_checkpoint_raise(copy_with_weights):
    path = copy_with_weights(lambda _: None)
    edit_config(path, num_hidden_layers=1, layer_types=None)
    with pytest.raises(InputError, match=r"has weights of layer 1 \(model.layers.* has 1 layers"):
        load(path)


def test_extra_layers_in_bare_encoder_checkpoint_raise(copy_with_weights):
    """The checkpoint lacks the prefix of the class that loads it."""

    def rename(weights):
        for name in [name for name in weights if name.startswith("bert.")]:
            weights[name.removeprefix("bert.")] = weights.pop(name)

    path = copy_with_weights(rename, "bert", "seqcls")
    edit_config(path, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"has weights of layer 1 \(.*has 1 layers"):
        load(path, "none", "AutoModelForSequenceClassification", num_labels=3)


@pytest.mark.parametrize("kind", ["none", "4bit"])
def test_unexpected_bias_in_checkpoint_raises(copy_with_weights, kind):
    name = "model.layers.1.mlp.down_proj.bias"
    directory = copy_with_weights(lambda weights: weights.update({name: torch.ones(64)}))
    with pytest.raises(InputError, match=f"has {name}, and its config.json describes a model with"):
        load(directory, kind)


def test_unrelated_extra_weights_are_ignored(copy_with_weights):
    """Old checkpoints contain buffers; checkpoints of other tasks contain heads."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "score.weight": torch.ones(3, 64),
        "vision.layers.7.weight": torch.ones(3),
    }
    model, missing = load(copy_with_weights(lambda weights: weights.update(extra)))
    assert missing == []
    assert set(extra).isdisjoint(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_int8_or_float8_weights_without_scale_raise(copy_with_weights, dtype):
    directory = copy_with_weights(
        lambda weights: weights.update({UP_PROJ: weights[UP_PROJ].to(dtype)})
    )
    with pytest.raises(InputError, match=f"stores 1 of its weights as .*8.*, such as {UP_PROJ}"):
        load(directory)


@pytest.mark.parametrize("classes", [2, 3])
def test_head_with_other_number_of_classes_is_reinitialized(copy_with_weights, classes):
    directory = copy_with_weights(lambda _: None, "bert", "seqcls")  # three classes
    overrides = label_overrides([f"class {index}" for index in range(classes)])
    model, missing = load(directory, "none", "AutoModelForSequenceClassification", **overrides)
    assert model.classifier.weight.shape == (classes, 64)
    assert missing == ([] if classes == 3 else ["classifier.bias", "classifier.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
     ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
     ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
      "it needs custom Python code .* train and preview run it with --trust-remote-code")],
)  # fmt: skip
def test_invalid_config_raises(copy_with_weights, fields, message):
    path = copy_with_weights(lambda _: None)
    edit_config(path, **fields)
    with pytest.raises(InputError, match=message):
        load(path)


def test_damaged_index_raises(copy_with_weights):
    directory = copy_with_weights(lambda _: None)
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="its weights cannot be read"):
        load(directory)


@pytest.mark.parametrize("kind", ["none", "4bit"])
@pytest.mark.parametrize("head", ["causal", "seqcls"])
def test_truncated_weights_raise(copy_with_weights, kind, head):
    directory = copy_with_weights(lambda _: None, "llama" if head == "causal" else "bert", head)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    auto_class = {"seqcls": "AutoModelForSequenceClassification"}.get(head, "")
    with pytest.raises(InputError, match=r"its weights cannot be read .* cut short\?"):
        load(directory, kind, auto_class)
    source = resolve_source(str(directory))
    meta = build_task_model(load_config(source), "AutoModel")
    with pytest.raises(InputError, match=r"its weights cannot be read .* cut short\?"):
        get_new_poolers(meta, source)


def test_gpt2_gguf_has_its_number_of_positions(tmp_path):
    config = GPT2Config(vocab_size=48, n_positions=40, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    path = tmp_path / "gpt2.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in model.transformer.state_dict().items():
        stored = tensor.T if name.endswith(("attn.weight", "proj.weight", "fc.weight")) else tensor
        key = names.get_name(f"transformer.{name}", (".weight", ".bias"))
        writer.add_tensor(key, stored.contiguous().numpy())
    writer.add_tensor("output.weight", model.lm_head.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_config(resolve_source(str(path))).n_positions == 40
    loaded, _ = load(path)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\0\0\0" + b"\1" + b"\0" * 7])
def test_truncated_gguf_raises(tmp_path, content):
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="download incomplete"):
        load_config(resolve_source(str(path)))


def test_missing_tokenizer_raises(copy_with_weights):
    directory = copy_with_weights(lambda _: None)
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\. Expected tokenizer.json in"):
        load_tokenizer(resolve_source(str(directory)))


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "qwen2", "t5", "gemma", "gpt_neox"])
@pytest.mark.parametrize("with_config", [False, True])
def test_missing_vocabulary_raises(tmp_path, model_type, with_config):
    """transformers would build a tokenizer that knows only special tokens, without a warning."""
    transformers.CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    if with_config:
        content = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"has no tokenizer\. Expected tokenizer.json in"):
        load_tokenizer(resolve_source(str(tmp_path)))


def test_tokenizer_without_vocabulary_file_loads(tmp_path):
    transformers.CONFIG_MAPPING["t5"]().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(resolve_source(str(tmp_path)))("ab")["input_ids"] == [100, 101, 1]


def test_adapter_path_as_model_raises(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    message = (
        r"is an adapter, expected a model\. Use the model it was trained on, or merge both: "
        r"ftlevel merge"
    )
    for path in (tmp_path, tmp_path / "adapter"):
        with pytest.raises(InputError, match=message):
            resolve_source(str(path))
