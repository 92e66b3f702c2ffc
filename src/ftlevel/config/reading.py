"""Safe YAML, and aliases of tasks, methods and quantizations.

YAML may come from third parties: only plain values of bounded size are accepted; dates stay text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftlevel.extensions import added_rows

TASK_ALIASES = dict(
    pair.split("=")
    for pair in """
    causal-lm=text-generation clm=text-generation sft=text-generation chat=text-generation
    instruct=text-generation pt=text-generation sequence-classification=text-classification
    seq-cls=text-classification classification=text-classification
    sentiment-analysis=text-classification token-cls=token-classification
    ner=token-classification pos=token-classification tagging=token-classification
    question-ans=question-answering qa=question-answering squad=question-answering
    fill-mask=masked-lm mlm=masked-lm summarisation=summarization summary=summarization
    translate=translation mt=translation
    """.split()
)
"""Task alias, in lower case with dashes → task."""
_ADDED_ALIASES = added_rows("task_aliases", TASK_ALIASES)
TASK_ALIASES |= {alias: task for alias, (task, _) in _ADDED_ALIASES.items()}

METHOD_ALIASES: dict[str, dict[str, Any]] = {
    **{name: {"kind": "lora", "init_lora_weights": name} for name in ("pissa", "olora", "eva")},
    "dora": {"kind": "lora", "use_dora": True},
    "qdora": {"kind": "qlora", "use_dora": True},
    "rslora": {"kind": "lora", "use_rslora": True},
    "loftq": {"kind": "qlora", "init_lora_weights": "loftq"},
    "prefix-tuning": {"kind": "prefix"},
    "prompt-tuning": {"kind": "prompt"},
    "ptuning": {"kind": "p-tuning"},
    "bottleneck": {"kind": "adapter"},
    "layernorm": {"kind": "ln-tuning"},
    "full-finetuning": {"kind": "full"},
}
"""Method alias → fields of the method section."""

QUANT_ALIASES: dict[str, dict[str, Any]] = {
    **{alias: {"kind": "4bit"} for alias in ("4", "4-bit", "int4")},
    **{alias: {"kind": "8bit"} for alias in ("8", "8-bit", "int8")},
    **{alias: {"kind": "4bit", "quant_type": alias} for alias in ("nf4", "fp4")},
    **{alias: {"kind": "none"} for alias in ("no", "16")},
}
"""Quantization alias → fields of the quant section."""

_SECTIONS = {"method": METHOD_ALIASES, "quant": QUANT_ALIASES}


def normalize_task(name: str) -> str:
    """Returns the task's name: lower case, with dashes, and aliases resolved."""
    task = _normalize_name(name)
    return TASK_ALIASES.get(task, task)


def resolve_aliases(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the sections `values` with aliases replaced, and a message for each alias.

    A field set explicitly overrides the value that an alias sets.
    """
    resolved, lines = dict(values), []
    if isinstance(task := resolved.get("task"), str):
        resolved["task"] = normalize_task(task)
        if resolved["task"] != _normalize_name(task):
            lines.append(f"task {resolved['task']} ({task!r} is an alias)")
        _, defaults = _ADDED_ALIASES.get(_normalize_name(task), ("", {}))
        for name, fields in defaults.items():
            if isinstance(section := resolved.get(name) or {}, Mapping):
                resolved[name] = {**fields, **section}
    for section, aliases in _SECTIONS.items():
        if not isinstance(fields := resolved.get(section), Mapping):
            continue
        kind = fields.get("kind")
        if canonical := aliases.get(_normalize_name(str(kind))):
            resolved[section] = {**canonical, **{k: v for k, v in fields.items() if k != "kind"}}
            settings = ", ".join(f"{section}.{name}={v}" for name, v in canonical.items())
            lines.append(f"{settings} ({kind!r} is an alias)")
        elif isinstance(kind, str):
            resolved[section] = {**fields, "kind": _normalize_name(kind)}
    return resolved, lines


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of all values in nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _normalize_name(word: str) -> str:
    return word.strip().lower().replace("_", "-")


_MAX_VALUES = 100_000


class YamlError(ValueError):
    """Invalid YAML, or a value of an unsupported type; `line` is 1-based, None if unknown."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def load_yaml(text: str) -> tuple[Any, Any]:
    """Returns the value and the YAML node of `text`, (None, None) if empty; raises YamlError."""
    import yaml  # lazy: --help needs no YAML

    class Loader(yaml.SafeLoader):
        """Safe loader that keeps dates as text."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            return None, None
        _count(node, {}, set())
        loader = Loader("")
        try:
            return loader.construct_document(node), node
        finally:
            loader.dispose()
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:  # a tag such as !!python/object, or a key that is a list
        mark = error.problem_mark or error.context_mark
        raise YamlError(str(error.problem), mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as error:  # an invalid character
        raise YamlError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise YamlError("its values are nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise YamlError(f"a value does not fit its tag ({error})") from None


def _count(node: Any, sizes: dict[int, int], ancestors: set[int]) -> int:
    """Returns the number of values in `node`, aliases expanded; raises YamlError if too many."""
    if id(node) in sizes:
        return sizes[id(node)]
    position = node.start_mark.line + 1
    if id(node) in ancestors:
        raise YamlError("an alias names what it is in", position)
    if isinstance(node.value, str) and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise YamlError("half of a character (\\ud800 to \\udfff) is none", position)
    ancestors.add(id(node))
    parts = node.value if isinstance(node.value, list) else []
    total = 1 + sum(
        _count(inner, sizes, ancestors)
        for part in parts
        for inner in (part if isinstance(part, tuple) else (part,))
    )
    ancestors.discard(id(node))
    if total > _MAX_VALUES:
        raise YamlError(f"its aliases expand to more than {_MAX_VALUES:,} values", position)
    sizes[id(node)] = total
    return total
