"""Compare a model with a reference model: KL divergence, top-1 agreement, loss and logits.

On encoded rows, logits are compared at each target; on text, at each position. A model without a
language head is compared by hidden states. At most `MAX_TARGETS` logits are stored, a quarter of a
gigabyte for a vocabulary of 128,000. `in_float32` runs a model in float32 on low-precision weights,
to isolate rounding errors.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional

from ftlevel.artifacts.cards import load_card
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.sources.docstrings import load_documentation
from ftlevel.errors import InputError
from ftlevel.models.hardware import autocast
from ftlevel.models.kinds import max_positions
from ftlevel.models.upstream.tensors import direct_tensors
from ftlevel.objectives import Objective
from ftlevel.trained.generation import batches
from ftlevel.trained.model_ref import PLAIN, LoadedModel, ModelRef
from ftlevel.trained.resolve import get_card_dir, resolve_model

WINDOW = 256  # maximum context in tokens
_MASK_PROBABILITY = 0.15
_DOCUMENTATION = "documentation of Python's standard library"
_MAX_TOKEN_LENGTH = 12  # upper bound, so that enough text is read

PREDICTS = {
    "AutoModelForCausalLM": "next tokens",
    "AutoModelForMaskedLM": "masked tokens (15 %)",
    "AutoModelForSeq2SeqLM": "the second half of each window, given the first",
}
HIDDEN_STATES = "hidden states (the model has no language head)"


@dataclass(frozen=True)
class Text:
    """A text to compare models on, and its name for display."""

    content: str
    name: str


def load_eval_text(path: Path | None, tokens: int) -> Text:
    """Load the text to compare on: a file, or docstrings of Python's standard library.

    Without a `path`, docstrings of about `tokens` tokens are read, which are not in the built-in
    training rows. Raises InputError if the file cannot be read or is empty.
    """
    if path is not None:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--eval-text {path} cannot be read: {error}.") from None
        if not content.strip():
            raise InputError(f"--eval-text {path} is empty. Name a text file.")
        return Text(content, str(path))
    content = "\n\n".join(load_documentation())
    return Text(content[: tokens * _MAX_TOKEN_LENGTH], _DOCUMENTATION)


def split_into_windows(tokenizer: Any, text: str, tokens: int, length: int) -> list[list[int]]:
    """Split `tokens` tokens of `text` into windows of at most `length`, with special tokens."""
    special_ids = tokenizer("")["input_ids"]
    head = special_ids[:-1] if special_ids and special_ids[-1] == _end(tokenizer) else special_ids
    tail = special_ids[len(head) :]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    num_tokens = length - len(special_ids)
    chunks = [ids[start : start + num_tokens] for start in range(0, len(ids), num_tokens)]
    return [[*head, *part, *tail] for part in chunks if len(part) > 1]


def _end(tokenizer: Any) -> int | None:
    if tokenizer.sep_token_id is not None:
        return int(tokenizer.sep_token_id)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


@dataclass(frozen=True)
class WindowOutputs:
    """A window's float32 outputs (positions, vocabulary or hidden size), and the target tokens."""

    values: torch.Tensor
    labels: torch.Tensor


def compute_window_outputs(
    model: Any, windows: Sequence[list[int]], auto_class: str, tokenizer: Any
) -> Iterator[WindowOutputs]:
    """Yields the outputs of `model`, which must be in eval mode, for each window."""
    device = next(model.parameters()).device
    name = "logits" if auto_class in PREDICTS else "last_hidden_state"
    for number, window in enumerate(windows):
        ids = torch.tensor([window], device=device)
        inputs, positions, labels = _build_inputs(ids, auto_class, tokenizer, number)
        if auto_class not in PREDICTS and model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        with torch.no_grad():
            output = model(**inputs)
        yield WindowOutputs(output[name][0][positions].float(), labels)


