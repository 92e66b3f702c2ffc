"""Tests of bottleneck adapters on every family: train, save, load into a fresh base and compare."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils.peft_types import PeftType

from ftlevel.config.methods.other import ON_RESIDUAL, AdapterSpec
from ftlevel.errors import ConfigError, InputError
from ftlevel.methods import METHODS
from ftlevel.methods.bottleneck import ADAPTER_POSITIONS, get_input_layer
from ftlevel.methods.bottleneck.layer import BottleneckLayer
from ftlevel.models.families import FAMILIES as KNOWN
from ftlevel.trained.adapt import apply_method, load_adapter
from sampling import sample
from tiny_models import (
    FAMILIES,
    HEADS,
    HIDDEN,
    LAYERS,
    build,
    build_batch,
    compute_logits,
)
from unit.models.meta_models import AUTO, has_model, tiny_config
from virtual_tokens import describe_base

PLACEMENTS = ("houlsby", "pfeiffer", "seq_bn", "parallel", "par_bn", "adapter_plus")
FEWER_PLACEMENTS = PLACEMENTS[:4]  # one of the placements on the residual is enough
DIM = 8
# Number of adapters in a tiny model: on attentions (Houlsby) and on feed-forwards.
ATTENTIONS = {"albert": 1, "t5": 3 * LAYERS, "mt5": 3 * LAYERS, "bart": 3 * LAYERS}
FEED_FORWARDS = {"albert": 1, "t5": 2 * LAYERS, "mt5": 2 * LAYERS, "bart": 2 * LAYERS}
SPARSE = ("mixtral", "qwen3_moe")
# Heads of one and of several linear layers, detected and not detected by PEFT.
HEAD_CASES = [
    ("bert", "tokcls", "houlsby"),
    ("roberta", "seqcls", "parallel"),
    ("distilbert", "seqcls", "pfeiffer"),
    ("deberta-v2", "seqcls", "houlsby"),
    ("modernbert", "seqcls", "parallel"),
    ("gpt2", "seqcls", "parallel"),
    ("llama", "qa", "pfeiffer"),
    ("qwen3_moe", "tokcls", "parallel"),
    ("t5", "seqcls", "houlsby"),
    ("bart", "seqcls", "parallel"),
]


def adapt(model: Any, head: str, **fields: Any) -> Any:
    """Add a bottleneck adapter to a tiny model, as `ftlevel train` does."""
    spec = AdapterSpec(**{"bottleneck_dim": DIM, **fields})
    return apply_method(model, spec, describe_base(spec, model, head))


def backward(
    model: Any, batch: dict[str, torch.Tensor], seed: int = 3, *, bf16: bool = False
) -> dict[str, torch.Tensor]:
    """Return the gradients of trainable parameters; `seed` seeds dropout."""
    torch.manual_seed(seed)
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return gradients


def train(model: Any, batch: dict[str, torch.Tensor], *, bf16: bool = False) -> set[str]:
    """Train two steps; return the trainable tensors that never had a nonzero gradient."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    without_gradient = set(trainable)
    for step in range(2):
        gradients = backward(model, batch, step, bf16=bf16)
        assert set(gradients) == set(trainable), "exactly what is trained has a gradient"
        without_gradient -= {
            name for name, gradient in gradients.items() if gradient.abs().sum() > 0
        }
        optimizer.step()
    return without_gradient


