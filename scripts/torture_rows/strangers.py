"""The exploits of tests/exploits, which must not work."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator

from exploits import EXPLOITS, SLOW, Scene
from torture_rows.lab import BAD, GOOD, Case, Lab


def strangers(lab: Lab, count: int) -> Iterator[Case]:
    """All exploits, slow ones last, with random names and places; further rounds draw new ones."""
    names = sorted(EXPLOITS, key=SLOW.__contains__)
    for index in range(count):
        name = names[index % len(names)]
        scene = Scene(lab, lab.folder(), lab.random)
        try:
            why = EXPLOITS[name](scene)
        except Exception:  # noqa: BLE001 - the other exploits are run, too
            why = traceback.format_exc()[-2000:]
        yield Case(BAD if why else GOOD, name, why, "data stayed data")
        shutil.rmtree(scene.folder, ignore_errors=True)
