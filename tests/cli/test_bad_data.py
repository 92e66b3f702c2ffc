"""Bad data: exact messages with file and line, before weights load, with nothing written.

Other tools train on each of these inputs silently, or fail with a traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from run_files import ModelDir

FIX = "Fix the line, or drop bad rows with --on-bad-row skip."
UNLABELLED = "Such numbers mark rows without a label: remove these rows."
CLASSIFY = ["--task", "text-classification", "--model", "bert"]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(count)]


def labelled(*labels: Any) -> bytes:
    good = [{"text": f"the value {i}", "label": i % 2} for i in range(6)]
    return jsonl(*good, *({"text": f"text {i}", "label": label} for i, label in enumerate(labels)))


BAD_FILES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "empty file": (b"", [], ["rows.jsonl: has 0 rows (0 bytes). Use a file with rows."]),
    "all rows filtered by length": (
        jsonl(*pairs(3)), ["--max-length", "5", "--overlong", "drop"],
        ["no row is left within --max-length 5: the shortest has 20 tokens. Raise --max-length."]),
    "all rows skipped": (
        b'{"a"\n{"b"\n', ["--on-bad-row", "skip"],
        ["rows.jsonl:1: not valid JSON (Expecting ':' delimiter, column 1). No row is left: "
         "--on-bad-row skip would drop all 2 rows of rows.jsonl. Fix the file."]),
    "missing column": (
        jsonl({"txt": "a"}, {"txt": "b"}), [],
        ["--task text-generation: no format matches the columns. Columns: 'txt'. Expected "
         "one of: messages, conversations, prompt + completion, instruction + output, text. Map "
         "the columns: --map text=txt."]),
    "mapped column that is not there": (
        jsonl({"txt": "a"}, {"txt": "b"}), ["--map", "text=txtt"],
        ["--map text=txtt: no column 'txtt'. Did you mean 'txt'? Columns: 'txt'."]),
    "Latin-1": (
        jsonl(*pairs(2)) + '{"prompt": "café", "completion": "b"}\n'.encode("latin-1"), [],
        ["rows.jsonl:3: not UTF-8 (byte 0xe9 at offset 105). If it is Latin-1: "
         "iconv -f LATIN1 -t UTF-8 rows.jsonl > utf8-rows.jsonl"]),
    "UTF-16": (
        '{"text": "a"}\n'.encode("utf-16"), [],
        ["rows.jsonl:1: looks like UTF-16, not UTF-8 (byte 0xff at offset 0). Convert it: "
         "iconv -f UTF-16 -t UTF-8 rows.jsonl > utf8-rows.jsonl"]),
    "malformed line 1000": (
        jsonl(*pairs(999)) + b'{"prompt": "a" "completion": "b"}\n' + jsonl(*pairs(1)), [],
        [f"rows.jsonl:1000: not valid JSON (Expecting ',' delimiter, column 16). {FIX}"]),
    "last line cut short": (
        jsonl(*pairs(999)) + b'{"prompt": "a", "comp', [],
        ["rows.jsonl:1000: not valid JSON (Unterminated string starting at, column 17) (the last "
         f"line, without a newline: was the download or copy cut short?). {FIX}"]),
    "a number where texts are": (
        jsonl(*pairs(3), {"prompt": 5, "completion": "b"}, *pairs(2)), [],
        ["rows.jsonl:4: 'prompt' is a number (5), but a string in most rows (line 1 for one). "
         + FIX]),
    "an odd key": (
        jsonl(*pairs(3), {"promt": "a", "completion": "b"}), [],
        ["rows.jsonl:4: lacks 'prompt' and has 'promt', unlike the 3 other rows (did you mean "
         f"'prompt'?). {FIX}"]),
    "an array on a line": (
        jsonl(*pairs(3), ["a", "b"]), [],
        [f"rows.jsonl:4: a list, where one object with named columns is expected. {FIX}"]),
    "a key twice": (
        jsonl(*pairs(3)) + b'{"prompt": "a", "completion": "b", "prompt": "c"}\n', [],
        [f"rows.jsonl:4: the key 'prompt' occurs twice in one object. {FIX}"]),
    "null text": (
        jsonl({"text": "a b"}, {"text": None}, {"text": "c"}), [],
        [f"rows.jsonl:2: 'text' is null. {FIX}"]),
    "every text empty": (
        jsonl({"text": ""}, {"text": " "}), [],
        ["rows.jsonl:1: 'text' is empty.", "rows.jsonl:2: 'text' is empty.",
         "rows.jsonl: 2 of 2 rows are bad. Fix them, or drop bad rows with --on-bad-row skip."]),
    "label -1": (
        labelled(-1), CLASSIFY,
        [f"rows.jsonl:7: 'label' is -1, and classes begin at 0. {UNLABELLED}"]),
    "label -100": (
        labelled(-100), CLASSIFY,
        [f"rows.jsonl:7: 'label' is -100, and classes begin at 0. {UNLABELLED}"]),
    "label null": (labelled(None), CLASSIFY, [f"rows.jsonl:7: 'label' is null. {FIX}"]),
    "labels 1 and 2": (
        jsonl(*({"text": f"the value {i}", "label": i % 2 + 1} for i in range(6))), CLASSIFY,
        ["rows.jsonl: 'label' has the classes 1, 2; numbers must be 0, 1, … without a gap, and 0 "
         'never occurs. Count from 0, or write names: "2" in quotes is one.']),
    "fractions that are two classes": (
        jsonl(*({"text": f"the value {i}", "label": i % 2 + 0.5} for i in range(6))),
        [*CLASSIFY, "--set", "data.problem_type=single_label_classification"],
        ["rows.jsonl:1: 'label' has decimals (0.5). Classes are names or whole numbers. To learn "
         "a quantity: --set data.problem_type=regression."]),
    "longer than the positions": (
        jsonl({"text": "value " * 600}), ["--model", "gpt2"],
        ["1 of 1 rows are longer than 512 tokens (the model's positions); the longest has 604 "
         "(rows.jsonl:1). Pass --overlong drop or split."]),
    "no chat template": (
        jsonl({"messages": CHAT * 2}), ["--model", "gpt2"],
        ["rows.jsonl:1: is a conversation of 4 messages, and the model has no chat template. Add "
         "--chat-template mistral, or use a model with a template (an -Instruct model)."]),
    "an unknown role": (
        jsonl({"messages": CHAT}, {"messages": [{**CHAT[0], "role": "userr"}, CHAT[1]]}), [],
        ["rows.jsonl:2: turn 1 of 'messages' has the unknown role 'userr' (did you mean 'user'?; "
         "or map it: --map user=userr, or assistant=…). "
         + FIX]),
    "content missing": (
        jsonl({"messages": CHAT}, {"messages": [{"role": "user"}, CHAT[1]]}), [],
        [f"rows.jsonl:2: turn 1 of 'messages' has no 'content' (keys: role). {FIX}"]),
    "content null": (
        jsonl({"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], "content": None}]}), [],
        [f"rows.jsonl:2: 'content' of turn 2 of 'messages' is null. {FIX}"]),
    "no answer in any conversation": (
        jsonl({"messages": CHAT[:1]}, {"messages": CHAT[:1]}), [],
        ["rows.jsonl:1: 'messages' has no assistant turn. No row is left: --on-bad-row skip would "
         "drop all 2 rows of rows.jsonl. Fix the file."]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> Path:
    """Return the working directory with two models whose weights cannot be loaded."""
    import ftlevel.training.model as engine

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "load_model", refuse)
    for family, options in (("bert", {}), ("gpt2", {"chat": False})):
        Path(family).symlink_to(tiny_model_dir(family, **options))
    return tmp_path


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_error_names_file_and_line(name: str, folder: Path, cli: Cli) -> None:
    content, arguments, messages = BAD_FILES[name]
    Path("rows.jsonl").write_bytes(content)
    before = sorted(folder.iterdir())
    captured = cli.run("train --quiet --dataset rows.jsonl", *arguments, code=2)
    errors, _, topic = captured.err.rpartition("  ")
    assert errors.splitlines() == [f"ftlevel: {message}" for message in messages]
    assert topic in ("[files]\n", "[rows]\n", "[columns]\n", "[encoding]\n")
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_byte_order_mark_is_accepted(folder: Path, cli: Cli) -> None:
    Path("rows.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(*pairs(3)))
    output = cli("train --dry-run --dataset rows.jsonl")
    assert "columns: prompt + completion: 'prompt', 'completion'" in output
