"""The fast step of our Trainer gives the plain one's loss and gradient, whatever is trained how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import tiny_models
from ftlevel.config import SPECS, TrainConfig
from ftlevel.config.methods.other import AdapterSpec, Placement
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.fast import packed_attention as attention
from ftlevel.fast import step_collator
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.fast.plan import FUNCTIONAL_DROPOUT, FastPlan, plan_fast
from ftlevel.fast.recompute import GeneratorDropout, using_generator
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS, Base
from ftlevel.objectives import Objective
from ftlevel.tasks.classes import Classes
from ftlevel.tasks.losses import Tokens
from ftlevel.tasks.span import Spans
from ftlevel.tasks.tags import Tags
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets
from ftlevel.training.trainer import FtlevelTrainer

OBJECTIVES: dict[str, Objective] = {
    "causal": Tokens("perplexity", shifted=True),
    "seq2seq": Tokens("perplexity", feeds_labels=True),
    "mlm": Tokens("perplexity"),
    "seqcls": Classes("accuracy"),
    "tokcls": Tags("f1"),
    "qa": Spans("f1"),
}
NO_DROPOUT: dict[str, dict[str, float]] = {
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
    "bart": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
    "mt5": {"dropout_rate": 0.0},
    "bert": {"attention_probs_dropout_prob": 0.0},
    "roberta": {"attention_probs_dropout_prob": 0.0},
}
LENGTHS = (5, 30, 12, 12, 3, 21, 8, 17)


def rows_of(head: str, lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    """Return rows with labels as `head` takes them; the first half of a text is not supervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(10, 490, (length,), generator=generator).tolist()
        if head == "seqcls":
            labels: Any = number % tiny_models.LABELS
        elif head == "qa":
            labels = (1, length - 1)
        elif head == "tokcls":
            labels = [IGNORED] + [number % tiny_models.LABELS] * (length - 1)
        elif head == "seq2seq":
            labels = ids[::2]
        else:
            labels = [IGNORED if i < length // 2 else token for i, token in enumerate(ids)]
        rows.append(Encoded(ids, labels, number))
    return rows


def trainer_of(model: Any, head: str, folder: Path, plan: FastPlan, **arguments: Any) -> Any:
    fast = FastStep(model, plan) if plan.enabled else None
    return FtlevelTrainer(
        objective=OBJECTIVES[head], model=model, fast=fast,
        args=TrainingArguments(str(folder), use_cpu=True, report_to="none", **arguments),
    )  # fmt: skip


def step_of(trainer: Any, batches: list[Any]) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of an optimizer step."""
    model = trainer.model
    model.zero_grad()
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = sum(trainer.training_step(model, batch, count).item() for batch in batches)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return loss, torch.cat([p.grad.flatten() for p in trained])


def conversation_rows() -> list[Encoded]:
    """Return rows with a common beginning of 40 tokens, of which some go on alike for 36 more.

    Half of the first beginning is supervised, as a turn that several rows of a chat go through.
    """
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(10, 490, (n,), generator=generator).tolist()  # noqa: E731
    start, middle = draw(40), draw(36)
    longer = start + middle
    texts = [start + draw(9), longer + draw(5), longer + draw(14), draw(20),
             longer, start + draw(3), longer + draw(5), start + draw(9)]  # fmt: skip
    return [
        Encoded(ids, [IGNORED] * 20 + ids[20:] if i != 3 else list(ids), i)
        for i, ids in enumerate(texts)
    ]


def both(
    model: Any, head: str, folder: Path, *, packs: bool = True, heads: bool | None = None,
    tokens: int = 40, prefix_tree: bool = False, rows: list[Encoded] | None = None,
    at_least: int = 3, workers: int = 1, shared_prefix: int = 0, prunes: bool = True,
    **arguments: Any,
) -> tuple[tuple[float, torch.Tensor], tuple[float, torch.Tensor]]:  # fmt: skip
    """Return the plain step, 4 micro-batches of 2 rows, and the fast one."""
    rows, pad_id = rows or rows_of(head), model.config.pad_token_id or 0
    heads = head in ("causal", "seq2seq", "mlm") if heads is None else heads
    plain = trainer_of(model, head, folder, FastPlan(), **arguments)
    micro_batches = [Collator(pad_id)(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    expected = step_of(plain, micro_batches)
    plan = FastPlan(
        True,
        packs,
        heads,
        tokens,
        prefix_tree,
        workers=workers,
        prunes_last_layer=prunes,
        shared_prefix=shared_prefix > 0,
    )
    trainer = trainer_of(model, head, folder, plan, **arguments)
    trainer.fast.prune_last_layer(OBJECTIVES[head], rows, pad_id, "cpu", "float32")
    batch = StepCollator(pad_id, trainer.fast.plan)(rows)
    assert len(batch["micro_batches"]) >= at_least
    assert batch["in_parallel"] is (workers > 1)
    assert ("shared_prefix" in batch) is (shared_prefix > 0)
    if shared_prefix:
        assert batch["shared_prefix"]["layout"].tokens == shared_prefix
        assert all(part["layout"].before == shared_prefix for part in batch["micro_batches"])
    found = step_of(trainer, [batch])
    trainer.fast.remove()
    return expected, found


def without_dropout(family: str, head: str, **config: Any) -> Any:
    base = tiny_models.build(family, head, **NO_DROPOUT.get(family, {}), **config)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base


def adapted(
    family: str, head: str, *, config: dict[str, Any] | None = None, **settings: Any
) -> Any:
    torch.manual_seed(0)
    settings = {"target_modules": "all-linear", "r": 4, **settings}
    base = without_dropout(family, head, **(config or {}))
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))


def assert_same_step(pair: Any, bound: float = 1e-5) -> None:
    (loss, gradient), (fast_loss, fast_gradient) = pair
    assert fast_loss == pytest.approx(loss, rel=bound)
    assert (fast_gradient - gradient).norm() <= bound * gradient.norm()


@pytest.mark.parametrize(
    ("family", "head", "packs"),
    [("llama", "causal", True), ("gemma3_text", "causal", True), ("opt", "causal", True),
     ("qwen3_moe", "causal", True), ("gpt_neo", "causal", False), ("t5", "seq2seq", False),
     ("bart", "seq2seq", False), ("bert", "mlm", True), ("bert", "seqcls", True),
     ("roberta", "tokcls", True), ("modernbert", "qa", True), ("llama", "seqcls", True),
     ("deberta-v2", "seqcls", False)],
)  # fmt: skip
def test_a_step_of_every_task(family: str, head: str, packs: bool, tmp_path: Path) -> None:
    assert_same_step(both(adapted(family, head), head, tmp_path, packs=packs))


@pytest.mark.parametrize(
    ("family", "head", "packs"),
    [*((family, "causal", family != "gpt_neo") for family in
       ("llama", "gpt2", "gpt_neo", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma3_text",
        "phi3")),
     *((family, "mlm", True) for family in ("bert", "roberta", "distilbert", "electra", "albert",
                                            "modernbert")),
     ("deberta-v2", "mlm", False), ("t5", "seq2seq", False), ("mt5", "seq2seq", False),
     ("bart", "seq2seq", False), ("llama", "seqcls", True), ("roberta", "tokcls", True),
     ("bert", "qa", True)],
)  # fmt: skip
def test_micro_batches_in_parallel(family: str, head: str, packs: bool, tmp_path: Path) -> None:
    model = adapted(family, head)
    arguments: dict[str, Any] = {"packs": packs, "tokens": 80, "workers": 2, "at_least": 2}
    first, second = (both(model, head, tmp_path, **arguments) for _ in range(2))
    assert_same_step(first)
    assert torch.equal(first[1][1], second[1][1])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_micro_batches_in_parallel_of_experts(family: str, tmp_path: Path) -> None:
    model = adapted(family, "causal", target_modules=["q_proj", "v_proj"])
    assert_same_step(both(model, "causal", tmp_path, tokens=80, workers=2, at_least=2))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("lora", {"use_dora": True}), ("lora", {"use_rslora": True}), ("adalora", {}), ("ia3", {}),
     ("vera", {}), ("oft", {}), ("boft", {}), ("loha", {}), ("lokr", {}), ("ln-tuning", {}),
     ("miss", {"r": 8}), ("shira", {"r": 4}), ("hira", {}), ("gralora", {}),
     ("c3a", {"block_size": 8}),
     ("adapter", {"placement": "houlsby"}), ("adapter", {"placement": "pfeiffer"})],
)  # fmt: skip
def test_micro_batches_in_parallel_of_every_method(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    spec, base = SPECS[kind](**fields), tiny_models.build("llama")
    found = resolve_method_targets(spec, base, "llama")
    facts = Base(base.config, "decoder", "CAUSAL_LM", found.modules, [], False, 10, [])
    torch.manual_seed(0)
    model = apply_method(base, spec, facts, fused=kind == "lora")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    assert_same_step(both(model, "causal", tmp_path, tokens=80, workers=2, at_least=2))


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize(("family", "head"), [("llama", "causal"), ("bert", "seqcls")])
def test_bottleneck_adapters(placement: Any, family: str, head: str, tmp_path: Path) -> None:
    """What an adapter reads beside its module is of the same tokens, packed, shared or pruned."""
    spec = AdapterSpec(placement=placement, bottleneck_dim=8)
    base = without_dropout(family, head)
    found = resolve_method_targets(spec, base, family)
    facts = Base(base.config, "", None, found.modules, [], False, 10, [])
    torch.manual_seed(0)
    model = apply_method(base, spec, facts)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    prunes = not METHODS["adapter"].step.pruning(spec)
    rows = conversation_rows() if head == "causal" else None
    shares = {"rows": rows, "prefix_tree": True, "tokens": 200, "at_least": 1} if rows else {}
    assert_same_step(both(model, head, tmp_path, prunes=prunes, **shares))


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "causal"), ("gpt2", "causal"), ("gpt_neox", "causal"), ("phi3", "causal"),
     ("bert", "seqcls"), ("roberta", "tokcls"), ("distilbert", "qa"), ("electra", "seqcls"),
     ("albert", "seqcls"), ("modernbert", "mlm"), ("opt", "causal")],
)  # fmt: skip
def test_micro_batches_in_parallel_drop_by_their_seed(
    family: str, head: str, tmp_path: Path
) -> None:
    """Dropout gives the same bits each time, whoever is first, and those in turn."""
    names = [n for n, v in tiny_models.build_config(family).to_dict().items()
             if "drop" in n and isinstance(v, float)]  # fmt: skip
    base = tiny_models.build(family, head, **{n: 0.2 for n in names if "layer" not in n})
    settings: dict[str, Any] = {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.2}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))
    rows, heads = rows_of(head), head in ("causal", "mlm")
    plan = FastPlan(True, True, heads, 80, workers=2, is_random=True)
    trainer = trainer_of(model, head, tmp_path, plan)
    said = trainer.fast.check(rows, 0, "cpu", "float32")
    assert ("one at a time" in str(said)) is (family in FUNCTIONAL_DROPOUT)
    if said:
        return
    batch, gradients = StepCollator(0, plan)(rows), []
    assert batch["in_parallel"]
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        gradients.append(step_of(trainer, [StepCollator(0, plan)(rows)])[1])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])

    torch.manual_seed(1)
    drawn = int(torch.randint(2**62, ()))
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    model.zero_grad()
    for number, part in enumerate(batch["micro_batches"]):
        with using_generator(drawn + number):
            trainer.training_step(model, {"micro_batches": [part], "in_parallel": False}, count)
    in_turn = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], in_turn, rtol=1e-4, atol=1e-5)
    trainer.fast.remove()
    assert all(type(m) is not GeneratorDropout for m in model.modules())


def test_micro_batches_in_parallel_are_trained_whatever_the_models_flag_says(
    tmp_path: Path,
) -> None:
    """A PEFT model says that it is in training where the base in it, as loaded, is not."""
    model = adapted("llama", "causal", lora_dropout=0.5)
    plan = FastPlan(True, True, True, 80, workers=2, is_random=True)
    trainer = trainer_of(model, "causal", tmp_path, plan)
    trainer.fast.check(rows_of("causal"), 0, "cpu", "float32")
    for evaluate in (False, True):
        model.eval()
        model.training = True
        if evaluate:
            trainer.evaluator = lambda _: {}
            trainer.evaluate()
        step_of(trainer, [StepCollator(0, plan)(rows_of("causal"))])
        assert all(module.training for module in model.modules())
    trainer.fast.remove()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("workers", [1, 2])
def test_weights_after_a_step(optimizer: str, workers: int, tmp_path: Path) -> None:
    """An optimizer that goes through raw memory finds each gradient where its weight is."""
    weights = []
    rows = rows_of("causal")
    for plan in (FastPlan(), FastPlan(True, True, True, 80, workers=workers)):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
        register_fused_layers(config)
        model = get_peft_model(tiny_models.build("llama"), config)
        trainer = trainer_of(model, "causal", tmp_path, plan, optim=optimizer, learning_rate=1e-3)
        batches = [StepCollator(0, plan)(rows)] if plan.enabled else [Collator(0)(rows)]
        step_of(trainer, batches)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert all(p.grad.stride() == p.stride() for p in trained)
        before = torch.cat([p.detach().flatten() for p in trained])
        trainer.create_optimizer().step()
        weights.append(torch.cat([p.detach().flatten() for p in trained]) - before)
    assert (weights[1] - weights[0]).norm() < 1e-2 * weights[0].norm()


def test_micro_batches_in_parallel_with_checkpointing(tmp_path: Path) -> None:
    model = adapted("llama", "causal", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.enable_input_require_grads()
    expected, _ = both(model, "causal", tmp_path)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = both(model, "causal", tmp_path, at_least=2, tokens=80, workers=2)
    assert_same_step((expected, found))


def test_micro_batches_in_parallel_with_shared_prefixes(tmp_path: Path) -> None:
    rows = [
        Encoded([1] * 33 + ids.input_ids, [IGNORED] * 30 + [1] * 3 + ids.labels, ids.row)
        for ids in rows_of("causal", (90, 80, 70, 60))
    ]
    arguments: dict[str, Any] = {
        "rows": rows,
        "prefix_tree": True,
        "tokens": 600,
        "at_least": 2,
    }
    pair = both(adapted("llama", "causal"), "causal", tmp_path, workers=2, **arguments)
    assert_same_step(pair)


def prefix_rows() -> list[Encoded]:
    """Return rows that begin with the same 60 tokens, some of which go on alike for 35 more.

    The first target of the first row is its 57th token, predicted by the 56th: a prefix of 55.
    """
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(10, 490, (n,), generator=generator).tolist()  # noqa: E731
    start, middle = draw(60), draw(35)
    ends = [draw(n) for n in (1, 20, 3, 9, 24, 30, 12, 12)]
    texts = [start + (middle if i % 3 == 1 else []) + end for i, end in enumerate(ends)]
    return [
        Encoded(ids, [IGNORED] * (56 if i == 0 else 62) + ids[56 if i == 0 else 62 :], i)
        for i, ids in enumerate(texts)
    ]


DECODERS = ("llama", "gpt2", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma3_text",
            "phi3", "mixtral", "qwen3_moe")  # fmt: skip


@pytest.mark.parametrize("family", DECODERS)
def test_a_shared_prefix_before_micro_batches_in_parallel(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_collator, "PREFIX_COST", 0)
    has_experts = family in ("mixtral", "qwen3_moe")  # which no workers have LoRA on
    targets = {"target_modules": ["q_proj", "v_proj"]} if has_experts else {}
    model = adapted(family, "causal", **targets)
    arguments: dict[str, Any] = {
        "rows": prefix_rows(),
        "prefix_tree": True,
        "tokens": 200,
        "at_least": 2,
    }
    first, second = (
        both(model, "causal", tmp_path, workers=2, shared_prefix=55, **arguments) for _ in range(2)
    )
    assert_same_step(first)
    assert torch.equal(first[1][1], second[1][1])


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["v_proj"], "layers_to_transform": [1]},
     {"target_modules": ["o_proj", "down_proj"]},
     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
     {"target_modules": ["k_proj"], "use_dora": True},
     {"target_modules": ["q_proj", "embed_tokens"]}],
)  # fmt: skip
def test_a_shared_prefix_whatever_is_trained(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no gradient reaches it, or only from its last blocks."""
    monkeypatch.setattr(step_collator, "PREFIX_COST", 0)
    rows = prefix_rows()
    pair = both(
        adapted("llama", "causal", **settings), "causal", tmp_path,
        rows=rows, prefix_tree=True, tokens=200, at_least=2, workers=2, shared_prefix=55,
    )  # fmt: skip
    assert_same_step(pair)


def test_a_shared_prefix_longer_than_a_window_and_micro_batches_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_collator, "PREFIX_COST", 0)
    model = adapted("mistral", "causal", config={"sliding_window": 30})
    arguments: dict[str, Any] = {"rows": prefix_rows(), "prefix_tree": True, "at_least": 8}
    assert_same_step(
        both(model, "causal", tmp_path, tokens=60, workers=2, shared_prefix=55, **arguments)
    )


