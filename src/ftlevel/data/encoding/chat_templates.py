"""Chat templates by name or file, for a model that has none.

The template is set on the tokenizer, and so is saved with the adapter and is the one of training,
evaluation and generation alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import read_plain
from ftlevel.config.choices import Choice
from ftlevel.errors import InputError, did_you_mean, listing
from ftlevel.models.upstream.data import check_template

MARKERS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
"""Template → the tokens that its turns are made of, beside BOS and EOS."""

_FOLDER = Path(__file__).parent / "templates"


def choose_chat_template(tokenizer: Any, wish: str | None) -> Choice | None:
    """Give `tokenizer` the chat template that is wished for (mutated).

    Args:
        tokenizer: of the model.
        wish: a name, a Jinja file, or None.

    Returns:
        The line for the screen; None where nothing is wished.

    Raises:
        InputError: no such name or file, a template that does not compile, or one whose turns are
            marked by tokens that the tokenizer does not have.
    """
    if wish is None:
        return None
    had = bool(getattr(tokenizer, "chat_template", None))
    template = _read_named(tokenizer, wish) if wish in MARKERS else _read_file(wish)
    tokenizer.chat_template = template
    reason = "in place of the model's own" if had else "the model has none"
    return Choice("chat template", wish, reason)


def _read_named(tokenizer: Any, name: str) -> str:
    """Return the template called `name`."""
    vocabulary = tokenizer.get_vocab()
    missing = {n: [m for m in markers if m not in vocabulary] for n, markers in MARKERS.items()}
    if missing[name]:
        fitting = [other for other, lacking in missing.items() if not lacking]
        raise InputError(
            f"--chat-template {name}: the tokenizer of {tokenizer.name_or_path} has no token for "
            f"{listing(missing[name])}, so that the model could not learn to stop there. "
            f"Its tokens fit: {listing(fitting)}."
        )
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _read_file(wish: str) -> str:
    """Return the template in the file `wish`."""
    from jinja2 import TemplateSyntaxError

    path = Path(wish).expanduser()
    try:
        template = read_plain(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--chat-template {wish}: neither a name nor a readable file."
            f"{did_you_mean(wish, MARKERS)} Names: {listing(MARKERS)}."
        ) from error
    try:
        check_template(template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"{path}:{error.lineno}: not a Jinja template ({error.message})."
        ) from None
    return template
