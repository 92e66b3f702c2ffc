"""Refusing to merge, in the way that PEFT's base classes ask of what no weight can hold."""

from __future__ import annotations

from typing import ClassVar, NoReturn

VIRTUAL_TOKENS = (
    "Virtual tokens are inputs and not weights, so no weight of the base model can hold them and "
    "they cannot be merged. Keep the adapter beside the base, or train with a method that merges, "
    "such as --method lora."
)


class UnmergeableLayer:
    """A layer that refuses; it stands before `BaseTunerLayer` among the bases.

    Attributes:
        cannot_merge: why, and what to do instead.
    """

    cannot_merge: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse.

        Raises:
            NotImplementedError: always, as PEFT's layers do.
        """
        raise NotImplementedError(self.cannot_merge)

    def unmerge(self) -> NoReturn:
        """Refuse, as nothing was merged.

        Raises:
            NotImplementedError: always, as PEFT's layers do.
        """
        raise NotImplementedError(self.cannot_merge)


class UnmergeableTuner:
    """A tuner of such layers; it stands before `BaseTuner` among the bases."""

    tuner_layer_cls: type[UnmergeableLayer]

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)
