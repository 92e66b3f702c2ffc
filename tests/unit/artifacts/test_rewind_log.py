"""metrics.jsonl of a resumed run: records after the checkpoint are dropped, all others kept."""

from __future__ import annotations

import json

import pytest

from ftlevel.artifacts.run_directory import RunDirectory, is_run
from ftlevel.extras.rl.rollout_file import load_rollouts

UP_TO_CHECKPOINT = (
    '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 2, "eval_loss": 1.0}\n'
)


@pytest.mark.parametrize(
    "after", ["", "cut", '{"step": 3, "loss": 1.0}\n', '{"step": 3, "loss": 1.0}\n{"step": 4, "lo']
)
def test_records_after_checkpoint_are_dropped(after, tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(UP_TO_CHECKPOINT[:-1] if after == "cut" else UP_TO_CHECKPOINT + after)
    records = RunDirectory(tmp_path).truncate_log(2)
    assert log.read_text() == UP_TO_CHECKPOINT
    assert [list(record.values()) for record in records] == [[1, 2.0], [2, 1.5], [2, 1.0]]
    assert list(tmp_path.iterdir()) == [log]


def test_foreign_lines_are_kept(tmp_path):
    assert RunDirectory(tmp_path).truncate_log(2) == []  # without a log
    assert not list(tmp_path.iterdir())
    log = tmp_path / "metrics.jsonl"
    log.write_text("my note\n" + UP_TO_CHECKPOINT + '["mine"]\n{"step": 9}\n')
    assert len(RunDirectory(tmp_path).truncate_log(2)) == 3
    assert log.read_text() == "my note\n" + UP_TO_CHECKPOINT + '["mine"]\n'


def test_line_separators_in_completions_do_not_end_lines(tmp_path):
    record = {"step": 1, "prompt": "a\u2028b\x85c", "completions": []}
    text = json.dumps(record, ensure_ascii=False) + "\n"
    (tmp_path / "rollouts.jsonl").write_text(text, encoding="utf-8")
    assert load_rollouts(tmp_path / "rollouts.jsonl") == [record]


DAMAGED = b'{"step": 1}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": "x"}\n[]\n{"step": 2'


def test_damaged_lines_are_skipped(tmp_path):
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    (tmp_path / "metrics.jsonl").write_bytes(DAMAGED)
    (run.checkpoints / "notes.jsonl").write_bytes(DAMAGED)
    assert run.load_log(9) == run.load_events() == [{"step": 1}]
    for name in ("summary.json", ".ftlevel.json"):
        (tmp_path / name).write_bytes(b"[" * 100_000)
    assert run.load_summary() is None
    assert not is_run(tmp_path)


def test_empty_predictions_delete_old_file(tmp_path):
    run = RunDirectory(tmp_path)
    run.save_predictions([{"row": 0}])
    assert (tmp_path / "validation.jsonl").read_text() == '{"row": 0}\n'
    run.save_predictions([])
    assert not (tmp_path / "validation.jsonl").exists()


def test_changed_settings_stay_when_later_events_are_removed(tmp_path):
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    events = [{"step": 2, "how": "skipped"}, {"step": 4, "field": "threads"}, {"step": 4}]
    for event in events:
        run.note(event)
    run.truncate_events(2)
    assert run.load_events() == events[:2]