def digest(model: Any) -> str:
    """Return a hash of the frozen parameters."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in frozen)).hexdigest()


def get_bottleneck_layers(model: Any) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def is_supported(family: str, placement: str) -> bool:
    """Return whether the family supports the placement; unsupported ones are tested below."""
    return placement not in ON_RESIDUAL or bool(ADAPTER_POSITIONS[family].residual)


def expected_hooks(family: str, placement: str) -> set[str]:
    """Return the hooks that a layer must have; a whole feed-forward receives its input itself."""
    if placement == "parallel":
        return set() if family in SPARSE else {"input"}
    is_norm = placement == "adapter_plus" and ADAPTER_POSITIONS[family].norm
    return {"residual"} if placement in ON_RESIDUAL and not is_norm else set()


def expected_adapter_count(family: str, placement: str) -> int:
    attentions = ATTENTIONS.get(family, LAYERS) if placement == "houlsby" else 0
    return attentions + FEED_FORWARDS.get(family, LAYERS)


CELLS = [
    (family, HEADS[family][0], placement)
    for family in FAMILIES
    for placement in PLACEMENTS
    if is_supported(family, placement)
]


@pytest.mark.parametrize(("family", "head", "placement"), [*sample(CELLS, times=2), *HEAD_CASES])
def test_adapter_trains_saves_and_reloads_on_every_family(family, head, placement, tmp_path):
    base, batch = build(family, head), build_batch(family, head)
    before = compute_logits(base, batch)
    model = adapt(base, head, placement=placement)
    layers = get_bottleneck_layers(model)
    assert len(layers) == expected_adapter_count(family, placement)
    assert all(set(layer._hooks) == expected_hooks(family, placement) for layer in layers)
    assert torch.equal(compute_logits(model, batch), before), "the identity at the start"

    frozen = digest(model)
    assert train(model, batch) == set()
    assert digest(model) == frozen
    after = compute_logits(model, batch)
    assert not torch.equal(after, before)
    assert all(not layer._inputs for layer in layers), "no activation is kept"

    if family != "albert":  # transformers cannot checkpoint it
        check_checkpointing(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    check_loading(family, head, batch, tmp_path, after)


def check_checkpointing(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Check that gradients with recomputed activations equal those without."""
    plain = backward(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = backward(model, batch)
    assert set(recomputed) == set(plain)
    largest = max(1.0, max(gradient.abs().max().item() for gradient in plain.values()))
    assert max((recomputed[n] - plain[n]).abs().max().item() for n in plain) < 1e-6 * largest
    assert all(not layer._inputs for layer in get_bottleneck_layers(model))


def check_loading(family, head, batch, directory, after):
    """Check a load into a fresh base under two names, then switch, delete, disable and unload."""
    fresh = build(family, head)
    untouched = compute_logits(fresh, batch)
    loaded = load_adapter(fresh, directory)
    assert torch.equal(compute_logits(loaded, batch), after)

    loaded.load_adapter(directory, adapter_name="other")
    with torch.no_grad():  # so that only the adapter "other" gives the right output
        for name, parameter in loaded.named_parameters():
            if "bottleneck_" in name and ".default." in name:
                parameter.fill_(0.3)
    assert not torch.equal(compute_logits(loaded, batch), after)
    loaded.set_adapter("other")
    assert torch.equal(compute_logits(loaded, batch), after)
    loaded.delete_adapter("default")
    assert torch.equal(compute_logits(loaded, batch), after)
    assert all(list(layer.configs) == ["other"] for layer in get_bottleneck_layers(loaded))

    with loaded.disable_adapter():
        assert torch.equal(compute_logits(loaded, batch), untouched)
    names = {n for n, _ in build(family, head).named_parameters()}
    unloaded = loaded.unload()
    assert {n for n, _ in unloaded.named_parameters()} == names
    leaves = [module for module in unloaded.modules() if not list(module.children())]
    assert not any(module._forward_pre_hooks for module in leaves)


def other_families():
    """Return the known families that `tiny_models` lacks, with each placement."""
    others = sorted({*KNOWN} - {*FAMILIES})
    return [(f, p) for f in others for p in FEWER_PLACEMENTS if is_supported(f, p)]


@pytest.mark.parametrize(("family", "placement"), sample(other_families()))
def test_adapter_trains_on_families_without_tiny_model(family, placement):
    tasks = ("summarization", "masked-lm", "text-generation")
    task = next(t for t in tasks if has_model(family, t))
    seq2seq = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "decoder_start_token_id": 0}
    config = tiny_config(family, **(seq2seq if task == "summarization" else {}))
    base = getattr(transformers, AUTO[task]).from_config(config).eval()
    ids = torch.randint(10, 190, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = compute_logits(base, batch)
    model = adapt(base, "mlm", placement=placement)
    layers = get_bottleneck_layers(model)
    assert all(set(layer._hooks) == expected_hooks(family, placement) for layer in layers)
    assert torch.equal(compute_logits(model, batch), before)
    assert train(model, batch) == set()
    assert not torch.equal(compute_logits(model, batch), before)


def test_moe_with_dense_layers_has_adapter_in_each_layer():
    base = build("qwen3_moe", mlp_only_layers=[0])
    assert hasattr(base.model.layers[0].mlp, "down_proj")
    before = compute_logits(base, build_batch("qwen3_moe"))
    model = adapt(base, "causal", placement="parallel")
    assert len(get_bottleneck_layers(model)) == LAYERS
    assert torch.equal(compute_logits(model, build_batch("qwen3_moe")), before)
    assert train(model, build_batch("qwen3_moe")) == set()


@pytest.mark.parametrize(
    ("family", "placement"),
    sample([cell[::2] for cell in CELLS if cell[1] in ("causal", "seq2seq")]),
)
def test_generation_with_cache_equals_without_cache(family, placement):
    model = adapt(build(family), HEADS[family][0], placement=placement)
    train(model, build_batch(family))
    ids = build_batch(family)["input_ids"][1:]
    tokens = [
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=cache,
            min_new_tokens=6, max_new_tokens=6, pad_token_id=0,
        )
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*tokens)


# Formulas of the placements.


def compute_adapter(layer: BottleneckLayer, source: torch.Tensor, scaling: float) -> torch.Tensor:
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    return scaling * up(torch.relu(down(source)))


