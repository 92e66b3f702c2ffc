"""Cells of the support matrix, each trained, saved, reloaded and compared in tiny models.

A cell is a row of `ftlevel.methods`, a family, a head and a quantization. Tasks that put the
same head on a family are one cell. Used by scripts/run_matrix.py and by a sample in the tests.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny_models
from ftlevel.config import SPECS, QuantConfig
from ftlevel.data.encoding.row import Encoded
from ftlevel.methods import METHOD_INFO, METHODS, Base, explain_unsupported, get_rule
from ftlevel.methods.base import InitializationInputs
from ftlevel.methods.support_table import Cell
from ftlevel.models.families import FAMILIES
from ftlevel.models.hardware import DTYPES, autocast
from ftlevel.models.loading import build_task_model, load_model
from ftlevel.models.module_tree import get_heads
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import apply_method, copy_initial_state, finalize_method, save_adapter
from ftlevel.training.model import ShuffledBatches, hash_tensors
from ftlevel.training.plan.method import resolve_method_targets
from ftlevel.training.proof import CheckInputs, check_saved

QUANTS = ("none", "4bit", "8bit")
STEPS = 4
_SMALL = {
    "r": 4, "init_r": 4, "target_r": 2, "oft_block_size": 8, "alpha": 4.0, "lora_alpha": 8.0,
    "num_virtual_tokens": 4, "bottleneck_dim": 8, "block_size": 8,
}  # fmt: skip
_WITHOUT_HEAD = ("distilbert", "modernbert", "llama", "qwen3")
"""Families of embedding models without a pooler in transformers."""
_CLASS_TO_HEAD = {name: head for head, name in tiny_models.AUTO_CLASSES.items()}
RERANK = "rerank"
"""Head of rerankers: a classification head with one output and a loss over document lists."""


@dataclass(frozen=True)
class TinyCell:
    """One cell to run.

    Attributes:
        row: a name of `METHOD_INFO`.
        head: of tiny_models, used by `tasks`.
        dtype: of the base and its activations; the sweep uses float32.
    """

    row: str
    family: str
    head: str
    tasks: tuple[str, ...]
    quant: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.row}-{self.family}-{self.head}-{self.quant}"

    @property
    def kind(self) -> str:
        """`encoder`, `decoder` or `encoder-decoder`."""
        return FAMILIES[self.family].kind

    @property
    def support_cell(self) -> Cell:
        """The cell of the support table, for the first task."""
        family = FAMILIES[self.family]
        return Cell(
            self.row, family.name, family.kind, self.tasks[0], self.quant,
            bool(family.target_parameters),
        )  # fmt: skip


def build_cells() -> list[TinyCell]:
    """Return all cells of methods, families and tasks."""
    rows = [info.name for info in METHOD_INFO.values() if info.method in SPECS]
    return [
        TinyCell(row, family, head, tasks, quant)
        for family in tiny_models.FAMILIES
        for head, tasks in get_tasks_by_head(family).items()
        for quant in QUANTS
        for row in rows
    ]


@cache
def get_tasks_by_head(family: str) -> dict[str, tuple[str, ...]]:
    """Return the heads of a family that ftlevel's tasks use, with these tasks."""
    kind = FAMILIES[family].kind
    tasks_by_head: dict[str, tuple[str, ...]] = {}
    for task in TASKS.values():
        head = _CLASS_TO_HEAD.get(task.auto_classes.get(kind, ""))
        if head in tiny_models.HEADS[family] or (head == "base" and family in _WITHOUT_HEAD):
            head = RERANK if task.name == "reranking" else head
            tasks_by_head[head] = (*tasks_by_head.get(head, ()), task.name)
    return tasks_by_head


def _base_head(head: str) -> tuple[str, dict[str, Any]]:
    """Return the head of tiny_models for `head`, and config values."""
    return ("seqcls", {"num_labels": 1}) if head == RERANK else (head, {})


def _build_config(cell: TinyCell) -> Any:
    head, values = _base_head(cell.head)
    return tiny_models.build_config(cell.family, head, **values)


def build_batch(cell: TinyCell) -> dict[str, torch.Tensor]:
    """Return the batch of `cell`; for a reranker, a relevant and an irrelevant document."""
    batch = tiny_models.build_batch(cell.family, _base_head(cell.head)[0])
    if cell.head == RERANK:
        batch["labels"] = torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    return batch