def _build_inputs(
    ids: torch.Tensor, auto_class: str, tokenizer: Any, number: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor | slice, torch.Tensor]:
    """Returns model inputs, positions to compare, and target ids there; `number` seeds masking."""
    if auto_class == "AutoModelForCausalLM":
        return {"input_ids": ids}, slice(0, -1), ids[0, 1:]
    if auto_class == "AutoModelForSeq2SeqLM":
        middle = ids.shape[1] // 2
        source, target = ids[:, :middle], ids[:, middle:]
        return {"input_ids": source, "labels": target}, slice(None), target[0]
    if auto_class != "AutoModelForMaskedLM":
        return {"input_ids": ids}, slice(None), ids[0]
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    candidates = (~torch.isin(ids[0], special)).nonzero().flatten()
    num_masked = max(1, round(len(candidates) * _MASK_PROBABILITY))
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(number))
    positions = candidates[order[:num_masked].to(ids.device)].sort().values
    masked = ids.clone()
    masked[0, positions] = tokenizer.mask_token_id
    return {"input_ids": masked}, positions, ids[0, positions]


MAX_TARGETS = 512
_BATCH = 4


@dataclass(frozen=True)
class RowLogits:
    """Logits of a model on rows.

    `logits` has a tensor `(targets, choices)` per batch, in float32 on the CPU. `loss` is the mean
    per target in nats, or the squared error of a regression. `has_choice` is False where a target
    is not one of several choices: regressions and reward models.
    """

    logits: list[torch.Tensor]
    loss: float
    targets: int
    has_choice: bool = True

    def first(self, batches: int) -> RowLogits:
        """Returns only the logits of the first `batches`; the loss stays that of all."""
        logits = self.logits[:batches]
        return replace(self, logits=logits, targets=sum(map(len, logits)))


