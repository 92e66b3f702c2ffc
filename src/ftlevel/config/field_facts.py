"""What a field of a configuration says of itself to help texts, docs and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class FieldFacts:
    """A field in the words of help and docs.

    Attributes:
        description: its help, whole.
        type: of a value on the command line: int, float, bool, list[str] for pairs, else str.
        choices: the values that there are, where they can be counted.
        default: as it is shown; empty where the description has it or it is off.
        required: whether there is no default.
        takes_number: whether a value may be a number.
    """

    description: str
    type: Any
    choices: tuple[str, ...]
    default: str
    required: bool
    takes_number: bool


def describe_field(config: type[BaseModel], path: str) -> FieldFacts:
    """Return the facts of the field at the dotted `path` of `config`.

    A part of the path may be one of several sections, such as a method: all that have the field
    give their choices, the first its help.

    Raises:
        KeyError: there is no such field.
    """
    *sections, name = path.split(".")
    holders: list[type[BaseModel]] = [config]
    above = ""
    for section in sections:
        info = holders[0].model_fields[section]
        above = info.description or ""
        holders = [a for a in _alternatives(info.annotation) if _is_section(a)]
    infos = {holder: holder.model_fields[name] for holder in holders if name in holder.model_fields}
    if not infos:
        raise KeyError(path)
    first = next(iter(infos.values()))
    kinds = [kind for info in infos.values() for kind in _alternatives(info.annotation)]
    closed = all(get_origin(kind) is Literal for kind in kinds)
    return FieldFacts(
        description=first.description or above,
        type=_value_type(kinds),
        choices=tuple(dict.fromkeys(str(v) for k in kinds for v in get_args(k))) if closed else (),
        default=_default_of(infos),
        required=first.is_required(),
        takes_number=bool({int, float} & set(kinds)),
    )


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types that a value may have, without None, unions and bounds opened."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def _value_type(kinds: list[Any]) -> Any:
    found = {get_origin(kind) or kind for kind in kinds}
    if found == {dict}:
        return list[str]
    only = found.pop() if len(found) == 1 else str
    return only if only in (int, float, bool) else str


def _default_of(infos: dict[type[BaseModel], FieldInfo]) -> str:
    """Return the default as it is shown; where the holders differ, the first one's."""
    shown = [_shown(info) for info in infos.values()]
    owner = next(iter(infos)).model_fields.get("kind")
    if len(set(shown)) == 1 or owner is None or owner in infos.values():
        return shown[0]
    return f"{shown[0]} with {owner.default}" if shown[0] else ""


def _shown(info: FieldInfo) -> str:
    value = None if info.is_required() else info.get_default(call_default_factory=True)
    if value is True:
        return "on"
    if not value and not (isinstance(value, (int, float)) and value is not False):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
