"""Tests that blocks are recomputed if memory requires it, without changing the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.events import NullListener
from ftlevel.fast.fused_layers import FusedNormGlu
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.fast.plan import plan_plain
from ftlevel.models.loading import silence_loggers
from ftlevel.models.module_tree import get_stacks
from ftlevel.training import memory as checkpointing
from ftlevel.training.forecast import fits
from ftlevel.training.forecast.fits import Device, Fit, fit_run
from ftlevel.training.memory import StepReducer, set_checkpointing
from ftlevel.training.model import load_training_model
from ftlevel.training.plan.resolve import resolve
from gpu_sim.commands import write_files

BLOCKS = 6


def build_lora_model() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    model = get_peft_model(tiny_models.build("llama", num_hidden_layers=BLOCKS), config).train()
    FusedNormGlu(model)
    return model


def create_run(*, recomputes: bool = False, **train: Any) -> Any:
    return SimpleNamespace(config=TrainConfig(train=train), recomputes=recomputes)  # type: ignore[arg-type]


def create_trainer_config(**train: Any) -> TrainerConfig:
    return TrainerConfig(**train)


TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "text": ("text-generation", "llama", "sft", {}),
    "chat": ("text-generation", "llama", "chat", {}),
    "summarization": ("summarization", "t5", "summary", {}),
    "classes": ("text-classification", "bert", "class", {}),
    "tags": ("token-classification", "bert", "tags", {}),
    "span": ("question-answering", "bert", "span", {}),
    "mask": ("masked-lm", "bert", "mask", {}),
    "preference": ("preference", "llama", "preference", {}),
    "kto": ("preference", "llama", "kto", {"preference": {"loss": "kto"}}),
    "reward": ("reward", "llama", "preference", {}),
    "rl": ("rl", "llama", "rl", {"rl": {
        "reward": "exact", "num_generations": 4, "max_completion_length": 64}}),
    "embedding": ("embedding", "bert", "pairs", {}),
    "reranking": ("reranking", "bert", "ranked", {}),
}  # fmt: skip
"""Name → task, family, rows of gpu_sim's commands, and other settings."""


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("rows"))


def resolve_run(model: Any, task: str, data: str, **sections: Any) -> Any:
    config = TrainConfig.model_validate({
        "task": task, "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"dataset": data, "cache": False, "validation_split": 0},
        "train": {"per_device_train_batch_size": 4}, **sections,
    })  # fmt: skip
    with silence_loggers():
        return resolve(config)


def on_gpu(run: Any) -> Any:
    """Return `run` as if it were resolved on a machine with a GPU."""
    return replace(run, model=replace(run.model, device="cuda"))


@pytest.mark.parametrize("name", TASKS)
def test_auto_is_chosen_by_estimate_for_every_task(
    name: str,
    rows_of: dict[str, str],
    tiny_model_dir: Callable[..., Path],
) -> None:
    task, family, rows, sections = TASKS[name]
    chat = True if name == "chat" else None
    run = resolve_run(tiny_model_dir(family, chat=chat), task, rows_of[rows], **sections)
    assert fit_run(run, Device.of_process("cpu", 1)) == Fit(), "on a CPU"
    sized = on_gpu(run.with_settings("speed", tokens_per_micro_batch=run.fast.tokens))
    gpu = Device("cuda", "", 2**40)
    fit = fit_run(sized, gpu)
    assert (fit.recomputes, fit.choices[0].value) == (False, "off")
    assert "of 1,024.00 GiB" in fit.choices[0].reason
    plain = replace(sized, fast=plan_plain(run.objective, run.fast.tokens))
    assert not fit_run(plain, gpu).recomputes
    need = gpu.forecast(sized).peak - fits.CONTEXT_BYTES
    fit = fit_run(sized, replace(gpu, memory=fits.CONTEXT_BYTES + int(0.55 * need)))
    assert (fit.recomputes, fit.choices[0].value) == (True, "all blocks")
    assert fit.choices[0].reason.startswith("auto: a step needs ")
    assert fit.choices[0].reason.endswith(" GiB with it")
    model = load_training_model(replace(run, recomputes=fit.recomputes), NullListener()).model
    stacks = get_stacks(model.get_base_model())
    assert all(block.gradient_checkpointing for stack in stacks for block in stack)


