"""Three doors for data: a chat's text, Trainer's order of rows, and staying off the network.

Trainer's private names, beside those that our subclass overrides.

The libraries' releases that ftlevel needs, for whoever runs it from a source tree.

pip asks for the same, and a test compares the two; but a tree on `PYTHONPATH` was never installed,
and an older transformers would stop in the middle of a run at a name that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from ftlevel.models.untrusted import ending_in, taking_at_most

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


def leave_sharded(trainer: Any) -> None:
    """Have Trainer leave a model as it is (mutated), of which each process holds a part.

    It does so with models that transformers has sharded as it loaded them, and has accelerate wrap
    no other in DDP, which takes no DTensors. Asked for in its constructor, it would refuse to
    write checkpoints; `training.sharding` writes them.

    Args:
        trainer: a Trainer before its first step.
    """
    trainer.is_distributed_loading_by_transformers = True


def use_one_gpu(arguments: Any) -> None:
    """Have Trainer use one GPU of a process (mutated), however many it sees.

    With several it wraps the model in `nn.DataParallel`, which cuts the rows of a step over
    threads, or takes as many rows more a step: neither is the step that was planned. Each process
    of a run has a GPU of its own.

    Args:
        arguments: `TrainingArguments`.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # n_gpu sets it up


LOWEST = {"torch": "2.8", "transformers": "5.24", "peft": "0.21", "accelerate": "1.15"}
"""Library → its lowest release, as in pyproject.toml."""


def find_old_libraries() -> list[str]:
    """Return a sentence for each library that is too old or not there."""
    problems = []
    for name, lowest in LOWEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        if not found or Version(found) < Version(lowest):
            has = f"{name} {found} is installed" if found else f"{name} is not installed"
            problems.append(
                f"{has}, and ftlevel needs {name} {lowest} or later. "
                f'pip install --upgrade "{name}>={lowest}".'
            )
    return problems
