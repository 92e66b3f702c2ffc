"""Packages that only some settings need: found missing before the run, not in the middle of it."""

from __future__ import annotations

from importlib.util import find_spec

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError

_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def check_packages(config: TrainConfig) -> None:
    """Refuse a tracker or an attention kernel whose package is not installed.

    Raises:
        ConfigError: naming the package.
    """
    problems = []
    wish = config.output.report_to
    names = _TRACKERS.get(wish, ())
    if names and not any(find_spec(name) for name in names):
        problems.append(
            f"--report-to {wish} needs the package {names[0]}, which is not installed. "
            f"pip install {names[0]}, or drop --report-to."
        )
    if config.model.attn_implementation == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            problems.append(
                "model.attn_implementation flash_attention_2 needs a CUDA device and the package "
                "flash-attn, and not both are here. Use sdpa, or leave it at auto."
            )
    if problems:
        raise ConfigError(problems)
