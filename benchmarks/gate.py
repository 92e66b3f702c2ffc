#!/usr/bin/env python3
"""What the gate sees: rows with a fault planted among real ones, and real rows without.

    python benchmarks/gate.py
    python benchmarks/gate.py --sets chat wordnet-define --seed 1
    python benchmarks/gate.py --swapped

For each set of data/ the first 500 training rows and, at their end, 10 rows of each kind of fault,
all at once, go through `prepare_data` as `ftlevel preview` does; a planted row is found if a
finding of its kind names its line. Near duplicates are earlier rows with a word or two replaced
by words of other rows, added or left out, or with slips: two letters swapped, one left out, doubled
or replaced, in words of five letters or more. They are planted in rows of eight words and more
(two words: of ten and more; slips: of four, two of them of eight), and in one of prompt and answer.
One whose short answer is another one has the prompt of an earlier row and another answer, and what
that check names is counted apart.
Then the whole sets go through as they are, train, validation and test: each finding is printed, to
be looked at. `--swapped` says how well the words, and the letters by threes, of the other rows'
prompts and answers can tell the two sides of a row apart at all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
ROWS, EACH = 500, 10
Row = dict[str, Any]
DECODER, ENCODER = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"

# name → model, task, --map, what is asked, what is answered or "" where that is a class
SETS: dict[str, tuple[str, str, dict[str, str], str, str]] = {
    "docstring-summary": (DECODER, "summarization", {}, "document", "summary"),
    "docstring-pairs": (DECODER, "text-generation", {"completion": "chosen"}, "prompt", "chosen"),
    "wordnet-define": (DECODER, "text-generation", {}, "input", "output"),
    "wordnet-supersense": (ENCODER, "text-classification", {}, "text", ""),
    "chat": (DECODER, "text-generation", {}, "messages", "messages"),
    "cldr-names": (DECODER, "translation", {"source": "en", "target": "de"}, "en", "de"),
    "bible-text": (DECODER, "text-generation", {}, "", "text"),
    "factbook-qa": (ENCODER, "question-answering", {}, "question", ""),
    "factbook-ner": (ENCODER, "token-classification", {}, "tokens", ""),
}


def sides(name: str, row: Row) -> tuple[str, str]:
    """Return what a row is asked and what it answers; "" where there is no such text."""
    _, _, _, asked, answered = SETS[name]
    if name == "chat":
        return row["messages"][0]["content"], row["messages"][-1]["content"]
    if name == "factbook-ner":
        return " ".join(row["tokens"]), ""
    return row[asked] if asked else "", row[answered] if answered else ""


def with_sides(name: str, row: Row, asked: str, answered: str) -> Row:
    """Return a row with other texts."""
    _, _, _, ask, answer = SETS[name]
    if name == "chat":
        first, *between, last = row["messages"]
        turns = [{**first, "content": asked}, *between, {**last, "content": answered}]
        return {**row, "messages": turns}
    if name == "factbook-ner":
        words = asked.split()
        tags = (row["ner_tags"] + ["O"] * len(words))[: len(words)]
        return {**row, "tokens": words, "ner_tags": tags}
    return {**row, **({ask: asked} if ask else {}), **({answer: answered} if answer else {})}


def slip(word: str, draw: random.Random) -> str:
    """Return a word as somebody mistypes it."""
    at = draw.randrange(1, len(word) - 1)
    return draw.choice(
        [
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + draw.choice("aeinorst") + word[at + 1 :],
        ]
    )


def edit(text: str, how: str, count: int, others: list[str], draw: random.Random) -> str | None:
    """Return a text that is nearly `text`; None where it has too few words for it."""
    words = text.split()
    pattern = r"[^\W\d_]{5,}" if how == "slip" else r"\w+"
    places = [i for i, word in enumerate(words) if re.fullmatch(pattern, word)]
    if len(places) < count or (how == "less" and len(words) <= count):
        return None
    for at in sorted(draw.sample(places, count), reverse=True):
        if how == "other":
            words[at] = draw.choice(others)
        elif how == "more":
            words.insert(at, draw.choice(("very", "also", "really", "please", "quite")))
        elif how == "less":
            del words[at]
        elif how == "case":
            words[at] = words[at].upper()
        else:
            words[at] = slip(words[at], draw)
    return " ".join(words)


# how a near duplicate is made: kind → edit, how many words, least words of the row
NEAR = {
    "another word": ("other", 1, 8),
    "two other words": ("other", 2, 10),
    "a word more": ("more", 1, 8),
    "a word less": ("less", 1, 9),
    "a slip": ("slip", 1, 4),
    "two slips": ("slip", 2, 8),
    "case": ("case", 2, 2),
}
LONG = 21  # words


def near(
    name: str, rows: list[Row], kind: str, long: bool, others: list[str], draw: random.Random
) -> list[Row]:
    """Return rows that are nearly some of `rows`."""
    how, count, least = NEAR[kind]
    made: list[Row] = []
    for row in draw.sample(rows, len(rows)):
        texts = list(sides(name, row))
        size = [len(re.findall(r"\w+", text)) for text in texts]
        if not (least <= sum(size) and (sum(size) >= LONG) == long):
            continue
        side = draw.choices((0, 1), size)[0]
        text = edit(texts[side], how, count, others, draw)
        if text is not None and text != texts[side]:
            texts[side] = text
            made.append(with_sides(name, row, *texts))
        if len(made) == EACH:
            break
    return made


def text_faults(name: str) -> dict[str, tuple[str, Callable[[Row, random.Random], Row | None]]]:
    """Return kind → the check that names it, and what makes it of a good row."""

    def change(side: int, make: Callable[[str], str]) -> Callable[[Row, random.Random], Row | None]:
        def made(row: Row, _: random.Random) -> Row | None:
            texts = list(sides(name, row))
            at = side if texts[side] else 1 - side
            texts[at] = make(texts[at])
            return with_sides(name, row, *texts)

        return made

    def turned(row: Row, _: random.Random) -> Row:
        if name == "wordnet-define":
            ask = f"{row['instruction']}\n\n{row['input']}"
            return {**row, "instruction": row["output"], "input": "", "output": ask}
        return with_sides(name, row, *sides(name, row)[::-1])

    def copied(row: Row, _: random.Random) -> Row | None:
        asked = sides(name, row)[0]
        if name == "wordnet-define":
            return {**row, "output": f"{row['instruction']}\n\n{row['input']}"}
        return with_sides(name, row, asked, asked) if len(asked.split()) >= 3 else None

    faults: dict[str, tuple[str, Callable[[Row, random.Random], Row | None]]] = {
        "NUL": ("lost_characters", change(1, lambda t: t[:2] + "\0" + t[2:])),
        "U+FFFD": ("lost_characters", change(0, lambda t: t + " \ufffd")),
        "tags": ("html", change(1, lambda t: f"<p>{t}</p>")),
        "entities": ("html", change(0, lambda t: t + " &amp; so on")),
    }
    if SETS[name][3] and SETS[name][4]:
        faults |= {
            "special token in the answer": (
                "special_token_text", change(1, lambda t: t + "<|im_end|>")),
            "special token in the prompt": (
                "special_token_text", change(0, lambda t: "<|im_start|>" + t)),
            "answer = prompt": ("answer_is_prompt", copied),
            "texts swapped": ("swapped_roles", turned),
        }  # fmt: skip
    if name == "chat":
        faults["begins with the assistant"] = (
            "turn_order",
            lambda row, _: {**row, "messages": row["messages"][::-1]},
        )
        faults["ends with the user"] = (
            "turn_order", lambda row, _: {**row, "messages": [
                *row["messages"], {"role": "user", "content": "And then?"}]})  # fmt: skip
    return faults


def conflict(name: str, rows: list[Row], draw: random.Random) -> list[Row]:
    """Return rows with the prompt of an earlier one, and the answer or the class of another."""
    made = []
    for row in draw.sample(rows, len(rows)):
        other, asked = draw.choice(rows), sides(name, row)[0]
        if name == "wordnet-supersense":
            new = {**row, "label": other["label"]}
        elif name == "factbook-ner":
            new = {**row, "ner_tags": ["B-DATE", *row["ner_tags"][1:]]}
        else:
            new = with_sides(name, row, asked, sides(name, other)[1])
        if new != row:
            made.append(new)
        if len(made) == EACH:
            break
    return made


def check(name: str, folder: Path) -> list[Any]:
    """Return what the gate finds in the rows of a folder."""
    from ftlevel.config import DataConfig
    from ftlevel.data import gate
    from ftlevel.data.encoding.fit import Bounds
    from ftlevel.data.prepare import encoder
    from ftlevel.data.prepare.dataset import prepare_data
    from ftlevel.data.prepare.encoder import EncodingContext
    from ftlevel.models.loading import load_config, load_tokenizer
    from ftlevel.models.sources import resolve_source
    from ftlevel.tasks import TASKS

    gate.MOST_SHOWN = 10**9  # every place
    model, task, columns, _, _ = SETS[name]
    source = resolve_source(str(ROOT / ".models" / model), None, False)
    kind = "encoder" if model == ENCODER else "decoder"
    context = EncodingContext(
        TASKS[task], kind, load_tokenizer(source), load_config(source).vocab_size, Bounds(8192),
        42, lenient=True,
    )  # fmt: skip
    config = DataConfig(dataset=str(folder), columns=columns, cache=False, overlong="drop")
    return list(prepare_data(config, context, encoder.ignore_progress).findings)


def read(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Row]) -> None:
    """Write rows to a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