def test_a_shared_prefix_that_is_worth_a_micro_batch() -> None:
    def rows(begin: int) -> list[Encoded]:
        texts = [[7] * begin + [8 + i] * 12 for i in range(40)]
        return [Encoded(ids, [IGNORED] * begin + ids[begin:], i) for i, ids in enumerate(texts)]

    plan = FastPlan(True, True, True, 400, True, workers=2, shared_prefix=True)
    step = StepCollator(0, plan)(rows(200))
    assert step["shared_prefix"]["layout"].tokens == 199  # the last one predicts a target
    assert len(step["micro_batches"]) == 6
    assert sum(part["layout"].tokens for part in step["micro_batches"]) == 40 * 13
    assert "shared_prefix" not in StepCollator(0, replace(plan, shared_prefix=False))(rows(200))
    assert "shared_prefix" not in StepCollator(0, plan)(rows(50)), "short"
    learned = [replace(row, labels=list(row.input_ids)) for row in rows(200)]
    assert "shared_prefix" not in StepCollator(0, plan)(learned), "the second token is a target"


def test_a_model_that_cannot_go_on_from_a_shared_prefix_is_left_alone(tmp_path: Path) -> None:
    model = adapted("llama", "causal")
    plan = FastPlan(True, True, True, 600, True, workers=2, shared_prefix=True)
    fast = FastStep(model, plan)
    assert fast.check(prefix_rows(), 0, "cpu", "float32") == []
    assert fast.plan.shared_prefix
    rotary = model.get_base_model().model.rotary_emb
    hook = (
        model.get_base_model()
        .model.layers[0]
        .register_forward_hook(
            lambda block, args, output: output + rotary.inv_freq.sum() * (output.shape[1] == 9)
        )
    )
    (reason,) = fast.check(prefix_rows(), 0, "cpu", "float32")
    assert reason.startswith(
        "micro-batches do not share their prefix: outputs change after a shared prefix of an "
        "earlier micro-batch"
    )
    assert not fast.plan.shared_prefix
    assert fast.plan.prefix_tree
    hook.remove()
    fast.remove()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("tokens", [100, 1000])
