"""Files and processes are opened by `safe_io`, and what it opens is what was named."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import ftlevel
from ftlevel.safe_io import (
    escape_json,
    mask_passwords,
    open_existing,
    open_new,
    python_command,
    script_command,
    start_process,
)

SOURCES = Path(ftlevel.__file__).parent
SCRIPTS = dict.fromkeys(
    (f"extras/serving/{name}_script.py" for name in ("llama_cpp", "mlx", "openvino", "vllm")),
    "runs in another Python, without ftlevel, in a directory that check-served has created",
)


def names(node: ast.expr) -> str:
    """Return the dotted name of a function that is called; "?" for parts that are expressions."""
    if isinstance(node, ast.Attribute):
        return f"{names(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def is_written(call: ast.Call, name: str) -> bool:
    """Return whether a call opens a file for writing, or writes one; mode x follows no link."""
    modes = [
        value.value
        for value in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]
    if name.rpartition(".")[2] in ("write_text", "write_bytes"):
        return name != "write_text"  # of artifacts.files
    opens = name in ("open", "os.fdopen") or name.endswith(".open")
    return opens and any(re.fullmatch(r"[wa]\+?[bt]?\+?", mode) for mode in modes)


Rule = Callable[[ast.Call, str], bool]
RULES: dict[str, tuple[Rule, dict[str, str]]] = {
    "files are written by open_new, open_existing and save_text": (
        is_written,
        {
            "extras/rl/reward_worker.py": "a pipe",
            **SCRIPTS,
        },
    ),
    "processes are started by start_process": (
        lambda _, name: bool(re.fullmatch(r"(subprocess\.\w+|os\.(system|popen|exec\w*|spawn\w*|"
                                          r"posix_spawn\w*|startfile))", name)),
        {"safe_io.py": "it is this module"},
    ),
    "modules are imported by name from tables of ftlevel": (
        lambda _, name: bool(re.search(r"(import_module|__import__|spec_from_file_location|"
                                       r"runpy\.\w+|pydoc\.locate|^exec|^eval)$", name)),
        {
            "__init__.py": "names of its own table",
            "__main__.py": "exec of an empty text",
            "extensions.py": "entry points of installed packages",
            "methods/__init__.py": "the table of methods",
            "extras/rl/reward_worker.py": "files that extras.rl.trust allows",
            "tasks/base.py": "the table of tasks",
        },
    ),
    "pickles are read with weights_only": (
        lambda call, name: name in ("pickle.load", "pickle.loads", "joblib.load") or (
            name == "torch.load" and "weights_only" not in {k.arg for k in call.keywords}
        ),
        {},
    ),
    "YAML is read by load_yaml": (
        lambda _, name: bool(re.fullmatch(r"yaml\.(\w*load\w*|compose\w*|parse|scan)", name)),
        {"config/reading.py": "it is this function"},
    ),
    "JSON files are read by read_json and load_json": (
        lambda call, name: name == "json.load" or (
            name == "json.loads" and "read_text" in ast.unparse(call)
        ),
        {
            "data/prepare/dataset.py": "of the user's cache",
            "extras/serving/check.py": "of a process that it has started",
            **SCRIPTS,
        },
    ),
    "texts are printed by typer.echo, echo_styled and Screen, which escape them": (
        lambda call, name: name in ("print", "Console", "raw_stream", "sys.__stdout__.write")
        or (name.endswith(("secho", "style", "Progress")) and name.startswith("typer"))
        or name == "os.write" or "color" in {k.arg for k in call.keywords if name == "typer.echo"},
        {
            "cli/screen.py": "its console escapes",
            "cli/startup.py": "it defines echo_styled",
            **SCRIPTS,
        },
    ),
}  # fmt: skip
"""Rule → what breaks it, and files that may with the reason."""


@pytest.mark.parametrize("rule", RULES)
def test_one_function_for_each_way_to_do_harm(rule):
    breaks, allowed = RULES[rule]
    found = {
        path.relative_to(SOURCES).as_posix(): node.lineno
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and breaks(node, names(node.func))
    }
    others = {file: line for file, line in found.items() if file not in allowed}
    assert not others, rule
    assert set(allowed) <= {*found, *SCRIPTS}, "files that are allowed without need"


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


CLIENTS = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "socket", "ftplib"}
ALLOWED_CLIENTS = {
    "safe_io.py": "send_request",
    "cli/train.py": "a free port of this machine",
    "models/sources.py": "whether the Hub has an address",
    "training/processes.py": "between the processes of a run",
}


def test_urls_are_requested_by_one_function():
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(parse(path)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                modules = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            if CLIENTS.intersection(modules):
                found.add(path.relative_to(SOURCES).as_posix())
    assert found == set(ALLOWED_CLIENTS)


def test_new_file_replaces_link_and_existing_refuses_it(tmp_path):
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
def test_started_python_imports_nothing_from_its_directory(tmp_path, kind):
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


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://me:s/3@h/x", "postgresql://me:s/3@h/x"),  # no password has a slash
        ("x postgresql://me:s@3@h/x y", "x postgresql://me:***@h/x y"),
        ("mysql://h/x?user=me&password=s&a=1", "mysql://h/x?user=me&password=***&a=1"),
        ("https:/me:s@h", "https:/me:***@h"),
        ("http://h:80/x C:/a me@h", "http://h:80/x C:/a me@h"),
    ],
)
def test_passwords_are_masked(text, masked):
    assert mask_passwords(text) == masked


def test_json_without_controls_has_the_same_value():
    value = {"\x9b": "\x1b\u202e\n\ud800\x7f"}
    text = escape_json(json.dumps(value, ensure_ascii=False))
    assert text.isprintable()
    assert json.loads(text) == value
