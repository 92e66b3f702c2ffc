"""Files and processes are opened by `safe_io`, and what it opens is what was named."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

import ftlevel
from ftlevel.safe_io import open_existing, open_new, python_command, script_command, start_process

SOURCES = Path(ftlevel.__file__).parent
_STARTS = {
    "Popen",
    "run",
    "call",
    "check_call",
    "check_output",
    "system",
    "popen",
    "execv",
    "execvp",
}


def find_process_starts(tree: ast.AST) -> list[int]:
    """Return the lines that call a function of `subprocess` or `os` which starts a process."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("subprocess", "os")
        and node.func.attr in _STARTS
    ]


def test_processes_are_started_by_one_function() -> None:
    found = {
        path.relative_to(SOURCES).as_posix(): lines
        for path in SOURCES.rglob("*.py")
        if (lines := find_process_starts(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert list(found) == ["safe_io.py"]


def test_new_file_replaces_link_and_existing_refuses_it(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    with pytest.raises(OSError, match="link"):
        open_existing(link)
    with open_new(link) as file:
        file.write("new")
    with open_existing(link) as file:
        file.write(" text")
    assert (link.read_text(), link.is_symlink(), target.read_text()) == ("new text", False, "mine")


@pytest.mark.parametrize("kind", ["module", "script"])
def test_started_python_imports_nothing_from_its_directory(tmp_path: Path, kind: str) -> None:
    (tmp_path / "selectors.py").write_text("print('imported')")
    script = tmp_path / "script.py"
    script.write_text("import selectors, sys; print(sys.argv[1:])")
    command = python_command("asyncio", "--help")
    if kind == "script":
        command = script_command(command[0], script, "a")
    process = start_process(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output, _ = process.communicate()
    assert "imported" not in output
    assert kind == "module" or output == "['a']\n"
