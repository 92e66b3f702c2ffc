"""Where on the Hugging Face Hub a command's result goes."""

from __future__ import annotations

from pydantic import Field, model_validator

from ftlevel.config.section import Section


class HubSection(Section):
    """What a command that writes a model is told of the Hub."""

    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Upload what was written, with its card, to this repository of the Hugging "
        "Face Hub once it is checked.",
    )
    hub_private: bool = Field(False, description="Make that repository a private one.")

    @model_validator(mode="after")
    def _a_private_repository_has_a_name(self) -> HubSection:
        if self.hub_private and self.push_to_hub is None:
            raise ValueError(
                "--hub-private is of --push-to-hub. Add --push-to-hub NAME, or drop it."
            )
        return self
