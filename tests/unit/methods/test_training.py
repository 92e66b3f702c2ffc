"""What single methods do while training: pruning, two learning rates, starts inside the base."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import tiny_models
from ftlevel.config import SPECS, TrainConfig
from ftlevel.methods import METHODS, Base
from ftlevel.methods.adalora.callback import RankPruningCallback
from ftlevel.models.module_tree import get_heads
from ftlevel.objectives import TrainingLoss
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import apply_method, copy_initial_state, load_adapter, save_adapter
from ftlevel.training.build_trainer import get_method_optimizer
from ftlevel.training.plan.method import resolve_method_targets

FORMS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
]
BATCH = tiny_models.build_batch("llama", "seqcls")


def adapted(kind: str, steps: int = 10, family: str = "llama", **fields):
    spec = SPECS[kind](**fields)
    base = tiny_models.build(family, "seqcls")
    found = resolve_method_targets(spec, base, family)
    facts = Base(
        base.config, "decoder", "SEQ_CLS", found.modules, get_heads(base), found.fan_in_fan_out,
        steps, found.parameters,
    )  # fmt: skip
    return base, apply_method(copy.deepcopy(base), spec, facts)


def step(model, optimizer, callback=None, number=0):
    loss = model(**BATCH).loss
    loss.backward()
    optimizer.step()
    if callback is not None:
        state = transformers.TrainerState(global_step=number)
        callback.on_optimizer_step(None, state, None, model=model)
    optimizer.zero_grad()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def test_adalora_prunes_to_its_budget_and_saves_only_what_is_left(tmp_path):
    base, model = adapted("adalora", init_r=4, target_r=2, tinit=2, tfinal=3)
    optimizer, callback = optimizer_of(model), RankPruningCallback(tmp_path)
    alive = []
    for number in range(10):
        step(model, optimizer, callback, number)
        ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n]
        alive.append(sum(ranks))
    linears = len(ranks)
    assert linears == 14
    assert alive[:2] == [4 * linears] * 2  # tinit
    assert alive[2] < 4 * linears
    assert alive[-4:] == [2 * linears] * 4  # total - tfinal and after
    assert model.peft_config["default"].rank_pattern is None  # until the end
    callback.on_train_end(None, transformers.TrainerState(), None, model=model)
    whole = _logits(model)
    METHODS["adalora"].finish(model)
    torch.testing.assert_close(_logits(model), whole, atol=1e-6, rtol=0)
    save_adapter(model, SPECS["adalora"](), tmp_path / "adapter", {})
    saved = _tensors(tmp_path / "adapter")
    assert sum(len(t) for n, t in saved.items() if n.endswith("lora_E")) == 2 * linears
    reloaded = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(_logits(reloaded), _logits(model))


def test_adaloras_rank_is_not_trained_on_a_base_in_bfloat16():
    base = tiny_models.build("llama").to(torch.bfloat16)
    facts = Base(base.config, "decoder", "CAUSAL_LM", ["q_proj"], [], False, 10)
    model = apply_method(base, SPECS["adalora"](), facts)
    learns = {name.split(".")[-2]: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(learns) == {"lora_A", "lora_B", "lora_E"}
    assert {p.dtype for p in learns.values()} == {torch.float32}


def test_adaloras_penalty_is_that_of_peft():
    _, model = adapted("adalora")
    with_penalty = model(**BATCH).loss
    plain = model.base_model.model(**BATCH).loss
    torch.testing.assert_close(METHODS["adalora"].penalty(model), with_penalty - plain)


def test_lora_plus_gives_b_its_own_rate():
    _, model = adapted("lora")
    config = TrainConfig(method=SPECS["lora"](lora_plus_ratio=16))
    arguments = transformers.TrainingArguments(
        output_dir="unused", learning_rate=1e-4, weight_decay=0.1, use_cpu=True, optim="adamw_torch"
    )
    optimizer = get_method_optimizer(config.method, model, arguments)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}
    assert get_method_optimizer(TrainConfig().method, model, arguments) is None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("forms", FORMS)
def test_a_start_inside_the_base_is_saved_for_the_untouched_base(tmp_path, init, forms):
    base, model = adapted("lora", r=4, init_lora_weights=init, **forms)
    before = _logits(base)
    assert torch.allclose(_logits(model), before, atol=1e-5)
    spec = SPECS["lora"](init_lora_weights=init)
    start, optimizer = copy_initial_state(model, spec), optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    save_adapter(model, spec, tmp_path, start)
    assert model.peft_config["default"].init_lora_weights == init  # the model itself is as it was
    reloaded = load_adapter(base, tmp_path)
    config = reloaded.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (8, True)
    assert (_logits(reloaded) - _logits(model)).abs().max() < 1e-5
    with reloaded.disable_adapter():
        assert torch.equal(_logits(reloaded), before)


def test_a_plain_lora_is_saved_as_it_is(tmp_path):
    _, model = adapted("lora", r=4)
    assert copy_initial_state(model, SPECS["lora"]()) == {}
    save_adapter(model, SPECS["lora"](), tmp_path, {})
    assert {t.shape[0] for n, t in _tensors(tmp_path).items() if "lora_A" in n} == {4}


def _logits(model):
    model.eval()
    return tiny_models.compute_logits(model, BATCH)


def _tensors(directory: Path):
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def test_the_penalty_is_in_the_gradient_and_not_in_the_loss():
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
