#!/usr/bin/env python3
"""Pack the folder for a GPU machine without a network: `make gpu-kit`.

    python benchmarks/gpu/pack.py FOLDER [--python 3.12] [--cuda 130]

FOLDER gets the wheels that a machine with torch and transformers lacks (in the versions of this
environment; the newest, where it has none), the tree, and run.py; then the lines to run there are
printed. Of bitsandbytes only the library of one CUDA version goes along. Not carried, and so not
measured there: scipy, scikit-learn and sacrebleu, which only scores of other tasks need.
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
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from run import EXPECTED, LINES  # noqa: E402 - found by the line above

CARRIED = (
    "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl", "liger-kernel",
    "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection",
    "typer", "annotated-doc", "shellingham", "rich", "markdown-it-py", "mdurl", "pygments",
    "pyyaml", "gguf", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "dill",
    "multiprocess", "xxhash", "pandas", "python-dateutil", "six", "psutil",
    "pytest", "pluggy", "iniconfig",
)  # fmt: skip
"""Everything that the lines import, and that EXPECTED does not name."""
TREE = ("src", "tests", "benchmarks", "scripts", "pyproject.toml")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64")  # fmt: skip
MOST_MIB = 60


def pin(name: str) -> str:
    """Return a requirement: the version that is installed here, or any."""
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


def download(folder: Path, python: str) -> None:
    """Download the wheels of CARRIED for a Python version into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps",
        "--python-version", python, *platforms, "--dest", str(folder), *map(pin, CARRIED),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Take the libraries of other CUDA versions and of other makers out of bitsandbytes.

    Args:
        wheel: written anew, with the list of its files.
        cuda: digits of the version, as in the library's name.

    Raises:
        SystemExit: it has no library for that version.
    """
    smaller = wheel.with_name(wheel.name + ".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        libraries = re.compile(r"bitsandbytes/libbitsandbytes_(?!cpu)(\w+)\.so$")
        names = [found[1] for name in old.namelist() if (found := libraries.match(name))]
        if f"cuda{cuda}" not in names:
            raise SystemExit(f"--cuda {cuda}: bitsandbytes has {', '.join(sorted(names))}.")
        record = []
        for item in old.infolist():
            found = libraries.match(item.filename)
            if (found and found[1] != f"cuda{cuda}") or item.filename.endswith(".dist-info/RECORD"):
                continue
            content = old.read(item)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            record.append(f"{item.filename},sha256={digest},{len(content)}")
            new.writestr(item, content)
        place = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        new.writestr(place, "\n".join([*record, f"{place},,"]) + "\n")
    smaller.replace(wheel)


def copy_tree(folder: Path) -> None:
    """Copy what the lines need of this checkout to `folder`."""
    without = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=without)
        else:
            shutil.copy2(source, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, print the lines, and return 1 if the folder is larger than it may be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="replaced")
    parser.add_argument("--python", default="3.12", help="version of the Python there")
    parser.add_argument("--cuda", default="130", help="CUDA version of the torch there, in digits")
    parser.add_argument("--wheels", type=Path, help="take wheels from this folder, offline")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        partial = Path(temporary) / "kit"
        if asked.wheels:
            shutil.copytree(asked.wheels, partial / "wheels")
        else:
            download(partial / "wheels", asked.python)
            for wheel in (partial / "wheels").glob("bitsandbytes-*.whl"):
                keep_one_library(wheel, asked.cuda)
        copy_tree(partial / "tree")
        shutil.copy2(HERE / "run.py", partial / "run.py")
        shutil.rmtree(asked.folder, ignore_errors=True)
        shutil.copytree(partial, asked.folder)
    size = sum(path.stat().st_size for path in asked.folder.rglob("*") if path.is_file()) / 2**20
    print(f"{asked.folder}: {size:.1f} MiB for Python {asked.python} and CUDA {asked.cuda}; "
          f"expects there: {', '.join(EXPECTED)}, and triton. Run there, each under 10 minutes, "
          "again where one says that it was cut off:\n")  # fmt: skip
    for line in LINES:
        print(f"  python3 {asked.folder.name}/run.py {line}")
    if size > MOST_MIB:
        print(f"error: more than {MOST_MIB} MiB", file=sys.stderr)
    return int(size > MOST_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
