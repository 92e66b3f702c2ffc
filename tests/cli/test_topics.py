"""Topics of errors and warnings, and the sections of docs/troubleshooting.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.cli.topics import TOPICS, topic_of_error, topic_of_module
from ftlevel.errors import ConfigError
from ftlevel.tasks.base import OutputOptions, check_options
from messages import messages

ROOT = Path(__file__).resolve().parents[2]
_MIN_MESSAGES = 600  # messages in the sources; fewer means that some are not recognized


def test_message_topics_match_troubleshooting_sections() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    sections = [title.lower() for title in re.findall(r"^## (.+)$", page, re.MULTILINE)]
    all_messages = list(messages())
    assert sections == list(TOPICS)
    assert [message.where for message in all_messages if message.topic is None] == []
    assert len(all_messages) > _MIN_MESSAGES
    assert set(Counter(message.topic for message in all_messages)) == set(sections)


def test_longest_module_prefix_decides_topic() -> None:
    assert topic_of_module("ftlevel.data.formats.columns") == "columns"
    assert topic_of_module("ftlevel.data.formats.turns") == "rows"
    assert topic_of_module("ftlevel.data.sources.hub") == "files"
    assert topic_of_module("ftlevel.datasets") is None
    assert topic_of_module("datasets.load") is None


def test_topic_modules_exist() -> None:
    names = [name for modules in TOPICS.values() for name in modules.split()]
    files = (ROOT / "src/ftlevel" / name.replace(".", "/") for name in names)
    missing = [file for file in files if not (file.is_dir() or file.with_suffix(".py").is_file())]
    assert missing == []


def test_setting_that_a_task_rejects_is_no_fault_of_rows() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(OutputOptions(probabilities=True), "a number", "")
    assert topic_of_error(caught.value) == "settings"


@pytest.mark.parametrize(
    ("arguments", "topic"),
    [
        (["train", "--lora-r", "-5"], "settings"),
        (["train", "--no-such-flag"], "settings"),
        (["recipes", "show", "nothing"], "recipes"),
        (["train", "--dataset", "missing.csv"], "files"),
        (["train", "--dataset", "mail.csv", "--task", "text-classification"], "columns"),
        (["train", "--model", "missing/model"], "models"),
        (["train", "--target-modules", "q_projj"], "targets"),
        (["train", "--method", "full", "--quant", "4bit"], "settings"),
        (["train", "--modules-to-save", "nothing"], "methods"),
        (["report", "missing"], "reports"),
    ],
)
def test_error_ends_with_topic(
    arguments: list[str], topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mail.csv").write_text("subject,queue\nhello,delivery\nhi,payment\n")
    *_, last = cli.fails(*arguments).splitlines()
    assert last.endswith(f"  [{topic}]")