def test_requested_checkpointing_is_not_estimated() -> None:
    run: Any = SimpleNamespace(
        config=TrainConfig(train=create_trainer_config(offload_activations=True)),
        model=SimpleNamespace(device="cuda"),
        fast=SimpleNamespace(enabled=False),
    )
    fit = fit_run(run, Device("cuda", "", 0))
    (choice,) = fit.choices
    assert not fit.recomputes, "the configuration has it"
    assert (choice.value, choice.reason) == (
        "all blocks", "as requested; their inputs are in host memory"
    )  # fmt: skip


def test_step_does_not_depend_on_checkpointing() -> None:
    model, results = build_lora_model(), []
    ids = torch.arange(40)[None] + 5
    for recomputes in (False, True):
        set_checkpointing(model, create_run(recomputes=recomputes))
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    (loss, gradients), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_auto_checkpointing_applies_to_gpus_only() -> None:
    train = create_trainer_config(gradient_checkpointing="auto")
    assert train.gradient_checkpointing is None
    assert train.may_recompute("cuda")
    assert not train.may_recompute("cpu")
    disabled = create_trainer_config(gradient_checkpointing=False)
    assert not disabled.may_recompute("cuda")


def test_offloading_recomputes_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = build_lora_model(), {}
    base = type(model.get_base_model())
    monkeypatch.setattr(base, "activation_checkpointing_enable",
                        lambda _, settings, **more: arguments.update(settings, **more))  # fmt: skip
    set_checkpointing(model, create_run(offload_activations=True))
    assert arguments == {"use_reentrant": False, "offload": True}


def build_encoder_decoder(family: str) -> Any:
    """Return an encoder-decoder with LoRA."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    return get_peft_model(tiny_models.build(family), config).train()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_can_enable_checkpointing_when_out_of_memory(family: str) -> None:
    model = build_encoder_decoder(family)
    fast = SimpleNamespace(plan=SimpleNamespace(workers=1, is_random=True))
    reducer = StepReducer(SimpleNamespace(model=model, fast=fast))
    assert reducer._can_checkpoint()
    set_checkpointing(model, create_run(gradient_checkpointing=True))
    assert not reducer._can_checkpoint()


def count_weight_uses(model: Any, blocks: list[Any]) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Return how often each linear layer's weight was used in a step, and the gradients.

    All `blocks` are recomputed.
    """
    counts: dict[str, int] = {}
    inputs = {"input_ids": torch.arange(20)[None] + 5}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for name, module in (pair for block in blocks[-1:] for pair in block.named_modules()):
        if hasattr(module, "_weight"):
            weight = module._weight

            def count_use(dtype: Any, name: str = name, weight: Any = weight) -> Any:
                counts[name] = counts.get(name, 0) + 1
                return weight(dtype)

            module._weight = count_use
    for _ in range(2):
        counts.clear()
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs)[0].float().square().sum().backward()
    return counts, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "targets", "last"),
    [
        ("llama", "all-linear", "mlp.down_proj"),
        ("llama", ["q_proj", "o_proj"], None),  # the block ends with a plain linear layer
        ("gpt2", "all-linear", "mlp.c_proj"),
        ("gemma3_text", "all-linear", None),  # a norm follows the linear layer
        ("bert", "all-linear", None),
        ("t5", "all-linear", "layer.2.DenseReluDense.wo"),
        ("opt", "all-linear", "fc2"),
        ("bart", "all-linear", None),
        ("gpt_neox", "all-linear", None),
    ],
)
def test_last_linear_layer_of_block_is_not_recomputed(
    family: str, targets: Any, last: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x)
    config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    register_fused_layers(config)
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.build(family), config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    base = model.get_base_model()
    blocks = get_stacks(base)[-1]
    _, expected = count_weight_uses(model, [])
    checkpointing.enable_checkpointing(base)
    counts, actual = count_weight_uses(model, blocks)
    assert counts == {name: 2 if name.endswith(last or "-") else 3 for name in counts}
    assert counts
    assert all(map(torch.equal, actual, expected))
