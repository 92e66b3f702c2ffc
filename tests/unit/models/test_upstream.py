"""A canary test for each fact in `models.upstream`: it fails when a library's private API moves."""

from __future__ import annotations

import inspect
import json
import platform
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import datasets
import gguf
import numpy as np
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn import functional
from transformers import modeling_gguf_pytorch_utils
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.integrations import moe

from export_cases import export_to, exportable_model
from ftlevel.config import QuantConfig
from ftlevel.models.loading import build_task_model, load_config, load_model, load_tokenizer
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.upstream import (
    architectures,
    batching,
    conversions,
    fake,
    libraries,
    quantizers,
)
from ftlevel.models.upstream import conversions as headers
from ftlevel.models.upstream import tensors as upstream
from ftlevel.models.upstream.libraries import leave_sharded
from ftlevel.models.upstream.shards import LazyWeights
from tiny_models import build, build_batch
from upstream_facts import (
    OF_MODELS,
    CanaryRegistry,
    check_fact,
    create_facts,
    get_parameters,
)

CANARIES = CanaryRegistry()


@pytest.mark.parametrize("fact", create_facts(OF_MODELS), ids=lambda fact: fact.name)
def test_upstream_fact_holds(fact, request):
    check_fact(fact)
    CANARIES[fact.name](request)


def test_each_fact_has_canary():
    assert set(CANARIES) == {fact.name for fact in create_facts(OF_MODELS)}


@CANARIES.of("aten._softmax_backward_data")
def _(_: Any) -> None:
    schema = "(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor"
    assert str(upstream.softmax_backward.default._schema).endswith(schema)
    logits = torch.randn(3, 5, requires_grad=True)
    probabilities, gradient = logits.softmax(-1), torch.randn(3, 5)
    (expected,) = torch.autograd.grad(probabilities, logits, gradient)
    assert torch.equal(
        upstream.softmax_backward(gradient, probabilities.detach(), -1, probabilities.dtype),
        expected,
    )


@CANARIES.of("aten._flash_attention_forward", "aten._flash_attention_backward")
def _(_: Any) -> None:
    """They have no CPU kernel: the arguments must be those that `varlen_attn` gives them."""
    lengths = "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal".split()
    operators = torch.ops.aten
    forward, backward = (
        [argument.name for argument in operator.default._schema.arguments]
        for operator in (operators._flash_attention_forward, operators._flash_attention_backward)
    )
    assert forward[:11] == ["query", "key", "value", *lengths, "return_debug_mask", "scale"]
    states = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert backward[:15] == [*states, *lengths, "rng_state", "unused", "scale"]


@CANARIES.of("aten.silu_backward", "aten.gelu_backward")
def _(_: Any) -> None:
    x, gradient = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    (expected,) = torch.autograd.grad(functional.silu(x), x, gradient)
    assert torch.equal(upstream.silu_backward(gradient, x.detach()), expected)
    for approximate in ("none", "tanh"):
        (expected,) = torch.autograd.grad(functional.gelu(x, approximate=approximate), x, gradient)
        actual = upstream.gelu_backward(gradient, x.detach(), approximate=approximate)
        assert torch.equal(actual, expected)


@CANARIES.of("aten._unsafe_view")
def _(_: Any) -> None:
    base = torch.randn(6, requires_grad=True) * 2
    reshaped = upstream.new_shape(base, [2, 3])
    assert reshaped.data_ptr() == base.data_ptr()
    assert not reshaped._is_view()
    assert reshaped.requires_grad


@CANARIES.of("torch._foreach_copy_")
def _(_: Any) -> None:
    target, source = torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1.0, 1.0039])
    torch._foreach_copy_([target], [source])
    assert torch.equal(target, source.bfloat16())
    assert upstream.cast_together([source], torch.bfloat16)[0].dtype == torch.bfloat16


@CANARIES.of(
    "mkldnn._reorder_linear_weight", "mkldnn._linear_pointwise", "mkldnn._is_mkldnn_bf16_supported"
)
def _(_: Any) -> None:
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(3, 1, 32)
    expected = functional.linear(x, weight, bias)
    for dtype in upstream.packed_dtypes():
        packed = upstream.pack_linear(weight.to(dtype), 8)
        actual = upstream.packed_linear(x.to(dtype), packed, bias.to(dtype))
        assert actual.dtype == dtype
        bound = 1e-6 if dtype == torch.float32 else 0.01
        assert (actual - expected).norm() < bound * expected.norm()


@CANARIES.of("torch._C._accelerator_setAllocatorSettings")
def _(_: Any) -> None:
    upstream.set_allocator("expandable_segments:True")
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"


