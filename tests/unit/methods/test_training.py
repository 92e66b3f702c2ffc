"""Tests of method-specific training: rank pruning, two learning rates, initialization."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

import tiny_models
from ftlevel.config import SPECS
from ftlevel.errors import ConfigError
from ftlevel.methods import METHODS, Base
from ftlevel.methods.adalora.callback import RankPruningCallback
from ftlevel.methods.lora.initialization import start_from_data
from ftlevel.models.module_tree import get_heads
from ftlevel.objectives import TrainingLoss
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import apply_method, copy_initial_state, load_adapter, save_adapter
from ftlevel.training.plan.method import resolve_method_targets

LORA_VARIANTS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
]
BATCH = tiny_models.build_batch("llama", "seqcls")


def build_adapted_models(kind: str, steps: int = 10, family: str = "llama", **fields):
    spec = SPECS[kind](**fields)
    base = tiny_models.build(family, "seqcls")
    targets = resolve_method_targets(spec, base, family)
    method_base = Base(
        base.config, "decoder", "SEQ_CLS", targets.modules, get_heads(base), targets.fan_in_fan_out,
        steps, targets.parameters,
    )  # fmt: skip
    return base, apply_method(copy.deepcopy(base), spec, method_base)


def step(model, optimizer, callback=None, number=0):
    loss = model(**BATCH).loss
    loss.backward()
    optimizer.step()
    if callback is not None:
        state = transformers.TrainerState(global_step=number)
        callback.on_optimizer_step(None, state, None, model=model)
    optimizer.zero_grad()


def create_optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def test_adalora_prunes_to_budget_and_saves_remaining_ranks(tmp_path):
    base, model = build_adapted_models("adalora", init_r=4, target_r=2, tinit=2, tfinal=3)
    optimizer, callback = create_optimizer(model), RankPruningCallback(tmp_path)
    rank_totals = []
    for number in range(10):
        step(model, optimizer, callback, number)
        ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n]
        rank_totals.append(sum(ranks))
    layer_count = len(ranks)
    assert layer_count == 14
    assert rank_totals[:2] == [4 * layer_count] * 2  # tinit
    assert rank_totals[2] < 4 * layer_count
    assert rank_totals[-4:] == [2 * layer_count] * 4  # total - tfinal and after
    assert model.peft_config["default"].rank_pattern is None  # only set at the end of training
    callback.on_train_end(None, transformers.TrainerState(), None, model=model)
    before = _logits(model)
    METHODS["adalora"].finish(model)
    torch.testing.assert_close(_logits(model), before, atol=1e-6, rtol=0)
    save_adapter(model, SPECS["adalora"](), tmp_path / "adapter", {})
    saved = _tensors(tmp_path / "adapter")
    assert sum(len(t) for n, t in saved.items() if n.endswith("lora_E")) == 2 * layer_count
    reloaded = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(_logits(reloaded), _logits(model))


def test_adalora_on_bfloat16_base_trains_float32_factors_only():
    base = tiny_models.build("llama").to(torch.bfloat16)
    method_base = Base(base.config, "decoder", "CAUSAL_LM", ["q_proj"], [], False, 10)
    model = apply_method(base, SPECS["adalora"](), method_base)
    trainable = {name.split(".")[-2]: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {"lora_A", "lora_B", "lora_E"}
    assert {p.dtype for p in trainable.values()} == {torch.float32}


def test_adalora_penalty_matches_peft():
    _, model = build_adapted_models("adalora")
    with_penalty = model(**BATCH).loss
    plain = model.base_model.model(**BATCH).loss
    torch.testing.assert_close(METHODS["adalora"].penalty(model), with_penalty - plain)


ARGUMENTS = {"output_dir": "unused", "learning_rate": 1e-4, "use_cpu": True, "optim": "adamw_torch"}


def get_lora_plus_rates(model, weight_decay):
    """Return id of a parameter → learning rate, from the optimizer of LoRA+ with ratio 16."""
    arguments = transformers.TrainingArguments(**ARGUMENTS, weight_decay=weight_decay)
    assert METHODS["lora"].optimizer(SPECS["lora"](), model, arguments) is None
    optimizer = METHODS["lora"].optimizer(SPECS["lora"](lora_plus_ratio=16), model, arguments)
    groups = [group for group in optimizer.param_groups if group["params"]]
    assert {group["weight_decay"] for group in groups} == {weight_decay}
    return {id(p): group["lr"] for group in groups for p in group["params"]}


def test_lora_plus_scales_learning_rate_of_b():
    _, model = build_adapted_models("lora")
    rates = get_lora_plus_rates(model, weight_decay=0.1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_eva_without_a_large_enough_batch_raises(processes, monkeypatch):
    """PEFT would repeat the batches forever. All processes have the same batches."""
    settings = peft.LoraConfig(
        r=8, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    model = peft.get_peft_model(tiny_models.build("llama"), settings)
    ids = torch.arange(30).view(2, 15)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "supervised": ids % 2 == 0}
    message = (
        r"rank 8 needs 16 supervised tokens in a batch, and no batch has more than 15\. Raise "
        r"--per-device-train-batch-size"
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
        patch.setattr(torch.distributed, "get_world_size", lambda: processes)
        with pytest.raises(ConfigError, match=message):
            start_from_data(model, [batch, batch], "cpu", "float32")
    start_from_data(model, [{**batch, "supervised": ids >= 0}], "cpu", "float32")
    assert model.peft_config["default"].init_lora_weights is True


def test_lora_plus_trains_embeddings_at_the_rate_of_a():
    """PEFT's default for them is 1e-6, whatever the learning rate is."""
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"])
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    rates = get_lora_plus_rates(model, weight_decay=0.0)
    embeddings = [p for name, p in model.named_parameters() if "lora_embedding_" in name]
    assert [rates[id(parameter)] for parameter in embeddings] == [1e-4, 1e-4]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("fields", LORA_VARIANTS)
