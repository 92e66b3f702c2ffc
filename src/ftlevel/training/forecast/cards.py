"""GPUs by name: memory, and what the makers' data sheets say of their speed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftlevel.errors import ConfigError, did_you_mean, listing

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as it is shown.
        memory: bytes.
        tflops: dense products in bfloat16 with sums in float32, 10¹² a second; 0 if not known.
        bandwidth: of its memory, 10⁹ bytes a second; 0 if not known.
        link: 10⁹ bytes a second, each way, to the other cards of its machine; 0 if not known.
    """

    name: str
    memory: int
    tflops: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0


_NVLINK_4, _NVLINK_3, _PCIE_5, _PCIE_4, _PCIE_3 = 18 * 20.6, 12 * 20.0, 48.0, 24.0, 12.0
"""What NCCL reckons with: 20.6 and 20.0 for each NVLink of Hopper and Ampere, of which these cards
have 18 and 12, and 12 for PCIe 3 x16, doubled by each generation (src/graph/topo.h)."""


def _card(name: str, gib: int, tflops: float, bandwidth: float, link: float) -> Card:
    return Card(name, gib * GIB, tflops, bandwidth, link)


CARDS = {
    "h200": _card("H200 SXM", 141, 989, 4800, _NVLINK_4),
    "h100": _card("H100 SXM", 80, 989, 3350, _NVLINK_4),
    "h100-pcie": _card("H100 PCIe", 80, 756, 2000, _PCIE_5),
    "a100": _card("A100 80 GB SXM", 80, 312, 2039, _NVLINK_3),
    "a100-40gb": _card("A100 40 GB", 40, 312, 1555, _NVLINK_3),
    "l40s": _card("L40S", 48, 362, 864, _PCIE_4),
    "a6000": _card("RTX A6000", 48, 155, 768, _PCIE_4),
    "a10": _card("A10", 24, 125, 600, _PCIE_4),
    "l4": _card("L4", 24, 121, 300, _PCIE_4),
    "rtx4090": _card("RTX 4090", 24, 165, 1008, _PCIE_4),
    "rtx3090": _card("RTX 3090", 24, 71, 936, _PCIE_4),
    "t4": _card("T4", 16, 65, 320, _PCIE_3),
}
"""Of the makers' data sheets; the T4 has no bfloat16, its figure is of float16."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)")


def read_card(wish: str) -> Card:
    """Return the card that `wish` names, or one with so much memory: `h100`, `24GB`.

    Raises:
        ConfigError: it is neither.
    """
    name = wish.strip().lower().replace(" ", "-").replace("_", "-")
    if name in CARDS:
        return CARDS[name]
    if size := _SIZE.fullmatch(name):
        return Card(f"a GPU of {size[1]} GiB", int(float(size[1]) * GIB))
    raise ConfigError(
        f"--gpu {wish}: no such card is known.{did_you_mean(name, CARDS)} Known: "
        f"{listing(CARDS)}. Or give its memory: --gpu 24GB."
    )
