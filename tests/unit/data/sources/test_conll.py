"""CoNLL files: columns, document marks, comments, bad lines, and detection by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftlevel.data.sources.readers import load_table
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

# sent_id = 2
Peter NNP B-NP B-PER
# # B-NP O
1 CD B-NP O
"""


def read(folder: Path, content: str, name: str = "x.conll", on_bad_row: Any = "error") -> Table:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return load_table(path, on_bad_row)


def test_columns_document_marks_and_comments(tmp_path):
    table = read(tmp_path, CONLL_2003)
    assert table.column_names == ["tokens", "2", "3", "tags"]
    assert table.rows[0] == {
        "tokens": ["EU", "rejects"], "2": ["NNP", "VBZ"], "3": ["B-NP", "B-VP"],
        "tags": ["B-ORG", "O"],
    }  # fmt: skip
    assert table.rows[1]["tokens"] == ["Peter", "#", "1"]
    assert list(table.lines) == [3, 7]
    assert table.where(1) == f"{tmp_path}/x.conll:7"


def test_tab_separated_words_may_contain_spaces(tmp_path):
    table = read(tmp_path, "New York\tB-LOC\r\nis\tO\r\n\r\nA\tO\r\n")
    assert [row["tokens"] for row in table.rows] == [["New York", "is"], ["A"]]
    assert [row["tags"] for row in table.rows] == [["B-LOC", "O"], ["O"]]
    untagged = read(tmp_path, "Ada\nLovelace\n\nx\n")
    assert untagged.rows == [{"tokens": ["Ada", "Lovelace"]}, {"tokens": ["x"]}]


def test_line_with_other_column_count_makes_sentence_bad(tmp_path):
    content = "a O\nb O\n\nc O\nd\ne O\n\nf B-X\n"
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(
        f"{tmp_path}/x.conll:5: has 1 column, where most lines have 2."
    )
    assert [row["tokens"] for row in read(tmp_path, content, on_bad_row="skip").rows] == [
        ["a", "b"], ["f"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["x.txt", "x.tsv"])
def test_conll_is_detected_by_content_and_reported(name, tmp_path):
    table = read(tmp_path, "EU\tB-ORG\nis\tO\n\nA\tO\n", name)
    assert table.rows[1] == {"tokens": ["A"], "tags": ["O"]}
    assert "read as conll: every line is a word and its tag" in table.notes[0]


@pytest.mark.parametrize(
    "content", ["I see vitamin B-12\nYes O\n", "a O\nb O\n", "text\ttag\na\tO\n"]
)
def test_other_text_is_not_detected_as_conll(content, tmp_path):
    assert "tokens" not in read(tmp_path, content, "x.txt").column_names


def test_file_without_sentences_raises(tmp_path):
    with pytest.raises(InputError, match="has 0 sentences"):
        read(tmp_path, "-DOCSTART- -X- O\n# only a comment\n\n")
