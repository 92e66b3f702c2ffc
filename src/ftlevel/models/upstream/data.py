"""Three doors for data: a chat's text, Trainer's order of rows, and staying off the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def apply_template(
    turns: Sequence[Any], template: str, **settings: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return what `template` makes of a chat.

    Args:
        turns: of the chat.
        template: in Jinja.
        settings: tools, special tokens, and `add_generation_prompt`; with
            `return_assistant_tokens_mask` the spans between the template's marks are returned too.

    Raises:
        jinja2.TemplateError, ValueError, TypeError: the template refuses the turns.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template([list(turns)], chat_template=template, **settings)
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def check_template(template: str) -> None:
    """Compile a chat template and render nothing.

    Raises:
        jinja2.TemplateSyntaxError: it is not one.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template([], chat_template=template)


def shared_order(rows: Any, seed: int) -> Any:
    """Return the sampler with the order that Trainer takes `rows` in when one process trains."""
    import torch
    from accelerate.data_loader import SeedableRandomSampler

    return SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=seed)


def is_shared_order(sampler: Any) -> bool:
    """Whether `sampler` is such an order, whose `set_epoch` chooses the epoch's."""
    from accelerate.data_loader import SeedableRandomSampler

    return isinstance(sampler, SeedableRandomSampler)


@contextmanager
def datasets_offline(wanted: bool) -> Iterator[None]:
    """Keep `datasets` from retrying for half a minute what is known to be out of reach."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
