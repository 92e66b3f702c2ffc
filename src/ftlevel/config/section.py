"""`Section`, the base class of all configuration sections, `Choice`, and types of fields."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ftlevel.config.constraints import Constraints, flag_name, list_violations
from ftlevel.errors import ConfigError, has_no_effect, join_names
from ftlevel.safe_io import mask_passwords

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".jsonl", ".yaml", ".yml")


def validate_dir_name(path: Path) -> Path:
    """Returns `path` with `~` expanded; raises ValueError if it has the suffix of a file."""
    if path.suffix in _FILE_SUFFIXES:
        raise ValueError(
            f"a directory is written, and {path.name} is the name of a file. Name it "
            f"{path.with_suffix('')}"
        )
    return path.expanduser()


NewDirectory = Annotated[Path, AfterValidator(validate_dir_name)]
"""Path of a directory that a command creates."""


def validate_address(address: str) -> str:
    """Returns `address`; raises ValueError unless it is an HTTP address with a host."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(
            f"{mask_passwords(address)} is not an address without a password, such as "
            "http://127.0.0.1:8000"
        )
    return address


Address = Annotated[str, AfterValidator(validate_address)]
"""HTTP address of a server."""
_TEXTS = ("system", "context", "prompt_tuning_init_text")
"""Fields with text for the model; all others may be file names."""


