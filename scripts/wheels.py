"""Download single packages from PyPI as files, checked by SHA-256, without installing them.

Used by the other scripts. This module knows pip and zip archives, not models or data.
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

# pip's errors when the index cannot be reached, as opposed to a missing package.
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
    """A package cannot be downloaded or is not the expected one."""

    exit_code = 1


class NoNetworkError(FetchError):
    """The package index cannot be reached from this machine."""

    exit_code = 3


@dataclass(frozen=True)
class Package:
    """One release of a package on PyPI, with the SHA-256 of its wheel.

    For a package with compiled parts, `abi` (such as `cp311`) selects the Linux x86-64 wheel.
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
        """Return the start of the wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-"


def fetch_wheel(package: Package, folder: Path) -> Path:
    """Return the path of the package's wheel in `folder`, downloading it if needed.

    The download goes to a temporary folder first, so an interrupted one leaves no partial file.

    Raises:
        NoNetworkError: the index cannot be reached.
        FetchError: pip fails for another reason, or the file has another digest.
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

    The target directory appears atomically.
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

    If another process was faster, its result stays and this one is dropped.
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
    wheels = sorted(folder.glob(f"{package.wheel_prefix}*.whl"))
    return wheels[0] if wheels else None


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
    """Return the pip flags that select the wheel of another Python and platform."""
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
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise FetchError(
            f"{sys.executable} has no pip, which downloads {package.pin}. "
            f"Run: {sys.executable} -m ensurepip"
        )
    if any(sign in result.stderr for sign in NETWORK_SIGNS):
        raise NoNetworkError(
            f"Cannot reach the package index to download {package.pin}. "
            "Connect this machine, or name a folder that holds the wheel with --wheels."
        )
    last = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no message"
    raise FetchError(f"pip could not download {package.pin}: {last}")
