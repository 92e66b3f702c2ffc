"""What a teacher is refused with, before weights load."""

from __future__ import annotations

import pytest

from ftlevel.cli.app import run

REFUSED = [
    (["--kd-ratio", "0.2"], "--kd-ratio needs --teacher MODEL. Add it, or drop the flag."),
    (["--teacher", "x", "--kd-ratio", "0"], "--kd-ratio: 0.0 is out of range"),
    (["--teacher", "x", "--kd-top-k", "0"], "--kd-top-k"),
    (["--teacher", "x", "--task", "masked-lm"], "--teacher is for tasks that write text"),
    (["--teacher", "x", "--task", "preference"], "--teacher is for tasks that write text"),
    (["--teacher", "x", "--label-smoothing", "0.1"], "Drop one of them."),
    (["--teacher", "x", "--streaming", "--max-steps", "2"], "Drop one of them."),
    (["--teacher", "x", "--set", "distillation.jsd_beta=0.3"], "does not read it; jsd does."),
    (["--teacher", "nowhere"], "--teacher nowhere: no such directory"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_a_teacher_is_refused(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *arguments, "--dry-run"]) == 2
    told = capfd.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if line.startswith("ftlevel")]
    assert len(lines) == 1
    assert words in lines[0]
