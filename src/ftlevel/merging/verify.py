"""Check a merge: compare the merged weights before rounding, and then the written files.

Rounding to bfloat16 can change logits more than an error such as a missing module or a scale of
1.02. The merged model is therefore compared in float32, before rounding, with the base and its
adapter. Each tensor of the reloaded files must equal the merged tensor after rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import format_difference
from ftlevel.errors import RunError
from ftlevel.evaluation.two_models import Agreement, EvalSet, RowLogits, compare_logits, in_float32
from ftlevel.merging.merge_input import MergeInput
from ftlevel.merging.merged_model import MergedFiles, TensorMerger
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import load_config, load_model
from ftlevel.models.sources import resolve_source

BOUND = 1e-5
"""Allowed mean difference of logits in float32, as a share of the largest logit."""
_ROWS = 8


@dataclass(frozen=True)
class Candidate:
    """A merged model in a temporary directory, to be checked.

    `onto` is the base: `original` or `dequantized`. `scores` are its logits, and `trained` is their
    difference from the trained model's; both are None until `measure`.
    """

    onto: str
    directory: Path
    written: MergedFiles
    merger: TensorMerger
    scores: RowLogits | None = None
    trained: Agreement | None = None


@dataclass(frozen=True)
class MergeCheck:
    """Differences of logits, each between two models, that were measured for a correct merge.

    Attributes:
        agreement: between the written model and the base with the adapter.
        before_rounding: the same comparison in float32, with the weights before rounding.
        rounding: between the written model and the unrounded one; None if all is in float32.
    """

    agreement: Agreement
    before_rounding: Agreement
    rounding: Agreement | None


def load_merged(model_dir: Path, inputs: MergeInput) -> Any:
    """Load the model in `model_dir` with transformers, in eval mode."""
    source = resolve_source(str(model_dir))
    model, missing = load_model(
        source,
        load_config(source),
        inputs.ref.auto_class,
        dtype=DTYPES[inputs.dtype],
        device=inputs.device,
    )
    unused = tuple(f"{module}." for module in inputs.ref.configured_task.get_unused_modules(model))
    missing = [name for name in missing if not name.startswith(unused)]
    if missing:
        raise RunError(f"the merged model lacks {len(missing):,} tensors, such as {missing[0]}.")
    return model.eval()


def measure(
    candidate: Candidate, inputs: MergeInput, eval_set: EvalSet, trained: RowLogits
) -> Candidate:
    """Returns `candidate` with its logits after reloading, and their difference from `trained`.

    Raises RunError if reloaded tensors differ from those that were written.
    """
    model = load_merged(candidate.directory, inputs)
    _check_files(model, candidate.merger)
    outputs = eval_set.score(model, inputs.dtype)
    return replace(candidate, scores=outputs, trained=compare_logits(trained, outputs))


def check(candidate: Candidate, inputs: MergeInput, eval_set: EvalSet) -> MergeCheck:
    """Compare the logits of the merged `candidate` with those of the base with its adapter.

    Raises RunError if, in float32, their mean difference exceeds `BOUND` × the largest logit.
    """
    if candidate.scores is None or candidate.trained is None:
        raise ValueError("what is checked was measured before")
    agreement = candidate.trained
    # Merging into the original weights differs from a quantized run, and LLM.int8 rounds
    # activations too, which weights cannot reproduce.
    is_original = inputs.quant.kind != "none" and candidate.onto == "original"
    if is_original or inputs.quant.kind == "8bit":
        reference = eval_set.score(_load_reference(candidate, inputs), inputs.dtype)
        agreement = compare_logits(reference, candidate.scores)
    if inputs.dtype == candidate.written.dtype == "float32":  # nothing was rounded
        _check_close(agreement)
        return MergeCheck(agreement, agreement, None)
    subset = replace(eval_set, rows=eval_set.rows[:_ROWS])
    exact, unrounded = _compare_before_rounding(candidate, inputs, subset)
    if not _is_close(exact) and inputs.dtype != "float32":
        wide_inputs = replace(inputs, dtype="float32")  # a layer may cast its inputs down too
        exact, unrounded = _compare_before_rounding(candidate, wide_inputs, subset)
    _check_close(exact)
    rounding = compare_logits(unrounded, candidate.scores.first(len(unrounded.logits)))
    return MergeCheck(agreement, exact, rounding)


def _check_files(model: Any, merger: TensorMerger) -> None:
    for name, weight in model.named_parameters():
        if name in merger.shapes:
            merged = merger.value(name).to(weight.dtype)
            if not torch.equal(weight.cpu(), merged):
                raise RunError(
                    f"the files are not what was merged: {name}, reloaded, is a different "
                    f"tensor. Nothing was saved. Please report this with the command."
                )


def _load_reference(candidate: Candidate, inputs: MergeInput) -> Any:
    is_original = candidate.onto == "original"
    ref = inputs.ref.with_card(quantization={"kind": "none"}) if is_original else inputs.ref
    return ref.load(inputs.device, inputs.dtype, dequantize=not is_original).model


def _compare_before_rounding(
    candidate: Candidate, inputs: MergeInput, eval_set: EvalSet
) -> tuple[Agreement, RowLogits]:
    """Returns the unrounded merge's difference from base with adapter, and the merge's logits."""
    merger = candidate.merger
    if candidate.onto == "original" and merger.loses_in(DTYPES[inputs.dtype]):
        inputs = replace(inputs, dtype="float32")
    reference = _load_reference(candidate, inputs)
    with in_float32(reference):
        expected = eval_set.score(reference, "float32")
    del reference
    model = load_merged(candidate.directory, inputs)
    with in_float32(model, merger.unrounded):
        outputs = eval_set.score(model, "float32")
    return compare_logits(expected, outputs), outputs


def _is_close(exact: Agreement) -> bool:
    return exact.mean_difference <= BOUND * exact.scale


def _check_close(exact: Agreement) -> None:
    if not _is_close(exact):
        raise RunError(
            f"the merged model is not the base with the adapter: before rounding its logits differ "
            f"by {exact.mean_difference:.3g} on average, and float32 explains "
            f"{BOUND * exact.scale:.3g} ({format_difference(asdict(exact))}, "
            f"{exact.targets:,} targets). Nothing was saved. Please report this with the command."
        )
