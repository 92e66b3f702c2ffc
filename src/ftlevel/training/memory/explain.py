"""Out of memory: what is an error of it, and what a run can be told to do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ftlevel.config import TrainConfig
from ftlevel.errors import RunError, is_out_of_memory
from ftlevel.training.plan.plan import Plan


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig, plan: Plan) -> Iterator[None]:
    """Turn what a library raises for want of memory into a line that says what takes less.

    Raises:
        RunError: instead of it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise RunError(f"out of memory: {text[:200]}. {_advice(config, plan)}") from error


def _advice(config: TrainConfig, plan: Plan) -> str:
    """Return what is not done yet and takes less memory, the mildest first."""
    train, rows = config.train, config.train.per_device_train_batch_size
    ways = []
    if rows > 1:
        more = train.gradient_accumulation_steps * 2
        ways.append(
            f"--per-device-train-batch-size {rows // 2} --gradient-accumulation-steps {more} "
            "(the same steps)"
        )
    if not train.recomputes:
        ways.append("--gradient-checkpointing")
    if config.quant.kind == "none" and not config.method.quant_problems(
        config.quant.model_copy(update={"kind": "4bit"})
    ):
        ways.append("--quant 4bit")
    if plan.data.max_length:
        ways.append(f"a --max-length below {plan.data.max_length:,}")
    ways.append("a smaller --model")
    return f"What takes less: {'; '.join(ways)}."
