"""Record a model's logits and greedy answers to the prompts, and read and write served.json.

served.json contains the expected outputs of a server, and those of the base, which reveal a server
that ignores the adapter.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import read_json, write_json
from ftlevel.errors import InputError
from ftlevel.extras.serving.config import SERVERS
from ftlevel.extras.serving.entry import (
    Prompt,
    ServedModel,
    build_embedding_commands,
    build_model_commands,
)
from ftlevel.models.sources import ModelSource
from ftlevel.trained.generation import cut_at_stop, has_stop_text, stop_ids
from ftlevel.trained.model_ref import ModelRef

TOKENS = 12
"""Maximum number of recorded tokens per answer."""
BOUND = 1e-4
"""Allowed difference of logits, as a share of the largest one: float32 sums depend on order."""


@dataclass(frozen=True)
class ReferenceOutput:
    """A greedy answer of up to `TOKENS` tokens.

    Attributes:
        ids: token ids, with the token that ends the answer (EOS, end of turn) if it was generated.
        logprobs: log-probability of each token.
        margins: log-probability of each token minus that of the second most likely one.
        text: decoded tokens without special tokens.
        partial: indices of tokens that end inside a character, which llama.cpp does not list.
    """

    ids: list[int]
    logprobs: list[float]
    margins: list[float]
    text: str
    partial: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for served.json, rounded to the precision of float32."""
        data = asdict(self)
        for key in ("logprobs", "margins"):
            data[key] = [round(value, 6) for value in data[key]]
        return data


@dataclass(frozen=True)
class PromptOutputs:
    """A model's outputs for all prompts: logits (or class scores), and greedy answers."""

    logits: list[torch.Tensor]
    answers: list[ReferenceOutput]


def run_prompts(model: Any, exported: ServedModel, prompts: Sequence[Prompt]) -> PromptOutputs:
    """Returns outputs of `model`, in eval mode; answers are empty if it generates no text."""
    device = next(model.parameters()).device
    logits, answers = [], []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt.ids], device=device)
            if exported.answers:
                prompt_logits, answer = _continue(model, ids, exported.tokenizer, prompt.stop)
                answers.append(answer)
            else:
                prompt_logits = _logits(model, ids, seq2seq="Seq2Seq" in exported.ref.auto_class)
            logits.append(prompt_logits.float().cpu())
    return PromptOutputs(logits, answers)


def _logits(model: Any, ids: torch.Tensor, *, seq2seq: bool) -> torch.Tensor:
    extra = {"decoder_input_ids": ids[:, :8]} if seq2seq else {}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    if hasattr(output, "start_logits"):
        return torch.cat([output.start_logits, output.end_logits], -1)[0]
    return output.logits[0]


def _continue(
    model: Any, ids: torch.Tensor, tokenizer: Any, stop: Sequence[str]
) -> tuple[torch.Tensor, ReferenceOutput]:
    """Returns the logits of the prompt `ids`, and the greedy answer, up to a text in `stop`."""
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    of_prompt, row = output.logits[0], output.logits[0, -1]
    ends = stop_ids(model, tokenizer)
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    for number in range(TOKENS):
        best = torch.log_softmax(row.float(), -1).topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        margins.append(float(best.values[0] - best.values[1]))
        is_last = tokens[-1] in ends or has_stop_text(tokenizer, tokens, stop)
        if is_last or number + 1 == TOKENS:
            break
        output = model(
            input_ids=torch.tensor([tokens[-1:]], device=ids.device),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        row = output.logits[0, -1]
    text = cut_at_stop(tokenizer.decode(tokens, skip_special_tokens=True), stop)
    while len(text) < len(tokenizer.decode(tokens, skip_special_tokens=True)):
        del tokens[-1], logprobs[-1], margins[-1]
    prefixes = (tokenizer.decode(tokens[: index + 1]) for index in range(len(tokens)))
    partial = [index for index, end in enumerate(prefixes) if end.endswith("\ufffd")]
    return of_prompt, ReferenceOutput(tokens, logprobs, margins, text, partial)


def max_difference(one: PromptOutputs, other: PromptOutputs) -> float:
    """Returns the largest absolute difference between the logits of two models."""
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))


def scale(outputs: PromptOutputs) -> float:
    """Returns the largest absolute logit in `outputs`."""
    return max(float(logits.abs().max()) for logits in outputs.logits)


def divergence(one: PromptOutputs, other: PromptOutputs) -> float:
    """Returns the KL divergence KL(one ‖ other), mean over the prompts' tokens, in nats."""
    divergences = [
        (a.log_softmax(-1).exp() * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).flatten()
        for a, b in zip(one.logits, other.logits, strict=True)
    ]
    return float(torch.cat(divergences).mean())