@dataclass(frozen=True)
class EvalSet:
    """Encoded rows on which models are compared, and the objective that computes the logits."""

    rows: Sequence[Encoded]
    objective: Objective
    pad_id: int
    device: str

    def score(self, model: Any, dtype: str) -> RowLogits:
        """Returns logits (or vectors) of at most `MAX_TARGETS` targets; `model` is in eval mode."""
        all_scores, count, loss, total = [], 0, 0.0, 0
        collator, objective = Collator(self.pad_id), self.objective.for_comparison(self.rows)

        def collate(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
            return {name: value.to(self.device) for name, value in collator(rows).items()}

        with torch.no_grad(), autocast(self.device, dtype):
            for rows in batches(self.rows, _BATCH):
                scores, loss_sum, num_targets = objective.compare(model, rows, collate)
                loss, total = loss + loss_sum, total + num_targets
                scores = scores[: MAX_TARGETS - count].float().cpu()
                count += len(scores)
                all_scores.append(scores)
                if count == MAX_TARGETS:
                    break
        return RowLogits(all_scores, loss / max(total, 1), count, self.objective.has_choice)


@dataclass(frozen=True)
class Agreement:
    """Differences between the logits of a model and a reference, and the mean loss of both.

    `scale` is the largest absolute logit of the reference. `kl` is the mean KL(reference ‖ model)
    in nats, and `top1` the fraction of targets with the same argmax; both are None if a target is
    not one of several classes or tokens, as in regression. Other differences are absolute.
    """

    max_difference: float
    mean_difference: float
    scale: float
    kl: float | None
    top1: float | None
    loss: float
    loss_reference: float
    targets: int

    @property
    def distance(self) -> float:
        """KL divergence; if it is None, the mean absolute difference of the logits."""
        return self.mean_difference if self.kl is None else self.kl


def compare_logits(reference: RowLogits, outputs: RowLogits) -> Agreement:
    """Returns the differences between `outputs` and `reference` on the same rows."""
    max_difference = total = scale = divergence = 0.0
    num_equal = num_values = 0
    for first, second in zip(reference.logits, outputs.logits, strict=True):
        difference = (second - first).abs()
        max_difference = max(max_difference, difference.max().item() if difference.numel() else 0.0)
        scale = max(scale, first.abs().max().item() if first.numel() else 0.0)
        total += difference.sum(dtype=torch.float64).item()
        num_values += difference.numel()
        p, q = functional.log_softmax(first, -1), functional.log_softmax(second, -1)
        divergence += functional.kl_div(q, p, log_target=True, reduction="sum").item()
        num_equal += _num_equal_choices(first, second)
    targets = max(reference.targets, 1)
    return Agreement(
        max_difference,
        total / max(num_values, 1),
        scale,
        divergence / targets if reference.has_choice else None,
        num_equal / targets if reference.has_choice else None,
        outputs.loss,
        reference.loss,
        reference.targets,
    )


def compare_text(
    reference: Iterable[WindowOutputs], other_outputs: Iterable[WindowOutputs], auto_class: str
) -> dict[str, Any]:
    """Returns the differences between the outputs of two models in the same windows.

    If `auto_class` has a language head: mean KL(reference ‖ other) in nats, its standard error,
    fraction of equal argmaxes, perplexities; else cosine similarity. NaN if outputs are not finite.
    """
    result: dict[str, Any] = {"predicts": PREDICTS.get(auto_class, HIDDEN_STATES)}
    divergences, similarities = list[torch.Tensor](), list[torch.Tensor]()
    agreed, losses = 0, [0.0, 0.0]
    for one, other in zip(reference, other_outputs, strict=True):
        pair = one.values, other.values.to(one.values.device)
        if auto_class not in PREDICTS:
            similarities.append(functional.cosine_similarity(*pair, dim=-1).cpu())
            continue
        logps, changed_logps = (values.log_softmax(-1) for values in pair)
        divergences.append((logps.exp() * (logps - changed_logps)).sum(-1).cpu())
        agreed += _num_equal_choices(logps, changed_logps)
        labels = one.labels.to(logps.device)
        for index, scores in enumerate((logps, changed_logps)):
            losses[index] += float(functional.nll_loss(scores, labels, reduction="sum"))
    result["windows"] = len(similarities or divergences)
    if similarities:
        cosine = torch.cat(similarities)
        return result | {
            "positions": len(cosine),
            "cosine": float(cosine.mean()),
            "cosine_smallest": float(cosine.min()),
        }
    kl = torch.cat(divergences)
    num_positions = len(kl)
    return result | {
        "positions": num_positions,
        "kl": float(kl.mean()),
        "kl_standard_error": float(kl.std() / math.sqrt(num_positions))
        if num_positions > 1
        else math.nan,
        "top1_agreement": agreed / num_positions,
        "perplexity_source": math.exp(losses[0] / num_positions),
        "perplexity": math.exp(losses[1] / num_positions),
    }


def _num_equal_choices(first: torch.Tensor, second: torch.Tensor) -> int:
    return int((first.argmax(-1) == second.argmax(-1)).sum())


def resolve_pair(
    name: str, other_name: str, task: str | None, base: str | None, *, device: str, dtype: str
) -> tuple[ModelRef, ModelRef]:
    """Resolve the model `name` to evaluate, and the model `other_name` to compare it with.

    A model without a task gets the other model's; `base` is as in `resolve_model`. Raises
    InputError if a model is missing, or the two cannot be compared.
    """
    card_paths = [get_card_dir(Path(each).expanduser()) for each in (name, other_name)]
    card, other_card = (load_card(path) if path is not None else None for path in card_paths)
    cards = [each for each in (card, other_card) if each is not None]
    default_task = task or (cards[0].task if cards else None)
    # A new location of the base is that of both only if they share it.
    has_same_base = len(cards) == 2 and len({each.base.get("fingerprint") for each in cards}) == 1
    has_reference = card is None and other_card is not None
    ref = resolve_model(
        name,
        task if card else default_task,
        None if has_reference else base,
        device=device,
        dtype=dtype,
    )
    other = resolve_model(
        other_name,
        task if other_card else default_task,
        base if has_reference or has_same_base else None,
        device=device,
        dtype=dtype,
        label=f"--against {other_name}",
    )
    if ref.task != other.task:
        raise InputError(
            f"--against {other_name} is for {other.task}, and {name} for {ref.task}. Choose a "
            "model for the same task."
        )
    if _get_output_format(ref) is None and not _have_equal_vocabs(ref, other):
        raise InputError(
            f"--against {other_name}: its tokenizer differs from that of {name}, "
            "so their predictions cannot be compared token by token. Name a relative of it."
        )
    if ref.labels != other.labels:
        raise InputError(
            f"--against {other_name}: its labels are {', '.join(other.labels)}, and "
            f"those of {name} are {', '.join(ref.labels)}. Name one with the same."
        )
    return ref, other


def have_same_inputs(ref: ModelRef, other: ModelRef) -> bool:
    """Returns whether both models have equal vocabularies and formats of outputs."""
    is_same = _get_output_format(ref) == _get_output_format(other)
    return is_same and _have_equal_vocabs(ref, other)


def _get_output_format(ref: ModelRef) -> Any:
    return ref.configured_task.get_output_format(ref.options, ref.model_config)


def _have_equal_vocabs(ref: ModelRef, other: ModelRef) -> bool:
    return bool(ref.load_tokenizer().get_vocab() == other.load_tokenizer().get_vocab())


def select_primary(ref: ModelRef, other: ModelRef | None) -> ModelRef:
    """Returns the model whose dataset is read: a run, else one with a card, else `ref`."""
    refs = [ref] if other is None else [ref, other]
    runs = [each for each in refs if each.run is not None]
    return [*runs, *(each for each in refs if each.card.method != PLAIN), ref][0]


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model on the rows and on the text windows."""

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
        """Returns the outputs of `trained` in its compute precision."""
        tokenizer = trained.tokenizer
        eval_set = EvalSet(
            self.rows, trained.objective, tokenizer.pad_token_id or 0, trained.device
        )
        with trained.inference():
            outputs = compute_window_outputs(
                trained.model, self.windows, self.auto_class, tokenizer
            )
            text = [WindowOutputs(output.values.cpu(), output.labels.cpu()) for output in outputs]
        return ModelOutputs(eval_set.score(trained.model, trained.dtype), text)

    def compare(self, reference: ModelOutputs, outputs: ModelOutputs) -> dict[str, Any]:
        """Returns the differences between `outputs` and `reference`."""
        rows = asdict(compare_logits(reference.scores, outputs.scores))
        if not self.windows:
            return {"rows": rows}
        text = compare_text(reference.text, outputs.text, self.auto_class)
        return {"rows": rows, "text": {"name": self.text, **text}}


def build_comparison_inputs(
    eval_text: Path | None, eval_tokens: int, trained: LoadedModel, rows: Sequence[Encoded]
) -> ComparisonInputs:
    """Create the inputs of a comparison; InputError if the text is unreadable or too short."""
    auto_class = trained.ref.auto_class
    if auto_class not in PREDICTS:
        return ComparisonInputs(rows, [], auto_class, "")
    text = load_eval_text(eval_text, eval_tokens)
    length = min(
        WINDOW, trained.ref.card.max_length or WINDOW, max_positions(trained.model.config) or WINDOW
    )
    windows = split_into_windows(trained.tokenizer, text.content, eval_tokens, length)
    if not windows:
        raise InputError(f"--eval-text {text.name} has less than two tokens. Name a longer text.")
    return ComparisonInputs(rows, windows, auto_class, text.name)


_TOKENS = "trainable_tokens_delta"  # attribute of the PEFT layer of trainable tokens


@contextlib.contextmanager
def in_float32(
    model: torch.nn.Module, get_replacement: Callable[[str], torch.Tensor | None] = lambda _: None
) -> Iterator[None]:
    """Run `model` in float32 inside the block, with the values of its low-precision weights.

    The weights of each module are cast only while it runs, so one module needs extra memory.
    `get_replacement` maps a parameter name to a tensor to use instead, or None.
    """
    originals: dict[torch.nn.Module, list[dict[str, Any]]] = defaultdict(list)
    paths = {module: path for path, module in model.named_modules()}

    def cast(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for part in _get_weight_modules(module):
            tensors, _ = direct_tensors(part)
            originals[part].append(dict(tensors))
            for name, weight in originals[part][-1].items():
                if weight is not None and weight.is_floating_point():
                    replacement = get_replacement(f"{paths[part]}.{name}".lstrip("."))
                    cast_weight = (weight if replacement is None else replacement).to(
                        weight.device, torch.float32
                    )
                    tensors[name] = torch.nn.Parameter(cast_weight, requires_grad=False)
        return tuple(_upcast(value) for value in inputs)  # T5 casts the input of wo

    def reset(module: torch.nn.Module, _: Any, __: Any) -> None:
        for part in _get_weight_modules(module):
            direct_tensors(part)[0].update(originals[part].pop())

    hooks = []
    for module in model.modules():
        if any(direct_tensors(part)[0] for part in _get_weight_modules(module)):
            hooks.append(module.register_forward_pre_hook(cast))
            hooks.append(module.register_forward_hook(reset, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _get_weight_modules(module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """Returns the modules whose weights `module` uses: itself, and the base of a token layer."""
    if isinstance(module, BaseTunerLayer) and _TOKENS in module.adapter_layer_names:
        return module, module.get_base_layer()
    return (module,)


def _upcast(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
