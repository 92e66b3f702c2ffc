"""transformers' continuous batching with a logits processor of ftlevel's own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)


class RequestProcessor(ContinuousBatchingLogitsProcessor):
    """Logits processor that has one int32 argument per token, computed from its request."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the declaration is transformers'
    ignored_kwargs = ()


def create_manager(
    model: Any, settings: GenerationConfig, config: ContinuousBatchingConfig, processor: Any
) -> Any:
    """Returns a `ContinuousBatchingManager` whose logits are processed by `processor` only."""
    manager = model.init_continuous_batching(settings, config)
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    return manager


def parse_request_id(request_id: str) -> tuple[str, int]:
    """Returns the id that was given to a request, and the number of its copy, from 0."""
    name, _, child = request_id.partition("__child#")
    return name, int(child) + 1 if child else 0


def count_tokens(request: Any) -> int:
    """Returns the tokens of a scheduled request, prompt included, that the batch has computed.

    The scheduler runs ahead of the tokens that the request has, so these cannot be counted.
    """
    return int(request.state.position_offset)


def get_thread_error(manager: Any) -> Exception | None:
    """Returns the error that ended the thread of `manager`."""
    error: Exception | None = manager.background_thread_status.fatal_error
    return error


@contextlib.contextmanager
def silence_manager() -> Iterator[None]:
    """Disable the log of continuous batching, which repeats errors with their traceback."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
