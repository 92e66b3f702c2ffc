"""The pure parts of scripts/build_data.py, on made-up inputs; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest

import build_data
from data_sets import bible, chat, cldr, docstrings, factbook, search, wordnet
from data_sets.sources import Sources
from data_sets.splits import Splits, balance, split_rows, write_splits
from wheels import FetchError, Package


def numbered(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {n}", "group": f"g{n % 17}"} for n in range(count)]


def ids(rows) -> list[str]:
    return [row["text"] for row in rows]


def test_splits_have_their_sizes_and_share_no_row():
    splits = split_rows("s", numbered(500), (300, 40, 50))
    assert [len(rows) for _, rows in splits.parts()] == [300, 40, 50]
    together = [text for _, rows in splits.parts() for text in ids(rows)]
    assert len(set(together)) == 390


def test_splits_do_not_depend_on_the_order_of_rows():
    rows = numbered(200)
    assert split_rows("s", rows, (100, 20, 20)) == split_rows("s", rows[::-1], (100, 20, 20))


def test_sets_of_other_names_have_another_order():
    rows = numbered(200)
    assert split_rows("a", rows, (100, 20, 20)) != split_rows("b", rows, (100, 20, 20))


def test_few_rows_are_split_by_tenths():
    splits = split_rows("s", numbered(95), (1000, 100, 100))
    assert [len(rows) for _, rows in splits.parts()] == [77, 9, 9]


def test_a_repeated_key_keeps_the_first_row():
    rows = [{"text": "same", "n": 1}, {"text": "same", "n": 2}]
    splits = split_rows("s", rows, (1, 0, 0), key=lambda row: row["text"])
    assert splits.train == [{"text": "same", "n": 1}]


def test_no_group_is_in_two_splits():
    splits = split_rows("s", numbered(500), (400, 50, 50), group=lambda row: row["group"])
    groups = [{row["group"] for row in rows} for _, rows in splits.parts()]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_balance_gives_every_label_as_many_rows_as_the_rarest():
    rows = [{"text": f"{n}", "label": "ab"[n % 5 == 0]} for n in range(50)]
    kept = balance(rows, "label", 40)
    assert [row["label"] for row in kept] == ["a"] * 10 + ["b"] * 10
    assert len(balance(rows, "label", 3)) == 6


def test_written_files_hold_one_object_a_line_in_plain_utf8(tmp_path):
    row = {"text": "größer\u2028 and \n"}
    write_splits(Splits([row, row], [], [row]), tmp_path)
    data = (tmp_path / "train.jsonl").read_bytes()
    assert data.count(b"\n") == 2
    assert "größer".encode() in data
    assert json.loads(data.split(b"\n")[0]) == row
    assert (tmp_path / "validation.jsonl").read_bytes() == b""


CODE = '''
class Outer:
    """Outer."""
    def inner(self):
        """Inner."""
    def _hidden(self):
        """Hidden."""

def bare(): ...
'''


def test_documented_finds_public_functions_and_classes():
    found = [(item.name, item.text) for item in docstrings.documented("lib", "f.py", CODE)]
    assert found == [("Outer", "Outer."), ("inner", "Inner.")]
    assert list(docstrings.documented("lib", "f.py", "def broken(:")) == []


DOCSTRING = """Compute the widgets of
a :class:`~lib.Frame`.

This paragraph explains at length what widgets are.

- a list item that is not prose at all

Parameters
----------
x : int
    A parameter, which is left out of the text.

Notes
-----
The notes stay, since they are prose and :func:`explain <lib.explain>` more.

