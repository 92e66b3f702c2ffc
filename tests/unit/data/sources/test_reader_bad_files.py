"""Exact error messages of bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftlevel.data.sources.readers import load_table
from ftlevel.errors import InputError

SKIP = "Fix the line, or drop bad rows with --on-bad-row skip."
CUT = "(the last line, without a newline: was the download or copy cut short?)"
GOOD = '{"text": "a", "n": 1}\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# (file name, content, message without the directory; a list if there are several lines)
BAD_FILES: list[tuple[str, str | bytes, str | list[str]]] = [
    # -- the file
    ("e.jsonl", "", "e.jsonl: has 0 rows (0 bytes). Use a file with rows."),
    ("e.jsonl", "\n \n", "e.jsonl: has 0 rows. Use a file with rows."),
    ("e.json", "[]", "e.json: has 0 rows. Use a file with rows."),
    ("e.csv", "text,n\n", "e.csv: has 0 rows. Use a file with rows."),
    ("e.txt", "\n\n", "e.txt: has 0 rows. Use a file with rows."),
    (
        "x.yaml",
        "a: 1",
        "x.yaml: cannot read '.yaml'. Formats: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, "
        ".arrow, .feather, .txt, .xlsx, .conll, .bio, .iob, .iob2. Convert it, or add "
        "--input-format.",
    ),
    (
        "x.jsonl.gz",
        b"\x1f\x8b",
        "x.jsonl.gz: cannot be unpacked (Compressed file ended before the end-of-stream marker was "
        "reached). Was the download or copy cut short?",
    ),
    (
        "x.jsonl",
        b"\x1f\x8b\x08abc",
        "x.jsonl: is compressed by gzip. Name it x.jsonl.gz.",
    ),
    (
        "x.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "x.jsonl: is a Git LFS pointer, not the data. Fetch the data: git lfs pull",
    ),
    # -- encoding
    (
        "x.jsonl",
        GOOD.encode() + '{"text": "é", "n": 1}\n'.encode("latin-1"),
        "x.jsonl:2: not UTF-8 (byte 0xe9 at offset 32). If it is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 x.jsonl > utf8-x.jsonl",
    ),
    (
        "x.csv",
        b"text,n\na,1\ncaf\xe9,2\n",
        "x.csv:3: not UTF-8 (byte 0xe9 at offset 14). If it is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 x.csv > utf8-x.csv",
    ),
    (
        "x.jsonl",
        (GOOD + '{"text": "é').encode()[:-1],
        "x.jsonl:2: the file ends inside a character (byte 0xc3 at offset 32): "
        "was the download or copy cut short? Fetch it again.",
    ),
    (
        "x.jsonl",
        GOOD.encode("utf-16"),
        "x.jsonl:1: looks like UTF-16, not UTF-8 (byte 0xff at offset 0). "
        "Convert it: iconv -f UTF-16 -t UTF-8 x.jsonl > utf8-x.jsonl",
    ),
    (
        "x.csv",
        "text,n\na,1\n".encode("utf-16-le"),
        "x.csv:1: looks like UTF-16, not UTF-8 (byte 0x74 at offset 0). "
        "Convert it: iconv -f UTF-16 -t UTF-8 x.csv > utf8-x.csv",
    ),
    # -- JSON Lines
    (
        "x.jsonl",
        GOOD * 999 + '{"text": "a" "n": 1}\n' + GOOD,
        f"x.jsonl:1000: not valid JSON (Expecting ',' delimiter, column 14). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD * 2 + '{"text": "a',
        f"x.jsonl:3: not valid JSON (Unterminated string starting at, column 10) {CUT}. {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + '{"text": NaN, "n": 1}\n',
        f"x.jsonl:2: not valid JSON (NaN is not a JSON number; write null). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + "[" * 100_000 + "\n",
        f"x.jsonl:2: not usable JSON (nested too deeply). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + '["a", 1]\n',
        f"x.jsonl:2: a list, where one object with named columns is expected. {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + '"a"\n',
        f"x.jsonl:2: a string, where one object with named columns is expected. {SKIP}",
    ),
    ("x.jsonl", GOOD + "{}\n", f"x.jsonl:2: an object without keys. {SKIP}"),
    (
        "x.jsonl",
        GOOD + '{"text": "a", "n": 1, "text": "b"}\n',
        f"x.jsonl:2: the key 'text' occurs twice in one object. {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + '{"text": "\\ud83d", "n": 1}\n',
        "x.jsonl:2: half of a surrogate pair (a '\\ud…' escape without its partner, as of an "
        f"emoji cut in two). {SKIP}",
    ),
    (
        "x.jsonl",
        '[{"text": "a"}]\n',
        "x.jsonl:1: looks like one JSON array, where one object a line is expected. "
        "Rename it to x.json",
    ),
    # -- types and keys
    (
        "x.jsonl",
        GOOD * 2 + '{"text": 5, "n": 1}\n' + GOOD,
        "x.jsonl:3: 'text' is a number (5), but a string in most rows (line 1 for one). " + SKIP,
    ),
    (
        "x.jsonl",
        GOOD * 2 + '{"text": "a", "n": true}\n',
        "x.jsonl:3: 'n' is true or false (True), but a number in most rows (line 1 for one). "
        + SKIP,
    ),
    (
        "x.jsonl",
        '{"txt": "a", "n": 1}\n' + GOOD * 3,
        "x.jsonl:1: lacks 'text' and has 'txt', unlike the 3 other rows "
        f"(did you mean 'text'?). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD * 3 + '{"text": "a"}\n',
        "x.jsonl:4: lacks 'n', which the 3 other rows have (a value may be null, the key must "
        f"be there). {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD + '{"text": "a", "n": 1, "note": ""}\n',
        f"x.jsonl:2: has 'note', which the other row lacks. {SKIP}",
    ),
    (
        "x.jsonl",
        GOOD * 20 + '{"text": "a"}\n' * 6 + "[]\n",
        [
            *(
                f"x.jsonl:{line}: lacks 'n', which the 20 other rows have (a value may be null, "
                "the key must be there)."
                for line in range(21, 26)
            ),
            "x.jsonl: 7 of 27 rows are bad (the first 5 are above). Fix them, or drop bad rows "
            "with --on-bad-row skip.",
        ],
    ),
    # -- JSON
    (
        "x.json",
        '[\n {"text": "a"},\n {"text" "b"}\n]',
        "x.json:3: not valid JSON (Expecting ':' delimiter, column 10). Fix it, or write one "
        "object a line and name the file .jsonl, where --on-bad-row skip can drop a bad row.",
    ),
    (
        "x.json",
        '[\n {"text": "a"}\n {"text": "b"}\n]',
        "x.json:3: not valid JSON (expecting ',' or ']'). Fix it, or write one object a line and "
        "name the file .jsonl, where --on-bad-row skip can drop a bad row.",
    ),
    (
        "x.json",
        '[\n {"text": "a"},\n {"text": "b',
        "x.json:3: not valid JSON (Unterminated string starting at, column 11) (was the download "
        "or copy cut short?). Fix it, or write one object a line and name the file .jsonl, where "
        "--on-bad-row skip can drop a bad row.",
    ),
    (
        "x.json",
        '[{"text": "a", "text": "b"}]',
        "x.json:1: the key 'text' occurs twice in one object. Fix it, or write one object a line "
        "and name the file .jsonl, where --on-bad-row skip can drop a bad row.",
    ),
    (
        "x.json",
        '[{"text": "a"}]\n\n{}',
        "x.json:3: not valid JSON (more text after the end of the array). Fix it, or write one "
        "object a line and name the file .jsonl, where --on-bad-row skip can drop a bad row.",
    ),
    (
        "x.json",
        '[\n{"text": "a"},\n7]',
        f"x.json:3: a number, where one object with named columns is expected. {SKIP}",
    ),
    (
        "x.json",
        '{\n"version": "1", "messages": [{"role": "user"}]\n}',
        "x.json:1: one object (keys 'version', 'messages'), where an array of objects is expected. "
        "Save the list in 'messages' as the file.",
    ),
    # -- CSV
    (
        "x.csv",
        "text,text,n\na,b,1\n",
        "x.csv:1: the header has 'text' twice. Rename one of them.",
    ),
    (
        "x.csv",
        ",text\n0,a\n",
        "x.csv:1: column 1 of the header has no name. It looks like a pandas index: write with "
        "index=False. Name every column.",
    ),
    ("x.csv", "text;label\na;b\nc\n", f"x.csv:3: has 1 cells, but the header has 2. {SKIP}"),
    (
        "x.csv",
        'text,n\n"two\nlines",1\na,1,2\n',
        f"x.csv:4: has 3 cells, but the header has 2. {SKIP}",
    ),
    ("x.tsv", "text\tn\na\n", f"x.tsv:2: has 1 cells, but the header has 2. {SKIP}"),
    (
        "x.csv",
        'text,n\na,1\n"b,1\nc,1\n',
        'x.csv:3: a quote (") is opened in this row and never closed. Close it.',
    ),
    (
        "x.csv",
        'text,n\n"a" b,1\n',
        "x.csv:2: not valid CSV (',' expected after '\"'). Put quotes around the whole cell and "
        'double (") those inside it.',
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file_error_names_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, message: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, content)
    with pytest.raises(InputError) as error:
        load_table(Path(name))
    assert error.value.problems == ([message] if isinstance(message, str) else message)


def test_missing_file_error_lists_existing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(InputError) as error:
        load_table(Path("trian.jsonl"))
    assert str(error.value) == (
        "trian.jsonl: no such file. Did you mean 'train.jsonl'? "
        "In the current directory: train.jsonl."
    )
    with pytest.raises(InputError) as error:
        load_table(Path("dta/train.jsonl"))
    assert str(error.value) == (
        "dta/train.jsonl: no such file, and no directory dta. Check the path."
    )


def test_directory_as_file_error_lists_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").mkdir()
    write(tmp_path / "data.jsonl", "a.csv", "text\na\n")
    with pytest.raises(InputError) as error:
        load_table(Path("data.jsonl"))
    assert str(error.value) == (
        "data.jsonl: is a directory, not a file. Files in it: a.csv. Name one file."
    )


def test_errors_of_a_relative_path_name_it_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "x.csv", 'a,b\nc,d\n"e,f\n')
    with pytest.raises(InputError, match=r'^\./x\.csv:3: a quote \("\) is opened'):
        load_table("./x.csv")