def test_shared_prefixes(family: str, tokens: int, tmp_path: Path) -> None:
    rows = conversation_rows()
    model = adapted(family, "causal")
    at_least = 1 if tokens == 1000 else 2
    assert_same_step(
        both(
            model,
            "causal",
            tmp_path,
            rows=rows,
            prefix_tree=True,
            tokens=tokens,
            at_least=at_least,
        )
    )
    batch = StepCollator(0, FastPlan(True, True, True, 1000, True))(rows)
    computed = sum(part["layout"].tokens for part in batch["micro_batches"])
    assert (
        computed == 40 + 36 + 9 + 5 + 14 + 20 + 3 + 5 + 9 < sum(len(r.input_ids) for r in rows) / 2
    )


def test_shared_prefixes_with_checkpointing_and_a_window(tmp_path: Path) -> None:
    model = adapted("mistral", "causal", config={"sliding_window": 30})
    model.enable_input_require_grads()
    arguments: dict[str, Any] = {"rows": conversation_rows(), "prefix_tree": True, "tokens": 1000}
    expected, _ = both(model, "causal", tmp_path, at_least=1, **arguments)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = both(model, "causal", tmp_path, at_least=1, **arguments)
    assert_same_step((expected, found))


def test_shared_prefixes_of_texts_with_a_class(tmp_path: Path) -> None:
    rows = [replace(row, labels=row.row % 3) for row in conversation_rows()]
    model = adapted("llama", "seqcls")
    assert_same_step(
        both(model, "seqcls", tmp_path, rows=rows, prefix_tree=True, tokens=1000, at_least=1)
    )