def test_pissa_and_olora_are_saved_for_original_base(tmp_path, init, fields):
    base, model = build_adapted_models("lora", r=4, init_lora_weights=init, **fields)
    before = _logits(base)
    assert torch.allclose(_logits(model), before, atol=1e-5)
    spec = SPECS["lora"](init_lora_weights=init)
    initial_state, optimizer = copy_initial_state(model, spec), create_optimizer(model)
    for _ in range(3):
        step(model, optimizer)
    save_adapter(model, spec, tmp_path, initial_state)
    assert (
        model.peft_config["default"].init_lora_weights == init
    )  # the model in memory is unchanged
    reloaded = load_adapter(base, tmp_path)
    config = reloaded.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (8, True)
    assert (_logits(reloaded) - _logits(model)).abs().max() < 1e-5
    with reloaded.disable_adapter():
        assert torch.equal(_logits(reloaded), before)


def test_plain_lora_is_saved_unchanged(tmp_path):
    _, model = build_adapted_models("lora", r=4)
    assert copy_initial_state(model, SPECS["lora"]()) == {}
    save_adapter(model, SPECS["lora"](), tmp_path, {})
    assert {t.shape[0] for n, t in _tensors(tmp_path).items() if "lora_A" in n} == {4}


def _logits(model):
    model.eval()
    return tiny_models.compute_logits(model, BATCH)


def _tensors(directory: Path):
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def test_penalty_affects_gradient_but_not_reported_loss():
    from ftlevel.training.trainer import FtlevelTrainer

    weight = torch.nn.Parameter(torch.ones(()))
    logits = torch.zeros(2, 3, requires_grad=True)

    class Loss(FtlevelTrainer):
        def __init__(self):
            self.objective = TASKS["text-classification"].create_objective("encoder", {})
            self.fast = None
            self.loss = TrainingLoss()
            self._is_padding = False
            self.penalty = lambda _: 5 * weight
            self.tokens_seen = torch.zeros((), dtype=torch.long)
            self.current_gradient_accumulation_steps = 2
            self.accelerator = SimpleNamespace(unwrap_model=lambda m: m)

    class Model:
        training = True

        def __call__(self, **_):
            return SimpleNamespace(logits=logits)

    batch = {"attention_mask": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    loss = Loss().compute_loss(Model(), batch)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
    assert weight.grad == 2.5
