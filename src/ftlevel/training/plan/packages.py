"""Packages that only some settings need: found missing before the run, not in the middle of it."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.fast.attention.hub import fetch_kernel
from ftlevel.models.upstream.versions import find_old_libraries


def check_packages(config: TrainConfig) -> None:
    """Refuse libraries that are too old, and what needs a package that is not installed.

    Raises:
        ConfigError: naming the package.
        InputError: as `fetch_kernel` does.
    """
    problems = find_old_libraries()
    for wish in config.output.report_to:
        if not find_spec(wish):
            problems.append(
                f"--report-to {wish} needs the package {wish}, which is not installed. "
                f'pip install "ftlevel[{wish}]", or drop it.'
            )
    if config.model.attn_implementation == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            problems.append(
                "model.attn_implementation flash_attention_2 needs a CUDA device and the package "
                "flash-attn, and not both are here. Use sdpa, or leave it at auto."
            )
    if named := config.speed.attention_kernel:
        if torch.cuda.is_available():
            fetch_kernel(named)
        else:
            problems.append(
                f"speed.attention_kernel {named} is for an NVIDIA GPU, and none is here. Drop it: "
                "a CPU attends by an attention of its own."
            )
    if problems:
        raise ConfigError(problems)
