"""Tuners of our own in PEFT: their names in `PeftType`, and their registration."""

from __future__ import annotations

from typing import Any


def add_peft_type(name: str) -> Any:
    """Return the member of `peft.utils.PeftType` called `name`, made if it is not there.

    `register_peft_method` only takes members of that enumeration, which is closed and has no
    public way in (PEFT 0.21). The member is made as `enum` makes its own: known by name, by value
    and in iteration, so that comparing, pickling and JSON work as for any other.
    """
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    setattr(PeftType, name, member)  # before the maps: a member that they hold cannot be set
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register_tuner(peft_type: Any, config: type, model: type) -> None:
    """Make PEFT know a tuner of ours by its type; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=peft_type.value.lower(), config_cls=config, model_cls=model)
