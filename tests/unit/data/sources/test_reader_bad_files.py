"""Exact error messages of bad files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlevel.data.sources.readers import load_table
from ftlevel.errors import InputError

SKIP = "Fix the line, or drop bad rows with --on-bad-row skip."
CUT = "(the last line, without a newline: was the download or copy cut short?)"
EMPTY = "has 0 rows. Use a file with rows."
AS_LINES = (
    "Fix it, or write one object a line and name the file .jsonl, where --on-bad-row skip can drop "
    "a bad row."
)
NO_OBJECT = "where one object with named columns is expected"
LACKS_N = "lacks 'n', which the {} other rows have (a value may be null, the key must be there)."
UTF_16 = (
    ":1: looks like UTF-16, not UTF-8 (byte {0} at offset 0). "
    "Convert it: iconv -f UTF-16 -t UTF-8 x.{1} > utf8-x.{1}"
)
GOOD = '{"text": "a", "n": 1}\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(autouse=True)
def _empty_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# (file name, content, message without the directory; a list if there are several lines)
# (file name, content, the message after the file name; a list if there are several lines)
BAD_FILES: list[tuple[str, str | bytes, str | list[str]]] = [
    # -- the file
    ("e.jsonl", "", ": has 0 rows (0 bytes). Use a file with rows."),
    ("e.jsonl", "\n \n", f": {EMPTY}"),
    ("e.json", "[]", f": {EMPTY}"),
    ("e.txt", "\n\n", f": {EMPTY}"),
    (
        "x.yaml",
        "a: 1",
        ": cannot read '.yaml'. Formats: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, "
        ".feather, .txt, .xlsx, .conll, .bio, .iob, .iob2. Convert it, or add --input-format.",
    ),
    (
        "x.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        ": is a Git LFS pointer, not the data. Fetch the data: git lfs pull",
    ),
    # -- encoding
    (
        "x.jsonl",
        (GOOD + '{"text": "é').encode()[:-1],
        ":2: the file ends inside a character (byte 0xc3 at offset 32): "
        "was the download or copy cut short? Fetch it again.",
    ),
    ("x.jsonl", GOOD.encode("utf-16"), UTF_16.format("0xff", "jsonl")),
    ("x.csv", "text,n\na,1\n".encode("utf-16-le"), UTF_16.format("0x74", "csv")),
    # -- JSON Lines
    (
        "x.jsonl",
        GOOD * 999 + '{"text": "a" "n": 1}\n' + GOOD,
        f":1000: not valid JSON (Expecting ',' delimiter, column 14). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD * 2 + '{"text": "a',
        f":3: not valid JSON (Unterminated string starting at, column 10) {CUT}. {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + '{"text": NaN, "n": 1}\n',
        f":2: not valid JSON (NaN is not a JSON number; write null). {SKIP}",
    ),
    ("x.jsonl", GOOD + "[" * 99_999 + "\n", f":2: not usable JSON (nested too deeply). {SKIP}"),
    ("x.jsonl", GOOD + '["a", 1]\n', f":2: a list, {NO_OBJECT}. {SKIP}"),
    ("x.jsonl", GOOD + '"a"\n', f":2: a string, {NO_OBJECT}. {SKIP}"),
    ("x.jsonl", GOOD + "{}\n", f":2: an object without keys. {SKIP}"),
    ("x.jsonl", GOOD + '{"n": 1, "n": 2}\n', f":2: the key 'n' occurs twice in one object. {SKIP}"),
    (
        "x.jsonl",
        GOOD + '{"text": "\\ud83d", "n": 1}\n',
        ":2: half of a surrogate pair (a '\\ud…' escape without its partner, as of an emoji cut in "
        f"two). {SKIP}",
    ),
    # -- types and keys
    (
        "x.jsonl",
        GOOD * 2 + '{"text": 5, "n": 1}\n' + GOOD,
        f":3: 'text' is a number (5), but a string in most rows (line 1 for one). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD * 2 + '{"text": "a", "n": true}\n',
        f":3: 'n' is true or false (True), but a number in most rows (line 1 for one). {SKIP}",
    ),
    (
        "x.jsonl",
        '{"txt": "a", "n": 1}\n' + GOOD * 3,
        f":1: lacks 'text' and has 'txt', unlike the 3 other rows (did you mean 'text'?). {SKIP}",
    ),
    ("x.jsonl", GOOD * 3 + '{"text": "a"}\n', f":4: {LACKS_N.format(3)} {SKIP}"),
    (
        "x.jsonl",
        GOOD + '{"text": "a", "n": 1, "note": ""}\n',
        f":2: has 'note', which the other row lacks. {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD * 20 + '{"text": "a"}\n' * 6 + "[]\n",
        [
            *(f":{line}: {LACKS_N.format(20)}" for line in range(21, 26)),
            ": 7 of 27 rows are bad (the first 5 are above). Fix them, or drop bad rows with "
            "--on-bad-row skip.",
        ],
    ),
    # -- JSON
    (
        "x.json",
        '[\n {"text": "a"},\n {"text" "b"}\n]',
        f":3: not valid JSON (Expecting ':' delimiter, column 10). {AS_LINES}",
    ),
    (
        "x.json",
        '[\n {"text": "a"}\n {"text": "b"}\n]',
        f":3: not valid JSON (expecting ',' or ']'). {AS_LINES}",
    ),
    (
        "x.json",
        '[\n {"text": "a"},\n {"text": "b',
        ":3: not valid JSON (Unterminated string starting at, column 11) (was the download or copy "
        f"cut short?). {AS_LINES}",
    ),
    ("x.json", '[{"a": 1, "a": 2}]', f":1: the key 'a' occurs twice in one object. {AS_LINES}"),
    (
        "x.json",
        '[{"text": "a"}]\n\n{}',
        f":3: not valid JSON (more text after the end of the array). {AS_LINES}",
    ),
    ("x.json", '[\n{"text": "a"},\n7]', f":3: a number, {NO_OBJECT}. {SKIP}"),
    (
        "x.json",
        '{\n"version": "1", "messages": [{"role": "user"}]\n}',
        ":1: one object (keys 'version', 'messages'), where an array of objects is expected. "
        "Save the list in 'messages' as the file.",
    ),
    # -- CSV
    (
        "x.csv",
        ",text\n0,a\n",
        ":1: column 1 of the header has no name. It looks like a pandas index: write with "
        "index=False. Name every column.",
    ),
    ("x.csv", "text;label\na;b\nc\n", f":3: has 1 cells, but the header has 2. {SKIP}"),
    ("x.csv", 'a,n\n"b\nc",1\na,1,2\n', f":4: has 3 cells, but the header has 2. {SKIP}"),
    ("x.tsv", "text\tn\na\n", f":2: has 1 cells, but the header has 2. {SKIP}"),
    ("x.csv", 'a\nb\n"c\nd\n', ':3: a quote (") is opened in this row and never closed. Close it.'),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file_error_names_line(name, content, message):
    write(Path(), name, content)
    with pytest.raises(InputError) as error:
        load_table(Path(name))
    messages = [message] if isinstance(message, str) else message
    assert error.value.problems == [f"{name}{message}" for message in messages]


def test_missing_file_error_lists_existing_files():
    write(Path(), "train.jsonl", GOOD)
    with pytest.raises(InputError) as error:
        load_table(Path("trian.jsonl"))
    assert str(error.value) == (
        "trian.jsonl: no such file. Did you mean 'train.jsonl'? "
        "In the current directory: train.jsonl."
    )


def test_directory_as_file_error_lists_its_files():
    Path("data.jsonl").mkdir()
    write(Path("data.jsonl"), "a.csv", "text\na\n")
    with pytest.raises(InputError) as error:
        load_table(Path("data.jsonl"))
    assert str(error.value) == (
        "data.jsonl: is a directory, not a file. Files in it: a.csv. Name one file."
    )


def test_errors_of_a_relative_path_name_it_as_given():
    write(Path(), "x.csv", 'a,b\nc,d\n"e,f\n')
    with pytest.raises(InputError, match=r'^\./x\.csv:3: a quote \("\) is opened'):
        load_table("./x.csv")
