"""Tests that the fast training step gives the loss and gradients of the plain step."""

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
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.extras.rl.objective import PolicyGradient
from ftlevel.extras.rl.rows import PromptRow
from ftlevel.fast import packed_attention as attention
from ftlevel.fast import plan as fast_plan
from ftlevel.fast import step_collator
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.fast.packing import PackedLayout, using_layout
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


LENGTHS = (5, 30, 12, 12, 3, 21, 8, 17)


def create_rows(head: str, lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    """Return encoded rows with labels for `head`; the first half of each text is unsupervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(10, 490, (length,), generator=generator).tolist()
        if head == "seqcls":
            labels: Any = index % tiny_models.LABELS
        elif head == "qa":
            labels = (1, length - 1)
        elif head == "tokcls":
            labels = [IGNORED] + [index % tiny_models.LABELS] * (length - 1)
        elif head == "seq2seq":
            labels = ids[::2]
        else:
            labels = [IGNORED if i < length // 2 else token for i, token in enumerate(ids)]
        rows.append(Encoded(ids, labels, index))
    return rows


def build_trainer(model: Any, head: str, output_dir: Path, plan: FastPlan, **arguments: Any) -> Any:
    fast = FastStep(model, plan) if plan.enabled else None
    return FtlevelTrainer(
        objective=OBJECTIVES[head], model=model, fast=fast,
        args=TrainingArguments(str(output_dir), use_cpu=True, report_to="none", **arguments),
    )  # fmt: skip


def run_step(trainer: Any, batches: list[Any]) -> tuple[float, torch.Tensor]:
    """Return the loss and the flattened gradient of one optimizer step."""
    model = trainer.model
    model.zero_grad()
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = sum(trainer.training_step(model, batch, count).item() for batch in batches)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return loss, torch.cat([p.grad.flatten() for p in trained])


def conversation_rows() -> list[Encoded]:
    """Return rows that share a prefix of 40 tokens; some share 36 more.

    Half of the first prefix is supervised, like a chat turn that several rows share.
    """
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(10, 490, (n,), generator=generator).tolist()  # noqa: E731
    start, middle = draw(40), draw(36)
    prefix = start + middle
    texts = [start + draw(9), prefix + draw(5), prefix + draw(14), draw(20),
             prefix, start + draw(3), prefix + draw(5), start + draw(9)]  # fmt: skip
    return [
        Encoded(ids, [IGNORED] * 20 + ids[20:] if i != 3 else list(ids), i)
        for i, ids in enumerate(texts)
    ]


def compute_both_steps(
    model: Any, head: str, output_dir: Path, *, packs: bool = True, heads: bool | None = None,
    tokens: int = 40, prefix_tree: bool = False, rows: list[Encoded] | None = None,
    at_least: int = 3, workers: int = 1, shared_prefix: int = 0, prunes: bool = True,
    multiple: int = 1, **arguments: Any,
) -> tuple[tuple[float, torch.Tensor], tuple[float, torch.Tensor]]:  # fmt: skip
    """Return loss and gradient of the plain step (micro-batches of 2 rows) and of the fast step."""
    rows, pad_id = rows or create_rows(head), model.config.pad_token_id or 0
    heads = head in ("causal", "seq2seq", "mlm") if heads is None else heads
    plain = build_trainer(model, head, output_dir, FastPlan(), **arguments)
    micro_batches = [Collator(pad_id)(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    expected = run_step(plain, micro_batches)
    plan = FastPlan(
        True, packs, heads, tokens, prefix_tree, workers=workers, prunes_last_layer=prunes,
        shared_prefix=shared_prefix > 0, token_multiple=multiple,
    )  # fmt: skip
    trainer = build_trainer(model, head, output_dir, plan, **arguments)
    trainer.fast.prune_last_layer(OBJECTIVES[head], rows, pad_id, "cpu", "float32")
    batch = StepCollator(pad_id, trainer.fast.plan)(rows)
    assert len(batch["micro_batches"]) >= at_least
    assert batch["in_parallel"] is (workers > 1)
    layouts = [part["layout"] for part in batch["micro_batches"]]
    assert all(layout is None or layout.tokens % multiple == 0 for layout in layouts)
    assert ("shared_prefix" in batch) is (shared_prefix > 0)
    if shared_prefix:
        assert batch["shared_prefix"]["layout"].tokens == shared_prefix
        assert all(layout.before == shared_prefix for layout in layouts)
    actual = run_step(trainer, [batch])
    trainer.fast.remove()
    return expected, actual


def dropout_names(family: str) -> list[str]:
    config = tiny_models.build_config(family).to_dict()
    return [name for name, value in config.items() if "drop" in name and isinstance(value, float)]


def build_without_dropout(family: str, head: str, **config: Any) -> Any:
    zeros = dict.fromkeys(dropout_names(family), 0.0)
    base = tiny_models.build(family, head, **{**zeros, **config})
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base


def build_lora_model(
    family: str, head: str = "causal", *, config: dict[str, Any] | None = None, **settings: Any
) -> Any:
    torch.manual_seed(0)
    settings = {"target_modules": "all-linear", "r": 4, **settings}
    base = build_without_dropout(family, head, **(config or {}))
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))


def build_adapted_model(base: Any, spec: Any, family: str, **options: Any) -> Any:
    """Return the model with an adapter of nonzero weights, as `ftlevel train` adds it."""
    targets = resolve_method_targets(spec, base, family)
    method_base = Base(base.config, "decoder", None, targets.modules, [], False, 10, [])
    torch.manual_seed(0)
    model = apply_method(base, spec, method_base, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def assert_same_step(pair: Any, bound: float = 1e-5) -> None:
    (loss, gradient), (fast_loss, fast_gradient) = pair
    assert fast_loss == pytest.approx(loss, rel=bound)
    assert (fast_gradient - gradient).norm() <= bound * gradient.norm()


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "causal"), ("gemma3_text", "causal"), ("opt", "causal"), ("gpt2", "causal"),
     ("qwen3_moe", "causal"), ("bert", "mlm"), ("bert", "seqcls"), ("roberta", "tokcls"),
     ("modernbert", "qa"), ("llama", "seqcls")],
)  # fmt: skip
@pytest.mark.parametrize("workers", [1, 2])
def test_padding_tokens_of_packed_rows_change_nothing(family, head, workers, tmp_path):
    """On a GPU packed rows are padded to a multiple of 64 tokens; embeddings are trained here."""
    model, step = build_without_dropout(family, head), {**PARALLEL, "workers": workers}
    assert_same_step(compute_both_steps(model, head, tmp_path, multiple=64, **step))


@pytest.mark.parametrize("lengths", [(32,), (20, 12), (5, 64, 59), (64,), (100, 1)])
def test_padding_tokens_are_a_sequence_of_their_own(lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    layout = PackedLayout.from_mask(mask.long())
    padded = layout.pad_to(64)
    padding = -sum(lengths) % 64
    assert (padded.tokens, padded.padding) == (sum(lengths) + padding, padding)
    assert padded.is_single_row is (lengths == (64,))
    assert padded.segments[: len(lengths)] == layout.segments
    assert len(padded.segments) == len(lengths) + (padding > 0)
    assert not padded.segments[-1].past
    assert padded.restore.max() == sum(lengths) - 1
    states = torch.arange(mask.numel()).view(mask.shape)[:, :, None]
    assert torch.equal(padded.unpack(padded.pack(states))[mask], states[mask])


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
def test_step_matches_plain_step_for_every_family_and_task(family, head, packs, tmp_path):
    model = build_lora_model(family, head)
    assert_same_step(compute_both_steps(model, head, tmp_path, packs=packs))
    parallel = {"packs": packs, "tokens": 80, "workers": 2, "at_least": 2}
    assert_same_step(compute_both_steps(model, head, tmp_path, **parallel))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("lora", {"use_dora": True}), ("lora", {"use_rslora": True}), ("adalora", {}), ("ia3", {}),
     ("vera", {}), ("oft", {}), ("boft", {}), ("loha", {}), ("lokr", {}), ("ln-tuning", {}),
     ("miss", {"r": 8}), ("shira", {"r": 4}), ("hira", {}), ("gralora", {}),
     ("c3a", {"block_size": 8}),
     ("adapter", {"placement": "houlsby"}), ("adapter", {"placement": "pfeiffer"})],
)  # fmt: skip
def test_parallel_micro_batches_match_plain_step_for_every_method(kind, fields, tmp_path):
    spec, base = SPECS[kind](**fields), tiny_models.build("llama")
    model = build_adapted_model(base, spec, "llama", fused=kind == "lora")
    assert_same_step(compute_both_steps(model, "causal", tmp_path, **PARALLEL))


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize(("family", "head"), [("llama", "causal"), ("bert", "seqcls")])
def test_fast_step_matches_plain_step_for_bottleneck_adapters(placement, family, head, tmp_path):
    """Packed, shared-prefix and pruned inputs keep the adapter's residual input aligned."""
    spec = AdapterSpec(placement=placement, bottleneck_dim=8)
    model = build_adapted_model(build_without_dropout(family, head), spec, family)
    prunes = not METHODS["adapter"].step.pruning(spec)
    shared = {**TREE, "tokens": 200, "rows": conversation_rows()} if head == "causal" else {}
    assert_same_step(compute_both_steps(model, head, tmp_path, prunes=prunes, **shared))


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "causal"), ("gpt2", "causal"), ("gpt_neox", "causal"), ("phi3", "causal"),
     ("bert", "seqcls"), ("roberta", "tokcls"), ("distilbert", "qa"), ("electra", "seqcls"),
     ("albert", "seqcls"), ("modernbert", "mlm"), ("opt", "causal")],
)  # fmt: skip
def test_dropout_of_parallel_micro_batches_depends_on_seed_only(family, head, tmp_path):
    """Dropout depends on the seed alone, not on the order of workers."""
    names = [name for name in dropout_names(family) if "layer" not in name]
    base = tiny_models.build(family, head, **dict.fromkeys(names, 0.2))
    settings: dict[str, Any] = {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.2}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))
    rows, heads = create_rows(head), head in ("causal", "mlm")
    plan = FastPlan(True, True, heads, 80, workers=2, is_random=True)
    trainer = build_trainer(model, head, tmp_path, plan)
    problems = trainer.fast.check(rows, 0, "cpu", "float32")
    assert ("one at a time" in str(problems)) is (family in FUNCTIONAL_DROPOUT)
    if problems:
        return
    batch, gradients = StepCollator(0, plan)(rows), []
    assert batch["in_parallel"]
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        gradients.append(run_step(trainer, [StepCollator(0, plan)(rows)])[1])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])

    torch.manual_seed(1)
    seed_of_step = int(torch.randint(2**62, ()))
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    model.zero_grad()
    for index, part in enumerate(batch["micro_batches"]):
        with using_generator(seed_of_step + index):
            trainer.training_step(model, {"micro_batches": [part], "in_parallel": False}, count)
    sequential = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], sequential, rtol=1e-4, atol=1e-5)
    trainer.fast.remove()
    assert all(type(m) is not GeneratorDropout for m in model.modules())


