"""Tests of the tuners through PEFT's Python API: they behave like PEFT's own tuners."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ftlevel.fast.fused_lora import FusedLinear, register_fused_layers
from ftlevel.methods.bottleneck.layer import BottleneckConfig
from ftlevel.methods.prefix.model import PrefixKvConfig
from ftlevel.methods.soft_prompt.layer import SoftPromptConfig
from ftlevel.models.upstream.architectures import attention_of
from sampling import sample
from tiny_models import HIDDEN, build, build_batch, build_config, compute_logits

CONFIGS = {
    "bottleneck": lambda: BottleneckConfig(init_weights=False),
    "parallel": lambda: BottleneckConfig(placement="parallel", init_weights=False),
    "prefix": PrefixKvConfig,
    "projected": lambda: PrefixKvConfig(prefix_projection=True),
    "prompt": SoftPromptConfig,
    "lstm": lambda: SoftPromptConfig(encoder="LSTM"),
}
every_tuner = pytest.mark.parametrize("tuner", CONFIGS)


def get_adapter_dtypes(model: Any, name: str) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if model.prefix in n and f".{name}" in n}


@pytest.mark.parametrize(
    ("tuner", "family", "dtype"),
    sample(
        [*product(CONFIGS, ("llama", "bert", "t5", "mixtral"), (torch.bfloat16, torch.float16))]
    ),
)
def test_autocast_adapter_dtype_sets_dtype_after_load(tuner, family, dtype, tmp_path):
    def get_base():
        return build(family).to(dtype)

    def get_dtypes(model):
        return [get_adapter_dtypes(model, name) for name in ("default", "other")]

    for autocast, expected in ((True, torch.float32), (False, dtype)):
        options = {"autocast_adapter_dtype": autocast}
        model = get_peft_model(get_base(), CONFIGS[tuner](), **options)
        model.add_adapter("other", CONFIGS[tuner](), **options)
        assert get_dtypes(model) == [{expected}] * 2
        assert torch.isfinite(compute_logits(model.eval(), build_batch(family))).all()
        model.save_pretrained(str(tmp_path))
        for load_options in (options, {**options, "low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(get_base(), str(tmp_path), **load_options)
            loaded.load_adapter(str(tmp_path / "other"), "other", **load_options)
            assert get_dtypes(loaded) == [{expected}] * 2
            for name in ("default", "other"):
                loaded.set_adapter(name)
                model.set_adapter(name)
                logits = compute_logits(model, build_batch(family))
                assert torch.equal(compute_logits(loaded, build_batch(family)), logits)


@pytest.mark.parametrize(
    ("tuner", "family"),
    sample([*product(CONFIGS, ("llama", "gpt2", "bert", "distilbert", "opt", "t5", "bart"))]),
)
def test_tuners_work_on_model_without_head(tuner, family, tmp_path):
    stack = AutoModel.from_config(build_config(family)).eval()

    def compute(model):
        return model(**inputs).last_hidden_state

    inputs = build_batch(family, "seqcls")
    del inputs["labels"]
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model = get_peft_model(copy.deepcopy(stack), CONFIGS[tuner]()).eval()
    states, before = compute(model), compute(stack)
    assert states.shape == before.shape
    assert not torch.allclose(states, before, atol=1e-4)
    states.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        torch.testing.assert_close(compute(model), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(str(tmp_path))
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(f".{model.prefix}" in key for key in keys)  # no base weights
    loaded = PeftModel.from_pretrained(copy.deepcopy(stack), str(tmp_path))
    torch.testing.assert_close(compute(loaded), states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compute(model.unload()), before, atol=1e-5, rtol=1e-5)


def test_soft_prompt_on_linear_layer_raises():
    config = SoftPromptConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="takes no tokens"):
        get_peft_model(build("llama"), config)


@every_tuner
def test_inject_adapter_from_state_dict_keys(tuner):
    injected = inject_adapter_in_model(CONFIGS[tuner](), build("llama"))
    state = get_peft_model_state_dict(injected)
    reinjected = inject_adapter_in_model(CONFIGS[tuner](), build("llama"), state_dict=state)
    assert get_peft_model_state_dict(reinjected).keys() == state.keys() != set()


def test_fused_layer_repr_equals_peft_repr():
    plain, fused = (LoraConfig(target_modules=["first", "last"], r=2) for _ in range(2))
    register_fused_layers(fused)
    expected, model = (get_peft_model(Feedforward(), config) for config in (plain, fused))
    assert type(model.base_model.model.last) is FusedLinear
    assert repr(model) == repr(expected)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "computes attention without"),
        ("mpnet", "computes attention without"),
        ("gpt_oss", "more than scaled_dot_product"),
    ],
)
def test_prefix_on_unsupported_attention_raises(auto, model_type, reason):
    if model_type == "mpnet":
        auto = AutoModelForMaskedLM
    config = AutoConfig.for_model(
        model_type, vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = auto.from_config(config)
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, PrefixKvConfig())


class Feedforward(nn.Module):
    """A model without a `config`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.last(self.first(x).relu())
        return states


