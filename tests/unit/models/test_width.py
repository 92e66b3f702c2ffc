"""Every family says how wide its hidden states are, by which learning rates are chosen."""

from __future__ import annotations

import pytest

from ftlevel.models.kinds import width_of
from unit.models.meta_models import tiny_config
from unit.models.tiny_configs import HIDDEN, TINY


@pytest.mark.parametrize("family", TINY)
def test_the_width_of_every_family_is_known(family: str) -> None:
    assert width_of(tiny_config(family)) == HIDDEN