@pytest.mark.parametrize(
    ("family", "placement", "scaling"),
    [("llama", "pfeiffer", 1.0), ("llama", "parallel", 4.0), ("mixtral", "parallel", 4.0)],
)
def test_adapter_output_matches_formula(family, placement, scaling):
    base = build(family)
    expected_mlp = copy.deepcopy(base.model.layers[1].mlp)
    model = adapt(base, "causal", placement=placement)
    train(model, build_batch(family))
    mlp = model.base_model.model.model.layers[1].mlp
    layer = mlp.down_proj if family == "llama" else mlp  # of experts, it reads the router's input
    hidden = torch.randn(2, 5, HIDDEN)
    with torch.no_grad():
        plain = expected_mlp(hidden)
        source = plain if placement == "pfeiffer" else hidden
        expected = plain + compute_adapter(layer, source, scaling)
        assert torch.allclose(mlp(hidden), expected, atol=1e-6)


def run_blocks(model: Any, family: str, source: str) -> torch.Tensor:
    """Return the hidden states after two blocks, computed as in the papers.

    `source` is the adapter's input: h, the feed-forward's output; r, its residual; y, their sum
    after the norm that follows, if any.
    """
    states = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    blocks = model.h if family == "gpt2" else model.encoder.layer
    for block in blocks:
        if family == "gpt2":
            r = states + block.attn(block.ln_1(states))[0]
            site, inner, norm = block.mlp.c_proj, block.mlp.act(block.mlp.c_fc(block.ln_2(r))), None
        else:
            r = block.attention(states)[0]
            site, inner, norm = block.output.dense, block.intermediate(r), block.output.LayerNorm
        if isinstance(norm, BottleneckLayer):
            site, norm = norm, norm.base_layer
            h = block.output.dense(inner)
        else:
            h = site.base_layer(inner)
        norm = norm or torch.nn.Identity()
        adapter_input = {"h": h, "r": r, "y": norm(h + r)}[source]
        down, up = site.bottleneck_down["default"], site.bottleneck_up["default"]
        scale = site.bottleneck_scale.get("default", 4.0)
        adapter_output = scale * (
            torch.relu(adapter_input @ down.weight.T + down.bias) @ up.weight.T + up.bias
        )
        is_after_norm = site is not block.output.dense if family == "bert" else False
        states = norm(h + r) + adapter_output if is_after_norm else norm(h + adapter_output + r)
    return states


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize(
    ("placement", "source"),
    [("pfeiffer", "h"), ("seq_bn", "y"), ("par_bn", "r"), ("adapter_plus", "y")],
)
def test_two_blocks_match_formulas_of_papers(family, placement, source):
    def run(blocks):
        states = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
        for block in blocks:
            output = block(states)
            states = output[0] if isinstance(output, tuple) else output
        return states

    scaling = None if placement in ("par_bn", "adapter_plus") else 4.0
    model = adapt(build(family, HEADS[family][0]), "mlm", placement=placement, scaling=scaling)
    base = model.base_model.model.base_model
    blocks = base.h if family == "gpt2" else base.encoder.layer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        expected = run_blocks(base, family, source)
        assert torch.allclose(run(blocks), expected, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(run(blocks), expected, atol=0.1)


@pytest.mark.parametrize("placement", ON_RESIDUAL)
def test_residual_placement_on_unsupported_family_returns_error(placement):
    def get_error(config):
        spec = AdapterSpec(placement=placement)
        return METHODS["adapter"].get_error(spec, config, "decoder", "text-generation", "none")

    for family in ("gptj", "gpt_neox", "falcon", "phi", "gemma2", "olmo2", "granite"):
        assert get_error(tiny_config(family)) == (
            f"placement {placement} reads the sum of the feed-forward's output and its residual, "
            f"and {family} does not simply add the two. Use placement houlsby, pfeiffer or "
            "parallel."
        )
    assert get_error(tiny_config("llama")) is None
    opt = tiny_config("opt", do_layer_norm_before=False)
    assert "opt with do_layer_norm_before False" in get_error(opt)


def test_residual_placement_with_target_modules_raises():
    with pytest.raises(ConfigError, match=r"seq_bn reads the residual.*drop target_modules"):
        AdapterSpec(placement="seq_bn", target_modules=["o_proj"])


def test_adapters_with_different_placements_share_one_model(tmp_path):
    batch = build_batch("bert")
    expected = {}
    for placement in PLACEMENTS:
        single = adapt(build("bert"), "mlm", placement=placement)
        train(single, batch)
        single.save_pretrained(tmp_path / placement)
        expected[placement] = compute_logits(single, batch)
    model = PeftModel.from_pretrained(build("bert"), tmp_path / "houlsby", adapter_name="houlsby")
    for placement in PLACEMENTS[1:]:
        model.load_adapter(tmp_path / placement, adapter_name=placement)
    model.eval()
    for placement in ("parallel", *PLACEMENTS, "seq_bn"):
        model.set_adapter(placement)
        assert torch.equal(compute_logits(model, batch), expected[placement])
    model.delete_adapter("parallel")
    assert not any("input" in layer._hooks for layer in get_bottleneck_layers(model))
    model.set_adapter("par_bn")
    assert torch.equal(compute_logits(model, batch), expected["par_bn"])
    model.delete_adapter("par_bn")
    model.delete_adapter("seq_bn")
    assert not any(layer._hooks for layer in get_bottleneck_layers(model))
    model.set_adapter("houlsby")
    assert torch.equal(compute_logits(model, batch), expected["houlsby"])


def test_deepcopy_hooks_its_own_modules():
    batch = build_batch("bert")
    model = adapt(build("bert"), "mlm", placement="parallel")
    train(model, batch)
    before = compute_logits(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in get_bottleneck_layers(model):
            layer.bottleneck_up["default"].weight.zero_()
    assert torch.equal(compute_logits(twin, batch), before)
    assert not torch.equal(compute_logits(model, batch), before)


def test_adapter_dropout_is_active_only_in_training():
    model = adapt(build("llama"), "causal", placement="pfeiffer", adapter_dropout=0.5)
    train(model, build_batch("llama"))
    layer, hidden = get_bottleneck_layers(model)[0], torch.randn(1, 3, HIDDEN * 2)
    with torch.no_grad():
        layer.eval()
        assert torch.equal(layer(hidden), layer(hidden))
        layer.train()
        assert not torch.equal(layer(hidden), layer(hidden))


def test_reentrant_checkpointing_keeps_gradients():
    model, batch = adapt(build("llama"), "causal", placement="parallel"), build_batch("llama")
    train(model, batch)
    plain = backward(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    recomputed = backward(model, batch)
    assert max((recomputed[n] - plain[n]).abs().max().item() for n in plain) < 1e-6


# Errors and registration with PEFT.


def test_merge_raises_with_reason_and_alternative():
    model = adapt(build("llama"), "causal")
    with pytest.raises(NotImplementedError, match=r"not linear.*cannot be merged.*--method lora"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="cannot be merged"):  # as PEFT's tuners
        model.base_model._check_merge_allowed()


def test_unknown_family_raises_and_lists_supported_families():
    class Unknown:
        config = transformers.PretrainedConfig(model_type="perceptron")

    with pytest.raises(InputError, match=r"no positions are known.*llama.*--target-modules"):
        METHODS["adapter"].default_target_modules(AdapterSpec(), Unknown())


def test_every_known_family_has_adapter_positions():
    assert set(ADAPTER_POSITIONS) == set(KNOWN)
    for name, family in KNOWN.items():
        sites = ADAPTER_POSITIONS[name]
        linears = [linear.path for stack in family.stacks for linear in stack.linears]
        paths = {path.removeprefix(f"layer.{i}.") for path in linears for i in range(3)}
        feed_forward = [sites.feed_forward] if sites.inputs else []
        assert {*sites.attention, *sites.inputs, *feed_forward} <= paths, name


def test_input_layer_is_in_the_same_block():
    sites = ADAPTER_POSITIONS["bert"]
    names = [f"encoder.layer.{i}.intermediate.dense" for i in (1, 11)]
    assert get_input_layer(sites, "encoder.layer.11.output.dense", names) == names[1]
    assert get_input_layer(sites, "encoder.layer.11.attention.output.dense", names) is None


def test_peft_type_behaves_like_enum_member():
    adapt(build("bert"), "mlm")
    member = PeftType("BOTTLENECK")
    assert member is PeftType.BOTTLENECK is PeftType["BOTTLENECK"]
    assert member in list(PeftType)
    assert member == "BOTTLENECK"
    assert copy.deepcopy(member) is member


def test_saved_config_has_all_fields(tmp_path):
    model = adapt(
        build("llama"), "causal", placement="parallel", bottleneck_dim=None, reduction_factor=4,
        non_linearity="gelu", adapter_dropout=0.1,
    )  # fmt: skip
    assert get_bottleneck_layers(model)[0].bottleneck_down["default"].out_features == HIDDEN // 4
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.placement, config.reduction_factor, config.scaling) == ("parallel", 4, 4.0)
    assert (config.non_linearity, config.adapter_dropout) == ("gelu", 0.1)


def test_get_peft_model_finds_adapter_positions():
    from peft import get_peft_model

    import ftlevel.adapters  # noqa: F401 - registers the tuners
    from ftlevel.methods.bottleneck.layer import BottleneckConfig

    model = get_peft_model(build("bert"), BottleneckConfig(placement="houlsby"))
    assert len(get_bottleneck_layers(model)) == 2 * LAYERS
