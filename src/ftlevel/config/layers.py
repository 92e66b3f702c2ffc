"""Merge defaults < recipe < `--set` < flags into one configuration, which is validated once.

The origin of every value is recorded, so that errors name the flag or the line of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ftlevel.config.flag import command_of
from ftlevel.config.flags import recipe_hint
from ftlevel.config.methods import SPECS
from ftlevel.config.reading import RENAMED, YamlError, load_yaml, rename_keys, resolve_aliases
from ftlevel.config.section import Section
from ftlevel.config.train import SHORTHAND, TrainConfig, expand_shorthand
from ftlevel.errors import ConfigError, closest_matches, did_you_mean, join_names
from ftlevel.extensions import hooks

KeyPath = tuple[str, ...]
S = TypeVar("S", bound=BaseModel)

_TAGGED = {"method"}
_LONGEST_VALUE = 200  # characters, in errors


@dataclass(frozen=True)
class Layer:
    """Unvalidated values from one source; `origins` has the flag, or file:line, of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)


def read_recipe(path: Path) -> Layer:
    """Load a YAML recipe with the line of every key; raises ConfigError like `read_yaml`."""
    values, origins = read_yaml(path)
    if tool := next(filter(None, (detect(values) for detect in hooks("detect_tool"))), ""):
        raise ConfigError(
            f"{path} is a configuration of {tool}. Write it as a recipe first: "
            f"ftlevel recipes convert {path} > recipe.yaml"
        )
    return Layer(values, origins)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Load the mapping in a YAML file and the origin (file:line) of every key.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping, or has a duplicate key.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"recipe {path} is no file. Name a YAML file.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent else []
        raise ConfigError(
            f"recipe {path} does not exist.{did_you_mean(str(path), siblings)}"
        ) from None
    except (OSError, ValueError) as error:  # not UTF-8, or a null byte in the name
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}.") from None
    try:
        values, node = load_yaml(text)
    except YamlError as error:
        where = path if error.line is None else f"{path}:{error.line}"
        raise ConfigError(
            f"{where}: not valid YAML ({error}). A recipe contains plain values: text, numbers, "
            f"lists and mappings."
        ) from None
    if node is None:
        raise ConfigError(f"recipe {path} is empty. Add at least one section, such as method.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a recipe is a mapping of sections, such as method: lora.")
    origins: dict[KeyPath, str] = {}
    for key, line in _walk(node, ()):
        origin = f"{path}:{line}"
        if key in origins:
            raise ConfigError(
                f"{origin}: key {'.'.join(key)!r} is given twice, first at {origins[key]}."
            )
        origins[key] = origin
    return values, origins