def test_step_sets_all_modules_to_training_mode(tmp_path):
    """`PeftModel.training` can be True while the base model is in eval mode."""
    model = build_lora_model("llama", "causal", lora_dropout=0.5)
    plan = FastPlan(True, True, True, 80, workers=2, is_random=True)
    trainer = build_trainer(model, "causal", tmp_path, plan)
    trainer.fast.check(create_rows("causal"), 0, "cpu", "float32")
    for evaluate in (False, True):
        model.eval()
        model.training = True
        if evaluate:
            trainer.evaluator = lambda _: {}
            trainer.evaluate()
        run_step(trainer, [StepCollator(0, plan)(create_rows("causal"))])
        assert all(module.training for module in model.modules())
    trainer.fast.remove()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("workers", [1, 2])
def test_weights_after_fast_step_match_plain_step(optimizer, workers, tmp_path):
    """Fused optimizers need gradients with the strides of their weights."""
    updates = []
    rows = create_rows("causal")
    for plan in (FastPlan(), FastPlan(True, True, True, 80, workers=workers)):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
        register_fused_layers(config)
        model = get_peft_model(tiny_models.build("llama"), config)
        trainer = build_trainer(
            model, "causal", tmp_path, plan, optim=optimizer, learning_rate=1e-3
        )
        batches = [StepCollator(0, plan)(rows)] if plan.enabled else [Collator(0)(rows)]
        run_step(trainer, batches)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert all(p.grad.stride() == p.stride() for p in trained)
        before = torch.cat([p.detach().flatten() for p in trained])
        trainer.create_optimizer().step()
        updates.append(torch.cat([p.detach().flatten() for p in trained]) - before)
    assert (updates[1] - updates[0]).norm() < 1e-2 * updates[0].norm()