class Section(BaseModel):
    """Base class of immutable configuration sections; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        defer_build=True,  # --help does not validate
        hide_input_in_errors=True,  # inputs may be rows
    )
    constraints: ClassVar[Constraints] = ()
    explain_errors: ClassVar[Callable[[ValidationError, type[BaseModel]], list[str]]]
    """Returns messages for a pydantic error; set by `config/layers.py`."""

    def __init__(self, **values: Any) -> None:
        """Validate `values`; raise ConfigError with all problems."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(Section.explain_errors(error, type(self))) from None

    # Validation of a section inside another does not go through `__init__`: all problems of the
    # outermost are reported together.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @property
    def changed(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        ]

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per violation of `constraints` of this class and its bases."""
        for cls in type(self).__mro__:
            constraints = cls.__dict__.get("constraints", ())
            yield from list_violations(self, constraints)

    @model_validator(mode="after")
    def _validate_conflicts(self) -> Section:
        if messages := list(self.list_conflicts()):
            raise ValueError("\n".join(messages))
        return self

    @field_validator("*")
    @classmethod
    def _validate_null_bytes(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else (value,)
        names = [str(item) for item in values if isinstance(item, str | Path)]
        if info.field_name not in _TEXTS and any("\0" in name for name in names):
            raise ValueError("a name cannot contain a null byte. Remove it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _convert_to_text(cls, raw: Any) -> Any:
        """Convert `os.PathLike` values of text fields to text, and booleans of numeric fields.

        Validation then rejects the latter, such as YAML's `yes`.
        """
        if not isinstance(raw, dict):
            return raw
        texts = {}
        for name, value in raw.items():
            if name not in cls.model_fields or not isinstance(value, bool | os.PathLike):
                continue
            types = set(_iter_types(cls.model_fields[name].annotation))
            if isinstance(value, os.PathLike) and Path not in types:
                texts[name] = os.fspath(value)
            elif isinstance(value, bool) and bool not in types and types & {int, float}:
                texts[name] = str(value).lower()
        return {**raw, **texts}


TEXT_FIELDS = (
    "train.num_beams",
    "train.temperature",
    "train.top_p",
    "train.predict_with_generate",
    "train.max_generate_samples",
    "train.max_new_tokens",
    "data.system",
    "data.train_on_inputs",
)
"""Dotted fields that tasks use which generate text."""


class TaskSection(Section):
    """Base class of the sections of `TrainConfig` that only some tasks use, as of extensions.

    Attributes:
        tasks: tasks that use the section; for others, a changed field is an error.
        summary: description of the section.
        shorthand: field that a plain value of the section sets.
        uses: task → dotted fields of other sections that it uses, and others do not.
        has_teacher: whether the tasks can learn from `--teacher`.
        paths: field that may contain local paths → its flag.
        command_line_only: field → (flag, what it does); a file cannot set it.
        code_field: field that may name files of code to run; "" if there is none.
        may_change: fields that may differ on resume.
        contents: field that may differ on resume → field with the fingerprint of its content, and
            the name of the content.
        pipeline_tags: task → the Hub's tag for its models, if that is not the task's name.
        overlong: values of `--overlong` besides error, if not those of most tasks.
    """

    tasks: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    shorthand: ClassVar[str] = ""
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    has_teacher: ClassVar[bool] = False
    paths: ClassVar[Mapping[str, str]] = {}
    command_line_only: ClassVar[Mapping[str, tuple[str, str]]] = {}
    code_field: ClassVar[str] = ""
    may_change: ClassVar[tuple[str, ...]] = ()
    contents: ClassVar[Mapping[str, tuple[str, str]]] = {}
    pipeline_tags: ClassVar[Mapping[str, str]] = {}
    overlong: ClassVar[tuple[str, ...]] = ()

    @property
    def steps_per_batch(self) -> int:
        """Number of optimizer steps that train on the same rows, one after the other."""
        return 1

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of generated tokens, instead of `train.max_new_tokens`; None if unset."""
        return None

    def get_options(self, config: Any) -> dict[str, Any]:
        """Returns what `BaseTask.configured` gets of the section; `config` is the `TrainConfig`."""
        return self.model_dump()

    def get_rate_factor(self, method: str, kind: str, size: float) -> tuple[float, str]:
        """Returns the factor of the method's default learning rate, and its origin for the log.

        `kind` is the type of model; `size` is from 0 (small models) to 1 (large ones).
        """
        return 1.0, ""

    def validate_run(self, config: Any) -> Iterable[str]:
        """Yields an error message for each value of a `TrainConfig` that the tasks cannot use."""
        return ()

    @classmethod
    def complete_run(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Returns the configuration `raw`, not validated, with values that its others determine."""
        return raw

    def check_code(self, location: str) -> Iterable[str]:
        """Yields a message for each file of `code_field`, set at `location`, that may not run."""
        return ()

    @classmethod
    def map_path(cls, field: str, value: str, function: Callable[[str], str]) -> str:
        """Returns `value` of a field of `paths`, with `function` applied to the path in it."""
        return function(value)


def list_unread(
    section: str, names: Iterable[str], loss: str, parameters: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """Yields an error message per field in `names` that `loss` does not use, but others do."""
    for name in names:
        losses = [other for other, fields in parameters.items() if name in fields]
        if losses and loss not in losses:
            flag = flag_name(f"{section}.{name}")
            yield has_no_effect(flag, f"--loss {loss}", f"it is for {join_names(losses)}")


def parse_range(text: str) -> tuple[int, int] | None:
    """Returns the bounds of `MIN-MAX`, or None if `text` is no range."""
    result = re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", text)
    if result is None or int(result[1]) > int(result[2]):
        return None
    return int(result[1]), int(result[2])


def check_config(config: object, expected: type[Section]) -> None:
    """Raise ConfigError unless `config` is of the class `expected`."""
    if not isinstance(config, expected):
        raise ConfigError(
            f"the configuration is of type {type(config).__name__}. Pass {expected.__name__}(…)."
        )


def _iter_types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _iter_types(part)


@dataclass(frozen=True)
class Choice:
    """Value of a setting with the reason for it, such as `bfloat16 (auto: CPU has avx512_bf16)`."""

    name: str
    value: Any
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})" if self.reason else str(self.value)


def split_pairs(value: Any) -> Any:
    """Parse `a=1,b=2` as a mapping; return any other value unchanged."""
    if not isinstance(value, str) or "=" not in value:
        return value
    pairs: dict[str, str] = {}
    for pair in filter(None, map(str.strip, value.split(","))):
        name, _, text = (part.strip() for part in pair.rpartition("="))
        if not (name and text):
            raise ValueError(f"{pair!r} is not NAME=VALUE; separate several by commas")
        pairs[name] = text
    return pairs


Scalar = bool | int | float | str


def _parse_scalars(value: Any) -> Any:
    if not isinstance(value := split_pairs(value), dict):
        return value
    return {name: _scalar(v) if isinstance(v, str) else v for name, v in value.items()}


def _scalar(text: str) -> Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


Scalars = Annotated[dict[str, Scalar], BeforeValidator(_parse_scalars)]
"""Arguments of an optimizer or schedule, under their names in the library."""


def _split_names(value: Any) -> Any:
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def _parse_tokens(value: Any) -> Any:
    """Parse `12,<tool>` as [12, "<tool>"]; tokens that contain commas must be given as a list."""
    names = _split_names(value)
    if isinstance(value, str):
        return [int(name) if name.isdecimal() else name for name in names]
    return names


Names = Annotated[list[str], BeforeValidator(_split_names)]
FewNames = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)] | str], BeforeValidator(_parse_tokens)]


def _parse_weights(value: Any) -> Any:
    value = split_pairs(value)
    if value is None or value == "balanced":
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError("expected balanced, or NAME=WEIGHT,NAME=WEIGHT")
    for name, weight in value.items():
        if isinstance(weight, bool) or not _is_positive(weight):
            raise ValueError(f"the weight of {name!r} is {weight}; a number above 0 is expected")
    return {str(name): float(weight) for name, weight in value.items()}


def _is_positive(weight: Any) -> bool:
    try:
        return 0 < float(weight) < math.inf
    except (TypeError, ValueError):
        return False


ClassWeights = Annotated[
    Literal["balanced"] | dict[str, float] | None,
    BeforeValidator(_parse_weights),
    Field(
        description="Class or tag weights in the training loss: balanced, or NAME=WEIGHT,…. "
        "Classes that are not named have weight 1."
    ),
]
