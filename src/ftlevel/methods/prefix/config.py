"""The `peft` config of prefix tuning: what adapter_config.json holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from ftlevel.methods.upstream import add_peft_type

PREFIX_KV = add_peft_type("PREFIX_KV")


@dataclass
class PrefixKvConfig(PeftConfig):
    """Configuration of `PrefixModel`.

    Attributes:
        num_virtual_tokens: keys and values that stand in front in each attention.
        prefix_projection: compute them by an MLP; `PrefixModel.fold` turns them into plain ones.
        encoder_hidden_size: width of that MLP.
        target_modules: names of the attentions, or one regular expression; None is all of them.
        exclude_modules: names or one regular expression that are left out.
        modules_to_save: modules that are trained in full and saved with the adapter.
    """

    num_virtual_tokens: int = field(default=20)
    prefix_projection: bool = field(default=False)
    encoder_hidden_size: int = field(default=512)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIX_KV
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):  # PEFT compares these as sets
                setattr(self, name, set(value))