def test_checkpointing(tmp_path: Path) -> None:
    model = adapted("llama", "causal")
    model.enable_input_require_grads()
    expected, _ = both(model, "causal", tmp_path)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = both(model, "causal", tmp_path)
    assert_same_step((expected, found))


def test_an_adapter_beside_others_and_a_head_that_is_trained(tmp_path: Path) -> None:
    model = adapted("llama", "causal", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_same_step(both(model, "causal", tmp_path))


def test_full_fine_tuning(tmp_path: Path) -> None:
    assert_same_step(both(tiny_models.build("llama").requires_grad_(True), "causal", tmp_path))


def test_bfloat16_differs_by_its_noise(tmp_path: Path) -> None:
    model = adapted("llama", "causal")
    assert_same_step(both(model, "causal", tmp_path, bf16=True), bound=2e-2)


def test_rows_that_are_longer_than_a_micro_batch(tmp_path: Path) -> None:
    assert_same_step(both(adapted("llama", "causal"), "causal", tmp_path, tokens=10))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 80), st.booleans())
def test_every_token_is_in_one_micro_batch_and_in_order(
    lengths: list[int], budget: int, packs: bool
) -> None:
    rows = rows_of("causal", tuple(lengths))
    micro_batches = StepCollator(0, FastPlan(True, packs, True, budget))(rows)["micro_batches"]
    found = []
    for part in micro_batches:
        ids, labels = part["input_ids"], part["labels"]
        if packs:
            layout = part["layout"]
            ids, labels = (
                layout.pack(ids[..., None])[0, :, 0],
                layout.pack(labels[..., None])[0, :, 0],
            )
            spans = [(s.start, s.stop) for s in layout.segments]
            assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
            found += [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in spans]
        else:
            sizes = part["attention_mask"].sum(1).tolist()
            found += [
                (i[:n].tolist(), y[:n].tolist()) for i, y, n in zip(ids, labels, sizes, strict=True)
            ]
    assert sorted(found) == sorted((row.input_ids, row.labels) for row in rows)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_no_row_sees_another(data: st.DataObject) -> None:
    """Whatever stands beside a row, what the model makes of it is the same."""
    model = TINY.setdefault("model", tiny_models.build("llama"))
    mine = rows_of("causal", (data.draw(st.integers(2, 20)),))[0]
    plan = FastPlan(True, True, False, 1000)
    fast = FastStep(model, plan)
    try:
        made = []
        for _ in range(2):
            lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
            part = StepCollator(0, plan)([mine, *rows_of("causal", tuple(lengths))])[
                "micro_batches"
            ][0]
            with torch.no_grad(), attention_of(part):
                logits = model(input_ids=part["input_ids"]).logits
            at = next(i for i, ids in enumerate(part["input_ids"].tolist())
                      if ids[: len(mine.input_ids)] == mine.input_ids)  # fmt: skip
            made.append(logits[at, : len(mine.input_ids)])
    finally:
        fast.remove()
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-5)