@CANARIES.of("torch._C._current_graph_task_id")
def _(_: Any) -> None:
    results = []
    leaf = torch.zeros(2, requires_grad=True)
    leaf.register_hook(lambda _: results.append(upstream.is_in_backward()))
    leaf.sum().backward()
    assert (results, upstream.is_in_backward()) == ([True], False)


@CANARIES.of("Node._sequence_nr")
def _(_: Any) -> None:
    leaf = torch.zeros(2, requires_grad=True)
    first, second = leaf * 2, leaf * 3
    assert upstream.order_of(leaf.sum().grad_fn) > upstream.order_of(second.grad_fn)
    assert upstream.order_of(second.grad_fn) > upstream.order_of(first.grad_fn)
    added = (second + first).grad_fn
    assert added.name() == "AddBackward0"
    assert [node.name() for node, _ in added.next_functions] == ["MulBackward0"] * 2


@CANARIES.of("Tensor._version")
def _(_: Any) -> None:
    tensor = torch.zeros(2)
    before = upstream.version_of(tensor)
    tensor.view(-1).add_(1)
    assert upstream.version_of(tensor) == before + 1


@CANARIES.of("Tensor.__tensor_flatten__")
def _(_: Any) -> None:
    rows = [torch.zeros(2), torch.ones(3)]
    parts = upstream.inner_tensors(torch.nested.nested_tensor(rows, layout=torch.jagged))
    assert {part.dtype for part in parts} == {torch.int64, torch.float32}
    assert not any(map(upstream.inner_tensors, [*parts, *rows]))


@CANARIES.of("Module._parameters", "Module._buffers")
def _(_: Any) -> None:
    linear = nn.Linear(2, 2, bias=False)
    parameters, _ = upstream.direct_tensors(linear)
    assert parameters == {"weight": linear.weight, "bias": None}
    parameters["weight"] = nn.Parameter(torch.eye(2) * 3)
    assert torch.equal(linear(torch.ones(2)), torch.full((2,), 3.0))
    norm = nn.BatchNorm1d(2)
    _, buffers = upstream.direct_tensors(norm)
    buffers["running_mean"] = torch.ones(2)
    assert norm.running_mean is buffers["running_mean"]


@CANARIES.of("Module._modules")
def _(_: Any) -> None:
    pair = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    copied = upstream.copy_module(pair)
    setattr(copied, "1", nn.Identity())
    assert [type(child) for child in copied.children()] == [nn.Linear, nn.Identity]
    assert [type(child) for child in pair.children()] == [nn.Linear, nn.ReLU]
    assert torch.equal(copied(torch.ones(2)), pair[0](torch.ones(2)))


@CANARIES.of(
    "Module._forward_hooks",
    "Module._forward_pre_hooks",
    "Module._backward_hooks",
    "Module._backward_pre_hooks",
)
def _(_: Any) -> None:
    for register in (
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ):
        linear = nn.Linear(2, 2)
        assert not upstream.is_watched(linear)
        handle = register(linear, lambda *_: None)
        assert upstream.is_watched(linear), register
        handle.remove()
        assert not upstream.is_watched(linear)


@CANARIES.of("Module._hf_hook")
def _(_: Any) -> None:
    assert upstream.is_watched(add_hook_to_module(nn.Linear(2, 2), AlignDevicesHook()))


@CANARIES.of("cpu._is_amx_tile_supported", "cpu._is_avx512_bf16_supported")
def _(_: Any) -> None:
    assert get_parameters(torch.cpu._is_amx_tile_supported) == []
    assert get_parameters(torch.cpu._is_avx512_bf16_supported) == []
    if platform.system() == "Linux":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        assert upstream.cpu_has("avx512_bf16") == ("avx512_bf16" in flags)
        assert upstream.cpu_has("amx_tile") == ("amx_tile" in flags)


@CANARIES.of("AutoModel._model_mapping")
def _(_: Any) -> None:
    for name, model in (
        ("AutoModelForCausalLM", transformers.LlamaForCausalLM),
        ("AutoModel", transformers.LlamaModel),
    ):
        assert architectures.model_classes(name)[transformers.LlamaConfig] is model
    assert transformers.T5Config not in architectures.model_classes("AutoModelForCausalLM")
    first = architectures.model_classes("AutoModel")[transformers.FunnelConfig]
    assert first[0] is transformers.FunnelModel


@CANARIES.of("MODEL_FOR_MASKED_LM_MAPPING_NAMES")
def _(_: Any) -> None:
    assert architectures.has_masked_lm("bert")
    assert not architectures.has_masked_lm("llama")


