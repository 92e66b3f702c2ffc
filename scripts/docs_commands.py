"""Run the commands on the pages of docs/, and write their output there.

    python scripts/docs_commands.py                     # run every block that is marked so
    python scripts/docs_commands.py docs/tutorials/classes.md --write

Above each block of commands stands a comment that says what becomes of it:

    <!-- run -->              it is run here, by `make docs-commands`
    <!-- run in CI -->        a test runs it too (tests/integration/test_docs_commands.py)
    <!-- run, fails -->       it is run, and its last command has to end with an error
    <!-- not run: WHY -->     nobody runs it; its flags are checked by a test all the same

A page's blocks run in the order of the page, in a directory of its own with `.models`, `data` and
`recipes` in it. With --write a ```text block below a block takes what it printed.
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
_MOST, _LAST = 17, 9  # lines of an output that are shown: all, or the first and so many last
_WIDTH = 130
_PASSING = re.compile(
    r"\s*(\S*\d+%\||· |rows: (kept|prepared)|(speed|plan) \d|(next |     )ftlevel )"
)
_SPEED = re.compile(r"(  [\d,]+ tok/s|, [\d.,]+ rows/s)$")
"""Lines of a terminal's course, of this machine's cache, speed and memory, and next commands."""


@dataclass(frozen=True)
class Block:
    """Commands on a page.

    Attributes:
        page: where they are.
        line: of the first command, from 1.
        mark: what its comment says; empty where there is none.
        text: the commands.
    """

    page: Path
    line: int
    mark: str
    text: str

    @property
    def where(self) -> str:
        """The place, as `docs/page.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each call of ftlevel; what a shell does around it is left out."""
        for line in _whole_lines(self.text):
            for part in re.split(r"\s(?:\||&&|;)\s", line):
                call = re.sub(r"^(\$ )?([A-Z_]+=\S* )*", "", part.strip())
                if call.startswith("ftlevel ") and "…" not in call:
                    words = shlex.split(call, comments=True)
                    redirected = (i for i, word in enumerate(words) if word[:1] in (">", "<"))
                    yield words[1 : next(redirected, len(words))]


def _whole_lines(text: str) -> Iterator[str]:
    """Yield the lines of a shell's text; what is continued or quoted over several is one."""
    held = ""
    for line in text.replace("\\\n", " ").splitlines():
        held = f"{held}\n{line}" if held else line
        try:
            shlex.split(held, comments=True)
        except ValueError:  # a quotation that goes on
            continue
        yield held
        held = ""


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page that hold commands: those of shells, and others with ftlevel."""
    found, lines, mark, start, fence = [], page.read_text(encoding="utf-8").splitlines(), "", 0, ""
    for number, line in enumerate(lines):
        if fence and line.strip() == "```":
            text = "\n".join(lines[start:number])
            called = fence != "```text" and re.search(r"^(\$ )?ftlevel ", text, re.MULTILINE)
            if fence in ("```sh", "```bash") or called:
                found.append(Block(page, start + 1, mark, text))
            fence, mark = "", ""
        elif not fence and line.startswith("```"):
            fence, start = line.strip(), number + 1
        elif not fence and (marked := _MARK.fullmatch(line.strip())):
            mark = marked[1]
        elif not fence and line.strip():
            if line.startswith("    ftlevel ") and not lines[number - 1].strip():
                own = itertools.takewhile(lambda text: text.startswith("    "), lines[number:])
                found.append(Block(page, number + 1, mark, "\n".join(text[4:] for text in own)))
            mark = ""
    return found


def make_place(place: Path, models: Path, data: Path) -> None:
    """Make the directory that a page's commands run in, without what an earlier run left there."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, target in ((".models", models), ("data", data), ("recipes", ROOT / "recipes")):
        (place / name).symlink_to(target.resolve())


def run_block(block: Block, place: Path) -> tuple[str, float]:
    """Run a block in `place`; return what it printed, without colours, and its seconds.

    Raises:
        RuntimeError: a command failed, or did not where it should.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=place, text=True, check=False,
        env={**os.environ, "PATH": path, "COLUMNS": str(_WIDTH), "NO_COLOR": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if bool(done.returncode) != (block.mark == "run, fails"):
        raise RuntimeError(f"{block.where}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout, time.monotonic() - begin


def shorten(text: str) -> str:
    """Return an output as a page shows it: lines that fit, the middle of a long one left out."""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    lines = [_SPEED.sub("", line) for line in lines if not _PASSING.match(line)]
    if len(lines) > _MOST:
        lines = [*lines[: _MOST - _LAST], "…", *lines[-_LAST:]]
    return "\n".join(map(_fitted, lines))


def _fitted(line: str) -> str:
    """Return a line that fits: what is said to the user is wrapped, anything else loses its end."""
    if line.startswith(("ftlevel: ", "warning: ", "note: ")):
        return textwrap.fill(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def with_output(text: str, block: Block, output: str) -> str:
    """Return a page's `text` with `output` in the ```text block below `block`, if there is one."""
    own = f"{block.text}\n```\n"
    before, found, after = text.partition(own)
    shown = re.match(r"\n```text\n(.*?)```\n", after, re.DOTALL)
    if not found or not shown:
        return text
    return before + own + f"\n```text\n{shorten(output)}\n```\n" + after[shown.end() :]


def main() -> int:
    """Run what was asked for; exit 1 where a command failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="all by default")
    parser.add_argument("--write", action="store_true", help="put the output on the pages")
    parser.add_argument("--models", type=Path, default=ROOT / ".models")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--place", type=Path, default=ROOT / ".docs-run", help="where they run")
    wish = parser.parse_args()
    failed = 0
    for page in [path.resolve() for path in wish.pages] or PAGES:
        place = wish.place / page.relative_to(ROOT).with_suffix("")
        make_place(place, wish.models, wish.data)
        for block in (b for b in blocks_of(page) if b.mark.startswith("run")):
            try:
                output, seconds = run_block(block, place)
            except RuntimeError as error:
                failed += 1
                print(error)
                break  # what follows needs it
            print(f"{block.where}: {seconds:.0f} s", flush=True)
            if wish.write:
                for name in (".models", "data"):
                    output = output.replace(str((place / name).resolve()), name)
                output = output.replace(f"{place.resolve()}/", "")
                text = page.read_text(encoding="utf-8")
                page.write_text(with_output(text, block, output), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
