"""Resolve `--target-modules` to the linear layers of a model.

`all-linear` means all linear layers in blocks, without heads, embeddings, routers and poolers. PEFT
would include task heads and poolers, so names are resolved before PEFT sees them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ftlevel.errors import InputError, did_you_mean, join_names
from ftlevel.models.module_tree import LinearModule, ModuleTree
from ftlevel.models.untrusted import limit_time

ALL_LINEAR = "all-linear"
AUTO = "auto"
_SECONDS = 10.0  # timeout; matching usually takes milliseconds
_PLAIN_NAME = re.compile(r"[\w.\-]+(,[\w.\-]+)*")


def build_meta_model(config: Any) -> nn.Module:
    """Build the model of a config on the meta device.

    Uses the first known class in `architectures`, else a language model of the model type, else
    the base model.
    """
    import transformers

    from ftlevel.models.upstream.architectures import model_classes

    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            with torch.device("meta"):
                return model_class(config)
    for auto in (
        *(["AutoModelForSeq2SeqLM"] if config.is_encoder_decoder else []),
        "AutoModelForMaskedLM",
        "AutoModelForCausalLM",
        "AutoModel",
    ):
        if type(config) in model_classes(auto):
            with torch.device("meta"):
                return getattr(transformers, auto).from_config(config, trust_remote_code=False)
    raise InputError(f"transformers has no model for model_type {config.model_type!r}.")


def parse_targets(text: str) -> str | list[str]:
    """Parse a `--target-modules` value: a keyword, comma-separated names, or one regex."""
    text = text.strip()
    if text in (ALL_LINEAR, AUTO):
        return text
    stripped = re.sub(r"\s*,\s*", ",", text)
    return stripped.split(",") if _PLAIN_NAME.fullmatch(stripped) else text


def resolve_targets(
    model: nn.Module, targets: str | Sequence[str], *, model_name: str | None = None
) -> list[str]:
    """Returns the sorted full names of the linear layers that `targets` selects.

    A name matches as in PEFT: a module of that name or one that ends in `.name`. Matches in blocks
    take precedence, so `dense` never selects BERT's pooler. A regex must match the full name; heads
    are excluded. Raises `InputError` if a name or the regex matches no adaptable module.

    Args:
        model: model, quantized or not, or on the meta device; not a PEFT model.
        targets: `all-linear`, `auto`, one regex, comma-separated names, or a list of names.
        model_name: name of the model in messages; default: `name_or_path` of its config.
    """
    selector = _Selector(model, model_name)
    if isinstance(targets, str):
        targets = parse_targets(targets)
    elif len(targets) == 1 and targets[0] in (ALL_LINEAR, AUTO):
        targets = targets[0]
    if isinstance(targets, str):
        if targets in (ALL_LINEAR, AUTO):
            return selector.all_linear()
        return selector.by_regex(targets)
    return selector.by_names(targets)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


class _Selector:
    def __init__(self, model: nn.Module, model_name: str | None) -> None:
        self.tree = ModuleTree(model)
        self.linears: dict[str, LinearModule] = {part.name: part for part in self.tree.linears()}
        config_name = getattr(getattr(model, "config", None), "name_or_path", "")
        self.model_name = model_name or config_name or _model_type(model)

    def all_linear(self) -> list[str]:
        selected = sorted(name for name, part in self.linears.items() if part.location == "block")
        if not selected:
            raise InputError(f"--target-modules: {self.model_name} has no linear in its blocks.")
        return selected

    def by_names(self, names: Sequence[str]) -> list[str]:
        selected: set[str] = set()
        failures: list[str] = []
        if not names:
            failures.append(f"--target-modules: no names given. {self._available()}")
        for name in names:
            matches = [full for full in self.tree.modules if f".{full}".endswith(f".{name}")]
            layers = self._adaptable(matches)
            selected.update(layers)
            if not layers:
                failures.append(self._format_message(name, matches))
        if failures:
            raise InputError(failures)
        return sorted(selected)

    def by_regex(self, regex: str) -> list[str]:
        try:
            compiled = re.compile(regex)
        except re.error as error:
            raise InputError(
                f"--target-modules: {regex!r} is not a regular expression ({error}). "
                f"{self._available()}"
            ) from error
        try:
            with limit_time(_SECONDS):
                matches = [full for full in self.tree.modules if compiled.fullmatch(full)]
        except TimeoutError as error:
            raise InputError(
                f"--target-modules: {regex!r} takes too long to match ({error}). Avoid nested "
                "repetitions."
            ) from None
        selected = [
            full
            for full in matches
            if full in self.linears and self.linears[full].location not in ("head", "kernel")
        ]
        if not selected:
            raise InputError(self._format_message(regex, matches, hint=False))
        return sorted(selected)

    def _adaptable(self, matches: Sequence[str]) -> list[str]:
        """Returns the linear layers among `matches`: those in blocks; if none, the others."""
        layers = [self.linears[full] for full in matches if full in self.linears]
        in_blocks = [part.name for part in layers if part.location == "block"]
        return in_blocks or [
            part.name for part in layers if part.location in ("router", "aside", "other")
        ]

    def _format_message(self, target: str, matches: Sequence[str], *, hint: bool = True) -> str:
        heads = [full for full in matches if self.tree.in_heads(full)]
        suffix = ""
        if heads:
            message = self._format_head_message(heads)
        elif any(
            full in self.linears and self.linears[full].location == "kernel" for full in matches
        ):
            message = (
                f"is used by the scan of {self.model_name} without calling the module, so an "
                "adapter on it would have no effect. Drop it."
            )
        elif matches:
            types = sorted({type(self.tree.modules[full]).__name__ for full in matches})
            message = f"matches no linear of {self.model_name}, only {join_names(types)}."
            if types == ["Embedding"]:
                message += " --modules-to-save trains it in full."
        elif any(f".{part.name}".endswith(f".{target}") for part in self.tree.experts()):
            message = (
                f"is a tensor of experts in {self.model_name}, not a module: PEFT reaches it by "
                "target_parameters."
            )
        else:
            suffix = did_you_mean(target, self._names()) if hint else ""
            message = f"matches no module of {self.model_name}."
        return f"--target-modules: {target!r} {message} {self._available(suffix)}"

    def _format_head_message(self, heads: Sequence[str]) -> str:
        get_output = getattr(self.tree.model, "get_output_embeddings", None)
        output = get_output() if get_output is not None else None
        parts = [part for head in self.tree.heads for part in self.tree.modules[head].modules()]
        if output is not None and any(part is output for part in parts):
            return (
                f"is the output head of {self.model_name}: adapters are added to the blocks. "
                "Drop it; --modules-to-save trains it in full."
            )
        return (
            f"is a task head of {self.model_name} ({join_names(heads, maximum=3)}): heads are "
            "trained in full and saved with the adapter. Drop it."
        )

    def _names(self) -> list[str]:
        parts = (part for part in self.linears.values() if part.location == "block")
        return sorted({part.pattern.rpartition(".")[2] for part in parts})

    def _available(self, suggestion: str = "") -> str:
        names = join_names(self._names())
        hint = f"{suggestion} Try: ftlevel list-targets {self.model_name}"
        return f"Linear modules here: {names}.{hint}"