def create_objective(cell: TinyCell) -> Any:
    task = TASKS[cell.tasks[0]]
    info = task.synthetic_info if cell.head == RERANK else {}
    return task.create_objective(FAMILIES[cell.family].kind, info)


@cache
def build_spec(row: str) -> Any:
    """Return the spec of a table row, small enough for a tiny model."""
    info = METHOD_INFO[row]
    spec = SPECS[info.method]
    required_values = {"lora_plus_ratio": 16.0, "target_parameters": "experts"}
    fields = {
        name: required_values[name]
        if value is ...
        else value[0]
        if isinstance(value, tuple)
        else value
        for name, value in info.fields.items()
    }
    small = {name: value for name, value in _SMALL.items() if name in spec.model_fields}
    return spec(**{**small, **fields})


@cache
def expected_error(cell: TinyCell) -> str | None:
    """Return the table's error message for `cell`, or None if the cell is supported."""
    problems = explain_unsupported(build_spec(cell.row), cell.support_cell)
    assert bool(problems) == (get_rule(cell.support_cell) is not None)
    return problems[0] if problems else None


@cache
def cached_base(family: str, head: str, quant: str, packs_experts: bool = False) -> Any:
    """Return the base of a cell, cached; callers copy it."""
    base_head, values = _base_head(head)
    if quant == "none":
        return tiny_models.build(family, base_head, **values)
    directory = Path(tempfile.mkdtemp(prefix="ftlevel-matrix-"))
    try:
        model = tiny_models.build(family, base_head, **values)
        model.save_pretrained(directory)
        return load_model(
            ModelSource(family, "directory", str(directory)),
            tiny_models.build_config(family, base_head, **values),
            tiny_models.AUTO_CLASSES[base_head],
            dtype=torch.float32,
            device="cpu",
            quantization=build_quantization_config(
                QuantConfig(kind=quant, experts=packs_experts),
                torch.float32,
                get_heads(model) if _has_new_head(head) else [],
            ),
        )[0]
    finally:
        shutil.rmtree(directory)


def _has_new_head(head: str) -> bool:
    return head in ("seqcls", "tokcls", "qa", RERANK)


def copy_base(cell: TinyCell) -> Any:
    """Return a copy of the base of `cell`."""
    has_experts = bool(FAMILIES[cell.family].target_parameters)
    packs_experts = (
        has_experts and cell.quant == "4bit" and cell.row != "experts"
    )  # like the engine
    model = copy.deepcopy(cached_base(cell.family, cell.head, cell.quant, packs_experts))
    stays_float32 = cell.quant != "none" or cell.row in ("full", "linear-probe")  # like the engine
    return model if stays_float32 else model.to(DTYPES[cell.dtype])


def copy_with_new_head(cell: TinyCell) -> Any:
    """Return a copy of the base, with another random head if the task trains one."""
    model = copy_base(cell)
    if _has_new_head(cell.head):
        generator = torch.Generator().manual_seed(99)
        for name in get_heads(model):
            for parameter in model.get_submodule(name).parameters():
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data = noise.to(parameter) * 0.02
    return model


def describe_base(cell: TinyCell, spec: Any) -> Base:
    """Return the description of the cell's base, computed without weights."""
    config = _build_config(cell)
    meta_model = build_task_model(config, tiny_models.AUTO_CLASSES[_base_head(cell.head)[0]])
    kind = FAMILIES[cell.family].kind
    targets = resolve_method_targets(spec, meta_model, cell.family, cell.quant)
    return Base(
        config=config,
        architecture=kind,
        task_type=TASKS[cell.tasks[0]].peft_types.get(kind),
        targets=targets.modules,
        heads=get_heads(meta_model) if _has_new_head(cell.head) else [],
        fan_in_fan_out=targets.fan_in_fan_out,
        total_steps=STEPS,
        parameters=targets.parameters,
    )