class _LlamaWithFloat32Modules(transformers.LlamaForCausalLM):  # type: ignore[misc]  # transformers is Any
    _keep_in_fp32_modules = ("up_proj",)
    _keep_in_fp32_modules_strict = ("down_proj",)


@CANARIES.of(
    "PreTrainedModel._keep_in_fp32_modules", "PreTrainedModel._keep_in_fp32_modules_strict"
)
def _(request: pytest.FixtureRequest) -> None:
    model_dir = request.getfixturevalue("tiny_model_dir")("llama")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = _LlamaWithFloat32Modules.from_pretrained(model_dir, dtype=dtype)
        float32_modules = {
            n.split(".")[-2] for n, p in model.named_parameters() if p.dtype == torch.float32
        }
        if dtype == torch.float32:
            assert architectures.modules_in_float32(model, dtype) == frozenset()
        else:
            assert float32_modules == architectures.modules_in_float32(model, dtype) != frozenset()


class _LlamaWithIgnoredKeys(transformers.LlamaForCausalLM):  # type: ignore[misc]  # transformers is Any
    _keys_to_ignore_on_save = ("model.norm.weight",)


@CANARIES.of("CheckpointException.failures")
def _(_: Any) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    error = OSError(28, "full")  # propagation to all processes: test_sharding.py
    assert CheckpointException("write", {1: (error, None)}).failures[1][0] is error  # type: ignore[arg-type]


