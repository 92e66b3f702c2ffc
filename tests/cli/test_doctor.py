"""`doctor` checks the environment and advises on what is missing."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands import doctor as command


def test_doctor_reports_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == (0 if result["ok"] else 1)
    names = {finding["name"] for finding in result["findings"]}
    assert {"ftlevel", "precision", "4 bits", "threads", "memory", "disk here", "Hub"} <= names
    four_bits = next(f for f in result["findings"] if f["name"] == "4 bits")
    assert four_bits["verdict"] == "good"


def test_outdated_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(command.metadata, "version", lambda n: "0.1" if n == "peft" else real(n))
    (finding,) = [f for f in command._versions() if f.name == "peft"]
    assert finding.verdict == "bad"
    assert finding.value.startswith("0.1; needs")
    assert finding.advice.startswith("pip install 'peft>=")


def test_library_with_import_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("libcuda.so is missing")

    (finding,) = command._run(fail)  # type: ignore[arg-type]
    assert finding.verdict == "bad"
    assert "libcuda.so" in finding.value


def test_failed_check_prints_advice_and_exits_1(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    bad = command.CheckResult("peft", "bad", "0.1", "pip install peft")
    monkeypatch.setattr(command, "run_checks", lambda: [bad])
    assert cli.run("doctor", code=1).out == "!! peft  0.1\n         → pip install peft\n"
