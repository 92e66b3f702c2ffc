"""What others made is bounded: it stays in its directory, ends, and fits."""

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
from ftlevel.models import untrusted
from ftlevel.models.loading import build_task_model, load_config, load_tokenizer
from ftlevel.models.quantization import match_quantization
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.untrusted import limit_memory, limit_time
from ftlevel.models.upstream import libraries
from ftlevel.weights.gguf_file import save_gguf
from tiny_models import build

ModelDir = Callable[..., Path]
CAUSAL = "AutoModelForCausalLM"


def changed(directory: Path, **fields: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return directory


@pytest.fixture
def model(tiny_model_dir: ModelDir, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny_model_dir("llama", chat=True).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_whole_directory_is_read(model: Path) -> None:
    assert load_config(resolve_source(str(model))).num_hidden_layers > 0


@pytest.mark.parametrize(
    "name",
    ["../evil/x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x\0.safetensors", 7],
)
def test_an_index_does_not_leave_its_directory(model: Path, name: Any) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="Files outside it are not read"):
        resolve_source(str(model))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_of_another_shape_is_named(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        resolve_source(str(model))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(InputError, match=f"{re.escape(name)}"):
        resolve_source(str(model))


def test_a_pipe_among_an_adapters_files_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ftlevel.json")
    with pytest.raises(InputError, match=r"ftlevel\.json is a pipe"):
        load_card(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '{"format": 1}', '{"format": 1, "a": 2}', "["])
def test_a_card_of_another_shape_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "ftlevel.json").write_text(text)
    with pytest.raises(InputError, match=r"ftlevel\.json"):
        load_card(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 0), ("vocab_size", -1),
     ("num_hidden_layers", 10**9), ("hidden_size", 2**31), ("vocab_size", 10**12),
     ("num_hidden_layers", 1e300)],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_built(
    model: Path, field: str, value: Any
) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=field):
        load_config(resolve_source(str(changed(model, **{field: value}))))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_is_fetched_because_a_config_says_so(model: Path, field: str) -> None:
    with pytest.raises(InputError, match="code that would be fetched"):
        resolve_source(str(changed(model, **{field: "evil/kernel"})))


