"""Three doors for data: a chat's text, Trainer's order of rows, and staying off the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ftlevel.models.strangers.memory_limit import taking_at_most
from ftlevel.models.strangers.time_limit import ending_in

_SECONDS = 10.0  # a template takes some microseconds
_BYTES = 1 << 30


def apply_template(
    turns: Sequence[Any], template: str, **settings: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat; with `return_assistant_tokens_mask` the spans that are marked too.

    Raises:
        jinja2.TemplateError, ValueError, TypeError: the template refuses the turns.
        TimeoutError: it took more than ten seconds.
        MemoryError: it asked for more than a gigabyte (on Linux).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with ending_in(_SECONDS), taking_at_most(_BYTES):
        texts, spans = render_jinja_template([list(turns)], chat_template=template, **settings)
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def check_template(template: str) -> None:
    """Compile a chat template and render nothing; raise `TemplateSyntaxError` if it is none."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template([], chat_template=template)


def shared_order() -> Any:
    """Return the class of the sampler that Trainer takes rows by when one process trains."""
    from accelerate.data_loader import SeedableRandomSampler

    return SeedableRandomSampler


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
