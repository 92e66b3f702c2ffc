"""Tests of untrusted files: they stay in their directory, end in time and fit in memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from ftlevel.artifacts.cards import load_card
from ftlevel.config import QuantConfig
from ftlevel.data.encoding.chat import render
from ftlevel.errors import InputError
from ftlevel.extras.serving.gguf_file import save_gguf
from ftlevel.models import untrusted
from ftlevel.models.loading import build_task_model, load_config, load_tokenizer
from ftlevel.models.quantization import match_quantization
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.untrusted import limit_memory, limit_time
from ftlevel.models.upstream import libraries
from tiny_models import build

ModelDir = Callable[..., Path]
CAUSAL = "AutoModelForCausalLM"


def edit_config(directory: Path, **fields: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return directory


@pytest.fixture
def model_dir(tiny_model_dir: ModelDir, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny_model_dir("llama", chat=True).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize(
    "name",
    ["../evil/x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x\0.safetensors", 7],
)
def test_index_with_path_outside_directory_raises(model_dir, name):
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="Files outside it are not read"):
        resolve_source(str(model_dir))


INDEX, GENERATION = "model.safetensors.index.json", "generation_config.json"


@pytest.mark.parametrize(
    ("name", "text"),
    [(INDEX, ""), (INDEX, "[]"), (INDEX, "{}"), (INDEX, '{"weight_map": []}'),
     (INDEX, "[" * 100_000), (GENERATION, '"x"'), (GENERATION, "[" * 100_000)],
)  # fmt: skip
def test_malformed_json_raises_with_its_name(model_dir, name, text):
    (model_dir / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(name)):
        resolve_source(str(model_dir))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_named_pipe_in_model_directory_raises(model_dir, name):
    (model_dir / name).unlink()
    os.mkfifo(model_dir / name)
    with pytest.raises(InputError, match=f"{re.escape(name)}"):
        resolve_source(str(model_dir))


def test_named_pipe_in_adapter_directory_raises(tmp_path):
    os.mkfifo(tmp_path / "ftlevel.json")
    with pytest.raises(InputError, match=r"ftlevel\.json is a pipe"):
        load_card(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '{"format": 1}', '{"format": 1, "a": 2}', "["])
def test_malformed_ftlevel_json_raises(tmp_path, text):
    (tmp_path / "ftlevel.json").write_text(text)
    with pytest.raises(InputError, match=r"ftlevel\.json"):
        load_card(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 0), ("vocab_size", -1),
     ("num_hidden_layers", 10**9), ("hidden_size", 2**31), ("vocab_size", 10**12),
     ("num_hidden_layers", 1e300)],
)  # fmt: skip
def test_implausible_sizes_raise_before_building(model_dir, field, value):
    start = time.monotonic()
    with pytest.raises(InputError, match=field):
        load_config(resolve_source(str(edit_config(model_dir, **{field: value}))))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "part", ["attn_implementation", "_attn_implementation", "_experts_implementation"]
)
@pytest.mark.parametrize("kernel", ["evil/kernel", {"": "sdpa", "text_config": "evil/kernel"}])
@pytest.mark.parametrize("is_nested", [False, True])
def test_kernel_in_config_raises(model_dir, part, kernel, is_nested):
    fields = {"text_config": {part: kernel}} if is_nested else {part: kernel}
    with pytest.raises(InputError, match=f"{part} in its config.json is 'evil/kernel', code that"):
        resolve_source(str(edit_config(model_dir, **fields)))


@pytest.mark.parametrize("names", [3, "os.system", [7]])
def test_malformed_architectures_raise(model_dir, names):
    with pytest.raises(InputError, match=r"architectures in its config\.json is .*list of names"):
        resolve_source(str(edit_config(model_dir, architectures=names)))


def write_gguf(path: Path, **keys: Any) -> Path:
    """Write the header of the .gguf of a small model, with `keys` replaced."""
    metadata = {"general.architecture": "qwen2", "general.file_type": 0, "qwen2.block_count": 2,
                 "qwen2.embedding_length": 64, "qwen2.feed_forward_length": 64,
                 "qwen2.attention.head_count": 2, "qwen2.context_length": 64,
                 "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
                 "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 1],
                 "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 0}  # fmt: skip
    save_gguf(path, {**metadata, **keys}, [], print)
    return path


def test_gguf_with_implausible_sizes_raises_before_building(tmp_path):
    assert load_config(resolve_source(str(write_gguf(tmp_path / "a.gguf")))).num_hidden_layers == 2
    path = write_gguf(tmp_path / "b.gguf", **{"qwen2.block_count": 10**9})
    with (  # a list of that many layers would take 8 GB
        limit_memory(1 << 30),
        pytest.raises(InputError, match="num_hidden_layers in its config is 1,000,000,000"),
    ):
        load_config(resolve_source(str(path)))


def test_gguf_merges_outside_vocabulary_raise(tmp_path):
    assert load_tokenizer(resolve_source(str(write_gguf(tmp_path / "a.gguf")))).vocab_size == 3
    path = write_gguf(tmp_path / "b.gguf", **{"tokenizer.ggml.merges": ["a b", "b c"]})
    with pytest.raises(InputError, match=r"has no usable tokenizer: .*vocabulary"):
        load_tokenizer(resolve_source(str(path)))


def test_config_from_hub_is_checked(model_dir, monkeypatch):
    text = (edit_config(model_dir, num_hidden_layers=10**9) / "config.json").read_text()
    from_hub = classmethod(lambda *_, **kwargs: (json.loads(text), kwargs))
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", from_hub)
    with pytest.raises(InputError, match="num_hidden_layers in its config is 1,000,000,000"):
        load_config(ModelSource("a/b", "hub", "a/b", local_files_only=True))


@pytest.mark.parametrize("lacking", [{"quant_method": "gptq"}, {"quant_method": "awq", "bits": []}])
def test_incomplete_quantization_config_raises(lacking):
    with pytest.raises(InputError, match=r"--model x.*quantiz"):
        match_quantization(lacking, QuantConfig(), "--model x", "cpu")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "more than"),
        ("{{ 1/0 }}", "division by zero"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{{ [1] * 10 ** 10 }}", "MemoryError"),
        ("{{ ('a' * (2 * 10 ** 9)) | length }}", "MemoryError"),  # exceeds the limit
        ("{{ 9 ** (9 ** 9) }}", "more than"),
        ("{{ 5 | round(-999999999) }}", "more than"),
        ("{% set n = namespace(x=9 ** 999) %}{% for _ in range(30) %}{% set n.x = n.x * n.x %}"
         "{% endfor %}{{ n.x // n.x }}", "more than"),
        ("{{ messages.nothing.at_all }}", "nothing"),
        ("{{ messages[99]['role'] }}", ""),
    ],
)  # fmt: skip
def test_chat_template_is_limited_in_time_and_memory(model_dir, monkeypatch, template, reason):
    from transformers import AutoTokenizer

    monkeypatch.setattr(libraries, "_SECONDS", 0.2)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"the chat template refuses these messages: .*{reason}"):
        render(tokenizer, [{"role": "user", "content": "hi"}])


def test_limit_time_stops_slow_regular_expression():
    with pytest.raises(TimeoutError), limit_time(0.2):
        re.fullmatch(r"(\w+\.?)+x", "model.layers.0.self_attn.q_proj." * 3)


def test_nested_limit_time_keeps_outer_limit():
    start = time.monotonic()
    with limit_time(0.3):
        with limit_time(5):
            pass
        with pytest.raises(TimeoutError, match=r"0\.3"):
            time.sleep(5)
    assert time.monotonic() - start < 3
    assert untrusted.signal.getitimer(untrusted.signal.ITIMER_REAL)[0] == 0


def test_limit_memory_is_removed_after_block_and_relative_to_usage():
    with pytest.raises(MemoryError), limit_memory(1 << 26):
        bytearray(1 << 28)
    buffers = [bytearray(1 << 28)]
    for _ in range(3):  # in total more than the limit of one block
        with limit_memory(1 << 28):
            buffers.append(bytearray(3 << 26))
    assert sum(map(len, buffers)) > 3 << 28


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_limit_memory_in_forked_process_uses_its_own_size():
    with limit_memory(1 << 26):
        pass
    child = os.fork()
    if child == 0:
        code = 1
        buffer = bytearray(1 << 29)  # more than the parent's size plus the limit
        with contextlib.suppress(MemoryError), limit_memory(1 << 27):
            bytearray(1 << 26)
            code = 0
        os._exit(code + (not buffer))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"target_modules": r"(\w+\.?)+x"}, "target_modules"),
     ({"rank_pattern": {r"(\w+\.?)+x": 4}}, "rank_pattern"),
     ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
     ({"exclude_modules": "*"}, "exclude_modules"),
     ({"layers_pattern": "(.+)+!"}, "layers_pattern"),
     ({"modules_to_save": ["(.+)+!"]}, "modules_to_save")],
)  # fmt: skip
def test_slow_or_invalid_adapter_patterns_raise(tmp_path, monkeypatch, settings, field):
    monkeypatch.setattr(untrusted, "_TIMEOUT", 0.2)
    with pytest.raises(InputError, match=rf"adapter_config\.json: {field} has "):
        untrusted.check_patterns(tmp_path, settings, build("llama"))
    untrusted.check_patterns(tmp_path, {"target_modules": ["(", "q_proj"]}, build("llama"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_alpha", float("nan")), ("alpha_pattern", {"q_proj": float("inf")}),
     ("init_lora_weights", "pissa_niter_9999"), ("init_lora_weights", "pissa_niter_ 1_0 "),
     ("layer_replication", [[0, 9999]]), ("layer_replication", 3),
     ("megatron_config", {"a": 1})],
)  # fmt: skip
def test_absurd_values_of_adapters_raise(tmp_path, name, value):
    usual = {"lora_alpha": 16, "init_lora_weights": "pissa_niter_4", "layer_replication": [[0, 2]]}
    untrusted.check_peft_config(tmp_path, usual)
    with pytest.raises(InputError, match=name):
        untrusted.check_peft_config(tmp_path, {**usual, name: value})


def test_auto_map_of_nested_config_is_dropped(model_dir):
    edit_config(model_dir, model_type="llava", architectures=None, auto_map={"AutoModel": "x.X"},
                text_config={"model_type": "llama", "auto_map": {"AutoModel": "x.X"}})  # fmt: skip
    config = load_config(resolve_source(str(model_dir)))
    assert not hasattr(config, "auto_map")
    assert not hasattr(config.text_config, "auto_map")


@pytest.mark.parametrize(
    "text", ["null", "3", "[]", "[" * 100_000, '{"model": null}', '{"added_tokens": [7]}']
)
def test_malformed_tokenizer_raises(model_dir, text):
    (model_dir / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="has no usable tokenizer"):
        load_tokenizer(resolve_source(str(model_dir)))


@pytest.mark.parametrize(
    "fields", [{"dtype": []}, {"dtype": "float7"}, {"layer_types": 3}, {"rope_parameters": "x"}]
)
def test_malformed_config_raises(model_dir, fields):
    with pytest.raises(InputError):
        build_task_model(load_config(resolve_source(str(edit_config(model_dir, **fields)))), CAUSAL)


def test_config_that_cannot_be_built_raises(model_dir):
    config = load_config(resolve_source(str(edit_config(model_dir, pad_token_id=10**6))))
    with pytest.raises(InputError, match=r"cannot be built from its config\.json"):
        build_task_model(config, CAUSAL)