Planted = dict[tuple[str, str], tuple[int, int, int]]


def plant(name: str, seed: int, folder: Path) -> Planted:
    """Return (check, kind) → how many rows were planted, were found, and as another answer."""
    draw = random.Random(f"{name}:{seed}")
    every = read(DATA / name / "train.jsonl")
    rows, spare = every[:ROWS], every[ROWS:] or every
    others = [w for row in rows for text in sides(name, row) for w in re.findall(r"\w+", text)]
    train, held = list(rows), read(DATA / name / "validation.jsonl")
    at: dict[tuple[str, str], set[str]] = defaultdict(set)

    def add(table: list[Row], split: str, key: tuple[str, str], made: list[Row]) -> None:
        for row in made:
            table.append(row)
            at[key].add(f"{split}.jsonl:{len(table)}")

    for kind in NEAR if SETS[name][1] != "question-answering" else ():
        for long in (False, True):
            size = "long" if long else "short"
            made = near(name, rows, kind, long, others, draw)
            add(train, "train", ("near_duplicates", f"{kind}, {size}"), made)
            made = near(name, rows, kind, long, others, draw)
            add(held, "validation", ("near_leaked", f"{kind}, {size}"), made)
    if SETS[name][3]:
        add(train, "train", ("conflicting_answers", "prompt"), conflict(name, rows, draw))
    for kind, (named, make) in text_faults(name).items():
        made = [
            m for row in draw.sample(spare, min(len(spare), 3 * EACH)) if (m := make(row, draw))
        ]
        add(train, "train", (named, kind), made[:EACH])
    write(folder / "train.jsonl", train)
    write(folder / "validation.jsonl", held)
    found: dict[str, set[str]] = defaultdict(set)
    for finding in check(name, folder):
        names = {finding.name}
        if finding.name in ("exact_duplicates", "leaked"):  # case alone
            names = {"near_duplicates", "near_leaked"}
        for place in finding.places:
            for one in names:
                found[one].add(place.split(" as ")[0].split(": ")[0].rpartition("/")[2])
    counts = {}
    for key, lines in at.items():
        missed = lines - found[key[0]]
        others = missed & found["conflicting_answers"] if key[0] == "near_duplicates" else ()
        counts[key] = (len(lines), len(lines) - len(missed), len(others))
    return counts