def test_prefix_with_linear_target_module_raises():
    config = PrefixKvConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])
    message = r"Linear does not expose its number of heads.*Name attention modules in"
    with pytest.raises(ValueError, match=message):
        get_peft_model(build("llama"), config)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_bottleneck_works_on_model_without_config(placement):
    config = BottleneckConfig(target_modules=["last"], placement=placement, init_weights=False)
    plain, x = Feedforward(), torch.randn(3, 6)
    before = plain(x)
    model = get_peft_model(plain, config)
    assert not torch.allclose(model(x), before)
    layer = model.base_model.model.last
    assert (layer.in_features, layer.out_features) == (8, 4)
    with pytest.raises(ValueError, match="Set target_modules"):
        get_peft_model(Feedforward(), BottleneckConfig())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_deleting_last_prefix_restores_attention(family, implementation):
    batch, base = build_batch(family), build(family)
    base.set_attn_implementation(implementation)
    before, attention = compute_logits(base, batch), attention_of(base)
    model = get_peft_model(base, PrefixKvConfig()).eval()
    model.delete_adapter("default")
    assert attention_of(base) == attention
    assert torch.equal(compute_logits(base, batch), before)
    model.add_adapter("again", PrefixKvConfig())
    model.set_adapter("again")
    assert not torch.allclose(compute_logits(model, batch), before, atol=1e-4)


ATTENTIONS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5", "bart", "gpt_neo", "deberta-v2"])
def test_output_attentions_include_prefix_first(family):
    batch, base = build_batch(family), build(family)
    if attention_of(base) == "sdpa":
        base.set_attn_implementation("eager")
    with torch.no_grad():
        before = base(**batch, output_attentions=True)
        model = get_peft_model(base, PrefixKvConfig(num_virtual_tokens=5)).eval()
        after = model(**batch, output_attentions=True)
    compared = [name for name in ATTENTIONS if before.get(name)]
    assert compared
    for name in compared:
        assert len(after[name]) == len(before[name])
        for weights, plain in zip(after[name], before[name], strict=True):
            assert weights.shape == (*plain.shape[:-1], 5 + plain.shape[-1])
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # The first layer's inputs are unchanged: attention among tokens keeps its ratios.
    first = "attentions" if "attentions" in compared else "encoder_attentions"
    on_tokens = after[first][0][1, ..., 5:]  # the row without padding
    assert (on_tokens.sum(-1) < 1).all()
    torch.testing.assert_close(on_tokens / on_tokens.sum(-1, keepdim=True), before[first][0][1])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_prompt_attentions_match_peft_prompt_tuning(family):
    batch, task = build_batch(family), "CAUSAL_LM" if family == "llama" else "SEQ_2_SEQ_LM"
    models = []
    for config in (SoftPromptConfig, PromptTuningConfig):
        base = build(family)
        base.set_attn_implementation("eager")
        models.append(get_peft_model(base, config(task_type=task, num_virtual_tokens=5)).eval())
    ours, plain = models
    prompt = next(p for p in ours.parameters() if p.requires_grad)
    plain.prompt_encoder["default"].embedding.weight.data[:5] = prompt.detach()
    with torch.no_grad():
        actual, expected = (model(**batch, output_attentions=True) for model in models)
    for name in ATTENTIONS:
        for weights, expected_weights in zip(
            actual.get(name) or (), expected.get(name) or (), strict=True
        ):
            torch.testing.assert_close(weights, expected_weights)
    first = actual["attentions" if family == "llama" else "encoder_attentions"][0]
    assert first.shape[-2:] == (17, 17)


@pytest.mark.parametrize("tuner", ["parallel", "prefix"])
def test_tuners_compile_to_one_graph(tuner):
    torch.compiler.reset()
    model, batch = get_peft_model(build("llama"), CONFIGS[tuner]()).eval(), build_batch("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, model(**batch).logits)


@every_tuner
@pytest.mark.parametrize("family", ["llama", "t5", "electra"])
def test_tuner_layers_expose_in_and_out_features(tuner, family):
    model = get_peft_model(build(family), CONFIGS[tuner]())
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers
    for layer in layers:
        base = layer.get_base_layer()
        width = getattr(base, "out_features", getattr(base, "embedding_dim", HIDDEN))
        assert layer.out_features == width
        assert layer.in_features == getattr(base, "in_features", width)


def test_bottleneck_on_layer_without_known_width_raises():
    message = (
        r"Embedding does not expose its input and output size, and the model has no config\. Name "
        r"linear layers in target_modules\."
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(nn.Embedding(4, 6)), BottleneckConfig(target_modules=["0"]))
