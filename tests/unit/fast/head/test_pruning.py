"""Tests of last-layer pruning; `test_step` checks that losses and gradients stay equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.likelihoods import PooledTokens, SupervisedTokens
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.plan import FastPlan
from ftlevel.fast.pruning import LastLayerPruning, get_prunable_layers
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.module_tree import get_blocks
from ftlevel.objectives import IGNORED, Objective
from ftlevel.tasks.classes import Classes
from ftlevel.tasks.losses import Tokens
from ftlevel.tasks.span import Spans
from ftlevel.tasks.tags import Tags

OBJECTIVES: dict[str, Objective] = {
    "causal": Tokens("perplexity", shifted=True),
    "mlm": Tokens("perplexity"),
    "seqcls": Classes("accuracy"),
    "tokcls": Tags("f1"),
    "qa": Spans("f1"),
}
ROWS = [
    Encoded(list(range(10, 40)), [IGNORED] * 26 + [1, 2, 3, 4], 0),
    Encoded(list(range(50, 60)), [IGNORED] * 8 + [5, 6], 1),
]


def create_pruned_step(model: Any, head: str, rows: list[Encoded] = ROWS) -> FastStep:
    fast = FastStep(
        model, FastPlan(True, True, head in ("causal", "mlm"), 1000, prunes_last_layer=True)
    )
    pad_id = model.config.pad_token_id or 0  # decoders use it to find a row's last token
    fast.prune_last_layer(OBJECTIVES[head], rows, pad_id, "cpu", "float32")
    return fast


def build_lora_model(family: str, head: str) -> Any:
    torch.manual_seed(0)
    base = tiny_models.build(family, head)
    return get_peft_model(base, LoraConfig(target_modules="all-linear", r=4))


def get_pruned_layers(fast: FastStep) -> set[str]:
    """Return the names of the pruned linear layers in the last block."""
    block = get_blocks(fast._base)[-1]
    hooked = {hook.hooks_dict_ref() and id(hook.hooks_dict_ref()) for hook in fast._pruning._hooks}
    return {
        name.rpartition(".")[2]
        for name, module in block.named_modules()
        if id(module._forward_pre_hooks) in hooked
    }


@pytest.mark.parametrize(
    ("family", "head", "expected"),
    [("llama", "causal", {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
     ("qwen3", "causal", {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
     ("gpt2", "causal", {"c_proj", "c_fc"}),
     ("phi3", "causal", {"o_proj", "gate_up_proj", "down_proj"}),
     ("opt", "causal", {"q_proj", "out_proj", "fc1", "fc2"}),
     ("bert", "seqcls", {"query", "dense"}), ("roberta", "mlm", {"query", "dense"}),
     ("distilbert", "seqcls", {"q_lin", "out_lin", "lin1", "lin2"})],
)  # fmt: skip
def test_all_linear_layers_except_keys_and_values_are_pruned(family, head, expected):
    fast = create_pruned_step(build_lora_model(family, head), head)
    assert get_pruned_layers(fast) == expected
    assert fast.pruned_linears >= len(expected)


@pytest.mark.parametrize(("family", "last"), [("bert", False), ("distilbert", False),
                                              ("electra", False), ("llama", True),
                                              ("gpt2", True), ("opt", True)])  # fmt: skip
def test_needed_tokens_of_classifier_are_detected(family, last):
    model = build_lora_model(family, "seqcls")
    fast = create_pruned_step(model, "seqcls")
    assert fast.plan.needed_tokens == PooledTokens(last, model.config.pad_token_id or 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rows_that_end_with_the_pad_token_keep_their_logits(family):
    """As with tokenizers that append the token with which they pad; the token before is pooled."""
    model = build_lora_model(family, "seqcls").eval()
    pad_id = model.config.pad_token_id or 0
    rows = [
        Encoded([*range(10, 40), pad_id], 0, 0),
        Encoded([*range(50, 60), pad_id, pad_id], 1, 1),
    ]
    fast = create_pruned_step(model, "seqcls", rows)
    assert fast.pruned_linears
    (batch,) = StepCollator(pad_id, fast.plan)(rows)["micro_batches"]
    layout = batch.pop("layout")
    del batch["labels"]
    with torch.no_grad(), using_layout(layout):
        logits = model(**batch).logits
    fast.remove()
    with torch.no_grad():
        expected = model(**batch).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def test_mean_pooling_is_not_pruned():
    base = tiny_models.build("modernbert", "seqcls", classifier_pooling="mean")
    assert create_pruned_step(base, "seqcls").plan.needed_tokens is None


@pytest.mark.parametrize(("family", "head"), [("bert", "qa"), ("roberta", "tokcls")])
def test_token_heads_are_not_pruned(family, head):
    fast = create_pruned_step(build_lora_model(family, head), head)
    assert (fast.plan.needed_tokens, fast.pruned_linears) == (None, 0)


def test_shared_block_is_not_pruned():
    fast = create_pruned_step(tiny_models.build("albert", "mlm"), "mlm")
    assert (fast.plan.needed_tokens, fast.pruned_linears) == (None, 0)


def test_short_rows_are_not_pruned():
    rows = [Encoded([11, 12], [11, 12], 0)]
    assert (
        create_pruned_step(build_lora_model("llama", "causal"), "causal", rows).pruned_linears == 0
    )


def test_last_block_computes_only_needed_tokens():
    """6 of 40 tokens predict a target; keys and values are computed for all."""
    model = build_lora_model("llama", "causal")
    fast = create_pruned_step(model, "causal")
    assert fast.plan.needed_tokens == SupervisedTokens(OBJECTIVES["causal"])  # type: ignore[arg-type]
    (batch,) = StepCollator(0, fast.plan)(ROWS)["micro_batches"]
    layout, token_counts = batch.pop("layout"), {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        module = get_blocks(fast._base)[-1].get_submodule(
            f"{'mlp' if name in ('up_proj', 'down_proj') else 'self_attn'}.{name}.base_layer"
        )
        module.register_forward_hook(
            lambda _, args, __, name=name: token_counts.update({name: args[0].shape[-2]})
        )
    labels = batch.pop("labels")
    with using_layout(layout):
        model(**batch)
    assert layout.needed.tolist() == [25, 26, 27, 28, 37, 38]
    assert labels.shape == (2, 30)
    assert token_counts == {
        "q_proj": 6, "k_proj": 40, "v_proj": 40, "o_proj": 6, "up_proj": 6, "down_proj": 6,
    }  # fmt: skip
    fast.remove()
    assert not any(
        part._forward_pre_hooks or part._forward_hooks
        for part in get_blocks(fast._base)[-1].modules()
        if "base_layer" in dict(part.named_children())
    )


class MixingBlock(torch.nn.Module):
    """Adds two linear layers to the states; the second one affects the next token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.next = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states + self.own(hidden_states)
        return states + self.next(hidden_states).roll(1, dims=1)


def test_layer_affecting_other_tokens_is_not_pruned():
    block, states = MixingBlock(), torch.randn(1, 6, 8)
    layout = PackedLayout.from_mask(torch.ones(1, 6)).with_needed_tokens(torch.tensor([1, 4]))
    linears = [block.own, block.next]
    assert get_prunable_layers(block, (states,), {}, layout, linears) == [block.own]
    expected = block(states)[:, [1, 4]]
    for pruned, is_equal in ((linears[:1], True), (linears[1:], False)):
        hooks = LastLayerPruning(pruned)
        with using_layout(layout):
            assert torch.allclose(block(states)[:, [1, 4]], expected) is is_equal
        hooks.remove()