@pytest.mark.parametrize("part", ["attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("kernel", ["evil/kernel", {"": "sdpa", "text_config": "evil/kernel"}])
def test_no_kernel_is_fetched_for_a_part_of_a_model(model: Path, part: str, kernel: Any) -> None:
    with pytest.raises(InputError, match=f"{part} in its config.json is 'evil/kernel'"):
        resolve_source(str(changed(model, text_config={part: kernel})))


@pytest.mark.parametrize("names", [3, "os.system", [7]])
def test_architectures_of_another_shape_are_named(model: Path, names: Any) -> None:
    with pytest.raises(InputError, match=r"architectures in its config\.json is .*list of names"):
        resolve_source(str(changed(model, architectures=names)))


@pytest.mark.parametrize("text", ['"x"', "[" * 100_000])
def test_a_generation_config_of_another_shape_is_named(model: Path, text: str) -> None:
    (model / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        resolve_source(str(model))


def gguf(path: Path, **keys: Any) -> Path:
    """Write the header of a .gguf of a small model, with some of its keys others."""
    described = {"general.architecture": "qwen2", "general.file_type": 0, "qwen2.block_count": 2,
                 "qwen2.embedding_length": 64, "qwen2.feed_forward_length": 64,
                 "qwen2.attention.head_count": 2, "qwen2.context_length": 64,
                 "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
                 "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 1],
                 "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 0}  # fmt: skip
    save_gguf(path, {**described, **keys}, [], print)
    return path


def test_a_gguf_of_absurd_sizes_is_refused_before_it_is_built(tmp_path: Path) -> None:
    assert load_config(resolve_source(str(gguf(tmp_path / "a.gguf")))).num_hidden_layers == 2
    path = gguf(tmp_path / "b.gguf", **{"qwen2.block_count": 10**9})
    with (  # a list of its layers alone would take 8 GB
        limit_memory(1 << 30),
        pytest.raises(InputError, match="num_hidden_layers in its config is 1,000,000,000"),
    ):
        load_config(resolve_source(str(path)))


def test_merges_outside_of_a_gguf_s_vocabulary_are_named(tmp_path: Path) -> None:
    assert load_tokenizer(resolve_source(str(gguf(tmp_path / "a.gguf")))).vocab_size == 3
    path = gguf(tmp_path / "b.gguf", **{"tokenizer.ggml.merges": ["a b", "b c"]})
    with pytest.raises(InputError, match=r"has no usable tokenizer: .*vocabulary"):
        load_tokenizer(resolve_source(str(path)))


def test_a_config_of_the_hub_is_looked_at_too(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = json.loads((changed(model, num_hidden_layers=10**9) / "config.json").read_text())

    def read(_: Any, *__: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return fields, more

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", classmethod(read))
    with pytest.raises(InputError, match="num_hidden_layers in its config is 1,000,000,000"):
        load_config(ModelSource("a/b", "hub", "a/b", local_files_only=True))


@pytest.mark.parametrize("lacking", [{"quant_method": "gptq"}, {"quant_method": "awq", "bits": []}])
def test_a_quantization_that_lacks_a_setting_is_named(lacking: dict[str, Any]) -> None:
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
        ("{{ ('a' * (2 * 10 ** 9)) | length }}", "MemoryError"),  # which a machine has
        ("{{ messages.nothing.at_all }}", "nothing"),
        ("{{ messages[99]['role'] }}", ""),
    ],
)  # fmt: skip
def test_a_template_ends(
    model: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(libraries, "_SECONDS", 0.2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"the chat template refuses these messages: .*{reason}"):
        render(tokenizer, [{"role": "user", "content": "hi"}])


def test_a_regular_expression_ends() -> None:
    with pytest.raises(TimeoutError), limit_time(0.2):
        re.fullmatch(r"(\w+\.?)+x", "model.layers.0.self_attn.q_proj." * 3)


def test_a_limit_inside_another_leaves_it_running() -> None:
    began = time.monotonic()
    with limit_time(0.3):
        with limit_time(5):
            pass
        with pytest.raises(TimeoutError, match=r"0\.3"):
            time.sleep(5)
    assert time.monotonic() - began < 3
    assert untrusted.signal.getitimer(untrusted.signal.ITIMER_REAL)[0] == 0


def test_a_limit_of_memory_ends_with_its_block() -> None:
    with pytest.raises(MemoryError), limit_memory(1 << 26):
        bytearray(1 << 28)
    assert len(bytearray(1 << 28)) == 1 << 28


def test_a_limit_of_memory_counts_from_what_the_process_has_now() -> None:
    held = []
    for _ in range(3):  # more in all than one block may take
        with limit_memory(1 << 28):
            held.append(bytearray(3 << 26))
    assert sum(map(len, held)) > 2 << 28


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_forked_process_is_measured_itself() -> None:
    with limit_memory(1 << 26):
        pass
    child = os.fork()
    if child == 0:
        code = 1
        held = bytearray(1 << 29)  # its parent's size and the limit are less than what it has
        with contextlib.suppress(MemoryError), limit_memory(1 << 27):
            bytearray(1 << 26)
            code = 0
        os._exit(code + (not held))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"target_modules": r"(\w+\.?)+x"}, "target_modules"),
     ({"rank_pattern": {r"(\w+\.?)+x": 4}}, "rank_pattern"),
     ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
     ({"exclude_modules": "*"}, "exclude_modules")],
)  # fmt: skip
def test_an_adapters_regular_expressions_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(untrusted, "_TIMEOUT", 0.2)
    with pytest.raises(InputError, match=rf"adapter_config\.json: {field} has "):
        untrusted.check_patterns(tmp_path, settings, build("llama"))
    untrusted.check_patterns(tmp_path, {"target_modules": ["(", "q_proj"]}, build("llama"))


@pytest.mark.parametrize(
    "text", ["null", "3", "[]", "[" * 100_000, '{"model": null}', '{"added_tokens": [7]}']
)
def test_a_tokenizer_of_another_shape_is_named(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="has no usable tokenizer"):
        load_tokenizer(resolve_source(str(model)))


@pytest.mark.parametrize(
    "fields", [{"dtype": []}, {"dtype": "float7"}, {"layer_types": 3}, {"rope_parameters": "x"}]
)
def test_a_config_of_another_shape_is_named(model: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        build_task_model(load_config(resolve_source(str(changed(model, **fields)))), CAUSAL)


def test_a_config_that_no_model_can_be_built_of_is_named(model: Path) -> None:
    config = load_config(resolve_source(str(changed(model, pad_token_id=10**6))))
    with pytest.raises(InputError, match=r"cannot be built from its config\.json"):
        build_task_model(config, CAUSAL)