@CANARIES.of("_materialize_copy", "GenerationMixin.adjust_generation_fn")
def _(request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue("tmp_path")
    build("llama").save_pretrained(directory)
    generation_config = directory / "generation_config.json"
    generation_config.write_text(
        json.dumps({**json.loads(generation_config.read_text()), "top_k": 7})
    )
    meta = build_task_model(load_config(resolve_source(str(directory))), "AutoModelForCausalLM")
    slices = LazyWeights()
    model, _ = slices.load(
        meta, directory, str(directory), config=meta.config, dtype=torch.float16,
        output_loading_info=True, local_files_only=True,
    )  # fmt: skip
    assert model.generation_config.top_k == 7
    unread = {name for name, p in model.named_parameters() if p.isnan().all()}
    assert unread == {name for name, p in model.named_parameters() if p in slices.weights}
    assert unread == {name for name, p in model.named_parameters() if p.dim() > 1}


@CANARIES.of("PreTrainedModel._keys_to_ignore_on_save")
def _(request: pytest.FixtureRequest) -> None:
    from safetensors.torch import load_file

    tmp_path = request.getfixturevalue("tmp_path")
    model = _LlamaWithIgnoredKeys(build("llama").config)
    model.save_pretrained(tmp_path)
    left_out = set(model.state_dict()) - set(load_file(tmp_path / "model.safetensors"))
    assert left_out == set(architectures.unsaved_names(model)) == {"model.norm.weight"}


@CANARIES.of("PreTrainedModel.all_tied_weights_keys")
def _(_: Any) -> None:
    model = build("gpt2")
    assert architectures.tied_names(model) == {"lm_head.weight": "transformer.wte.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight


@CANARIES.of("eager_attention_forward")
def _(_: Any) -> None:
    for family in ("llama", "bert", "t5"):
        model = build(family)
        attention = next(part for part in model.modules() if "Attention" in type(part).__name__)
        function = architectures.eager_attention_of(attention)
        groups = getattr(attention, "num_key_value_groups", 1)
        query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 4 // groups, 5, 16)
        _, weights = function(attention, query, key, key, None, scaling=0.25)
        scores = query @ key.repeat_interleave(groups, 1).mT * 0.25
        torch.testing.assert_close(weights, scores.softmax(-1))


@CANARIES.of(
    "PreTrainedModel._supports_sdpa", "PreTrainedModel._supports_flash_attn",
    "ALL_ATTENTION_FUNCTIONS",
)  # fmt: skip
def _(_: Any) -> None:
    assert architectures.supports_sdpa(transformers.LlamaModel)
    assert architectures.supports_flash(transformers.LlamaModel)
    assert architectures.uses_attention_interface(transformers.LlamaModel)
    assert not architectures.supports_sdpa(transformers.DebertaV2Model)
    assert not architectures.uses_attention_interface(transformers.DebertaV2Model)
    module = inspect.getmodule(transformers.LlamaModel)
    assert isinstance(vars(module)["ALL_ATTENTION_FUNCTIONS"], transformers.AttentionInterface)


@CANARIES.of("PreTrainedConfig._attn_implementation")
def _(_: Any) -> None:
    model = build("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert architectures.attention_of(model) == name
    transformers.AttentionInterface.register("canary_flash", lambda *_, **__: None)
    with pytest.raises(ValueError, match="kernel from the hub"):
        model.set_attn_implementation("canary_flash")
    architectures.set_attention_name(model, "canary_flash")
    assert model.model.layers[0].self_attn.config._attn_implementation == "canary_flash"


@CANARIES.of(
    "ContinuousBatchingManager.logit_processor",
    "ContinuousBatchingManager.background_thread_status",
    "ContinuousBatchProcessor.update_batch",
    "ContinuousBatchingLogitsProcessorList.tensors_required",
    "RequestState.position_offset",
)
def _(_: Any) -> None:
    seen = []

    class Choose(batching.RequestProcessor):
        """Chooses token 5 + the number of the copy, and fails on the third token."""

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: Any) -> torch.Tensor:
            ids = [
                batching.parse_request_id(request.state.request_id)
                for request in requests_with_new_token
            ]
            seen.append([batching.count_tokens(request) for request in requests_with_new_token])
            return torch.tensor([copy for _, copy in ids], dtype=torch.int32)

        def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
            if len(seen) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            tokens = 5 + tensor_arg[: len(scores), None].long()
            return torch.zeros_like(scores).scatter(1, tokens, 1.0)

    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=3, eos_token_id=-1)
    settings.num_return_sequences = 2
    config = transformers.ContinuousBatchingConfig(num_blocks=8, page_size=32, seed=0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), batching.silence_manager():
        manager = batching.create_manager(build("llama"), settings, config, Choose())
        manager.add_request([7, 8, 9], "0")
        manager.start()
        outputs = [manager.get_result(timeout=60) for _ in range(2)]
        manager.stop()
    tokens = {output.request_id: output.generated_tokens for output in outputs}
    assert tokens == {"0": [5, 5], "0__child#0": [6, 6]}
    assert all("out of memory" in output.error for output in outputs)
    assert isinstance(batching.get_thread_error(manager), torch.OutOfMemoryError)
    assert seen == [[], [3, 3], [4, 4], [5, 5]]  # the last token of the prompt is in each copy


@CANARIES.of("PreTrainedModel.hf_quantizer")
def _(request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue("tmp_path")
    model_dir = exportable_model(request.getfixturevalue("tiny_model_dir"), directory, "llama")
    export_to(str(directory / "x.gguf"), model_dir, outtype="f32", verify=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file="x.gguf")
    assert {"hf_quantizer", "is_quantized"} & set(vars(model))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(directory)
    architectures.forget_gguf(model)
    model.save_pretrained(directory)
    assert not hasattr(transformers.AutoConfig.from_pretrained(directory), "quantization_config")


@CANARIES.of("GGUFReader.data", "load_gguf_checkpoint")
def _(request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue("tmp_path")
    model_dir = exportable_model(request.getfixturevalue("tiny_model_dir"), directory, "llama")
    export_to(str(directory / "x.gguf"), model_dir, outtype="q8_0", verify=False)
    readers = []

    class Counted(headers.FastGGUFReader):
        def __init__(self, path: str) -> None:
            super().__init__(path)
            readers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers, "FastGGUFReader", Counted)
        source = resolve_source(str(directory / "x.gguf"), None, False)
        load_config(source)
        load_tokenizer(source)
        load_config(source).vocab_size = 1  # the cached config is not changed
        config = load_config(source)
        load_model(source, config, "AutoModelForCausalLM",
                   dtype=torch.float32, device="cpu")  # fmt: skip
        assert len(readers) == 2  # once without the weights, once for the weights
        b = directory / "other"
        b.mkdir()
        export_to(str(b / "x.gguf"), model_dir, outtype="f32", verify=False)
        (b / "x.gguf").replace(directory / "x.gguf")
        assert load_config(source).to_dict() == config.to_dict()
        assert len(readers) == 3  # another file with the same name
    reference, fast = gguf.GGUFReader(directory / "x.gguf"), readers[-1]
    assert type(reference.data) is np.memmap
    assert type(fast.data) is np.ndarray
    assert list(reference.fields) == list(fast.fields)
    for name, field in reference.fields.items():
        assert field.types == fast.fields[name].types, name
        assert field.contents() == fast.fields[name].contents(), name
    assert modeling_gguf_pytorch_utils.load_gguf_checkpoint is headers._load_checkpoint
    assert (
        headers._load_gguf_checkpoint(str(directory / "x.gguf"))["config"]
        == (headers._load_checkpoint(str(directory / "x.gguf"))["config"])
    )
    for a, b in zip(reference.tensors, fast.tensors, strict=True):
        assert a.name == b.name
        assert np.array_equal(a.data, b.data)


@CANARIES.of("ROPE_INIT_FUNCTIONS")
def _(_: Any) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    frequencies = architectures.llama3_frequencies(config)
    plain = 1.0 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(frequencies[:1], plain[:1])
    assert torch.allclose(frequencies[3:], plain[3:] / 8)


_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@CANARIES.of("render_jinja_template")
def _(_: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    marked = libraries.apply_template(turns, _TEMPLATE, return_assistant_tokens_mask=True)
    assert marked == ("a|bc", [(2, 4)])
    assert libraries.apply_template(turns[:1], _TEMPLATE, add_generation_prompt=True) == ("a|>", [])
    libraries.check_template(_TEMPLATE)


@CANARIES.of(
    "get_model_conversion_mapping",
    "rename_source_key",
    "WeightRenaming",
    "WeightConverter",
    "dot_natural_key",
)
def _(_: Any) -> None:
    assert get_parameters(conversions.get_model_conversion_mapping)[:2] == ["model", "key_mapping"]
    assert get_parameters(conversions.rename_source_key) == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix",
        "meta_state_dict", "reverse",
    ]  # fmt: skip
    add_parameters = ["self", "target_key", "source_key", "source_pattern", "future"]
    assert get_parameters(WeightConverter.add_tensor) == add_parameters
    assert issubclass(WeightConverter, type(WeightRenaming("a", "b")).__base__)
    model = build("mixtral")
    naming = conversions.KeyMapper(model)
    expert = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    name, pattern = naming(expert.format(0))
    assert name == "model.layers.0.mlp.experts.down_proj"
    assert pattern is not None
    assert naming("model.norm.weight") == ("model.norm.weight", None)
    # More than ten experts, so that string order differs from numeric order.
    keys = conversions.in_reading_order(expert.format(index) for index in reversed(range(11)))
    assert keys == [expert.format(index) for index in range(11)]
    parts = [(key, pattern, torch.full((2, 3), float(at))) for at, key in enumerate(keys)]
    merged = conversions.convert(naming.converters[pattern], name, parts, model)[name]
    assert torch.equal(merged[:, 0, 0], torch.arange(11.0))


@CANARIES.of("revert_weight_conversion", "PreTrainedModel._weight_conversions")
def _(request: pytest.FixtureRequest) -> None:
    assert get_parameters(conversions.revert_weight_conversion) == ["model", "state_dict"]
    model_dir = request.getfixturevalue("tiny_model_dir")("mixtral")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    name = "model.layers.0.mlp.experts.down_proj"
    saved = conversions.revert(model, {name: model.get_parameter(name)})
    expert = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    assert set(saved) == {expert.format(index) for index in range(len(model.get_parameter(name)))}
    conversions.forget_conversions(model)
    assert list(conversions.revert(model, {name: model.get_parameter(name)})) == [name]


@CANARIES.of("PreTrainedConfig._experts_implementation", "ALL_EXPERTS_FUNCTIONS")
def _(_: Any) -> None:
    model = build("mixtral")
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        assert model.model.layers[0].mlp.experts.config is model.config
    model.config._experts_implementation = "none of its"
    with pytest.raises(KeyError, match="not a valid experts implementation"):
        model(**build_batch("mixtral"))
    import ftlevel.models.upstream.experts  # noqa: F401 - registers ftlevel's

    assert "ftlevel_packed" in moe.ALL_EXPERTS_FUNCTIONS


@CANARIES.of(
    "experts_class._apply_gate", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm"
)
def _(_: Any) -> None:
    experts = build("qwen3_moe").model.layers[0].mlp.experts
    output = experts._apply_gate(torch.ones(3, 8))
    assert torch.allclose(output, torch.nn.functional.silu(torch.ones(3, 4)))
    flags = (experts.has_gate, experts.has_bias, experts.is_transposed)
    assert (*flags, experts.has_post_expert_norm) == (True, False, False, False)


@CANARIES.of(
    "replace_parameter_4bit_prequantized", "Bnb4bitParametrization.quant_state",
    "Bnb4BitHfQuantizer.param_needs_quantization", "Bnb4BitHfQuantizer.get_quantize_ops",
    "Bnb4BitHfQuantizer._process_model_after_weight_loading",
)  # fmt: skip
def _(request: pytest.FixtureRequest) -> None:
    from ftlevel.models.quantization import build_quantization_config

    model_dir = request.getfixturevalue("tiny_model_dir")("mixtral")
    quantization = build_quantization_config(
        QuantConfig(kind="4bit", experts=True), torch.float32, []
    )
    config = transformers.AutoConfig.from_pretrained(model_dir)
    model, _ = load_model(
        ModelSource("mixtral", "directory", str(model_dir)), config, "AutoModelForCausalLM",
        dtype=torch.float32, device="cpu", quantization=quantization,
    )  # fmt: skip
    experts = model.model.layers[0].mlp.experts
    state = experts.parametrizations.down_proj[0].quant_state
    assert state.shape == experts.down_proj.shape == (4, 64, 128)
    assert "model.layers.0.mlp.experts.down_proj.absmax" in model.state_dict()


@CANARIES.of("AutoHfQuantizer", "Linear4bit.source_cls")
def _(_: Any) -> None:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head"]
    )
    for family, is_conv1d in (("gpt2", True), ("llama", False)):
        with torch.device("meta"):
            model = type(build(family))(build(family).config)
        expected = {
            name for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
        }  # fmt: skip
        replaced = quantizers.replaced_layers(model, quantization, pre_quantized=False)
        assert replaced == dict.fromkeys(expected, is_conv1d)
        assert all(isinstance(model.get_submodule(name), bnb.nn.Linear4bit) for name in replaced)
    quantizers.check_environment(quantization.to_dict(), "cpu")
    with pytest.raises((ImportError, RuntimeError, ValueError)):
        quantizers.check_environment({"quant_method": "gptq", "bits": 4}, "cpu")


def _four_bit(double: bool = False) -> Any:
    linear: Any = bnb.nn.Linear4bit(64, 64, bias=False, compress_statistics=double)
    return linear.to("cpu")


def check_trainer(**parameters: str) -> None:
    """Assert the parameters of methods of `Trainer`."""
    for name, expected in parameters.items():
        actual = get_parameters(getattr(transformers.Trainer, name))
        assert actual == ["self", *expected.split()], name


@CANARIES.of("Linear4bit.support_avx512bf16_for_cpu", "QuantState.packing_format_for_cpu")
def _(_: Any) -> None:
    # Its effect is tested in test_four_bit_training.py, on CPUs that support it.
    linear = _four_bit()
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(bnb.nn.Linear4bit.forward)
    assert "quant_state.packing_format_for_cpu = True" in inspect.getsource(bnb.functional)
    assert quantizers.keep_trainable_layout(nn.Sequential(linear)) == 1
    assert linear.support_avx512bf16_for_cpu is False
    linear.compute_type_is_set = True
    assert quantizers.supports_4bit_training(linear)
    linear.weight.quant_state.packing_format_for_cpu = True
    assert not quantizers.supports_4bit_training(linear)


@CANARIES.of("Linear4bit.compute_type_is_set")
def _(_: Any) -> None:
    linear = _four_bit()
    quantizers.keep_trainable_layout(linear)
    assert not quantizers.supports_4bit_training(linear)
    linear(torch.ones(1, 64, dtype=torch.bfloat16))
    assert linear.compute_dtype == torch.bfloat16
    assert quantizers.supports_4bit_training(linear)


@CANARIES.of("QuantState.state2")
def _(_: Any) -> None:
    (scales,) = quantizers.scales_of(_four_bit().weight)
    assert (scales.dtype, scales.numel()) == (torch.float32, 64)
    codes, scales = quantizers.scales_of(_four_bit(double=True).weight)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    assert not list(quantizers.scales_of(nn.Linear(2, 2).weight))


@CANARIES.of("Int8Params.SCB", "Linear8bitLt.init_8bit_state")
def _(_: Any) -> None:
    plain = nn.Linear(64, 32, bias=False)
    linear: Any = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    linear.load_state_dict(plain.state_dict())
    linear = linear.to("cpu")
    (scales,) = quantizers.scales_of(linear.weight)
    assert torch.allclose(scales, plain.weight.abs().amax(1), rtol=1e-2)
    assert quantizers.supports_8bit_training(linear)
    dequantized = quantizers.dequantize_8bit(linear, torch.float32)
    assert (dequantized - plain.weight).abs().max() <= plain.weight.abs().max() / 127
    x = torch.randn(3, 64)
    assert torch.allclose(linear(x), x @ dequantized.t(), atol=2e-2)


@CANARIES.of("MatMul8bitFp")
def _(_: Any) -> None:
    """Rows do not depend on outliers of other rows while inputs are not rounded."""
    torch.manual_seed(0)
    layer: Any = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0)
    weight = layer.weight.data.clone()
    layer = layer.to("cpu").eval()
    x, others = torch.randn(4, 64), torch.randn(3, 64)
    others[:, 5] = 60.0
    batch = torch.cat([x, others])
    with torch.no_grad():
        rounded = layer(x)
        assert (layer(batch)[:4] - rounded).norm() > 1e-4 * rounded.norm(), "LLM.int8()"
    with quantizers.with_float_inputs(layer):
        alone = layer(x.requires_grad_())
        torch.testing.assert_close(layer(batch)[:4], alone)
        torch.testing.assert_close(alone, x @ weight.T + layer.bias, rtol=2e-2, atol=2e-2)
        (gradient,) = torch.autograd.grad(alone.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(4, -1), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        assert torch.equal(layer(x), rounded), "restored"


@CANARIES.of("functional.get_4bit_type")
def _(_: Any) -> None:
    assert get_parameters(bnb.functional.get_4bit_type)[:2] == ["typename", "device"]
    for kind in ("nf4", "fp4"):
        values = quantizers.four_bit_values(kind)
        assert values.shape == (16,)
        weight = values.repeat(4)  # one block, whose scale is 1
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=kind, blocksize=64)
        assert torch.allclose(bnb.functional.dequantize_4bit(packed, state), weight)


