"""Run the commands on the pages of docs/, and update their output.

    python scripts/docs_commands.py                     # run every block that is marked to run
    python scripts/docs_commands.py docs/tutorials/classes.md --write

A comment above each block of commands says how it is run:

    <!-- run -->              run by `make docs-commands`
    <!-- run in CI -->        also run by a test (tests/integration/test_docs_commands.py)
    <!-- run, fails -->       run, and its last command must fail
    <!-- not run: WHY -->     not run; a test checks its flags

A page's blocks run in page order, in one directory with `.models`, `data` and `recipes`. --write
puts the output of a block into the ```text block below it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_MARK = re.compile(r"<!-- (run in CI|run, fails|run|not run: .+) -->")
_MAX_LINES, _LAST_LINES = 12, 9  # shown lines of an output: at most, and of these the last ones
_WIDTH = 130
_VARYING = re.compile(
    r"\s*(\S*\d+%\||· |rows: (kept|prepared)|(speed|plan) \d|(next |     )ftlevel )"
)
_SPEED = re.compile(r"(  [\d,]+ tok/s|, [\d.,]+ rows/s)$")
"""Progress lines, lines that depend on the machine (cache, speed, memory), and next commands."""


@dataclass(frozen=True)
class Block:
    """Commands on a page, their first line (from 1), and the comment above them in `mark`."""

    page: Path
    line: int
    mark: str
    text: str

    @property
    def where(self) -> str:
        """The location, as `docs/page.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each ftlevel call, without shell syntax."""
        for line in _logical_lines(self.text):
            for command in re.split(r"\s(?:\||&&|;)\s", line):
                call = re.sub(r"^(\$ )?([A-Z_]+=\S* )*", "", command.strip())
                if call.startswith("ftlevel ") and "…" not in call:
                    words = shlex.split(call, comments=True)
                    redirected = (i for i, word in enumerate(words) if word[:1] in (">", "<"))
                    yield words[1 : next(redirected, len(words))]


def _logical_lines(text: str) -> Iterator[str]:
    """Yield the logical lines of a shell script: continued and quoted lines are joined."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending = f"{pending}\n{line}" if pending else line
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # an open quotation
            continue
        yield pending
        pending = ""


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks with commands of a page: shell blocks, and others that call ftlevel."""
    blocks, lines, mark, start, fence = [], page.read_text(encoding="utf-8").splitlines(), "", 0, ""
    for index, line in enumerate(lines):
        if fence and line.strip() == "```":
            text = "\n".join(lines[start:index])
            has_ftlevel = fence != "```text" and re.search(r"^(\$ )?ftlevel ", text, re.MULTILINE)
            if fence in ("```sh", "```bash") or has_ftlevel:
                blocks.append(Block(page, start + 1, mark, text))
            fence, mark = "", ""
        elif not fence and line.startswith("```"):
            fence, start = line.strip(), index + 1
        elif not fence and (marked := _MARK.fullmatch(line.strip())):
            mark = marked[1]
        elif not fence and line.strip():
            if line.startswith("    ftlevel ") and not lines[index - 1].strip():
                indented = itertools.takewhile(lambda text: text.startswith("    "), lines[index:])
                blocks.append(
                    Block(page, index + 1, mark, "\n".join(text[4:] for text in indented))
                )
            mark = ""
    return blocks


def create_directory(directory: Path, models: Path, data: Path) -> None:
    """Create an empty working directory for a page's commands."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, target in ((".models", models), ("data", data), ("recipes", ROOT / "recipes")):
        (directory / name).symlink_to(target.resolve())


def run_block(block: Block, directory: Path) -> tuple[str, float]:
    """Run a block in `directory`; return its output without colors, and its seconds.

    Raises:
        RuntimeError: a command failed, or did not fail although marked so.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    start = time.monotonic()
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=directory, text=True, check=False,
        env={**os.environ, "PATH": path, "COLUMNS": str(_WIDTH), "NO_COLOR": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if bool(result.returncode) != (block.mark == "run, fails"):
        raise RuntimeError(f"{block.where}: exit code {result.returncode}\n{result.stdout}")
    return result.stdout, time.monotonic() - start


def shorten(text: str) -> str:
    """Return an output as shown on a page: long outputs and lines are shortened."""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    lines = [_SPEED.sub("", line) for line in lines if not _VARYING.match(line)]
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - _LAST_LINES], "…", *lines[-_LAST_LINES:]]
    return "\n".join(map(_fit_line, lines))


def _fit_line(line: str) -> str:
    """Return a line of at most `_WIDTH` characters: messages are wrapped, other lines are cut."""
    if line.startswith(("ftlevel: ", "warning: ", "note: ")):
        return textwrap.fill(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def with_output(text: str, block: Block, output: str) -> str:
    """Return a page's `text` with `output` in the ```text block below `block`, if any."""
    fenced = f"{block.text}\n```\n"
    before, separator, after = text.partition(fenced)
    output_block = re.match(r"\n```text\n(.*?)```\n", after, re.DOTALL)
    if not separator or not output_block:
        return text
    return before + fenced + f"\n```text\n{shorten(output)}\n```\n" + after[output_block.end() :]


def main() -> int:
    """Run the pages of the command line; return 1 if a command failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="all by default")
    parser.add_argument("--write", action="store_true", help="update the output on the pages")
    parser.add_argument("--models", type=Path, default=ROOT / ".models")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--place", type=Path, default=ROOT / ".docs-run", help="working directory")
    args = parser.parse_args()
    failed = 0
    for page in [path.resolve() for path in args.pages] or PAGES:
        directory = args.place / page.relative_to(ROOT).with_suffix("")
        create_directory(directory, args.models, args.data)
        for block in (b for b in blocks_of(page) if b.mark.startswith("run")):
            try:
                output, seconds = run_block(block, directory)
            except RuntimeError as error:
                failed += 1
                print(error)
                break  # later blocks depend on it
            print(f"{block.where}: {seconds:.0f} s", flush=True)
            if args.write:
                for name in (".models", "data"):
                    output = output.replace(str((directory / name).resolve()), name)
                output = output.replace(f"{directory.resolve()}/", "")
                text = page.read_text(encoding="utf-8")
                page.write_text(with_output(text, block, output), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
