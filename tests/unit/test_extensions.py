"""Extensions are discovered; broken ones are skipped, and duplicate names raise."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftlevel import extensions
from ftlevel.errors import ConfigError
from ftlevel.extensions import Extension, _find_extensions, added, find_extensions, hooks, loaded

ROOT = Path(__file__).parents[2]
Install = Callable[..., None]
HEAD = "from ftlevel.extensions import Command, Extension\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a package with a module and an entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _find_extensions.cache_clear()

    def install_package(name: str, text: str, reference: str | None = None) -> None:
        (tmp_path / f"{name}.py").write_text(HEAD + text, encoding="utf-8")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        point = f"[{extensions.GROUP}]\n{name} = {reference or f'{name}:EXTENSION'}\n"
        (info / "entry_points.txt").write_text(point, encoding="utf-8")

    yield install_package
    _find_extensions.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toy")]:
        del sys.modules[name]


def test_builtin_extras_are_listed_in_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split('[project.entry-points."ftlevel.extras"]\n')[1].split("\n\n")[0]
    listed = re.findall(r'^(\w+) = "([\w.]+):EXTENSION"$', table, re.M)
    folders = sorted(p.parent.name for p in (ROOT / "src/ftlevel/extras").glob("*/__init__.py"))
    assert listed == [(name, f"ftlevel.extras.{name}") for name in folders]


def test_installed_extension_is_found(install):
    install("toyone", 'EXTENSION = Extension(formats={".toy": "toyone:EXTENSION"})\n')
    assert added("formats") == {".toy": ("toyone 1.0", "toyone:EXTENSION")}
    assert isinstance(loaded("formats")[".toy"], Extension)


@pytest.mark.parametrize(
    ("text", "reference", "reason"),
    [
        ("import nothing_of_the_kind\n", None, "ModuleNotFoundError: No module named 'nothing_"),
        ("EXTENSION = 3\n", None, "toytwo:EXTENSION is not an Extension"),
        ("", "toytwo:GONE", "AttributeError: module 'toytwo' has no attribute 'GONE'"),
        ("EXTENSION = Extension(hooks={'gone': 'a:b'})\n", None, "no such hook: gone"),
        ("EXTENSION = Extension(wrong=1)\n", None, "unexpected keyword argument 'wrong'"),
        ("raise SystemError('no')\n", None, "SystemError: no"),
    ],
)
def test_broken_extension_is_skipped_with_warning(text, reference, reason, install, capsys):
    install("toytwo", text, reference)
    sources = {source for source, _ in find_extensions()}
    warning = capsys.readouterr().err
    assert sources == {"ftlevel"}
    assert warning.startswith("ftlevel: warning: toytwo 1.0 cannot be used (")
    assert reason in warning
    assert warning.count("\n") == 1


def test_broken_part_of_extension_is_skipped(install, capsys):
    install(
        "toythree",
        "EXTENSION = Extension(formats={'.toy': 'toythree:Gone'},"
        "hooks={'finish_run': 'toythree_gone:run'})\n",
    )
    assert loaded("formats") == {}
    assert [hook.__module__ for hook in hooks("finish_run")] == ["ftlevel.extras.report.page"]
    assert capsys.readouterr().err.count("toythree 1.0 cannot be used") == 2


def test_duplicate_name_raises(install):
    install("toyfour", "EXTENSION = Extension(tasks={'rank': 'a'})\n")
    with pytest.raises(ConfigError, match="the task 'rank' is defined by ftlevel and by toyfour"):
        added("tasks", ("rank",))
    install("toyfive", "EXTENSION = Extension(tasks={'rank': 'b'})\n")
    _find_extensions.cache_clear()
    with pytest.raises(ConfigError, match=r"toyf\w+ 1.0 and by toyf\w+ 1.0\. Uninstall one"):
        added("tasks")


def run_launch_help(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ftlevel", "launch", "--help"]
    paths = {"PYTHONPATH": f"{folder}:{ROOT / 'src'}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=paths, capture_output=True, text=True, check=False)


def test_duplicate_flag_error_names_both_packages(install, tmp_path):
    install(
        "toysix",
        "def flags():\n    from ftlevel.config.flag import option\n    return [option('--nodes', "
        "'Nodes.', on=('launch',))]\nEXTENSION = Extension(flags=flags)\n",
    )
    process = run_launch_help(tmp_path)
    assert process.returncode == 2
    message = "ftlevel: --nodes of ftlevel launch is defined by ftlevel and by toysix 1.0."
    assert process.stderr.startswith(message)


def test_command_line_works_with_broken_extension(install, tmp_path):
    install("toyseven", "1 / 0\n")
    process = run_launch_help(tmp_path)
    assert process.returncode == 0
    assert "--gpus-per-node" in process.stdout
    assert process.stderr.startswith("ftlevel: warning: toyseven 1.0 cannot be used (ZeroDivision")
    assert process.stderr.count("\n") == 1


def test_method_that_cannot_be_imported_raises(install, tmp_path):
    (tmp_path / "toyspec.py").write_text(
        "from typing import Literal\nfrom ftlevel.config.methods.base import MethodSpec\nclass "
        "Spec(MethodSpec):\n    kind: Literal['toyeight'] = 'toyeight'\n"
    )
    install(
        "toyeight",
        "EXTENSION = Extension(methods={'toyeight': ('toyspec:Spec', 'toygone:METHOD')})\n",
    )
    script = (
        "from ftlevel.config import SPECS\nfrom ftlevel.methods import METHOD_INFO, "
        "METHODS\nassert 'toyeight' in SPECS and 'toyeight' not in METHODS and 'lora' in "
        "METHOD_INFO\nMETHODS['toyeight']\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "PATH": "/usr/bin:/bin"}
    process = subprocess.run(
        [sys.executable, "-c", script], env=paths, capture_output=True, text=True, check=False
    )
    warning, *_, error = process.stderr.splitlines()
    assert warning.startswith("ftlevel: warning: toyeight 1.0 cannot be used (ModuleNotFoundError")
    assert error.startswith(
        "ftlevel.errors.ConfigError: --method toyeight: the method of toyeight 1.0 cannot be "
    )
