"""`preview` shows the encoded rows as `train` gets them, for every task, and data problems."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import task_data
from command_line import Cli
from ftlevel.config import TrainConfig
from run_files import ModelDir, write_rows

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the argument"},
    {"role": "assistant", "content": "the [file]"},
    {"role": "user", "content": "the value"},
    {"role": "assistant", "content": "an object"},
]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    return write_rows(path, rows)


def supervised_text(text: str) -> str:
    """Return the bracketed (supervised) texts, joined; `\\[` is a literal bracket."""
    inside = re.findall(r"(?<!\\)\[((?:\\.|[^\]\\])*)\]", text)
    return "".join(inside).replace("\\", "")


def test_preview_conversation(tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    data = write(tmp_path / "talk.jsonl", {"messages": CHAT}, {"messages": CHAT[1:3]})
    out = cli("preview", "--model", tiny_model_dir("qwen2"), "--dataset", data, "--row", "1")
    head, row = out.split("row 1 (", 1)
    assert "columns: messages: 'messages'" in head
    body = row.split("length in tokens")[0]
    assert "<|im_start|>system⏎\nBe brief.<|im_end|>⏎\n" in body
    assert supervised_text(body) == "the [file]<|im_end|>an object<|im_end|>"
    assert "the run: 3 steps" in out
    assert "data check: no problems found" in out


@pytest.mark.parametrize(
    ("name", "family", "head", "expected"),
    [
        ("tags", "bert", "mlm", r"\[[^\]=]*=B-LOC\].*\[[^\]=]*=O\]"),
        ("class", "bert", "mlm", r"label: b"),
        ("multi", "bert", "mlm", r"label: x"),
        ("regression", "gpt2", None, r"label: 0\.\d+"),
        ("mask", "bert", "mlm", r"\[ ?\\\[MASK\\\]=\w+\]"),
        ("pair", "t5", None, r"\d+ tokens → \d+"),
    ],
)
def test_preview_every_task(
    name: str, family: str, head: str | None, expected: str, tmp_path: Path,
    tiny_model_dir: ModelDir, cli: Cli,
) -> None:  # fmt: skip
    tasks = {"tags": "token-classification", "mask": "masked-lm", "pair": "translation"}
    data = task_data.write(tmp_path / "data", name)
    columns = ["--map", "source=en", "--map", "target=de"] if name == "pair" else []
    out = cli("preview", "--model", tiny_model_dir(family, head), "--dataset", data,
        "--task", tasks.get(name, "text-classification"), *columns, "--row", "2",
    )  # fmt: skip
    assert re.search(expected, out, re.DOTALL), out


def test_embedding_texts_are_on_separate_lines(
    tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    rows = [{"anchor": f"a word {n}", "positive": f"[its] meaning {n}"} for n in range(2)]
    data = write(tmp_path / "pairs.jsonl", *rows)
    out = cli(
        f"preview --task embedding --model {tiny_model_dir('bert', 'mlm')} --dataset {data} --row 2"
    )
    title, query, document = out.split("row 2 (")[1].splitlines()[:3]
    assert re.search(r"\d tokens; query: tokens 1-\d+; document with label 1: tokens \d", title)
    assert query.startswith("query: [CLS]")
    assert query.endswith("[SEP]")
    assert re.match(r"document 1: \[CLS\] ?\[", document)


def test_question_answering_windows(tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    data = task_data.write(tmp_path / "data", "span")
    out = cli("preview", "--model", tiny_model_dir("bert", "mlm"), "--dataset", data, "--row", "3",
        "--task", "question-answering", "--max-length", "48", "--set", "data.doc_stride=12",
    )  # fmt: skip
    windows = out.split("row 3 (")[1:]
    assert len(windows) > 1
    assert "no answer in this window" in out
    with_answer = [window for window in windows if "no answer in this window" not in window]
    assert {supervised_text(window).strip() for window in with_answer} == {"module 2"}


def test_json_matches_training_rows(tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    from ftlevel.training.plan.resolve import resolve

    data = write(tmp_path / "talk.jsonl", *({"messages": CHAT[1 : 3 + 2 * i]} for i in range(2)))
    model = str(tiny_model_dir("llama", chat=True))
    result = json.loads(cli("preview", "--model", model, "--dataset", str(data), "--json"))
    config = TrainConfig.model_validate(
        {"model": {"name_or_path": model}, "data": {"dataset": str(data)}}
    )
    rows = {row.row + 1: row for row in resolve(config).data.train}
    for preview_row in result["rows"]:
        row = rows[preview_row["number"]]
        assert preview_row["place"].endswith(f"talk.jsonl:{preview_row['number']}")
        assert [token["id"] for token in preview_row["tokens"]] == row.input_ids
        assert [t["id"] if t["supervised"] else -100 for t in preview_row["tokens"]] == row.labels
    assert result["tokens"] == sum(len(row.input_ids) for row in rows.values())
    assert sum(bar["count"] for bar in result["lengths"]) == 2


def test_problems_that_stop_training_are_shown(tmp_path: Path, cli: Cli) -> None:
    good = {"prompt": "a", "completion": "b"}
    data = write(tmp_path / "x.jsonl", good, {"prompt": "c", "completion": None}, good)
    cli.fails(f"train --dry-run --dataset {data}")
    out = cli("preview", "--dataset", data)
    assert f"null content: 1 of 3 train rows ({data}:2: 'completion' is null): would stop" in out
    assert f"the same as an earlier row: 1 of 2 train rows ({data}:3 as {data}:1): kept" in out


def test_rows_are_numbered_in_order_of_files(tmp_path: Path, cli: Cli) -> None:
    for name, count in (("a", 2), ("b", 3)):  # training interleaves them, beginning with b
        rows = ({"prompt": f"{name} {i}", "completion": "x"} for i in range(count))
        write(tmp_path / f"{name}.jsonl", *rows)
    numbers = [part for number in ("1", "2", "3", "5") for part in ("--row", number)]
    out = cli("preview", "--dataset", tmp_path / "*.jsonl", *numbers)
    places = re.findall(r"row (\d) \(.*?(\w\.jsonl:\d)\)", out)
    assert places == [("1", "a.jsonl:1"), ("2", "a.jsonl:2"), ("3", "b.jsonl:1"),
                      ("5", "b.jsonl:3")]  # fmt: skip


def test_missing_row_is_rejected(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "x.jsonl", *({"prompt": f"{i}", "completion": "b"} for i in range(2)))
    error = cli.fails("preview", "--dataset", data, "--row", "9")
    assert error == (
        "ftlevel: --row 9: no such row. There are 2 training rows, of which 2 are trained on.  "
        "[files]\n"
    )


def test_preview_of_run_uses_its_data(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(f"data: {{dataset: {data}}}\n", encoding="utf-8")
    assert "row 1 (" in cli("preview", tmp_path / "run")
    assert "without config.yaml" in cli.fails("preview", tmp_path)


def test_multi_token_characters_are_not_split(
    tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    data = write(tmp_path / "x.jsonl", {"text": "the 木 and 🎈 file"})
    for family in ("gpt2", "llama"):
        out = cli("preview", "--model", tiny_model_dir(family, chat=False), "--dataset", data)
        assert "the 木 and 🎈 file" in supervised_text(out), family


@pytest.mark.slow
def test_html_page_fits_phone_screen(tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser is installed ({', '.join(BROWSERS)})")
    data = write(tmp_path / "x.jsonl", {"prompt": "a<b>" + "x" * 300, "completion": "</div>&amp;"})
    page = tmp_path / "page.html"
    cli("preview", "--model", tiny_model_dir("qwen2"), "--dataset", data, "--html", page)
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|url\(|<script|@import", html)
    measure = (
        "<script>document.title = [document.documentElement.scrollWidth <= innerWidth, "
        "[...document.querySelectorAll('.l')].slice(1).map(e => e.textContent).join('')]"
        ".join('|')</script></body>"
    )
    page.write_text(html.replace("</body>", measure), encoding="utf-8")
    process = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", process.stdout)
    assert title is not None
    assert title.group(1) == "true|&lt;/div&gt;&amp;amp;&lt;|im_end|&gt;"


BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


LONG = [{"prompt": f"{'word ' * 40 * (i % 2)}{i}", "completion": f"answer {i}"} for i in range(6)]


def test_long_rows_are_shown_truncated(tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    data = write(tmp_path / "long.jsonl", *LONG)
    arguments = ["--model", tiny_model_dir("llama"), "--dataset", data, "--max-length", "60"]
    truncation = ["--overlong", "truncate-prompt"]
    out = cli("preview", *arguments, *truncation, "--row", "4")
    assert "row 4 (" in out
    assert "long.jsonl:4): 60 tokens" in out
    assert "rows changed: 3 shortened at the beginning of the prompt" in out
    assert "would stop the run" not in out


def test_overlong_rows_that_stop_training_are_reported(
    tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    data, page = write(tmp_path / "long.jsonl", *LONG), tmp_path / "page.html"
    arguments = ["--model", tiny_model_dir("llama"), "--dataset", data, "--max-length", "60"]
    out = cli("preview", *arguments, "--html", page)
    assert "rows changed: 3 dropped" in out
    message = "3 of 6 rows are longer than 60 tokens; the longest has"
    assert f"data check: would stop the run: {message}" in out
    assert message in page.read_text(encoding="utf-8")
    result = cli.json("preview", *arguments, "--json")
    assert result["data"]["stops"].startswith(message)
    assert result["data"]["stops"] in cli.fails("train --dry-run", *arguments)


def test_overlong_targets_that_stop_training_are_reported(
    tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    rows = [{"document": f"the {i}", "summary": "word " * (30 * (i == 2) + 1)} for i in range(4)]
    data = write(tmp_path / "x.jsonl", *rows)
    out = cli(f"preview --model {tiny_model_dir('t5')} --dataset {data} --task summarization",
              "--set data.max_target_length=20")  # fmt: skip
    assert "would stop the run: 1 of 4 targets are longer than 20 tokens" in out
