"""What a step takes of a device's memory: the forecast of its tensors, and what is beside them."""

from __future__ import annotations

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.training.forecast.live import ACTIVATIONS, GRADIENTS, LOGITS, WORKSPACE
from ftlevel.training.forecast.memory import MemoryForecast, forecast_memory
from ftlevel.training.plan.plan import Plan

ALLOCATOR = "allocator and context"

CONTEXT_BYTES, SLACK = 600 * 2**20, 0.05
"""What a CUDA context takes, and the share of what comes and goes that torch's allocator has to
spare: an allowance, since no card was at hand to measure either."""

COMES_AND_GOES = (ACTIVATIONS, LOGITS, WORKSPACE, GRADIENTS)


def forecast_step(config: TrainConfig, plan: Plan) -> MemoryForecast:
    """Return the forecast of the run that `plan` is.

    Raises:
        ConfigError: its step cannot be computed without numbers.
    """
    try:
        return forecast_memory(config, plan)
    except FtlevelError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"the step of {plan.model.family} with --method {config.method.kind} cannot be "
            f"computed without its weights ({reason}), so its memory is not known. Train with "
            "--max-steps 2: summary.json has the peak."
        ) from error


def with_reserve(forecast: MemoryForecast, device: str) -> dict[str, int]:
    """Return the parts, on a GPU with what its context and its allocator take."""
    if device != "cuda":
        return forecast.parts
    moving = sum(forecast.parts.get(part, 0) for part in COMES_AND_GOES)
    return {**forecast.parts, ALLOCATOR: CONTEXT_BYTES + int(SLACK * moving)}


def bytes_on(forecast: MemoryForecast, device: str) -> int:
    """Return the bytes at the peak, with what the device takes beside the tensors."""
    return sum(with_reserve(forecast, device).values())