def run_cell(cell: TinyCell) -> float:
    """Train, save, load into a fresh base and compare; raise on any failure.

    Returns:
        Largest change of a logit by training.
    """
    torch.manual_seed(0)
    spec = build_spec(cell.row)
    base = describe_base(cell, spec)
    base_model = copy_base(cell)
    digests = hash_tensors(base_model.named_parameters())
    model = apply_method(base_model, spec, base)
    batch, objective = build_batch(cell), create_objective(cell)
    method = METHODS[spec.kind]
    if spec.kind in ("lora", "qlora"):
        rows = [
            Encoded(ids.tolist(), ids.tolist() if cell.head == "causal" else 0, 0)
            for ids in batch["input_ids"].repeat(4, 1)
        ]
        inputs = InitializationInputs(
            lambda: ShuffledBatches(rows, 0, 4, 0, "cpu"),
            lambda: lambda name: get_float_weight(cell, name),
            "cpu", cell.dtype,
        )  # fmt: skip
        method.initialization.initialize(model, spec, inputs)
    initial_state = copy_initial_state(model, spec)
    _train(model, batch, spec, cell.dtype, objective if cell.head == RERANK else None)
    with tempfile.TemporaryDirectory(prefix="ftlevel-matrix-") as folder:
        directory = Path(folder)
        finalize_method(model, spec, "cpu", "float32")
        if hasattr(model, "peft_config"):
            save_adapter(model, spec, directory, initial_state)
        else:
            model.save_pretrained(directory)
        _, _, effect = check_saved(
            model, directory, digests, lambda: copy_with_new_head(cell),
            CheckInputs(_probe(batch), objective, "cpu", cell.dtype),
            is_base_modified=method.initialization.rewrites_base(spec),
        )  # fmt: skip
    return effect


def get_float_weight(cell: TinyCell, name: str) -> torch.Tensor:
    linear = cached_base(cell.family, cell.head, "none").get_submodule(name)
    return linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T


def _probe(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch like that of the collator: spans are labels."""
    probe = dict(batch)
    if "start_positions" in probe:
        spans = (probe.pop("start_positions"), probe.pop("end_positions"))
        probe["labels"] = torch.stack(spans, dim=1)
    probe.setdefault("labels", torch.zeros(len(probe["input_ids"])))
    return probe


def _project(states: torch.Tensor) -> torch.Tensor:
    """Return a loss for a model without a head: a fixed random projection of its states."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(states.shape[-1], generator=generator)
    return (states.float() @ weights).mean()


def _loss(model: Any, batch: dict[str, torch.Tensor], objective: Any) -> torch.Tensor:
    """Return the loss of the model's head, or of `objective` if given."""
    if objective is None:
        outputs = model(**batch)
        return _project(outputs[0]) if outputs.get("loss") is None else outputs.loss
    inputs, labels = objective.split(batch)
    logits = objective.logits(model(**inputs))
    total = objective.loss_sum(logits, labels, batch["attention_mask"])
    return total / objective.count(labels)


def _train(
    model: Any, batch: dict[str, torch.Tensor], spec: Any, dtype: str, objective: Any = None
) -> None:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=5e-3)
    method = METHODS[spec.kind]
    callbacks = method.callbacks(spec, Path(), True)
    with_gradient: set[str] = set()
    model.train()
    for step in range(STEPS):
        with autocast("cpu", dtype):
            loss = _loss(model, batch, objective)
        penalty = method.penalty(model)
        if penalty is not None:
            loss = loss + penalty
        loss.backward()
        assert torch.isfinite(loss), f"loss {loss.item()} at step {step}"
        missing = [name for name, p in trainable.items() if p.grad is None]
        assert not missing, f"no gradient: {missing[:3]}"
        with_gradient |= {name for name, p in trainable.items() if bool(p.grad.abs().sum() > 0)}
        optimizer.step()
        state = transformers.TrainerState(global_step=step)
        for callback in callbacks:
            callback.on_optimizer_step(None, state, None, model=model)
        optimizer.zero_grad()
    for callback in callbacks:
        callback.on_train_end(None, transformers.TrainerState(), None, model=model)
    idle = sorted(set(trainable) - with_gradient)
    assert not idle, f"gradient always zero: {idle[:3]}"


def outcome(cell: TinyCell) -> str:
    """Return "yes", "no: REASON" or, if the result contradicts the table, "?? ERROR"."""
    reason = expected_error(cell)
    if reason is not None:
        return f"no: {reason}"
    try:
        run_cell(cell)
    except Exception as error:  # noqa: BLE001 - any error is a result
        text = str(error).strip().splitlines()
        return f"?? {type(error).__name__}: {text[0] if text else ''}"
    return "yes"
