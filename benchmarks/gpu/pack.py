#!/usr/bin/env python3
"""Pack the folder for a GPU machine without a network: `make gpu-kit`.

    python benchmarks/gpu/pack.py FOLDER [--python 3.12] [--cuda 130]

FOLDER gets the wheels that a machine with torch and transformers lacks (in the versions of this
environment, else the newest), the source tree, and run.py; then the commands for the machine are
printed. bitsandbytes is reduced to the library of one CUDA version. scipy, scikit-learn and
sacrebleu are not included; only metrics of other tasks need them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = Path(__file__).resolve().parent
sys.path.insert(0, str(DIRECTORY))

from run import EXPECTED, LINES  # noqa: E402 - found by the line above

PACKAGES = (
    "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl", "liger-kernel",
    "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection",
    "typer", "annotated-doc", "shellingham", "rich", "markdown-it-py", "mdurl", "pygments",
    "pyyaml", "gguf", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "dill",
    "multiprocess", "xxhash", "pandas", "python-dateutil", "six", "psutil",
    "pytest", "pluggy", "iniconfig",
)  # fmt: skip
"""Packages that the lines import and that are not in EXPECTED."""
TREE = ("src", "tests", "benchmarks", "scripts", "pyproject.toml")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64")  # fmt: skip
MAX_MIB = 60


def pin(name: str) -> str:
    """Return a requirement with the installed version, or without version."""
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


def download(folder: Path, python: str) -> None:
    """Download the wheels of PACKAGES for a Python version into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps",
        "--python-version", python, *platforms, "--dest", str(folder), *map(pin, PACKAGES),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def reduce_bitsandbytes(wheel: Path, cuda: str) -> None:
    """Remove the libraries of other CUDA versions and other vendors from bitsandbytes.

    Args:
        wheel: the wheel, which is rewritten with its RECORD.
        cuda: digits of the CUDA version, as in the library's name.

    Raises:
        SystemExit: there is no library for that version.
    """
    partial = wheel.with_name(wheel.name + ".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
        libraries = re.compile(r"bitsandbytes/libbitsandbytes_(?!cpu)(\w+)\.so$")
        names = [match[1] for name in old.namelist() if (match := libraries.match(name))]
        if f"cuda{cuda}" not in names:
            raise SystemExit(f"--cuda {cuda}: bitsandbytes has {', '.join(sorted(names))}.")
        record = []
        for item in old.infolist():
            match = libraries.match(item.filename)
            if (match and match[1] != f"cuda{cuda}") or item.filename.endswith(".dist-info/RECORD"):
                continue
            content = old.read(item)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            record.append(f"{item.filename},sha256={digest},{len(content)}")
            new.writestr(item, content)
        record_path = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        new.writestr(record_path, "\n".join([*record, f"{record_path},,"]) + "\n")
    partial.replace(wheel)


def copy_tree(folder: Path) -> None:
    """Copy the required files of this checkout to `folder`."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, print the commands, and return 1 if the folder is too large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="output directory, replaced")
    parser.add_argument("--python", default="3.12", help="Python version of the machine")
    parser.add_argument(
        "--cuda", default="130", help="CUDA version of the machine's torch, in digits"
    )
    parser.add_argument("--wheels", type=Path, help="directory of wheels to use, offline")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        partial = Path(temporary) / "kit"
        if args.wheels:
            shutil.copytree(args.wheels, partial / "wheels")
        else:
            download(partial / "wheels", args.python)
            for wheel in (partial / "wheels").glob("bitsandbytes-*.whl"):
                reduce_bitsandbytes(wheel, args.cuda)
        copy_tree(partial / "tree")
        shutil.copy2(DIRECTORY / "run.py", partial / "run.py")
        shutil.rmtree(args.folder, ignore_errors=True)
        shutil.copytree(partial, args.folder)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file()) / 2**20
    print(f"{args.folder}: {size:.1f} MiB for Python {args.python} and CUDA {args.cuda}; "
          f"expects on the machine: {', '.join(EXPECTED)}, and triton. Run there, each under 10 "
          "minutes, and again if incomplete:\n")  # fmt: skip
    for line in LINES:
        print(f"  python3 {args.folder.name}/run.py {line}")
    if size > MAX_MIB:
        print(f"error: more than {MAX_MIB} MiB", file=sys.stderr)
    return int(size > MAX_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