def prefix_rows() -> list[Encoded]:
    """Return rows that share a prefix of 60 tokens; some share 35 more.

    The first target of row 0 is its 57th token, predicted by the 56th: a shared prefix of 55.
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
def test_shared_prefix_in_parallel_micro_batches_matches_plain_step(family, tmp_path, monkeypatch):
    monkeypatch.setattr(step_collator, "PREFIX_COST", 0)
    has_experts = family in ("mixtral", "qwen3_moe")  # parallel workers: no LoRA on experts
    model = build_lora_model(
        family, **({"target_modules": ["q_proj", "v_proj"]} if has_experts else {})
    )
    first, second = (
        compute_both_steps(model, "causal", tmp_path, rows=prefix_rows(), **SHARED)
        for _ in range(2)
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
def test_shared_prefix_matches_plain_step_for_any_trained_layers(settings, tmp_path, monkeypatch):
    """Also where no gradient reaches the prefix, or only from its last blocks."""
    monkeypatch.setattr(step_collator, "PREFIX_COST", 0)
    model = build_lora_model("llama", **settings)
    assert_same_step(compute_both_steps(model, "causal", tmp_path, rows=prefix_rows(), **SHARED))


def test_shared_prefix_is_used_only_if_long_and_unsupervised():
    def build_rows(prefix_length):
        texts = [[7] * prefix_length + [8 + i] * 12 for i in range(40)]
        ignored = [IGNORED] * prefix_length
        return [Encoded(ids, ignored + ids[prefix_length:], i) for i, ids in enumerate(texts)]

    plan = FastPlan(True, True, True, 400, True, workers=2, shared_prefix=True)
    rows = build_rows(200)
    step = StepCollator(0, plan)(rows)
    assert step["shared_prefix"]["layout"].tokens == 199  # the last one predicts a target
    assert len(step["micro_batches"]) == 6
    assert sum(part["layout"].tokens for part in step["micro_batches"]) == 40 * 13
    assert "shared_prefix" not in StepCollator(0, replace(plan, shared_prefix=False))(rows)
    assert "shared_prefix" not in StepCollator(0, plan)(build_rows(50)), "short"
    supervised = [replace(row, labels=list(row.input_ids)) for row in rows]
    assert "shared_prefix" not in StepCollator(0, plan)(supervised), "the second token is a target"


def test_shared_prefix_is_disabled_if_it_changes_outputs():
    model = build_lora_model("llama")
    fast = FastStep(model, FastPlan(True, True, True, 600, True, workers=2, shared_prefix=True))
    assert fast.check(prefix_rows(), 0, "cpu", "float32") == []
    assert fast.plan.shared_prefix
    decoder = model.get_base_model().model
    hook = decoder.layers[0].register_forward_hook(
        lambda _, args, output: output + decoder.rotary_emb.inv_freq.sum() * (output.shape[1] == 9)
    )
    (reason,) = fast.check(prefix_rows(), 0, "cpu", "float32")
    assert reason.startswith(
        "micro-batches do not share their prefix: outputs change after a shared prefix of an "
        "earlier micro-batch"
    )
    assert (fast.plan.shared_prefix, fast.plan.prefix_tree) == (False, True)
    hook.remove()
    fast.remove()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("tokens", "at_least"), [(100, 2), (1000, 1)])
def test_prefix_tree_matches_plain_step(family, tokens, at_least, tmp_path):
    rows, sizes = conversation_rows(), {"tokens": tokens, "at_least": at_least}
    model = build_lora_model(family)
    pair = compute_both_steps(model, "causal", tmp_path, rows=rows, prefix_tree=True, **sizes)
    assert_same_step(pair)
    batch = StepCollator(0, FastPlan(True, True, True, 1000, True))(rows)
    computed = sum(part["layout"].tokens for part in batch["micro_batches"])
    assert computed == 40 + 36 + 9 + 5 + 14 + 20 + 3 + 5 + 9
    assert computed < sum(len(r.input_ids) for r in rows) / 2


def test_prefix_tree_for_sequence_classification(tmp_path):
    rows = [replace(row, labels=row.row % 3) for row in conversation_rows()]
    model = build_lora_model("llama", "seqcls")
    assert_same_step(compute_both_steps(model, "seqcls", tmp_path, rows=rows, **TREE))


PARALLEL: dict[str, Any] = {"tokens": 80, "workers": 2, "at_least": 2}
TREE: dict[str, Any] = {"prefix_tree": True, "tokens": 1000, "at_least": 1}
SHARED: dict[str, Any] = {
    "prefix_tree": True, "tokens": 200, "workers": 2, "at_least": 2, "shared_prefix": 55,
}  # fmt: skip
WINDOW = {"sliding_window": 30}


def rows_with_long_prefix() -> list[Encoded]:
    return [
        Encoded([1] * 33 + row.input_ids, [IGNORED] * 30 + [1] * 3 + row.labels, row.row)
        for row in create_rows("causal", (90, 80, 70, 60))
    ]


def build_with_two_adapters() -> Any:
    model = build_lora_model(
        "llama", "causal", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ({}, {"tokens": 10}),
        ({}, {"bf16": True}),
        (build_with_two_adapters, {}),
        (lambda: tiny_models.build("llama").requires_grad_(True), {}),
        ({"family": "mixtral", "target_modules": ["q_proj", "v_proj"]}, PARALLEL),
        ({"family": "qwen3_moe", "target_modules": ["q_proj", "v_proj"]}, PARALLEL),
        ({}, {**PARALLEL, "prefix_tree": True, "tokens": 600, "rows": rows_with_long_prefix()}),
        ({}, {**SHARED, "rows": prefix_rows(), "multiple": 64}),
        (
            {"family": "mistral", "config": WINDOW},
            {**SHARED, "rows": prefix_rows(), "tokens": 60, "at_least": 8},
        ),
    ],
    ids=[
        "rows longer than a micro-batch", "bfloat16", "two adapters and a trained head", "full",
        "mixtral", "qwen3_moe", "prefix tree in parallel micro-batches",
        "shared prefix and padding tokens", "shared prefix longer than the sliding window",
    ],
)  # fmt: skip
def test_step_matches_plain_step(model, step, tmp_path, monkeypatch):
    monkeypatch.setattr(step_collator, "PREFIX_COST", 0)
    model = model() if callable(model) else build_lora_model(**{"family": "llama", **model})
    bound = 2e-2 if "bf16" in step else 1e-5
    assert_same_step(compute_both_steps(model, "causal", tmp_path, **step), bound)


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ({}, {}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, PARALLEL),
        ({"family": "mistral", "config": WINDOW}, {**TREE, "rows": conversation_rows()}),
    ],
    ids=["packed", "parallel micro-batches", "prefix tree and sliding window"],
)
def test_checkpointed_step_matches_plain_step(model, step, tmp_path):
    model = build_lora_model(**{"family": "llama", **model})
    model.enable_input_require_grads()
    expected, _ = compute_both_steps(model, "causal", tmp_path, **step)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, actual = compute_both_steps(model, "causal", tmp_path, **step)
    assert_same_step((expected, actual))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 80), st.booleans())
def test_micro_batches_contain_each_row_once_in_order(lengths, budget, packs):
    rows = create_rows("causal", tuple(lengths))
    micro_batches = StepCollator(0, FastPlan(True, packs, True, budget))(rows)["micro_batches"]
    sequences = []
    for part in micro_batches:
        ids, labels = part["input_ids"], part["labels"]
        if packs:
            layout = part["layout"]
            ids, labels = (layout.pack(values[..., None])[0, :, 0] for values in (ids, labels))
            spans = [(s.start, s.stop) for s in layout.segments]
            assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
            sequences += [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in spans]
        else:
            sizes = part["attention_mask"].sum(1).tolist()
            padded = zip(ids, labels, sizes, strict=True)
            sequences += [(i[:n].tolist(), y[:n].tolist()) for i, y, n in padded]
    assert sorted(sequences) == sorted((row.input_ids, row.labels) for row in rows)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_packed_rows_do_not_attend_to_each_other(data):
    """A row's logits do not depend on the other rows of its packed batch."""
    model = TINY.setdefault("model", tiny_models.build("llama"))
    row = create_rows("causal", (data.draw(st.integers(2, 20)),))[0]
    plan = FastPlan(True, True, False, 1000)
    fast = FastStep(model, plan)
    try:
        row_logits = []
        for _ in range(2):
            lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
            rows = [row, *create_rows("causal", tuple(lengths))]
            (part,) = StepCollator(0, plan)(rows)["micro_batches"]
            with torch.no_grad(), using_layout(part["layout"]):
                logits = model(input_ids=part["input_ids"]).logits
            index = next(i for i, ids in enumerate(part["input_ids"].tolist())
                      if ids[: len(row.input_ids)] == row.input_ids)  # fmt: skip
            row_logits.append(logits[index, : len(row.input_ids)])
    finally:
        fast.remove()
    torch.testing.assert_close(row_logits[0], row_logits[1], rtol=1e-5, atol=1e-5)


