"""Chat template rendering, private settings of Trainer and datasets, and minimum versions.

Versions are also checked at run time, because a source tree on `PYTHONPATH` bypasses pip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

from packaging.version import Version

from ftlevel.models.untrusted import call_in_fork, limit_memory, limit_time

_SECONDS = 10.0  # timeout; templates usually take microseconds
_BYTES = 1 << 30


def apply_template(
    turns: Sequence[Any], template: str, **kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the rendered chat, and assistant spans if `return_assistant_tokens_mask` is set.

    Raises TimeoutError after 10 seconds, MemoryError above 1 GB (Linux), and the template's errors.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    def render() -> Any:
        with limit_time(_SECONDS), limit_memory(_BYTES):
            return render_jinja_template([list(turns)], chat_template=template, **kwargs)

    texts, spans = call_in_fork(render, _SECONDS + 1) if _is_unbounded(template) else render()
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


@lru_cache(maxsize=64)
def _is_unbounded(template: str) -> bool:
    """Returns whether one operation in `template` may take forever: of integers of any size.

    Bounded are operations with a literal on their right, such as `loop.index0 % 2`.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        lexed = Environment().lex(template)
        tokens = [(kind, value) for _, kind, value in lexed if kind != "whitespace"]
    except TemplateSyntaxError:  # rendering reports it
        return False
    return any(
        value == "**"
        or (kind, value) == ("name", "round")
        or (value in ("*", "/", "//", "%") and next_kind not in ("integer", "float", "string"))
        for (kind, value), (next_kind, _) in pairwise([*tokens, ("", "")])
        if kind in ("operator", "name")
    )


def check_template(template: str) -> None:
    """Compile a chat template; raises `TemplateSyntaxError` or, after 10 s, `TimeoutError`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def compile_() -> None:
        render_jinja_template([], chat_template=template)

    if _is_unbounded(template):
        call_in_fork(compile_, _SECONDS)
    else:
        compile_()


def shared_order() -> Any:
    """Returns accelerate's class `SeedableRandomSampler`: all processes draw the same order."""
    from accelerate.data_loader import SeedableRandomSampler

    return SeedableRandomSampler


def move_batches(loader: Any, args: Any) -> Any:
    """Returns `loader`, whose rows are one process's, with batches moved like those of Trainer.

    `args` are the `TrainingArguments`. The next batch is copied before a batch is returned.
    """
    from accelerate.data_loader import prepare_data_loader

    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,  # else the rows would be divided again
        process_index=0,
        put_on_device=True,
        non_blocking=args.accelerator_config.non_blocking,
    )


@contextmanager
def datasets_offline(enabled: bool) -> Iterator[None]:
    """If `enabled`, set `datasets` offline inside the `with` block, to avoid long retries."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or enabled
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def leave_sharded(trainer: Any) -> None:
    """Keep `trainer` (modified) from wrapping its sharded model: DDP does not support DTensors."""
    trainer.is_distributed_loading_by_transformers = True


def use_one_gpu(arguments: Any) -> None:
    """Set one GPU per process in the `TrainingArguments` (modified): no `nn.DataParallel`."""
    arguments._n_gpu = min(arguments.n_gpu, 1)  # reading n_gpu initializes _n_gpu


MIN_VERSIONS = {"torch": "2.8", "transformers": "5.25", "peft": "0.21", "accelerate": "1.15"}
"""Library -> minimum version, as in pyproject.toml."""


def get_outdated_libraries() -> list[str]:
    """Returns an error message for each missing or outdated library."""
    failures = []
    for name, minimum in MIN_VERSIONS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = ""
        if not installed or Version(installed) < Version(minimum):
            has = f"{name} {installed} is installed" if installed else f"{name} is not installed"
            failures.append(
                f"{has}, and ftlevel needs {name} {minimum} or later. "
                f'pip install --upgrade "{name}>={minimum}".'
            )
    return failures
