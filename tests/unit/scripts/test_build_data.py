"""Parsing and splitting of scripts/build_data.py on synthetic inputs, without downloads."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest

import build_data
from data_sets import builtin
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


def test_splits_depend_on_dataset_name_and_not_on_row_order():
    rows, sizes = make_rows(200), (100, 20, 20)
    assert split_rows("s", rows, sizes) == split_rows("s", rows[::-1], sizes)
    assert split_rows("s", rows, sizes) != split_rows("other", rows, sizes)


def test_small_datasets_are_split_by_tenths():
    splits = split_rows("s", make_rows(95), (1000, 100, 100))
    assert [len(rows) for _, rows in splits.parts()] == [77, 9, 9]


def test_repeated_key_keeps_first_row():
    rows = [{"text": "same", "n": 1}, {"text": "same", "n": 2}]
    splits = split_rows("s", rows, (1, 0, 0), key=lambda row: row["text"])
    assert splits.train == [{"text": "same", "n": 1}]


def test_groups_are_not_shared_between_splits():
    splits = split_rows("s", make_rows(500), (400, 50, 50), group=lambda row: row["group"])
    train, validation, test = ({row["group"] for row in rows} for _, rows in splits.parts())
    assert len(train) + len(validation) + len(test) == len(train | validation | test) == 17
    assert min(len(train), len(validation), len(test)) > 0


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
