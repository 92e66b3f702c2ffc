"""Tests that the hidden size of every family is known; default learning rates depend on it."""

from __future__ import annotations

import pytest

from ftlevel.models.kinds import width_of
from unit.models.meta_models import tiny_config
from unit.models.tiny_configs import HIDDEN, TINY


@pytest.mark.parametrize("family", TINY)
def test_width_of_every_family(family):
    assert width_of(tiny_config(family)) == HIDDEN
