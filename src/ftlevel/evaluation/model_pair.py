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
from ftlevel.config import EvaluateConfig
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
from ftlevel.models.hardware import autocast
from ftlevel.models.kinds import max_positions
from ftlevel.models.upstream.tensors import own_tensors
from ftlevel.trained.load import LoadedModel
from ftlevel.trained.model_ref import (
    PLAIN,
    ModelRef,
    card_directory,
    load_own_tokenizer,
    resolve_model,
)


def resolve_pair(config: EvaluateConfig, device: str) -> tuple[ModelRef, ModelRef | None]:
    """Resolve the model to evaluate and the one named by `--against`, or None.

    A plain model has no task, so it gets the task of the other one.

    Raises:
        InputError: a model is missing, or the two cannot be compared.
    """
    if config.against is None:
        found = resolve_model(
            config.name, config.task, config.base_model, device=device, dtype=config.dtype
        )
        return found, None
    names = (config.name, config.against)
    cards = [card_directory(Path(name).expanduser()) for name in names]
    known = [read_card(card).task for card in cards if card is not None]
    task = config.task or (known[0] if known else None)
    places = _places(config.base_model, cards)
    said = (config.name, f"--against {config.against}")
    found, reference = (
        resolve_model(
            name,
            config.task if card else task,
            place,
            device=device,
            dtype=config.dtype,
            said=words,
        )
        for name, card, words, place in zip(names, cards, said, places, strict=True)
    )
    if found.card.task != reference.card.task:
        raise InputError(
            f"--against {config.against} is for {reference.card.task}, and {config.name} for "
            f"{found.card.task}: there is no prompt both. Name one for the same task."
        )
    _check_same_answers(found, reference, *names)
    return found, reference


def _places(place: str | None, cards: Sequence[Path | None]) -> list[str | None]:
    """Return the base model's path for each of the two; both get it only if they share a base."""
    own, other = cards
    if own is None and other is not None:
        return [None, place]
    bases = [read_card(card).base.get("fingerprint") for card in cards if card is not None]
    return [place, place if len(bases) == 2 and bases[0] == bases[1] else None]


def _check_same_answers(found: ModelRef, reference: ModelRef, name: str, against: str) -> None:
    """Raise InputError if the two differ in vocabulary or labels."""
    one, other = (load_own_tokenizer(f.source, f.directory).get_vocab() for f in (found, reference))
    if one != other:
        raise InputError(
            f"--against {against}: its tokenizer differs from that of {name}, "
            "so their predictions cannot be compared token by token. Name a relative of it."
        )
    if found.card.labels != reference.card.labels:
        raise InputError(
            f"--against {against}: its labels are {', '.join(reference.card.labels)}, and "
            f"those of {name} are {', '.join(found.card.labels)}. Name one with the same."
        )


def choose_leader(found: ModelRef, reference: ModelRef | None) -> ModelRef:
    """Return the model that defines the evaluation rows: a run, or else one with a model card."""
    both = [found] if reference is None else [found, reference]
    for says in (lambda f: f.run is not None, lambda f: f.card.method != PLAIN):
        if leaders := [f for f in both if says(f)]:
            return leaders[0]
    return found


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

    def ask(self, trained: LoadedModel) -> ModelOutputs:
        """Return the outputs of `trained` in its own compute precision."""
        model, tokenizer = trained.model, trained.tokenizer
        probe = ComparisonProbe(
            self.rows, trained.objective, tokenizer.pad_token_id or 0, trained.device
        )
        scores = probe.score(model, trained.dtype)
        with autocast(trained.device, trained.dtype):
            text = [
                WindowOutputs(answer.values.cpu(), answer.labels.cpu())
                for answer in compute_window_outputs(
                    model, self.windows, self.auto_class, tokenizer
                )
            ]
        return ModelOutputs(scores, text)

    def compare(self, reference: ModelOutputs, found: ModelOutputs) -> dict[str, Any]:
        """Return the differences between `found` and `reference`."""
        rows = asdict(compare_rows(reference.scores, found.scores))
        if not self.windows:
            return {"rows": rows}
        text = compare_text(reference.text, found.text, self.auto_class)
        return {"rows": rows, "text": {"name": self.text, **text}}


def build_comparison_inputs(
    eval_text: Path | None, eval_tokens: int, trained: LoadedModel, rows: Sequence[Encoded]
) -> ComparisonInputs:
    """Return the inputs for comparing `trained` with its reference.

    Raises:
        InputError: the text cannot be read, or has fewer than two tokens.
    """
    model_config = trained.model.config
    auto_class = trained.task.auto_class(trained.kind, model_config.model_type)
    if auto_class not in PREDICTS:
        return ComparisonInputs(rows, [], auto_class, "")
    text = read_eval_text(eval_text, eval_tokens)
    length = min(WINDOW, trained.max_length or WINDOW, max_positions(model_config) or WINDOW)
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
    narrow: dict[torch.nn.Module, list[dict[str, Any]]] = defaultdict(list)
    paths = {module: path for path, module in model.named_modules()}

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for part in _read_by(module):
            own, _ = own_tensors(part)
            narrow[part].append(dict(own))
            for name, weight in narrow[part][-1].items():
                if weight is not None and weight.is_floating_point():
                    better = unrounded(f"{paths[part]}.{name}".lstrip("."))
                    wide = (weight if better is None else better).to(weight.device, torch.float32)
                    own[name] = torch.nn.Parameter(wide, requires_grad=False)
        return tuple(_widened(value) for value in inputs)  # T5 casts the input of wo

    def restore(module: torch.nn.Module, _: Any, __: Any) -> None:
        for part in _read_by(module):
            own_tensors(part)[0].update(narrow[part].pop())

    hooks = []
    for module in model.modules():
        if any(own_tensors(part)[0] for part in _read_by(module)):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_by(module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """Return the modules whose weights `module` reads; PEFT's token layer reads its base layer."""
    if isinstance(module, BaseTunerLayer) and _TOKENS in module.adapter_layer_names:
        return module, module.get_base_layer()
    return (module,)


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
