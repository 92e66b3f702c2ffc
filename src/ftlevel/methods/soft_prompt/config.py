"""The `peft` config of soft prompts: what adapter_config.json holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from ftlevel.methods.upstream import add_peft_type

SOFT_PROMPT = add_peft_type("SOFT_PROMPT")


@dataclass
class SoftPromptConfig(PeftConfig):
    """Configuration of `SoftPromptModel`.

    Attributes:
        num_virtual_tokens: length of the prompt.
        tokens_before: tokens of the text that stand in front of the prompt; 1 keeps [CLS] first.
        init_token_ids: tokens whose embeddings the prompt begins with, over and over if they are
            fewer than it is long; None draws them from the vocabulary.
        random_init: begin with small random vectors instead.
        encoder: "none"; "MLP" or "LSTM" compute the prompt, until `SoftPromptModel.fold`.
        encoder_hidden_size: width of the MLP or the LSTM; the embedding's if None.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout between those layers.
        target_modules: names of the stacks, or one regular expression; None finds them.
        exclude_modules: names or one regular expression that are left out.
        modules_to_save: modules that are trained in full and saved with the adapter.
    """

    num_virtual_tokens: int = field(default=20)
    tokens_before: int = field(default=0)
    init_token_ids: list[int] | None = field(default=None)
    random_init: bool = field(default=False)
    encoder: str = field(default="none")
    encoder_hidden_size: int | None = field(default=None)
    encoder_num_layers: int = field(default=2)
    encoder_dropout: float = field(default=0.0)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SOFT_PROMPT
        if self.encoder not in ("none", "MLP", "LSTM"):
            raise ValueError(f"encoder {self.encoder!r} is none of none, MLP and LSTM.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):  # PEFT compares these as sets
                setattr(self, name, set(value))
