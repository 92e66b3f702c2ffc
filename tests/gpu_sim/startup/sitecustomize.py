"""Installs the simulated device in every Python process that has this folder on its path."""

import os
import sys
from pathlib import Path

if os.environ.get("SIMULATED_LIBRARY"):
    sys.path.append(str(Path(__file__).parents[2]))
    from gpu_sim import device

    device.install_on_import()
