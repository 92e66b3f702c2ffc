"""Compare a model with a reference: resolve both, build their inputs, compute differences.

`in_float32` runs a model in float32 on low-precision weights, to isolate rounding errors.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ftlevel.artifacts.cards import read_card
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import InputError
from ftlevel.evaluation.two_models import (
    PREDICTS,
    WINDOW,
    ComparisonProbe,
    RowLogits,
    WindowOutputs,
    compare_rows,
    compare_text,
    compute_window_outputs,
    cut_windows,
    read_eval_text,
)
from ftlevel.models.kinds import max_positions
from ftlevel.models.upstream.tensors import direct_tensors
from ftlevel.trained.model_ref import PLAIN, LoadedModel, ModelRef
from ftlevel.trained.resolve import card_directory, resolve_model


def resolve_pair(
    name: str, against: str, task: str | None, base: str | None, *, device: str, dtype: str
) -> tuple[ModelRef, ModelRef]:
    """Resolve the model to evaluate and the one to compare it with.

    A plain model has no task, so it gets the task of the other one.

    Raises:
        InputError: a model is missing, or the two cannot be compared.
    """
    directories = [card_directory(Path(each).expanduser()) for each in (name, against)]
    card, other_card = (read_card(path) if path is not None else None for path in directories)
    both = [each for each in (card, other_card) if each is not None]
    plain_task = task or (both[0].task if both else None)
    # A new location of the base is that of both only if they share it.
    shares = len(both) == 2 and len({each.base.get("fingerprint") for each in both}) == 1
    is_of_other = card is None and other_card is not None
    ref = resolve_model(
        name,
        task if card else plain_task,
        None if is_of_other else base,
        device=device,
        dtype=dtype,
    )
    other = resolve_model(
        against,
        task if other_card else plain_task,
        base if is_of_other or shares else None,
        device=device,
        dtype=dtype,
        said=f"--against {against}",
    )
    if ref.task != other.task:
        raise InputError(
            f"--against {against} is for {other.task}, and {name} for {ref.task}. Choose a model "
            "for the same task."
        )
    if ref.load_tokenizer().get_vocab() != other.load_tokenizer().get_vocab():
        raise InputError(
            f"--against {against}: its tokenizer differs from that of {name}, "
            "so their predictions cannot be compared token by token. Name a relative of it."
        )
    if ref.labels != other.labels:
        raise InputError(
            f"--against {against}: its labels are {', '.join(other.labels)}, and "
            f"those of {name} are {', '.join(ref.labels)}. Name one with the same."
        )
    return ref, other


def choose_leader(ref: ModelRef, other: ModelRef | None) -> ModelRef:
    """Returns the model that defines the evaluation rows: a run, or else one with a model card."""
    both = [ref] if other is None else [ref, other]
    runs = [each for each in both if each.run is not None]
    return [*runs, *(each for each in both if each.card.method != PLAIN), ref][0]


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model on the rows and on the windows of the text."""

    scores: RowLogits
    text: list[WindowOutputs]


@dataclass(frozen=True)
class ComparisonInputs:
    """Inputs of a comparison: encoded rows, and windows of token ids for language models."""

    rows: Sequence[Encoded]
    windows: list[list[int]]
    auto_class: str
    text: str

    def outputs_of(self, trained: LoadedModel) -> ModelOutputs:
        """Return the outputs of `trained` in its own compute precision."""
        tokenizer = trained.tokenizer
        probe = ComparisonProbe(
            self.rows, trained.objective, tokenizer.pad_token_id or 0, trained.device
        )
        with trained.inference():
            outputs = compute_window_outputs(
                trained.model, self.windows, self.auto_class, tokenizer
            )
            text = [WindowOutputs(output.values.cpu(), output.labels.cpu()) for output in outputs]
        return ModelOutputs(probe.score(trained.model, trained.dtype), text)

    def compare(self, reference: ModelOutputs, outputs: ModelOutputs) -> dict[str, Any]:
        """Return the differences between `outputs` and `reference`."""
        rows = asdict(compare_rows(reference.scores, outputs.scores))
        if not self.windows:
            return {"rows": rows}
        text = compare_text(reference.text, outputs.text, self.auto_class)
        return {"rows": rows, "text": {"name": self.text, **text}}


def build_comparison_inputs(
    eval_text: Path | None, eval_tokens: int, trained: LoadedModel, rows: Sequence[Encoded]
) -> ComparisonInputs:
    """Build the inputs for comparing `trained` with its reference.

    Raises:
        InputError: the text cannot be read, or has fewer than two tokens.
    """
    auto_class = trained.ref.auto_class
    if auto_class not in PREDICTS:
        return ComparisonInputs(rows, [], auto_class, "")
    text = read_eval_text(eval_text, eval_tokens)
    length = min(
        WINDOW, trained.ref.card.max_length or WINDOW, max_positions(trained.model.config) or WINDOW
    )
    windows = cut_windows(trained.tokenizer, text.content, eval_tokens, length)
    if not windows:
        raise InputError(f"--eval-text {text.name} has less than two tokens. Name a longer text.")
    return ComparisonInputs(rows, windows, auto_class, text.name)


_TOKENS = "trainable_tokens_delta"  # attribute of PEFT's layer of trainable tokens


@contextlib.contextmanager
def in_float32(
    model: torch.nn.Module, unrounded: Callable[[str], torch.Tensor | None] = lambda _: None
) -> Iterator[None]:
    """Run `model` in float32 inside the block, on its own weights.

    The weights of each module are cast only while it runs, so memory grows by one module.
    `unrounded` maps a parameter name to a replacement tensor, or None.
    """
    stored: dict[torch.nn.Module, list[dict[str, Any]]] = defaultdict(list)
    paths = {module: path for path, module in model.named_modules()}

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for part in _read_by(module):
            tensors, _ = direct_tensors(part)
            stored[part].append(dict(tensors))
            for name, weight in stored[part][-1].items():
                if weight is not None and weight.is_floating_point():
                    replacement = unrounded(f"{paths[part]}.{name}".lstrip("."))
                    widened = (weight if replacement is None else replacement).to(
                        weight.device, torch.float32
                    )
                    tensors[name] = torch.nn.Parameter(widened, requires_grad=False)
        return tuple(_widened(value) for value in inputs)  # T5 casts the input of wo

    def restore(module: torch.nn.Module, _: Any, __: Any) -> None:
        for part in _read_by(module):
            direct_tensors(part)[0].update(stored[part].pop())

    hooks = []
    for module in model.modules():
        if any(direct_tensors(part)[0] for part in _read_by(module)):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_by(module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """Read the modules whose weights `module` reads; PEFT's token layer reads its base layer."""
    if isinstance(module, BaseTunerLayer) and _TOKENS in module.adapter_layer_names:
        return module, module.get_base_layer()
    return (module,)


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