FILE = "served.json"
_FORMAT = 1


@dataclass(frozen=True)
class AdapterRecord:
    """Recorded prompts and answers of one adapter; `rank` is None for a whole model.

    `place` is its path relative to served.json. Each prompt has answers of the `trained` model and,
    if recorded, of the `base`.
    """

    name: str
    place: str
    rank: int | None
    prompts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stop(self) -> list[str]:
        """Texts that end the answers."""
        return list(self.prompts[0].get("stop", [])) if self.prompts else []


def record(
    name: str,
    place: str,
    rank: int | None,
    prompts: Sequence[Prompt],
    outputs_of: Mapping[str, PromptOutputs | None],
) -> AdapterRecord:
    """Returns a record of `prompts` and the answers of "trained" and, unless None, of "base"."""
    rows = []
    for index, prompt in enumerate(prompts):
        answers = {
            who: outputs.answers[index].to_dict()
            for who, outputs in outputs_of.items()
            if outputs is not None and outputs.answers
        }
        if answers:
            row = {
                "text": prompt.text,
                "ids": prompt.ids,
                "messages": prompt.messages,
                "rendered": prompt.rendered,
                **({"stop": list(prompt.stop)} if prompt.stop else {}),
            }
            rows.append(row | answers)
    return AdapterRecord(name, place, rank, rows)


def save_record(path: Path, metadata: Mapping[str, Any], adapters: Sequence[AdapterRecord]) -> None:
    """Write served.json; `metadata` has the server, the format, the base and the commands."""
    rows = [asdict(adapter) for adapter in adapters]
    write_json(
        path, {"format": _FORMAT, **metadata, "adapters": rows, "versions": library_versions()}
    )


@dataclass(frozen=True)
class ServingRecord:
    """A parsed served.json; `metadata` has all fields but the adapters."""

    metadata: Mapping[str, Any]
    adapters: list[AdapterRecord]


def read_record(out: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the path of served.json of the export at `out`, and its content.

    Raises InputError if there is none, or if it is not a JSON object.
    """
    path = out / FILE if out.is_dir() else out.with_suffix(".served.json")
    if not path.is_file():
        raise InputError(
            f"{out} has no {path.name}. Expected what ftlevel export --for SERVER --out wrote, "
            "without --no-verify."
        )
    return path, read_json(path)


def parse_record(path: Path, metadata: dict[str, Any]) -> ServingRecord:
    """Parse `metadata`, the content of served.json at `path`; its adapters are removed from it.

    Raises InputError if it has no valid reference answers.
    """
    try:
        if metadata.pop("format") != _FORMAT:
            raise InputError(f"{path} was written by a later ftlevel. Install that version.")
        adapters = [AdapterRecord(**row) for row in metadata.pop("adapters")]
        for adapter in adapters:
            for row in adapter.prompts:
                for who in ("trained", "base"):
                    if who in row:
                        row[who] = ReferenceOutput(**row[who])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not what export writes ({error!r}). Export again.") from None
    if not any(adapter.prompts for adapter in adapters):
        raise InputError(f"{path} has no reference outputs: its model does not generate text.")
    return ServingRecord(metadata, adapters)


def start_commands(server: str | None, out: Path, format_: Any = None) -> list[str]:
    """Returns commands that serve the full model at `out`; empty without a server.

    `format_` has pooling, normalization and prompts of an embedding model.
    """
    if server is None:
        return []
    if format_ is not None:
        return build_embedding_commands(SERVERS[server], out, out.stem, format_)
    return build_model_commands(SERVERS[server], out, out.stem)


def record_whole(
    path: Path,
    out: Path,
    metadata: Mapping[str, Any],
    ref: ModelRef,
    source: ModelSource,
    device: str,
) -> None:
    """Write served.json at `path`, with answers of the exported model at `source`, in float32.

    If `ref` is an adapter, the base's answers are recorded too.
    """
    name = out.stem
    card = replace(ref.card, quantization={"kind": "none"}, dtype="float32")
    served = ServedModel(name, replace(ref, source=source, directory=None, card=card))
    prompts = served.prompts()
    trained = run_prompts(served.ref.load(device).model, served, prompts)
    base = None
    if ref.directory is not None and served.answers:
        exported = ServedModel(name, ref)
        base = run_prompts(
            exported.in_float32(with_adapter=False).load(device).model, exported, prompts
        )
    gc.collect()
    record_ = record(
        name, out.name if out.suffix else ".", None, prompts, {"trained": trained, "base": base}
    )
    start = start_commands(metadata["server"], out)
    head = {"model": metadata["model"], "server": metadata["server"], "base": None, "start": start}
    save_record(path, {**head, **metadata}, [record_])
