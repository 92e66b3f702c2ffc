"""Malicious contents: headers, configurations, templates and recipes."""

from __future__ import annotations

import json
import struct
from typing import Any


def _header(content: Any, size: int | None = None, rest: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


HEADERS: dict[str, bytes] = {
    "no bytes": b"",
    "seven bytes": b"1234567",
    "a size of 2**63": _header({}, 2**63),
    "a size beyond the file": _header({}, 10**6),
    "not JSON": _header(b"{{{{"),
    "a list": _header([1, 2]),
    "a number": _header(7),
    "a string for a tensor": _header({"a": "b"}),
    "no offsets": _header({"a": {"dtype": "F32", "shape": [2]}}),
    "offsets outside": _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "offsets backwards": _header(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, rest=b"12345678"
    ),
    "offsets overlap": _header(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, rest=b"12345678"
    ),
    "another dtype": _header(
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "a negative shape": _header(
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "a shape of 2**62": _header(
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "deep": _header(b"[" * 100_000),
    "a strange name": _header(
        {"../../x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "metadata of another kind": _header(
        {"__metadata__": [1], "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        rest=b"12345678",
    ),
}

JSONS: dict[str, str] = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a string": '"x"',
    "cut": '{"a": ',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 50_000,
    "twice": '{"a": 1, "a": 2}',
    "NaN": '{"a": NaN}',
    "a large number": '{"a": ' + "9" * 5_000 + "}",
    "not UTF-8": "\udcff",
    "a zero byte": "\0",
    "empty object": "{}",
}

TEMPLATES = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "an indent of 10**9": "{{ messages | tojson(indent=10**9) }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a long string": "{{ 'a' * 10 ** 10 }}",
    "1/0": "{{ 1/0 }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__'].open('CANARY', 'w') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "not closed": "{% for m in messages %}",
    "a filter": "{{ messages | nothing }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "an exception": "{{ raise_exception('x') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "no text": "",
    "a list": "{{ [1] * 10 ** 9 }}",
    "ranges": "{{ range(10 ** 12) | list }}",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "10**9 layers": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "-1 layers": {"num_hidden_layers": -1},
    "half a layer": {"num_hidden_layers": 0.5},
    "layers as text": {"num_hidden_layers": "2"},
    "hidden 2**31": {"hidden_size": 2**31},
    "hidden 0": {"hidden_size": 0},
    "hidden as list": {"hidden_size": [64]},
    "vocabulary 10**12": {"vocab_size": 10**12},
    "vocabulary 0": {"vocab_size": 0},
    "no heads": {"num_attention_heads": 0},
    "heads 3": {"num_attention_heads": 3},
    "head_dim 10**9": {"head_dim": 10**9},
    "a kernel": {"attn_implementation": "evil/kernel"},
    "a private kernel": {"_attn_implementation": "evil/kernel"},
    "code of its own": {
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        "model_type": "evil",
    },
    "code beside a known type": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    "type of nothing": {"model_type": None},
    "type as a list": {"model_type": ["qwen2"]},
    "type as a path": {"model_type": "../../evil"},
    "act as code": {"hidden_act": "__import__('os')"},
    "act as a list": {"hidden_act": ["silu"]},
    "eps as text": {"rms_norm_eps": "x"},
    "rope as text": {"rope_parameters": "x"},
    "rope factor 0": {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
    "rope of nothing": {"rope_parameters": {"rope_type": "nothing"}},
    "layer types": {"layer_types": ["x"] * 2},
    "dtype of nothing": {"dtype": "float7", "torch_dtype": "float7"},
    "quantized by nothing": {"quantization_config": {"quant_method": "evil"}},
    "quantized by a list": {"quantization_config": [1]},
    "quantized by code": {"quantization_config": {"quant_method": "gptq", "backend": "x"}},
    "another architecture": {"architectures": ["os.system"]},
    "architectures as a number": {"architectures": 3},
    "a pad beyond": {"pad_token_id": 10**6},
    "positions 10**12": {"max_position_embeddings": 10**12},
    "positions 0": {"max_position_embeddings": 0},
    "tied as text": {"tie_word_embeddings": "maybe"},
}

ADAPTERS: dict[str, dict[str, Any]] = {
    "r 0": {"r": 0},
    "r 10**9": {"r": 10**9},
    "r as text": {"r": "8"},
    "r as nothing": {"r": None},
    "alpha as text": {"lora_alpha": "x"},
    "type of nothing": {"peft_type": "EVIL"},
    "no type": {"peft_type": None},
    "type as a list": {"peft_type": ["LORA"]},
    "targets that backtrack": {"target_modules": r"(\w+\.?)+x"},
    "targets as a number": {"target_modules": 3},
    "targets of nothing": {"target_modules": ["nothing"]},
    "no targets": {"target_modules": []},
    "a pattern that backtracks": {"rank_pattern": {r"(\w+\.?)+x$": 4}},
    "a pattern of nothing": {"rank_pattern": [3]},
    "a base elsewhere": {"base_model_name_or_path": "../../../etc"},
    "a base as a number": {"base_model_name_or_path": 7},
    "an unknown field": {"evil": True},
    "modules of nothing": {"modules_to_save": ["nothing"]},
    "bias of nothing": {"bias": "evil"},
    "start by pissa": {"init_lora_weights": "evil"},
    "layers of nothing": {"layers_to_transform": [10**9]},
    "code": {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
    "replicated": {"layer_replication": [[0, 10**6]]},
    "megatron": {"megatron_config": {}, "megatron_core": "os"},
}

YAMLS = {
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(
        f"{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]"
        for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "python objects": "model: !!python/object/apply:os.system ['touch CANARY']",
    "python names": "model: !!python/name:os.system",
    "a recursive alias": "train: &a {seed: *a}",
    "deep": "[" * 20_000,
    "deep maps": "{a: " * 20_000,
    "not UTF-8": b"\xff\xfe\x00",
    "a date": "train: {seed: 2024-13-45}",
    "a large number": "train: {seed: " + "9" * 6_000 + "}",
    "a tag": "train: {seed: !!int x}",
    "a merge": "train: {<<: 3}",
    "documents": "---\ntrain: {}\n---\nmodel: {}",
    "tabs": "\ttrain: {}",
    "a key as a list": "? [a]\n: b",
    "a zero byte": "a: \0",
    "binary": "train: {seed: !!binary aGVsbG8=}",
    "a set": "train: !!set {a, b}",
    "sexagesimal": "train: {seed: 1:99:99}",
}


SHARDS = ("../evil/model.safetensors", "/etc/passwd", "a/../../evil.safetensors", 7, "",
          "nothing.safetensors")  # fmt: skip
