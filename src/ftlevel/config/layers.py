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
from ftlevel.config.reading import YamlError, load_yaml, resolve_aliases
from ftlevel.config.section import Section
from ftlevel.config.train import (
    COMMAND_LINE_ONLY,
    SECTIONS,
    SHORTHAND,
    TrainConfig,
    check_values,
    expand_shorthand,
)
from ftlevel.errors import ConfigError, closest_matches, did_you_mean, join_names
from ftlevel.extensions import hooks

KeyPath = tuple[str, ...]
S = TypeVar("S", bound=BaseModel)

_UNIONS = {"method"}
_MAX_LENGTH = 200  # characters, in errors
_CODE_FIELDS = {f"{n}.{own.code_field}": n for n, own in SECTIONS.items() if own.code_field}


@dataclass(frozen=True)
class Layer:
    """Unvalidated values of one source (recipe, flags, …); `locations`: key → flag or file:line.

    A file may be a stranger's, so its values are `is_untrusted`: see `COMMAND_LINE_ONLY`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, str] = field(default_factory=dict)
    is_untrusted: bool = False


def load_recipe(path: Path) -> Layer:
    """Load a YAML recipe; raises ConfigError if invalid, or a configuration of another tool."""
    values, locations = load_yaml_file(path)
    if tool := next(filter(None, (detect(values) for detect in hooks("detect_tool"))), ""):
        raise ConfigError(
            f"{path} is a configuration of {tool}. Write it as a recipe first: "
            f"ftlevel recipes convert {path} > recipe.yaml"
        )
    return Layer(values, locations, is_untrusted=True)


def load_yaml_file(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Returns the mapping in a YAML file, and file:line of each key.

    Raises ConfigError if the file is missing, not YAML or not a mapping, or repeats a key.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"recipe {path} is not a file. Name a YAML file.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        candidates = [str(p) for p in sorted(path.parent.glob("*.y*ml"))]
        raise ConfigError(
            f"recipe {path} does not exist.{did_you_mean(str(path), candidates)}"
        ) from None
    except (OSError, ValueError) as error:  # not UTF-8, or a null byte in the name
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}.") from None
    try:
        values, node = load_yaml(text)
    except YamlError as error:
        location = str(path) if error.line is None else f"{path}:{error.line}"
        raise ConfigError(
            f"{location}: not valid YAML ({error}). A recipe contains plain values: text, numbers, "
            f"lists and mappings."
        ) from None
    if node is None:
        raise ConfigError(f"recipe {path} is empty. Add at least one section, such as method.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a recipe is a mapping of sections, such as method: lora.")
    locations: dict[KeyPath, str] = {}
    for key, line in _iter_keys(node, ()):
        location = f"{path}:{line}"
        if key in locations:
            raise ConfigError(
                f"{location}: key {'.'.join(key)!r} is given twice, first at {locations[key]}."
            )
        locations[key] = location
    return values, locations


def _iter_keys(mapping: Any, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    for key_node, value_node in mapping.value:
        key = (*prefix, str(key_node.value))
        yield key, key_node.start_mark.line + 1
        if value_node.id == "mapping":
            yield from _iter_keys(value_node, key)


def parse_overrides(overrides: Iterable[str]) -> Layer:
    """Parse `--set section.key=value` pairs with YAML values; raise ConfigError if malformed."""
    layer = Layer()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set {override}: expected section.key=value, as in train.seed=1.")
        try:
            value, _ = load_yaml(text)
        except YamlError:
            raise ConfigError(f"--set {dotted.strip()}: the value is not valid YAML.") from None
        _put_fields(layer, tuple(dotted.strip().split(".")), value, f"--set {dotted.strip()}")
    return layer


def _put_fields(layer: Layer, key: KeyPath, value: Any, location: str) -> None:
    layer.locations[key] = location
    if not isinstance(value, dict) or not value:
        put(layer, _complete_key(key, value), value, location)
    for name, field_value in value.items() if isinstance(value, dict) else ():
        _put_fields(layer, (*key, str(name)), field_value, location)


def _complete_key(key: KeyPath, value: Any) -> KeyPath:
    is_short = len(key) == 1 and key[0] in SHORTHAND and not isinstance(value, Mapping | None)
    return (*key, SHORTHAND[key[0]]) if is_short else key


def put(layer: Layer, key: KeyPath, value: Any, location: str) -> None:
    """Set `key` in `layer` (modified) to `value`, whose origin is `location`."""
    target = layer.values
    for part in key[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = target[part] = {part: inner}
        target = inner
    target[key[-1]] = target.get(key[-1], value) if value == {} else value
    layer.locations[key] = location


def build_config(
    layers: Iterable[Layer], note: Callable[[str], object] = lambda _: None, *, runs: bool = True
) -> TrainConfig:
    """Merge `layers`, later ones winning, and validate the merged configuration.

    `note` is called with a message for each alias. Raises ConfigError; with `runs`,
    also for what only the command line may set, because the configuration will be used for a run.
    """
    merged: dict[str, Any] = {}
    locations: dict[KeyPath, str] = {}
    untrusted: dict[str, str] = {}
    aliased: dict[str, set[str]] = {}
    for layer in layers:
        values = {k: expand_shorthand(k, v) for k, v in layer.values.items() if v is not None}
        _validate_sections(values, layer)
        resolved, notes = resolve_aliases(values)
        for line in notes:
            note(line)
        _drop_alias_fields(merged, aliased, values, resolved)
        _merge(merged, resolved)
        for key, location in layer.locations.items():
            locations[_complete_key(key, layer.values.get(key[0]))] = location
        for field_path in (*COMMAND_LINE_ONLY, *_CODE_FIELDS):
            section, _, name = field_path.partition(".")
            if name in (resolved.get(section) or {}):
                untrusted.pop(field_path, None)
                if layer.is_untrusted:
                    key = (section, name)
                    untrusted[field_path] = _get_location(key, layer.locations, "a recipe")
    try:
        config = TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(format_errors(error, locations)) from None
    if runs:
        _check_trust(config, merged, untrusted)
    return config


def _check_trust(
    config: TrainConfig, values: Mapping[str, Any], untrusted: Mapping[str, str]
) -> None:
    problems = list(check_values(values, untrusted))
    for path, name in _CODE_FIELDS.items():
        if location := untrusted.get(path):
            problems += getattr(config, name).check_code(location)
    if problems:
        raise ConfigError(problems)


def build_section(
    section: type[S], values: Mapping[str, Any], flags: Mapping[str, str] | None = None
) -> S:
    """Returns a validated instance of the class `section`; in `values` of flags, None means unset.

    `flags` maps fields to their flags where the names differ. Raises ConfigError.
    """
    shown = {name: "--" + name.replace("_", "-") for name in section.model_fields}
    shown.update(flags or {})
    values_set = {name: value for name, value in values.items() if value is not None}
    locations: dict[KeyPath, str] = {(name,): shown.get(name, name) for name in values_set}
    missing = [
        f"{shown[name]} is missing: {field.description}"
        for name, field in section.model_fields.items()
        if field.is_required() and name not in values_set
    ]
    if missing:
        raise ConfigError(missing)
    try:
        return section.model_validate(values_set)
    except ValidationError as error:
        raise ConfigError(format_errors(error, locations, section)) from None


def _drop_alias_fields(
    merged: dict[str, Any], aliased: dict[str, set[str]], values: Any, resolved: Any
) -> None:
    """Remove the fields that an alias of an earlier layer set, if this layer sets `kind`."""
    for section in ("method", "quant"):
        fields = values.get(section) or {}
        names = aliased.get(section, set()) - fields.keys()
        if "kind" in fields:
            for name in names:
                merged[section].pop(name, None)
            names = resolved[section].keys() - fields.keys()
        aliased[section] = names


def _validate_sections(values: Mapping[str, Any], layer: Layer) -> None:
    for name, value in values.items():
        fields = _fields_of((name,))
        if fields and not isinstance(value, Mapping):
            raise ConfigError(
                f"{layer.locations.get((name,), name)}: {name} is a section and got {value!r}. Set "
                f"its fields, such as {name}.{fields[0]}."
            )


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if type(value) is not dict:  # rows may be a DatasetDict
            into[key] = value
        elif type(into.get(key)) is dict:
            _merge(into[key], value)
        else:
            into[key] = dict(value)


def format_errors(
    error: ValidationError,
    locations: Mapping[KeyPath, str] | None,
    model: type[BaseModel] = TrainConfig,
) -> list[str]:
    """Returns a message per invalid field; `locations` is None for values passed from Python."""
    messages: list[str] = []
    seen: set[KeyPath] = set()
    sources = locations or {}
    for detail in error.errors():
        key, kind = _key_and_method(detail, model)
        if detail["type"] == "extra_forbidden" and key not in sources:
            key = next((full for full in sources if full[: len(key)] == key), key)
        if key and key in seen:  # the other branches of a union of values
            continue
        seen.add(key)
        location = _get_location(key, sources, "" if locations is not None else model.__name__)
        if detail["type"] == "value_error" and not key:  # a rule between sections names the flags
            messages += str(detail["ctx"]["error"]).split("\n")
        elif detail["type"] == "value_error" and isinstance(
            detail["input"], Mapping
        ):  # a section's
            prefix = "" if location == ".".join(key) else f"{location}: "
            lines = str(detail["ctx"]["error"]).split("\n")
            messages += [f"{prefix}{line.rstrip('.')}." for line in lines]
        elif detail["type"] == "extra_forbidden":
            messages.append(f"{location}: {_invalid_key(key, kind, model)}")
        else:
            messages.append(f"{location}: {_invalid_value(key, detail, model)}")
    return list(dict.fromkeys(messages))


Section.explain_errors = staticmethod(lambda error, root: format_errors(error, None, root))


def _key_and_method(detail: ErrorDetails, model: type[BaseModel]) -> tuple[KeyPath, str | None]:
    """Returns the recipe key of a pydantic error, and the method's name for a method's field."""
    location = [str(part) for part in detail["loc"]]
    if len(location) > 1 and location[0] in _UNIONS and location[1] in SPECS:
        inner = location[2:] if detail["type"] == "extra_forbidden" else location[2:3]
        return (location[0], *inner), location[1]
    if detail["type"] == "union_tag_invalid":
        return (*location, "kind"), None
    if detail["type"] != "extra_forbidden":  # a union of values adds its branch to the location
        while len(location) > 1 and location[-1] not in _fields_of(tuple(location[:-1]), model):
            location.pop()
    return tuple(location), None


def _get_location(key: KeyPath, locations: Mapping[KeyPath, str], constructor: str) -> str:
    for end in range(len(key), 0, -1):
        if key[:end] in locations:
            return locations[key[:end]]
    dotted = ".".join(key) or "configuration"
    return f"{constructor}({dotted})" if constructor else dotted


def _invalid_key(key: KeyPath, kind: str | None, model: type[BaseModel]) -> str:
    while len(key) > 2 and not _fields_of(key[:-1], model):  # of a mapping, such as {a: 1}
        key = key[:-1]
    dotted = ".".join(key)
    if kind is not None:
        names = [name for name, spec in SPECS.items() if key[1] in spec.model_fields]
        if names:
            return f"{dotted!r} belongs to method {join_names(names)}, and the method is {kind}."
        candidates: Iterable[str] = SPECS[kind].model_fields
    else:
        candidates = _fields_of(key[:-1], model)
    if hint := recipe_hint(key[-1], command_of(model)):
        return f"unknown key {dotted!r}.{hint}"
    if kind is None and model is TrainConfig and (elsewhere := _closest_field(key)):
        return f"unknown key {dotted!r}. Did you mean {elsewhere!r}?"
    if not candidates:  # the section is not known either
        return f"unknown key {dotted!r}. Sections: {join_names(TrainConfig.model_fields, 20)}."
    matches = [name for name in candidates if _SYNONYMS.get(key[-1]) == name] or closest_matches(
        key[-1], candidates
    )
    hint = f" Did you mean {'.'.join((*key[:-1], matches[0]))!r}?" if matches else ""
    return f"unknown key {dotted!r}.{hint or ' Keys here: ' + join_names(candidates, 30) + '.'}"


def _closest_field(key: KeyPath) -> str:
    section, name = key[:-1], key[-1]
    sections = [part for part in TrainConfig.model_fields if _fields_of((part,))]
    if len(section) == 1 and section[0] not in TrainConfig.model_fields:
        section_names = closest_matches(section[0], sections)
        field = closest_matches(name, _fields_of((section_names[0],))) if section_names else []
        if field:
            return f"{section_names[0]}.{field[0]}"
    if name in _fields_of(section) or len(section) > 1:
        return ""
    return get_field_path(name)


_SYNONYMS = {
    "dropout": "lora_dropout",
    "name": "name_or_path",
    "path": "name_or_path",
    "type": "kind",
}


def get_field_path(name: str) -> str:
    """Returns the dotted path of the field `name` of a section or method; "" if there is none."""
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


_OPERATORS = {
    "greater_than": ">",
    "greater_than_equal": "≥",
    "less_than": "<",
    "less_than_equal": "≤",
}
_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
}
"""Type of a pydantic error → description of the expected value."""


def _invalid_value(key: KeyPath, detail: ErrorDetails, model: type[BaseModel]) -> str:
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "literal_error" | "union_tag_invalid":
            if detail["type"] == "union_tag_invalid":
                value, expected = context["tag"], list(SPECS)
            else:
                parts = context["expected"].replace(" or ", ", ").split(",")
                expected = [part.strip("' ") for part in parts]
            hint = did_you_mean(str(value), expected)
            return f"{_text(value)} is not known. Expected one of {join_names(expected, 30)}.{hint}"
        case kind if kind in _OPERATORS:
            sign, bound = _OPERATORS[kind], next(iter(context.values()))
            return f"{_text(value)} is out of range: {'.'.join(key)} must be {sign} {bound}."
        case kind if kind in _EXPECTED:
            return f"{_text(value)} cannot be used for {'.'.join(key)}. Expected {_EXPECTED[kind]}."
        case "missing":
            field = model.model_fields.get(key[-1])
            return f"it is missing: {field.description if field else 'give a value'}"
        case "model_type" | "model_attributes_type" if fields := _fields_of(key, model):
            return (
                f"{'.'.join(key)} is a section and got {_text(value)}. Set its fields, such as "
                f"{'.'.join((*key, fields[0]))}."
            )
        case "value_error" if isinstance(value, Mapping | list | tuple):  # names fields or items
            return f"{context['error']}."
        case "value_error":
            return f"{_text(value)}: {context['error']}."
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{_text(value)} cannot be used for {'.'.join(key)}: {message}."


def _text(value: Any) -> str:
    plain = str | int | float | None
    is_plain = isinstance(value, plain) or (
        isinstance(value, list | tuple) and all(isinstance(part, plain) for part in value)
    )
    text = repr(value) if is_plain else f"a {type(value).__name__}"
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"
