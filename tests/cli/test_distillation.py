"""Invalid distillation arguments, rejected before weights load."""

from __future__ import annotations

import pytest

from command_line import Cli

INVALID = [
    (["--kd-ratio", "0.2"], "--kd-ratio 0.2 needs --teacher MODEL. Add"),
    (["--teacher", "x", "--kd-ratio", "0"], "--kd-ratio: 0.0 is out of range"),
    (["--teacher", "x", "--kd-top-k", "0"], "--kd-top-k"),
    (
        ["--teacher", "x", "--task", "masked-lm"],
        "cannot be used with --task masked-lm: it is for text-g",
    ),
    (
        ["--teacher", "x", "--task", "preference"],
        "cannot be used with --task preference: it is for te",
    ),
    (["--teacher", "x", "--label-smoothing", "0.1"], "Drop one of them."),
    (
        ["--teacher", "x", "--set", "distillation.jsd_beta=0.3"],
        "no effect with --divergence forward-kl: it is for jsd",
    ),
    (["--teacher", "nowhere"], "--teacher nowhere: no such directory"),
]


@pytest.mark.usefixtures("capfd")
@pytest.mark.parametrize(("arguments", "message"), INVALID)
def test_invalid_teacher_arguments_are_rejected(
    arguments: list[str], message: str, cli: Cli
) -> None:
    output = cli.run("train", *arguments, "--dry-run", code=2)
    lines = [line for line in (output.out + output.err).splitlines() if line.startswith("ftlevel")]
    assert len(lines) == 1
    assert message in lines[0]