def print_swapped(sets: list[str]) -> None:
    """Print how many swapped rows can be told at most where no row as it is may be named.

    A row is scored as in `find_swapped`: by how much more often the other rows' prompts than their
    answers have each of its prompt's words, and the other way round. Turned round it has the
    negative score, so one is told that is below the lowest of all as they are.
    """
    print("| set | by | median, nats | lowest | swapped rows told at most |\n|---|---|--:|--:|--:|")
    for name in sets:
        if not (SETS[name][3] and SETS[name][4]):
            continue
        texts = [sides(name, row) for row in read(DATA / name / "train.jsonl")[:ROWS]]
        for by, parts in (("words", words_of), ("letters by threes", threes_of)):
            rows = [(parts(asked), parts(answered)) for asked, answered in texts]
            counts = [Counter(part for row in rows for part in row[side]) for side in (0, 1)]
            scores = [score_sides(row, counts) for row in rows]
            told = sum(-score < min(scores) for score in scores) / len(scores)
            middle = sorted(scores)[len(scores) // 2]
            print(f"| {name} | {by} | {middle:.1f} | {min(scores):.1f} | {told:.0%} |", flush=True)


def score_sides(row: tuple[set[str], set[str]], counts: list[Counter[str]]) -> float:
    """Return the nats by which a prompt and an answer are in their places, by all other rows."""
    score = 0.0
    for side, sign in ((0, 1), (1, -1)):
        for part in row[side]:
            asked, answered = (counts[k][part] - (part in row[k]) for k in (0, 1))
            if asked + answered:
                score += sign * math.log((asked + 0.5) / (answered + 0.5))
    return score


def words_of(text: str) -> set[str]:
    """Return the words of a text."""
    return set(re.findall(r"\w+", text.lower()))


def threes_of(text: str) -> set[str]:
    """Return the letters of a text by threes."""
    padded = f" {text.lower()} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def main() -> None:
    """Plant, look, and print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swapped", action="store_true", help="prompts and answers only")
    options = parser.parse_args()
    if options.swapped:
        print_swapped(options.sets)
        return
    total: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    missed: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            for key, (planted, found, others) in plant(name, options.seed, Path(folder)).items():
                total[key].update(planted=planted, found=found, others=others)
                if found + others < planted:
                    missed[key].append(f"{name} {found + others}/{planted}")
    print("| check | planted | rows | found | as another answer | | missed in |")
    print("|---|---|--:|--:|--:|--:|---|")
    for (named, kind), count in sorted(total.items()):
        if count["planted"]:
            share = f"{(count['found'] + count['others']) / count['planted']:.0%}"
            where = ", ".join(missed[(named, kind)])
            figures = f"{count['planted']} | {count['found']} | {count['others'] or ''} | {share}"
            print(f"| `{named}` | {kind} | {figures} | {where} |")
    print("\n| set, as it is | rows | findings |\n|---|--:|---|")
    for name in options.sets:
        rows = sum(len(read(file)) for file in (DATA / name).glob("*.jsonl"))
        alarms = [
            f"{f.name} ({f.split}): {place.replace(str(DATA / name) + '/', '')}"
            for f in check(name, DATA / name) for place in f.places
        ]  # fmt: skip
        print(f"| {name} | {rows:,} | {len(alarms)}{': ' if alarms else ''}{'; '.join(alarms)} |")


if __name__ == "__main__":
    main()
