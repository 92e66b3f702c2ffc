"""What a run needs of a device, and whether there is as much: the verdict in a line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.models.hardware import describe_device
from ftlevel.models.memory import device_memory
from ftlevel.models.quantized import as_quant_config, quantization_name, stored_quantization
from ftlevel.training.forecast.cards import Card
from ftlevel.training.forecast.live import ACTIVATIONS, CASTS, GRADIENTS, LOGITS, WORKSPACE
from ftlevel.training.forecast.memory import MemoryForecast, forecast_memory
from ftlevel.training.forecast.process import estimate_process
from ftlevel.training.forecast.shares import GATHERED, REDUCED, describe_shares
from ftlevel.training.plan.plan import Plan

ALLOCATOR = "allocator and context"

CONTEXT_BYTES, SLACK = 600 * 2**20, 0.05
"""What a CUDA context takes, and the share of what comes and goes that torch's allocator has to
spare: an allowance, since no card was at hand to measure either."""

COMES_AND_GOES = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS, GRADIENTS, GATHERED, REDUCED)


@dataclass(frozen=True)
class Device:
    """Where a run is planned.

    Attributes:
        kind: torch device type.
        name: in words.
        memory: its bytes.
        ranks: such devices that the run is shared out among, as `--shard` says.
    """

    kind: str
    name: str
    memory: int
    ranks: int = 1

    @classmethod
    def of(cls, kind: str, card: Card | None = None, ranks: int = 1) -> Device:
        """Return `card`, or the device of this machine of that torch type."""
        if card is not None:
            return cls(kind, card.name, card.memory, ranks)
        name = "the memory of this machine" if kind == "cpu" else describe_device(kind)
        return cls(kind, name, device_memory(kind))

    def forecast(self, config: TrainConfig, plan: Plan) -> MemoryForecast:
        """Return what the run takes, on a GPU with what its context and its allocator take.

        Of several devices it is the one that holds most.

        Raises:
            ConfigError: the step cannot be computed without its numbers.
        """
        context = CONTEXT_BYTES if self.kind == "cuda" else 0
        try:
            found = self._tensors(config, plan, self.memory - context)
        except FtlevelError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"the step of {plan.model.family} with --method {config.method.kind} cannot be "
                f"computed without its weights ({reason}), so its memory is not known. Train with "
                "--max-steps 2: summary.json has the peak."
            ) from error
        if context:
            moving = sum(found.parts.get(part, 0) for part in COMES_AND_GOES)
            found.parts[ALLOCATOR] = context + int(SLACK * moving)
        return found

    def _tensors(self, config: TrainConfig, plan: Plan, memory: int) -> MemoryForecast:
        if self.ranks == 1:
            return forecast_memory(config, plan, memory)
        way = config.train.shard
        shares = describe_shares(config, plan)
        saved = 0 if way == "none" else int(sum(shares.saved(self.ranks).values()))
        return shares.of_a_rank(forecast_memory(config, plan, memory + saved), self.ranks, way)


@dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        parts: part → bytes at the peak.
        at: the moment of the peak.
        device: what is planned for.
        tokens: places of the fullest micro-batch.
        recomputed_peak: of a run that will recompute blocks until it fits, with all of them; None
            of another, and of one that fits as it is.
        process: bytes of the whole process, tensors among them; None where memory of its own, as a
            GPU's, is what runs out.
    """

    parts: dict[str, int]
    at: str
    device: Device
    tokens: int
    recomputed_peak: int | None = None
    process: int | None = None

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def does_fit(self) -> bool:
        """Whether there is as much memory, with blocks recomputed where the run does so itself."""
        most = self.process or self.peak
        return min(most, self.recomputed_peak or most) <= self.device.memory

    def verdict(self) -> str:
        """Return it in a line."""
        peak, memory = (f"{size / 2**30:,.2f} GiB" for size in (self.peak, self.device.memory))
        word = "fits" if self.does_fit else "does not fit"
        if self.recomputed_peak is not None:
            least = f"{self.recomputed_peak / 2**30:,.2f} GiB"
            word += f" with blocks recomputed, as auto does ({least} with all of them)"
        whole = "" if self.process is None else f", {self.process / 2**30:,.2f} GiB the process"
        return f"peak {peak}{whole} of {memory} ({self.device.name}), at the {self.at}: {word}"


def find_need(config: TrainConfig, plan: Plan, device: Device) -> Need:
    """Return what the run that `plan` is needs of `device`.

    Raises:
        ConfigError: as `Device.forecast` does; a base that another library than bitsandbytes
            quantized.
    """
    _check_quantization(plan)
    found = device.forecast(config, plan)
    shares_memory = device.kind == "cpu" and device.ranks == 1
    process = estimate_process(config, plan, found) if shares_memory else None
    need = Need(found.parts, found.at, device, found.tokens, process=process)
    chooses = config.train.gradient_checkpointing is None and device.kind == "cuda"
    if need.does_fit or not chooses:
        return need
    recomputing = config.train.model_copy(update={"gradient_checkpointing": True})
    least = device.forecast(config.model_copy(update={"train": recomputing}), plan).peak
    return replace(need, recomputed_peak=least if least < need.peak else None)


def _check_quantization(plan: Plan) -> None:
    """Refuse a checkpoint that another library than bitsandbytes quantized."""
    stored = stored_quantization(plan.model.config)
    if stored is not None and as_quant_config(stored) is None:
        raise ConfigError(
            f"--model {plan.model.source.name} is quantized by {quantization_name(stored)}, "
            "whose memory cannot be planned: it is known of plain models and of bitsandbytes'. "
            "Plan for the model it was made from, with --quant."
        )