TINY: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
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
def test_plan_reports_packing_and_reason(family, settings, message):
    model = tiny_models.build(family)
    kind = "encoder-decoder" if model.config.is_encoder_decoder else "decoder"
    objective = OBJECTIVES["seq2seq" if family == "t5" else "causal"]
    config = TrainConfig.model_validate(settings)
    plan = plan_fast(config, model, kind, objective, "cpu", create_rows("causal"), 100)
    assert message in str(plan.choices[0])
    assert model.config._attn_implementation != attention.NAME


@pytest.mark.parametrize(
    ("family", "settings", "message"),
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
def test_plan_reports_number_of_workers(family, settings, message, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = tiny_models.build({"longrope": "phi3", "unknown": "llama"}.get(family, family))
    if family == "longrope":
        model.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0}
    if family == "unknown":
        model.config.model_type = "some_model"
    kind = {"bert": "encoder", "t5": "encoder-decoder"}.get(family, "decoder")
    config = TrainConfig.model_validate(settings)
    plan = plan_fast(config, model, kind, OBJECTIVES["causal"], "cpu", create_rows("causal"), 100)
    assert message in str(plan.choices[0])
    assert plan.workers == (2 if message.startswith("2") else 1)


SHARING = [[1] * 60 + [i] * 20 for i in range(8)]


@pytest.mark.parametrize(
    ("family", "settings", "prefix_tree", "message"),
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
def test_plan_shares_prefixes_only_if_useful_and_exact(family, settings, prefix_tree, message):
    rows = [Encoded(ids, ids, i) for i, ids in enumerate(SHARING)]
    config, model = TrainConfig.model_validate(settings), tiny_models.build(family)
    plan = plan_fast(config, model, "decoder", OBJECTIVES["causal"], "cpu", rows, 100)
    assert plan.prefix_tree is prefix_tree
    messages = [str(choice) for choice in plan.choices if choice.name == "prefix sharing"]
    assert (message is None) == (messages == [])
    assert message is None or message in messages[0]


@pytest.mark.parametrize(
    ("device", "batch", "max_length", "tokens"),
    [("cpu", 8, 100, 1024), ("cpu", 8, 200, 1600), ("cpu", 64, 512, 2048), ("cpu", 4, 4096, 4096),
     ("cuda", 64, 512, 32768)],
)  # fmt: skip
def test_plan_sets_tokens_per_micro_batch(device, batch, max_length, tokens):
    config = TrainConfig.model_validate({"train": {"per_device_train_batch_size": batch}})
    model, rows = tiny_models.build("llama"), create_rows("causal")
    plan = plan_fast(config, model, "decoder", OBJECTIVES["causal"], device, rows, max_length)
    assert plan.tokens == tokens


@pytest.mark.parametrize(
    ("completion_tokens", "threads", "gib", "tokens"),
    [
        (64, 2, 16, 1152),
        (200, 2, 16, 2 * 1650),
        (512, 2, 16, 2 * 2098),
        (200, 4, 16, 4 * 1650),
        (200, 1, 16, 1650),
        (200, 2, 0.08, 1650),
        (200, 2, 0.02, 1152),
    ],
)
def test_a_group_of_completions_is_a_micro_batch_if_it_fits(
    completion_tokens, threads, gib, tokens, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("ftlevel.models.hardware.device_memory", lambda _: int(gib * 2**30))
    values = {
        "task": "rl",
        "rl": {"reward": "exact", "max_completion_length": completion_tokens},
        "train": {"per_device_train_batch_size": 2},
    }
    config = TrainConfig.model_validate(values)
    prompts = [[1] * 50, [2] * 40]
    rows = [PromptRow(ids, [], i, most=completion_tokens) for i, ids in enumerate(prompts)]
    model, objective = tiny_models.build("llama"), PolicyGradient("reward", config=config.rl)
    plan = plan_fast(config, model, "decoder", objective, "cpu", rows, 512)
    assert plan.tokens == tokens


def test_synthetic_rows_shorter_than_a_completion_count_completions_only():
    config = TrainConfig.model_validate(
        {"task": "rl", "rl": {"reward": "exact", "max_completion_length": 4096}}
    )
    objective = PolicyGradient("reward", config=config.rl)
    rows = [Encoded([1] * 512, [], 0)]  # of an estimate without data
    tokens = objective.micro_batch_tokens(tiny_models.build("llama"), rows, "cpu", 2)
    assert tokens == 2 * fast_plan.MAX_CPU_TOKENS


class NeighborMixingLayer(torch.nn.Module):
    """Layer that mixes neighboring tokens, like a convolution."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + states.roll(1, dims=1)


def test_packing_is_disabled_if_rows_affect_each_other():
    rows = create_rows("causal")
    model = tiny_models.build("llama")
    fast = FastStep(model, FastPlan(True, True, True, 100, True))
    assert fast.check(rows, 0, "cpu", "float32") == []
    assert fast.plan.packs
    assert fast.plan.prefix_tree
    for block in model.model.layers:
        block.mlp = NeighborMixingLayer(block.mlp)
    assert "attend to each other" in fast.check(rows, 0, "cpu", "float32")[0]
    assert not fast.plan.packs
    assert model.config._attn_implementation == "sdpa"
    fast.remove()


class InaccurateLayer(torch.nn.Module):
    """Layer whose bfloat16 output is wrong at `tokens` of packed rows."""

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
        (slice(0, 1), False, True),  # rounding of one large state
        (slice(0, 1), True, False),  # wrong in float32 too: an error
        (slice(16, None), False, False),  # most states of a row: a kernel error
    ],
)
def test_packing_check_tolerates_rounding_of_one_large_state(tokens, everywhere, packs):
    """SmolLM2's first hidden state has norm 24,000, then 5,000: bfloat16 rounds it by a tenth."""
    model = tiny_models.build("llama").to(torch.bfloat16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fast = FastStep(model, FastPlan(True, True, True, 100, True))
    mlp = model.model.layers[-1].mlp
    model.model.layers[-1].mlp = InaccurateLayer(mlp, tokens, everywhere=everywhere)
    rows = create_rows("causal", (16, 16))
    assert (fast.check(rows, 0, "cpu", "bfloat16") == []) is packs
    assert fast.plan.packs is packs
    model.model.layers[-1].mlp = mlp
    fast.remove()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights[name])