TINY: dict[str, Any] = {}


def attention_of(part: dict[str, Any]) -> Any:
    from ftlevel.fast.packing import using_layout

    return using_layout(part["layout"])


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {}, "packed, no padding, cross-entropy on supervised tokens only"),
        ("llama", {"speed": {"pack": False}}, "padded by length (speed.pack is off), cross-"),
        ("llama", {"model": {"attn_implementation": "eager"}}, "(attention is eager)"),
        ("llama", {"method": {"kind": "prefix"}}, "prefix puts virtual tokens into every row"),
        ("llama", {"speed": {"fast": False}}, "plain (--no-fast)"),
        ("gpt_neo", {}, "padded by length (gpt_neo has an attention of its own), cross-entropy on"),
        ("t5", {}, "padded by length (t5 has not one stack of blocks), cross-entropy on"),
    ],
)  # fmt: skip
def test_the_plan_says_what_is_done_and_why(
    family: str, settings: dict[str, Any], said: str
) -> None:
    model = tiny_models.build(family)
    kind = "encoder-decoder" if model.config.is_encoder_decoder else "decoder"
    objective = OBJECTIVES["seq2seq" if family == "t5" else "causal"]
    config = TrainConfig.model_validate(settings)
    plan = plan_fast(config, model, kind, objective, "cpu", rows_of("causal"), 100)
    assert said in str(plan.choices[0])
    assert model.config._attn_implementation != attention.NAME


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {}, "2 parallel workers"),
        ("llama", {"speed": {"parallel_workers": 1}}, "one micro-batch at a time"),
        ("llama", {"method": {"kind": "lora", "lora_dropout": 0.1}}, "2 parallel workers"),
        ("llama", {"method": {"kind": "lora", "lora_dropout": 0.1},
                   "train": {"gradient_checkpointing": True}},
         "one micro-batch at a time: lora_dropout 0.1 is drawn at random, in order"),
        ("bert", {}, "2 parallel workers"),
        ("t5", {}, "one micro-batch at a time: dropout_rate 0.1 is drawn at random, in order"),
        ("opt", {}, "one micro-batch at a time: dropout 0.1 is drawn at random, in order"),
        ("llama", {"method": {"kind": "full"}}, ": full would hold a gradient for every weight"),
        ("llama", {"method": {"kind": "prefix"}}, ": prefix keeps its place in the model"),
        ("llama", {"method": {"kind": "adapter", "placement": "parallel"}},
         ": parallel adapters keep their input in the model"),
        ("llama", {"method": {"kind": "adapter", "placement": "seq_bn"}},
         ": seq_bn adapters keep their input in the model"),
        ("mixtral", {"method": {"kind": "lora", "target_parameters": "experts"}},
         ": PEFT puts target_parameters into the model"),
        ("longrope", {}, ": phi3 changes its rotary embedding with the length"),
        ("unknown", {}, ": not tried with some_model"),
    ],
)  # fmt: skip
def test_the_plan_says_how_many_workers_there_are(
    family: str, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = tiny_models.build({"longrope": "phi3", "unknown": "llama"}.get(family, family))
    if family == "longrope":
        model.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0}
    if family == "unknown":
        model.config.model_type = "some_model"
    kind = {"bert": "encoder", "t5": "encoder-decoder"}.get(family, "decoder")
    config = TrainConfig.model_validate(settings)
    plan = plan_fast(config, model, kind, OBJECTIVES["causal"], "cpu", rows_of("causal"), 100)
    assert said in str(plan.choices[0])
    assert plan.workers == (2 if said.startswith("2") else 1)