def _walk(mapping: Any, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """Yields (key path, 1-based line) of every key in a YAML mapping node."""
    for key_node, value_node in mapping.value:
        key = (*prefix, str(key_node.value))
        yield key, key_node.start_mark.line + 1
        if value_node.id == "mapping":
            yield from _walk(value_node, key)


def read_settings(settings: Iterable[str]) -> Layer:
    """Parse `--set section.key=value` pairs with YAML values; raise ConfigError if malformed."""
    layer = Layer()
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set {setting}: expected section.key=value, as in train.seed=1.")
        try:
            value, _ = load_yaml(text)
        except YamlError:
            raise ConfigError(f"--set {dotted.strip()}: the value is not valid YAML.") from None
        put(layer, tuple(dotted.strip().split(".")), value, f"--set {dotted.strip()}")
    return layer


def put(layer: Layer, key: KeyPath, value: Any, origin: str) -> None:
    """Set the value and origin at `key` in `layer` (modified)."""
    target = layer.values
    for part in key[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = target[part] = {SHORTHAND.get(part, part): inner}
        target = inner
    target[key[-1]] = value
    layer.origins[key] = origin


def build_config(layers: Iterable[Layer], note: Callable[[str], None] | None = None) -> TrainConfig:
    """Merge `layers`, later ones winning, and validate the result once.

    `note` receives a message per old key name. Raises ConfigError with all problems.
    """
    merged: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for layer in [_normalize_layer(layer, note) for layer in layers]:
        expanded = {k: expand_shorthand(k, v) for k, v in layer.values.items() if v is not None}
        _check_sections(expanded, layer)
        _merge(merged, expanded)
        for key, origin in layer.origins.items():
            short = len(key) == 1 and not isinstance(layer.values.get(key[0]), Mapping)
            origins[(*key, SHORTHAND[key[0]]) if short and key[0] in SHORTHAND else key] = origin
    try:
        return TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(format_errors(error, origins)) from None


def _normalize_layer(layer: Layer, note: Callable[[str], None] | None) -> Layer:
    try:
        values, lines = rename_keys(layer.values, layer.origins)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    values, notes = resolve_aliases(values)
    lines += notes
    if not lines and values == layer.values:
        return layer
    if note is not None:
        for line in lines:
            note(line)
    renamed = {tuple(old.split(".")): tuple(new.split(".")) for old, new in RENAMED.items()}
    return Layer(values, {renamed.get(key, key): origin for key, origin in layer.origins.items()})


def build_section(
    section: type[S], values: Mapping[str, Any], flags: Mapping[str, str] | None = None
) -> S:
    """Build `section` from the flag values of a command; None means not given.

    `flags` maps field → flag where the names differ. Raises ConfigError with all problems.
    """
    shown = {name: "--" + name.replace("_", "-") for name in section.model_fields}
    shown.update(flags or {})
    given = {name: value for name, value in values.items() if value is not None}
    origins: dict[KeyPath, str] = {(name,): shown.get(name, name) for name in given}
    missing = [
        f"{shown[name]} is missing: {field.description}"
        for name, field in section.model_fields.items()
        if field.is_required() and name not in given
    ]
    if missing:
        raise ConfigError(missing)
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise ConfigError(format_errors(error, origins, section)) from None


def _check_sections(values: Mapping[str, Any], layer: Layer) -> None:
    for name, value in values.items():
        fields = _fields_of((name,))
        if fields and not isinstance(value, Mapping):
            raise ConfigError(
                f"{layer.origins.get((name,), name)}: {name} is a section and got {value!r}. Set "
                f"its fields, such as {name}.{fields[0]}."
            )


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def format_errors(
    error: ValidationError,
    origins: Mapping[KeyPath, str] | None,
    model: type[BaseModel] = TrainConfig,
) -> list[str]:
    """Returns a message per pydantic error; `origins` is None for constructor arguments."""
    messages: list[str] = []
    seen: set[KeyPath] = set()
    known = origins or {}
    for detail in error.errors():
        key, kind = _key_and_method(detail, model)
        if detail["type"] == "extra_forbidden" and key not in known:
            key = next((full for full in known if full[: len(key)] == key), key)
        if key and key in seen:  # the other branches of a union of values
            continue
        seen.add(key)
        origin = _origin(key, known, "" if origins is not None else model.__name__)
        if detail["type"] == "value_error" and not key:  # a rule between sections names the flags
            messages += str(detail["ctx"]["error"]).split("\n")
        elif detail["type"] == "extra_forbidden":
            messages.append(f"{origin}: {_unknown_key(key, kind, model)}")
        else:
            messages.append(f"{origin}: {_bad_value(key, detail, model)}")
    return list(dict.fromkeys(messages))


Section.explain_errors = staticmethod(lambda error, root: format_errors(error, None, root))


def _key_and_method(detail: ErrorDetails, model: type[BaseModel]) -> tuple[KeyPath, str | None]:
    """Returns the recipe key of an error, and its method if it is a method's setting, else None."""
    location = [str(part) for part in detail["loc"]]
    if len(location) > 1 and location[0] in _TAGGED and location[1] in SPECS:
        inner = location[2:] if detail["type"] == "extra_forbidden" else location[2:3]
        return (location[0], *inner), location[1]
    if detail["type"] == "union_tag_invalid":
        return (*location, "kind"), None
    if detail["type"] != "extra_forbidden":  # a union of values adds its branch to the location
        while len(location) > 1 and location[-1] not in _fields_of(tuple(location[:-1]), model):
            location.pop()
    return tuple(location), None


def _origin(key: KeyPath, origins: Mapping[KeyPath, str], constructor: str) -> str:
    """Returns where `key` or its nearest parent was set; if unknown, `key` itself in text."""
    for end in range(len(key), 0, -1):
        if key[:end] in origins:
            return origins[key[:end]]
    dotted = ".".join(key) or "configuration"
    return f"{constructor}({dotted})" if constructor else dotted


def _unknown_key(key: KeyPath, kind: str | None, model: type[BaseModel]) -> str:
    dotted = ".".join(key)
    if kind is not None:
        owners = [name for name, spec in SPECS.items() if key[1] in spec.model_fields]
        if owners:
            return f"{dotted!r} belongs to method {join_names(owners)}, and the method is {kind}."
        siblings: Iterable[str] = SPECS[kind].model_fields
    else:
        siblings = _fields_of(key[:-1], model)
    if hint := recipe_hint(key[-1], command_of(model)):
        return f"unknown key {dotted!r}.{hint}"
    if kind is None and model is TrainConfig and (elsewhere := _nearest_elsewhere(key)):
        return f"unknown key {dotted!r}. Did you mean {elsewhere!r}?"
    if not siblings:  # the section is not known either
        return f"unknown key {dotted!r}. Sections: {join_names(TrainConfig.model_fields, 20)}."
    near = [name for name in siblings if _SYNONYMS.get(key[-1]) == name] or closest_matches(
        key[-1], siblings
    )
    hint = f" Did you mean {'.'.join((*key[:-1], near[0]))!r}?" if near else ""
    return f"unknown key {dotted!r}.{hint or ' Keys here: ' + join_names(siblings, 30) + '.'}"


def _nearest_elsewhere(key: KeyPath) -> str:
    """Returns the dotted field probably meant by a `key` with a wrong or missing section."""
    section, name = key[:-1], key[-1]
    sections = [part for part in TrainConfig.model_fields if _fields_of((part,))]
    if len(section) == 1 and section[0] not in TrainConfig.model_fields:
        owner = closest_matches(section[0], sections)
        field = closest_matches(name, _fields_of((owner[0],))) if owner else []
        if field:
            return f"{owner[0]}.{field[0]}"
    if name in _fields_of(section) or len(section) > 1:
        return ""
    owners = [part for part in sections if name in _fields_of((part,))]
    owners += ["method"] * any(name in spec.model_fields for spec in SPECS.values())
    return f"{owners[0]}.{name}" if owners else ""


_SYNONYMS = {
    "dropout": "lora_dropout",
    "name": "name_or_path",
    "path": "name_or_path",
    "type": "kind",
}


def find_setting(name: str) -> str:
    """Returns the dotted path of a field called `name` in any section or method; empty if none."""
    for section in TrainConfig.model_fields:
        for inner in ((section,), (section, "gate")):
            if name in _fields_of(inner):
                return ".".join((*inner, name))
    return f"method.{name}" if any(name in spec.model_fields for spec in SPECS.values()) else ""


def _fields_of(section: KeyPath, root: type[BaseModel] = TrainConfig) -> list[str]:
    model = root
    for part in section:
        info = model.model_fields.get(part)
        annotation = info.annotation if info else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


_SIGNS = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
}
"""Type of a pydantic error → expected value."""


def _bad_value(key: KeyPath, detail: ErrorDetails, model: type[BaseModel]) -> str:
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "literal_error" | "union_tag_invalid":
            if detail["type"] == "union_tag_invalid":
                value, expected = context["tag"], list(SPECS)
            else:
                parts = context["expected"].replace(" or ", ", ").split(",")
                expected = [part.strip("' ") for part in parts]
            hint = did_you_mean(str(value), expected)
            return (
                f"{_shown(value)} is not known. Expected one of {join_names(expected, 30)}.{hint}"
            )
        case kind if kind in _SIGNS:
            sign, bound = _SIGNS[kind], next(iter(context.values()))
            return f"{_shown(value)} is out of range: {'.'.join(key)} must be {sign} {bound}."
        case kind if kind in _EXPECTED:
            return (
                f"{_shown(value)} cannot be used for {'.'.join(key)}. Expected {_EXPECTED[kind]}."
            )
        case "missing":
            field = model.model_fields.get(key[-1])
            return f"it is missing: {field.description if field else 'give a value'}"
        case "model_type" | "model_attributes_type" if fields := _fields_of(key, model):
            return (
                f"{'.'.join(key)} is a section and got {_shown(value)}. Set its fields, such as "
                f"{'.'.join((*key, fields[0]))}."
            )
        case "value_error" if isinstance(value, Mapping):  # inconsistent fields of a section
            return f"{context['error']}."
        case "value_error":
            return f"{_shown(value)}: {context['error']}."
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{_shown(value)} cannot be used for {'.'.join(key)}: {message}."


def _shown(value: Any) -> str:
    plain = str | int | float | None
    is_plain = isinstance(value, plain) or (
        isinstance(value, list | tuple) and all(isinstance(part, plain) for part in value)
    )
    text = repr(value) if is_plain else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
