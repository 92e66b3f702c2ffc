"""The example package of docs/extend.md: installed, and each of its parts used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from additions.tree import METHOD
from forked import Forked

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
ADDITIONS = ROOT / "tests/additions"


def run_commands(commands: list[str]) -> None:
    """Import ftlevel and run several commands in this process."""
    from ftlevel.cli.app import run

    for command in commands:
        assert run(command.split()) == 0, command


def write_toy_package(folder: Path) -> None:
    """Write the page's package into `folder`, as pip installs it."""
    toy, info = folder / "toy", folder / "toy-1.0.dist-info"
    toy.mkdir()
    info.mkdir()
    extension, command = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (toy / "__init__.py").write_text(extension, encoding="utf-8")
    (toy / "command.py").write_text(command, encoding="utf-8")
    spec, method = METHOD.files.values()
    (toy / "spec.py").write_text(spec, encoding="utf-8")
    method = method.replace("ftlevel.config.methods.scale", "toy.spec")
    (toy / "method.py").write_text(f"{method}\nMETHOD = METHODS['scale']\n", encoding="utf-8")
    for name, source in (("task", "rank"), ("key_value", "key_value"), ("names", "names")):
        (toy / f"{name}.py").write_text((ADDITIONS / f"{source}.py").read_text(encoding="utf-8"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    point = re.search(r"```toml\n\[project.entry-points\.\"(.*)\"\]\n(.*) = \"(.*)\"\n", PAGE)
    assert point is not None
    (info / "entry_points.txt").write_text(f"[{point[1]}]\n{point[2]} = {point[3]}\n")


@pytest.fixture(scope="module")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_package(folder)
    rows = (f"first=a {i};second=b {i};better={'first' if i % 2 else 'second'}" for i in range(24))
    (folder / "rows.kv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def python_path(package_dir: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(package_dir), str(ROOT / "src")])
    return {**os.environ, "PYTHONPATH": paths}


def run_program(package_dir: Path, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "ftlevel", *arguments],
        cwd=package_dir, env=python_path(package_dir), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "warning: toy" not in process.stderr
    return process.stdout


def test_extension_command_is_listed_and_runs(package_dir: Path) -> None:
    listed = run_program(package_dir, "--help")
    assert re.search(r"shout +Print a text in capitals\.", listed)
    output = run_program(package_dir, "shout", "hi", "--times", "2", "--json")
    assert json.loads(output) == {"text": "HI HI"}


@pytest.mark.slow
def test_extension_method_task_formats_and_hook_are_used(package_dir: Path) -> None:
    common = "--task rank --dataset rows.kv"
    commands = [
        f"preview {common}",
        f"train {common} --method scale --max-steps 2 --step-size 0.01 --output-dir run -q",
        "export run --format names --out run.names -q",
    ]
    process = Forked(
        call=(run_commands, (commands,)), imported="libraries", cwd=package_dir,
        env=python_path(package_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert "warning: toy" not in error
    summary = json.loads((package_dir / "run/summary.json").read_text(encoding="utf-8"))
    assert (summary["task"], summary["method"]) == ("rank", "scale")
    assert "learning_rate: 0.01" in (package_dir / "run/config.yaml").read_text()
    assert (package_dir / "run/steps.txt").read_text() == "2"
    assert (package_dir / "run.names").read_text().count("\n") > 5


def test_documented_files_and_hooks_exist() -> None:
    from ftlevel.extensions import HOOKS

    paths = re.findall(r"`((?:src|tests|docs)/[\w./-]+)`", PAGE)
    assert len(paths) > 6
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert set(re.findall(r"^\| `(\w+)` \| (?:at|by|when) ", PAGE, re.M)) == set(HOOKS)