SHARING = [[1] * 60 + [i] * 20 for i in range(8)]


@pytest.mark.parametrize(
    ("family", "settings", "prefix_tree", "said"),
    [
        ("llama", {}, True, "66% of tokens computed once (estimated on 8 steps)"),
        ("llama", {"speed": {"share_prefixes": "never"}}, False, None),
        ("llama", {"speed": {"pack": False}}, False, None),
        ("llama", {"method": {"kind": "lora", "lora_dropout": 0.1}}, False,
         "off (66% of tokens could be computed once, but their lora_dropout 0.1 would be the same"),
        ("gpt2", {}, False, "but their resid_pdrop 0.1 would be the same"),
        ("llama", {"method": {"kind": "lora", "lora_dropout": 0.1},
                   "speed": {"share_prefixes": "always"}}, True, "shares lora_dropout 0.1"),
    ],
)  # fmt: skip
def test_prefixes_are_shared_where_it_pays_and_is_exact(
    family: str, settings: dict[str, Any], prefix_tree: bool, said: str | None
) -> None:
    rows = [Encoded(ids, ids, i) for i, ids in enumerate(SHARING)]
    config, model = TrainConfig.model_validate(settings), tiny_models.build(family)
    plan = plan_fast(config, model, "decoder", OBJECTIVES["causal"], "cpu", rows, 100)
    assert plan.prefix_tree is prefix_tree
    shown = [str(choice) for choice in plan.choices if choice.name == "prefix sharing"]
    assert (said is None) == (shown == [])
    assert said is None or said in shown[0]