@CANARIES.of("SeedableRandomSampler")
def _(_: Any) -> None:
    sampler = libraries.shared_order()
    order = sampler(range(9), generator=torch.Generator(), data_seed=3)
    for epoch in (0, 2):
        order.set_epoch(epoch)
        expected = torch.randperm(9, generator=torch.Generator().manual_seed(3 + epoch))
        assert list(order) == expected.tolist()


@CANARIES.of("config.HF_HUB_OFFLINE")
def _(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("monkeypatch").setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with (
        libraries.datasets_offline(True),
        pytest.raises(ConnectionError, match="OfflineModeIsEnabled"),
    ):
        datasets.load_dataset("no-such-owner/no-such-data")
    assert datasets.config.HF_HUB_OFFLINE is False


@CANARIES.of(
    "Trainer._get_train_sampler",
    "Trainer._run_epoch",
    "Trainer._evaluate",
    "Trainer._load_from_checkpoint",
    "Trainer._get_num_items_in_batch",
    "Trainer.model_accepts_loss_kwargs",
    "Trainer.current_gradient_accumulation_steps",
)
def _(request: pytest.FixtureRequest) -> None:
    check_trainer(
        _get_train_sampler="train_dataset",
        _evaluate="trial ignore_keys_for_eval skip_scheduler",
        _load_from_checkpoint="resume_from_checkpoint model",
        _get_num_items_in_batch="batch_samples device",
    )
    trainer = _ReversedTrainer(
        model=build("llama"),
        args=transformers.TrainingArguments(
            str(request.getfixturevalue("tmp_path")), max_steps=1, per_device_train_batch_size=1,
            gradient_accumulation_steps=2, report_to=[], use_cpu=True, learning_rate=0.0,
        ),
        train_dataset=[{"input_ids": torch.tensor([3 + index, 4])} for index in range(4)],
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs = True
    logged = trainer.train().training_loss
    assert trainer.first_tokens == [6, 5]  # in the overridden order
    assert logged == 2.0  # two micro-batches of 7 / 7: summed, not averaged
    assert trainer.steps == [2, 2]
    assert trainer.epochs == 1  # all steps are in one epoch
    trainer.model_accepts_loss_kwargs = False
    assert trainer.train().training_loss == 1.0  # averaged over the micro-batches


class _ReversedTrainer(transformers.Trainer):  # type: ignore[misc]  # transformers is Any
    """Trainer that reads the last rows first and reports 7 targets per step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.first_tokens: list[int] = []
        self.steps: list[int] = []
        self.epochs = 0

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        before = self.state.global_step
        super()._run_epoch(*arguments, **settings)
        assert self.state.global_step == before + 1
        self.epochs += 1

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return [3, 2, 1, 0]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> torch.Tensor:
        assert len(batch_samples) == 2
        return torch.tensor(7)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self.first_tokens.append(int(inputs["input_ids"][0, 0]))
        self.steps.append(self.current_gradient_accumulation_steps)
        targets = 7 if num_items_in_batch is None else num_items_in_batch
        return model(**inputs).logits.sum() * 0 + 7 / targets


@CANARIES.of(
    "Tensor._make_wrapper_subclass", "Tensor.__torch_dispatch__",
    "TorchDispatchMode.__torch_dispatch__", "tree_leaves", "tree_map",
)  # fmt: skip
def _(_: Any) -> None:
    class RecordResults(fake.OperationWatch):
        def __init__(self) -> None:
            super().__init__()
            self.first_tokens: list[torch.Tensor] = []

        def on_result(self, tensor: torch.Tensor) -> None:
            self.first_tokens.append(tensor)

    weight = nn.Parameter(fake.new_fake((3, 2), torch.float32))
    with RecordResults() as recorder, torch.autocast("cpu", torch.bfloat16):
        y = functional.linear(torch.zeros(4, 2), weight)
        torch.split(y, 2)
    assert (y.shape, y.dtype, y.device.type) == ((4, 3), torch.bfloat16, "cpu")
    assert [tuple(t.shape) for t in recorder.first_tokens][-2:] == [(2, 3), (2, 3)]
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert isinstance(gradient, fake.FakeTensor)
    assert gradient.shape == weight.shape


@CANARIES.of("functional.QuantState")
def _(_: Any) -> None:
    for double in (False, True):
        packed, state = bnb.functional.quantize_4bit(torch.randn(128, 64), quant_type="nf4",
                                                     compress_statistics=double)  # fmt: skip
        linear = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4",
                                   compress_statistics=double, device="meta")  # fmt: skip
        fake.pack_fake(nn.Sequential(linear), torch.float32)
        fake_state = linear.weight.quant_state
        while state is not None:
            for name in ("absmax", "code"):
                real, fake_value = getattr(state, name), getattr(fake_state, name)
                assert (fake_value.shape, fake_value.dtype) == (real.shape, real.dtype)
            assert (state.blocksize, state.quant_type) == (
                fake_state.blocksize,
                fake_state.quant_type,
            )
            state, fake_state = state.state2, fake_state.state2
        assert linear.weight.shape == packed.shape
        dequantized = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert dequantized.shape == (128, 64)


@CANARIES.of(
    "Trainer._save",
    "Trainer._save_optimizer_and_scheduler",
    "Trainer._load_optimizer_and_scheduler",
    "Trainer._clip_grad_norm",
    "Trainer._get_grad_norm",
    "Trainer._defer_fsdp_gradient_reduction",
    "Trainer._sync_replicated_trainable_parameters",
    "Trainer.is_distributed_loading_by_transformers",
)
def _(request: pytest.FixtureRequest) -> None:
    check_trainer(
        _save="output_dir state_dict",
        _save_optimizer_and_scheduler="output_dir",
        _load_optimizer_and_scheduler="checkpoint",
        _clip_grad_norm="model",
        _get_grad_norm="model grad_norm",
        _defer_fsdp_gradient_reduction="",
    )
    trainer = _RecordingTrainer(
        model=build("llama"),
        args=transformers.TrainingArguments(
            str(request.getfixturevalue("tmp_path")), max_steps=1, per_device_train_batch_size=1,
            report_to=[], use_cpu=True, learning_rate=0.0, save_strategy="steps", save_steps=1,
        ),
        train_dataset=[{"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([3, 4])}],
    )  # fmt: skip
    assert trainer.is_distributed_loading_by_transformers is False
    leave_sharded(trainer)
    trainer.train()
    assert trainer.called == [
        "_sync_replicated_trainable_parameters", "_clip_grad_norm", "_get_grad_norm", "_save",
        "_save_optimizer_and_scheduler",
    ]  # fmt: skip


def _recorded(name: str) -> Any:
    def call(self: Any, *arguments: Any, **settings: Any) -> Any:
        self.called.append(name)
        if name in ("_clip_grad_norm", "_get_grad_norm"):
            return getattr(transformers.Trainer, name)(self, *arguments, **settings)
        return None

    return call


class _RecordingTrainer(transformers.Trainer):  # type: ignore[misc]  # transformers is Any
    def __init__(self, **settings: Any):
        self.called: list[str] = []
        super().__init__(**settings)

    _sync_replicated_trainable_parameters = _recorded("_sync_replicated_trainable_parameters")
    _clip_grad_norm = _recorded("_clip_grad_norm")
    _get_grad_norm = _recorded("_get_grad_norm")
    _save = _recorded("_save")
    _save_optimizer_and_scheduler = _recorded("_save_optimizer_and_scheduler")


@CANARIES.of("TrainingArguments._n_gpu")
def _(request: Any) -> None:
    output_dir = request.getfixturevalue("tmp_path")
    training_args = transformers.TrainingArguments(output_dir=str(output_dir), use_cpu=True)
    assert training_args.n_gpu == 0
    training_args._n_gpu = 3
    assert training_args.train_batch_size == 3 * training_args.per_device_train_batch_size
