"""How a merge is checked: what was merged, before rounding; and what was written, afterwards.

Rounding to bfloat16 moves the scores of a model by more than a fault may (a module left out, an
update scaled by 1.02), and how far depends on the weights: those of a .gguf file or of a float32
checkpoint all round, those of a bfloat16 checkpoint only where something was merged. So nothing is
checked through it. The base with the adapter beside it and the merged model are compared in
float32, the merged one on weights that have not been rounded yet; and of the files, loaded afresh,
each tensor must be such a weight, rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import how_near
from ftlevel.config import QuantConfig
from ftlevel.errors import RunError
from ftlevel.evaluation.model_pair import in_float32
from ftlevel.evaluation.two_models import Agreement, Probe, Scores, compare_rows
from ftlevel.merging.merge_input import MergeInput, load_trained_model
from ftlevel.merging.merged_model import TensorMerger, Written
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import load_config, load_model
from ftlevel.models.sources import ModelSource

FLOAT = QuantConfig(kind="none")
BOUND = 1e-5
"""Mean difference of two right models' logits in float32, as a share of the largest logit."""
_ROWS = 8


@dataclass(frozen=True)
class Candidate:
    """A merged model that was written, and what was measured of it.

    Attributes:
        onto: `original` or `dequantized`.
        directory: where it is for now.
        written: what it holds.
        merger: what made its tensors.
        scores: what it says of the rows, loaded afresh; None if that was not measured.
        trained: how far it is from the model as trained; None likewise.
    """

    onto: str
    directory: Path
    written: Written
    merger: TensorMerger
    scores: Scores | None = None
    trained: Agreement | None = None


@dataclass(frozen=True)
class Checked:
    """What was measured of a merge that is right.

    Attributes:
        agreement: how far what was written is from the base with the adapter beside it.
        before_rounding: the same in float32, of the weights before they are rounded.
        rounding: how far what was written is from these weights.
    """

    agreement: Agreement
    before_rounding: Agreement
    rounding: Agreement | None


def load_merged(directory: Path, inputs: MergeInput) -> Any:
    """Return the model in `directory`, loaded afresh as any program would load it."""
    source = ModelSource(str(directory), "directory", str(directory), local_files_only=True)
    model, missing = load_model(
        source,
        load_config(source),
        inputs.auto_class,
        dtype=DTYPES[inputs.dtype],
        device=inputs.device,
    )
    if missing:
        raise RunError(f"the merged model lacks {len(missing):,} tensors, such as {missing[0]}.")
    return model.eval()


def measure(candidate: Candidate, inputs: MergeInput, probe: Probe, trained: Scores) -> Candidate:
    """Return `candidate` with what it says, loaded afresh, beside the model as trained.

    Raises:
        RunError: a tensor is not the merged one.
    """
    model = load_merged(candidate.directory, inputs)
    _check_files(model, candidate.merger)
    found = probe.score(model, inputs.dtype)
    return replace(candidate, scores=found, trained=compare_rows(trained, found))


def check(candidate: Candidate, inputs: MergeInput, probe: Probe) -> Checked:
    """Return what was measured of a right merge.

    Raises:
        RunError: it is not the base with the adapter.
    """
    if candidate.scores is None or candidate.trained is None:
        raise ValueError("what is checked was measured before")
    agreement = candidate.trained
    if (reference := _other_reference(candidate, inputs)) is not None:
        agreement = compare_rows(probe.score(reference(), inputs.dtype), candidate.scores)
    if inputs.dtype == candidate.written.dtype == "float32":  # nothing has been rounded
        _refuse_other_than(agreement)
        return Checked(agreement, agreement, None)
    few = replace(probe, rows=probe.rows[:_ROWS])
    exact, unrounded = _compare_before_rounding(candidate, inputs, few)
    if not _is_right(exact) and inputs.dtype != "float32":
        wide = replace(inputs, dtype="float32")  # a layer may narrow what it is given, too
        exact, unrounded = _compare_before_rounding(candidate, wide, few)
    _refuse_other_than(exact)
    rounding = compare_rows(unrounded, candidate.scores.first(len(unrounded.logits)))
    return Checked(agreement, exact, rounding)


def _check_files(model: Any, merger: TensorMerger) -> None:
    """Refuse files that, loaded into `model`, are not what was merged, rounded.

    Raises:
        RunError: naming the first tensor that differs.
    """
    for name, weight in model.named_parameters():
        if name in merger.shapes:
            merged = merger.value(name).to(weight.dtype)
            if not torch.equal(weight.cpu(), merged):
                raise RunError(
                    f"the files are not what was merged: {name}, loaded afresh, is another tensor. "
                    "Nothing was kept. Please report this with the command."
                )


def _other_reference(candidate: Candidate, inputs: MergeInput) -> Callable[[], Any] | None:
    """Return what loads the model to compare a merge with, where it is not the model as trained.

    The original weights are not those that a quantized run was trained on; and a base of 8 bits
    rounds its activations as well (LLM.int8), which no weight can repeat.
    """
    if inputs.quant.kind == "none":
        return None
    if candidate.onto == "original" or inputs.quant.kind == "8bit":
        return lambda: _load_reference(candidate, inputs)
    return None


def _load_reference(candidate: Candidate, inputs: MergeInput) -> Any:
    """Return the weights that were merged into, in floating point, with the adapter beside them."""
    if candidate.onto == "original":
        return load_trained_model(inputs, FLOAT)
    return load_trained_model(inputs, inputs.quant, dequantized=True)


def _compare_before_rounding(
    candidate: Candidate, inputs: MergeInput, probe: Probe
) -> tuple[Agreement, Scores]:
    """Compare in float32 what was merged with the base and the adapter; return what it says, too.

    Weights in the type that they are stored in are widened a module at a time, and need no more
    memory than before. Others are loaded in float32, so that none is rounded on the way.
    """
    merger = candidate.merger
    if candidate.onto == "original" and merger.loses_in(DTYPES[inputs.dtype]):
        inputs = replace(inputs, dtype="float32")
    reference = _load_reference(candidate, inputs)
    with in_float32(reference):
        expected = probe.score(reference, "float32")
    del reference
    model = load_merged(candidate.directory, inputs)
    with in_float32(model, merger.unrounded):
        found = probe.score(model, "float32")
    return compare_rows(expected, found), found


def _is_right(exact: Agreement) -> bool:
    return exact.mean_difference <= BOUND * exact.scale


def _refuse_other_than(exact: Agreement) -> None:
    """Refuse a merge that in float32 is not the base with the adapter.

    Raises:
        RunError: farther than float32 explains.
    """
    if not _is_right(exact):
        raise RunError(
            f"the merged model is not the base with the adapter: before rounding its logits differ "
            f"by {exact.mean_difference:.3g} on average, and float32 explains "
            f"{BOUND * exact.scale:.3g} ({how_near(asdict(exact))}, "
            f"{exact.targets:,} targets). Nothing was kept. Please report this with the command."
        )