@pytest.mark.parametrize(
    ("device", "batch", "max_length", "tokens"),
    [("cpu", 8, 100, 1024), ("cpu", 8, 200, 1600), ("cpu", 64, 512, 2048), ("cpu", 4, 4096, 4096),
     ("cuda", 64, 512, 32768)],
)  # fmt: skip
def test_a_micro_batch_holds_what_the_batch_would(
    device: str, batch: int, max_length: int, tokens: int
) -> None:
    config = TrainConfig.model_validate({"train": {"per_device_train_batch_size": batch}})
    model = tiny_models.build("llama")
    plan = plan_fast(
        config, model, "decoder", OBJECTIVES["causal"], device, rows_of("causal"), max_length
    )
    assert plan.tokens == tokens


class Leaky(torch.nn.Module):
    """A block's part that mixes neighbouring tokens, as a convolution does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + states.roll(1, dims=1)


def test_a_model_whose_rows_see_each_other_is_not_packed() -> None:
    rows = rows_of("causal")
    model = tiny_models.build("llama")
    fast = FastStep(model, FastPlan(True, True, True, 100, True))
    assert fast.check(rows, 0, "cpu", "float32") == []
    assert fast.plan.packs
    assert fast.plan.prefix_tree
    for block in model.model.layers:
        block.mlp = Leaky(block.mlp)
    assert "see each other" in fast.check(rows, 0, "cpu", "float32")[0]
    assert not fast.plan.packs
    assert model.config._attn_implementation == "sdpa"
    fast.remove()


class Imprecise(torch.nn.Module):
    """A block's part whose values in bfloat16 are wrong at `tokens` of packed rows."""

    def __init__(self, inner: torch.nn.Module, tokens: slice, *, everywhere: bool = False) -> None:
        super().__init__()
        self.inner, self.tokens, self.everywhere = inner, tokens, everywhere

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output = self.inner(states)
        if len(output) == 1 and (self.everywhere or output.dtype == torch.bfloat16):
            output = output.clone()
            output[:, self.tokens] += 3 * states[:, self.tokens]
        return output


@pytest.mark.parametrize(
    ("tokens", "everywhere", "packs"),
    [
        (slice(0, 1), False, True),  # the rounding of one large state
        (slice(0, 1), True, False),  # in float32, too: it is a fault
        (slice(16, None), False, False),  # most states of a row: a fault of a kernel
    ],
)
def test_rounding_of_large_states_is_no_reason_to_pad(
    tokens: slice, everywhere: bool, packs: bool
) -> None:
    """SmolLM2's first state is 24,000 long and ends at 5,000, so bfloat16 rounds it by a tenth."""
    model = tiny_models.build("llama").to(torch.bfloat16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fast = FastStep(model, FastPlan(True, True, True, 100, True))
    mlp = model.model.layers[-1].mlp
    model.model.layers[-1].mlp = Imprecise(mlp, tokens, everywhere=everywhere)
    rows = rows_of("causal", (16, 16))
    assert (fast.check(rows, 0, "cpu", "bfloat16") == []) is packs
    assert fast.plan.packs is packs
    model.model.layers[-1].mlp = mlp
    fast.remove()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights[name])