>>> code()
"""


def test_divide_keeps_prose_only():
    summary, document = docstrings.divide(DOCSTRING)
    assert summary == "Compute the widgets of a `lib.Frame`."
    assert document == (
        "This paragraph explains at length what widgets are. "
        "The notes stay, since they are prose and `explain` more."
    )


def test_only_good_pairs_become_rows():
    body = "Words that go on and on. " * 10
    texts = ["Compute something useful\n\n" + body, "Short.\n\n" + body, "Compute something\n\nNo."]
    made = docstrings.build_rows(docstrings.Docstring("l", "f.py", "n", text) for text in texts)
    assert [row["summary"] for row in made] == ["Compute something useful."]


def test_templated_docstrings_are_kept_once():
    rows = [
        {"document": "one", "summary": "a"},
        {"document": "two", "summary": "a"},
        {"document": "one", "summary": "b"},
        {"document": "three", "summary": "c"},
    ]
    assert docstrings.drop_templated(rows) == [rows[0], rows[3]]


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("numpy/tests/a.py", True),
        ("numpy/conftest.py", True),
        ("scipy/_lib/a.py", True),
        ("numpy/testing/a.py", False),
        ("numpy/lib/a.py", False),
    ],
)
def test_files_that_are_no_documentation(path, left_out):
    assert bool(docstrings.NOT_DOCUMENTATION.search(path)) is left_out


WORDNET = [
    "  1 a line of the licence\n",
    "00001 05 n 02 house_cat 0 tabby 1 001 @ 0 n 0 | a small animal that lives with people; "
    '"a house cat sat there"; "the tabby slept"\n',
    "00002 26 n 01 calm 0 000 | a state that nobody asked about here\n",
]


def test_synsets_are_parsed():
    cat, calm = wordnet.parse_synsets(WORDNET)
    assert cat.words == ["house cat", "tabby"]
    assert cat.gloss == "a small animal that lives with people"
    assert cat.examples == ["a house cat sat there", "the tabby slept"]
    assert (calm.category, calm.examples) == (26, [])


def test_wordnet_rows():
    synsets = list(wordnet.parse_synsets(WORDNET))
    assert list(wordnet.define_rows(synsets, "noun")) == [
        {
            "instruction": 'Define the noun "house cat" as it is used in the sentence.',
            "input": "a house cat sat there",
            "output": "a small animal that lives with people",
        }
    ]
    assert [row["label"] for row in wordnet.supersense_rows(synsets)] == ["animal"]


def test_conversations_alternate_and_end_with_an_answer():
    text = "conversations:\n- [Hello, 'Good  morning', Bye]\n- [Hi, Hi]\n- [alone]\n"
    (row,) = chat.conversation_rows(text, "greetings")
    assert row == {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good morning"},
        ],
        "topic": "greetings",
    }


def test_names_that_a_language_lacks_or_inherits_are_left_out():
    xml = '<annotation cp="a" type="tts">salt &amp; pepper</annotation>'
    xml += '<annotation cp="a">condiments</annotation>'
    assert cldr.parse_names(xml) == {"a": "salt & pepper"}
    whole = {"a": "salt", "b": "waving hand: light skin tone", "c": "house", "d": "tree"}
    names = {"en": whole, "de": {**whole, "c": "↑↑↑"}, "fr": whole, "es": {"a": "sal", "c": "casa"}}
    assert list(cldr.name_rows(names)) == [{"en": "salt", "de": "salt", "fr": "salt", "es": "sal"}]


def test_verses_lose_notes_headings_and_tags():
    markup = '<title>Heading</title>He said<note n="a">a note</note> , <w lemma="x">go</w> .'
    assert bible.plain_verse(markup) == "He said, go."
    chapters = [("Mark", 1, ["One. ", "", "Two."]), ("Mark", 2, ["<note>only</note>"])]
    assert list(bible.chapter_rows(chapters)) == [{"ref": "Mark 1", "text": "One. Two."}]


def country(**government) -> factbook.Country:
    facts = {
        "Government": {
            "Country name": {"conventional short form": {"text": "Atlantis (sunken)"}},
            "Capital": {"name": {"text": "Poseidonis; note - flooded"}},
            "Suffrage": {"text": "18 years of age"},
            **government,
        },
        "Geography": {
            "Location": {"text": "<p>Atlantic&nbsp;Ocean</p>"},
            "Coastline": {"text": "0 km note: none"},
            "Terrain": {"text": "none"},
        },
        "People and Society": {
            "Nationality": {"noun": {"text": "Atlantean(s)"}, "adjective": {"text": "Atlantean"}}
        },
    }
    return factbook.Country(factbook.country_name(facts), facts)


def test_country_names():
    assert country().name == "Atlantis"
    long_form = {"conventional short form": {"text": "none"}}
    long_form["conventional long form"] = {"text": "Kingdom of Atlantis"}
    assert country(**{"Country name": long_form}).name == "Kingdom of Atlantis"
    assert factbook.country_name({}) == ""


def test_answers_stand_where_they_are_said_to_stand():
    rows = list(factbook.question_rows(country()))
    assert {row["question"] for row in rows} == {
        "Where is Atlantis located?",
        "How long is the coastline of Atlantis?",
        "Who may vote in Atlantis?",
    }
    for row in rows:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
    assert "0 km" in {row["answers"]["text"][0] for row in rows}


def test_sentences_are_tagged():
    names = factbook.known_names([country()])
    assert names["Atlantis"] == "COUNTRY"
    assert names["Atlanteans"] == "NATIONALITY"
    assert "Poseidonis" not in names
    pattern = factbook.name_pattern(names)
    sentence = "Atlanteans left Atlantis on 3 May 1905 with 1,905 Dutch ships."
    tokens, tags = factbook.tag_sentence(sentence, pattern, names)
    tagged = [(token, tag) for token, tag in zip(tokens, tags, strict=True) if tag != "O"]
    assert tagged == [
        ("Atlanteans", "B-NATIONALITY"),
        ("Atlantis", "B-COUNTRY"),
        ("3", "B-DATE"),
        ("May", "I-DATE"),
        ("1905", "I-DATE"),
        ("Dutch", "B-NATIONALITY"),
    ]


@pytest.fixture
def toy_package(tmp_path) -> Package:
    """A wheel in the work folder, so that nothing is downloaded."""
    wheel = tmp_path / "work/wheels/toy_text-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/b.txt", "second")
        archive.writestr("toy/a.txt", "first")
        archive.writestr("toy_text-1.0.dist-info/licenses/LICENSE", "Do as you like.")
    return Package("toy-text", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())


def toy_set(package: Package) -> build_data.DataSet:
    def build(name: str, sources: Sources) -> Splits:
        rows = [{"text": text} for _, text in sources.members(package, r"toy/.*\.txt")]
        return Splits(rows, rows[:1], rows[1:])

    return build_data.DataSet("toy", "summarization: toys", "CC0", build, "0" * 64, (package,))


def test_a_set_is_built_with_its_licence_and_replaces_an_older_one(tmp_path, toy_package, capsys):
    out = tmp_path / "data"
    for _ in range(2):
        build_data.build(toy_set(toy_package), out, Sources(tmp_path / "work"))
    assert sorted(path.name for path in out.iterdir()) == ["toy"]
    assert (out / "toy/train.jsonl").read_text() == '{"text": "first"}\n{"text": "second"}\n'
    source = (out / "toy/SOURCE.md").read_text()
    assert "toy-text==1.0 (PyPI)" in source
    assert "Do as you like." in source
    assert "not the bytes of the reference build" in capsys.readouterr().out


def test_a_set_that_fails_leaves_the_older_one(tmp_path, toy_package):
    out = tmp_path / "data"
    build_data.build(toy_set(toy_package), out, Sources(tmp_path / "work"))
    wrong = Package("toy-text", "1.0", "f" * 64)
    with pytest.raises(FetchError, match=r"SHA-256 is [0-9a-f]{64}, expected f{64}"):
        build_data.build(toy_set(wrong), out, Sources(tmp_path / "work"))
    assert (out / "toy/train.jsonl").exists()


def test_a_debian_package_off_debian_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"no dpkg-deb here.*'wordnet-base'.*debs"):
        Sources(tmp_path).deb("wordnet-base")


@pytest.mark.parametrize("arguments", [[], ["no-such-set"]])
def test_wrong_names_end_in_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        build_data.main(arguments)
    assert stop.value.code == 2
    assert "docstring-summary" in capsys.readouterr().err


def test_the_list_names_every_set_with_its_licence(tmp_path, capsys):
    assert build_data.main(["--list", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    for data_set in build_data.DATA_SETS:
        assert data_set.name in listed
        assert data_set.licence in listed
        assert len(data_set.reference) == 64


def test_search_sets_pair_a_query_with_its_document():
    (row,) = search.sense_rows([
        {"instruction": 'Define the noun "bank" as it is used in the sentence.',
         "input": "He sat on the bank", "output": "sloping land"},
    ])  # fmt: skip
    assert row == {"anchor": "bank: He sat on the bank", "positive": "sloping land"}
    body = "    total = sum(values)\n    count = len(values)\n    if not count:\n"
    body += "        return 0.0\n    return total / count\n"
    code = f'def mean(values):\n    """Return the mean of the values.\n\n    More.\n    """\n{body}'
    (row,) = search.code_rows("lib/a.py", code + "\ndef bare():\n    return 1\n")
    assert row["anchor"] == "Return the mean of the values."
    assert row["positive"].startswith("total = sum(values)\ncount")
    text = (
        "Package: python3-thing\nDescription-md5: 1\nDescription-en: a library of useful things\n"
        " The first paragraph says at some length what the package has in it, and goes on\n"
        " in another line.\n .\n The second is left out.\n\n"
        "Package: short\nDescription-md5: 2\nDescription-en: too short\n Nothing.\n"
    )
    (row,) = search.package_rows(text)
    assert (row["anchor"], row["package"]) == ("a library of useful things", "python3")
    assert row["positive"].endswith("and goes on in another line.")


def test_a_text_that_occurs_twice_is_in_no_search_set():
    rows = [{"anchor": "a", "positive": "x"}, {"anchor": "b", "positive": "X"},
            {"anchor": "c", "positive": "z"}]  # fmt: skip
    assert search.distinct(rows) == rows[2:]
