"""metrics.jsonl of a run that goes on: nothing past the checkpoint, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlevel.artifacts.run_directory import RunDirectory, is_run

BEFORE = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 2, "eval_loss": 1.0}\n'


@pytest.mark.parametrize(
    "past", ["", "cut", '{"step": 3, "loss": 1.0}\n', '{"step": 3, "loss": 1.0}\n{"step": 4, "lo']
)
def test_what_was_logged_past_a_checkpoint_is_dropped(past: str, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(BEFORE[:-1] if past == "cut" else BEFORE + past)
    records = RunDirectory(tmp_path).truncate_log(2)
    assert log.read_text() == BEFORE
    assert [list(record.values()) for record in records] == [[1, 2.0], [2, 1.5], [2, 1.0]]
    assert list(tmp_path.iterdir()) == [log]


def test_lines_of_somebody_else_stay(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("my note\n" + BEFORE + '["mine"]\n{"step": 9}\n')
    assert len(RunDirectory(tmp_path).truncate_log(2)) == 3
    assert log.read_text() == "my note\n" + BEFORE + '["mine"]\n'


def test_no_log_is_none(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).truncate_log(2) == []
    assert not list(tmp_path.iterdir())


DAMAGED = b'{"step": 1}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": "x"}\n[]\n{"step": 2'


def test_damaged_lines_are_done_without(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    (tmp_path / "metrics.jsonl").write_bytes(DAMAGED)
    for name in ("notes.jsonl", "changes.jsonl"):
        (run.checkpoints / name).write_bytes(DAMAGED)
    assert run.load_log(9) == run.load_events() == [{"step": 1}]
    assert run.load_changes() == [{"step": 1}, {"step": "x"}]
    for name in ("summary.json", ".ftlevel.json"):
        (tmp_path / name).write_bytes(b"[" * 100_000)
    assert run.load_summary() is None
    assert not is_run(tmp_path)


def test_answers_of_a_former_end_do_not_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.save_predictions([{"row": 0}])
    assert (tmp_path / "validation.jsonl").read_text() == '{"row": 0}\n'
    run.save_predictions([])
    assert not (tmp_path / "validation.jsonl").exists()
