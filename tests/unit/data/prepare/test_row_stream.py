"""Streams of encoded rows: each kept row once per pass, and resumable from every state."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import SequentialSampler

from ftlevel.config import DataConfig
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData
from ftlevel.data.prepare.row_stream import ChunkEncoder, RowStream, StreamSharding
from ftlevel.data.prepare.streaming import StreamedRows, prepare_stream
from ftlevel.errors import ConfigError, InputError
from ftlevel.tasks import TASKS
from tiny_tokenizers import build_tokenizer

COUNT = 90


def prepare(path: Path, rows: list[Any], **options: Any) -> PreparedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(dataset=str(path), streaming=True, shuffle_buffer=20, **options)
    tokenizer = build_tokenizer("llama", None)
    context = EncodingContext(
        TASKS["text-generation"], "decoder", tokenizer, len(tokenizer), LengthBounds(200), seed=3
    )
    return prepare_stream(config, context)


def pair(i: int) -> dict[str, str]:
    return {"prompt": f"say {i}", "completion": f"it is {i}" + " and" * (i % 7)}


def read_rows(stream: RowStream, count: int) -> list[Any]:
    return [next(stream) for _ in range(count)]


def test_each_pass_returns_every_kept_row_once(tmp_path: Path) -> None:
    prepared = prepare(
        tmp_path / "x.jsonl", [*map(pair, range(COUNT)), pair(1) | {"completion": None}],
        on_bad_row="skip", validation_rows=10,
    )  # fmt: skip
    first, second = read_rows(prepared.stream, COUNT - 10), read_rows(prepared.stream, COUNT - 10)
    lines = [row.row for row in first]
    assert sorted(lines) == list(range(11, COUNT + 1)), "the first ten are held out"
    assert lines != sorted(lines)
    assert sorted(row.row for row in second) == sorted(lines)
    assert [row.row for row in second] != lines, "each pass has an order of its own"
    assert {row.row: row.input_ids for row in first} == {r.row: r.input_ids for r in second}
    expected = {tuple(row.input_ids) for row in prepared.train}
    assert {tuple(row.input_ids) for row in first} == expected, "as they are without streaming"
    assert len(prepared.validation) == 10
    assert prepared.stream.counts["passes"] == 1
    assert prepared.stream.counts["gate.null_content"] == 2, "once a pass"


@pytest.mark.parametrize("step", [1, 3, 7])
def test_restored_stream_returns_remaining_rows(step: int, tmp_path: Path) -> None:
    data, options = tmp_path / "x.jsonl", {"validation_rows": 70}  # more than the first chunk
    rows = list(map(pair, range(120)))
    uninterrupted = StreamedRows(prepare(data, rows, **options).stream, step, 60)
    expected = [uninterrupted[i] for i in SequentialSampler(uninterrupted)]
    assert len(expected) == 60 * step
    for checkpoint_step in (1, 2, 30, 59):
        interrupted = StreamedRows(prepare(data, rows, **options).stream, step, 60)
        for i in range(
            min(checkpoint_step * step + 2 * step, len(interrupted))
        ):  # the data loader prefetches
            interrupted[i]
        folder = tmp_path / f"checkpoint-{checkpoint_step}"
        folder.mkdir()
        interrupted.save(folder, checkpoint_step)
        resumed = StreamedRows(prepare(data, rows, **options).stream, step, 60)
        resumed.restore(folder)
        assert [resumed[i] for i in range(checkpoint_step * step, 60 * step)] == expected[
            checkpoint_step * step :
        ]


def test_rows_of_other_processes_are_skipped(tmp_path: Path) -> None:
    rows = list(map(pair, range(COUNT)))
    all_rows = StreamedRows(prepare(tmp_path / "x.jsonl", rows).stream, 8, 9)
    sharded_rows = StreamedRows(prepare(tmp_path / "x.jsonl", rows).stream, 8, 9)
    expected = [all_rows[i] for i in range(72)]
    own_indices = [i for i in range(72) if i % 8 >= 4]
    assert [sharded_rows[i] for i in own_indices] == [expected[i] for i in own_indices]
    with pytest.raises(IndexError, match="was taken"):
        sharded_rows[3]


class Exchange:
    """Exchange of values between processes, which are threads here."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count
        self.wait = threading.Barrier(count, timeout=30).wait

    def shard(self, rank: int) -> StreamSharding:
        def exchange(value: Any) -> Any:
            self.values[rank] = value
            self.wait()
            gathered = list(self.values)
            self.wait()
            return gathered

        return StreamSharding(len(self.values), rank, exchange)


@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_processes_share_encoding_and_get_expected_rows(
    overlong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "x.jsonl"
    rows: list[Any] = [{"text": f"say {n} and it is" + " and" * (n % 7)} for n in range(700)]
    for n in (300, 301, 690):
        rows[n] = {"text": "please " * 90}
    rows[400] = {"text": None}
    options = {"validation_rows": 70, "on_bad_row": "skip", "overlong": overlong,
               "max_length": 60, "max_eval_samples": 70}  # fmt: skip
    step, steps, count = 12, 110, 3  # two passes
    encoded: Counter[int] = Counter()
    original_call = ChunkEncoder.__call__

    def counting_call(self: ChunkEncoder, chunk: Any, counts: Any) -> Any:
        encoded[id(self)] += len(chunk.rows)
        return original_call(self, chunk, counts)

    monkeypatch.setattr(ChunkEncoder, "__call__", counting_call)
    single = StreamedRows(prepare(data, rows, **options).stream, step, steps)
    expected = [single[i] for i in range(len(single))]
    num_single_process = encoded.total()
    streams = [prepare(data, rows, **options).stream for _ in range(2 * count)]

    def run(streams: list[RowStream], begin: int, end: int, save: bool = False) -> None:
        exchange = Exchange(len(streams))

        def read_share(rank: int) -> list[Any]:
            streams[rank].divide(exchange.shard(rank))
            sharded_rows = StreamedRows(streams[rank], step, steps, together=step // 2)
            folder = tmp_path / f"checkpoint-{rank}"
            if begin:
                sharded_rows.restore(folder)
            share = step // 2 // len(streams)
            own_indices = [
                i for i in range(begin * step, end * step) if i % (step // 2) // share == rank
            ]
            assert [sharded_rows[i] for i in own_indices] == [expected[i] for i in own_indices]
            if save:
                folder.mkdir()
                sharded_rows.save(folder, end)
            return own_indices

        with ThreadPoolExecutor(len(streams)) as pool:
            indices = list(pool.map(read_share, range(len(streams))))
        assert sorted(i for process_indices in indices for i in process_indices) == list(
            range(begin * step, end * step)
        )

    run(streams[:count], 0, 60, save=True)
    states = {(tmp_path / f"checkpoint-{rank}" / "stream.json").read_text() for rank in range(3)}
    assert len(states) == 1
    run(streams[count : count + 2], 60, 110)  # with a different number of processes
    num_encoded = [encoded[id(stream._encode)] for stream in streams[: count + 2]]
    assert sum(num_encoded) < 1.2 * num_single_process
    assert max(num_encoded[:3]) < 0.5 * sum(num_encoded[:3])


def test_error_is_raised_in_all_processes_at_its_row(tmp_path: Path) -> None:
    data, exchange = tmp_path / "x.jsonl", Exchange(2)
    rows = list(map(pair, range(1200)))
    streams = [prepare(data, rows, max_eval_samples=1).stream for _ in range(2)]
    rows[1100] = {"prompt": 3}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read_all(rank: int) -> tuple[int, str]:
        streams[rank].divide(exchange.shard(rank))
        received: list[Any] = []
        with pytest.raises(InputError) as error:
            received.extend(streams[rank])
        return len(received), str(error.value)

    with ThreadPoolExecutor(2) as pool:
        (first, message), (second, other_message) = pool.map(read_all, range(2))
    assert first == second > 1000
    assert message == other_message
    assert "x.jsonl:1101" in message


def test_stream_without_usable_rows_raises(tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "x.jsonl", list(map(pair, range(8))), validation_rows=7)
    first = next(prepared.stream)
    assert next(prepared.stream).input_ids == first.input_ids
    text = "".join(json.dumps(pair(i) | {"completion": None}) + "\n" for i in range(9))
    skipping = prepare(tmp_path / "y.jsonl", [pair(0)], on_bad_row="skip")
    (tmp_path / "y.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="no row is left to train on; all were dropped"):
        next(skipping.stream)


def test_restore_from_checkpoint_without_stream_state_raises(tmp_path: Path) -> None:
    rows = StreamedRows(prepare(tmp_path / "x.jsonl", list(map(pair, range(9)))).stream, 1, 1)
    with pytest.raises(ConfigError, match=r"has no stream\.json, so it is not of a streamed run"):
        rows.restore(tmp_path)


Policy = Callable[[list[Any]], None]


@pytest.mark.parametrize(
    ("overlong", "lines", "counter"),
    [("drop", 3, "dropped"), ("truncate-prompt", 4, "shortened")],
)
def test_overlong_rows_in_stream(overlong: str, lines: int, counter: str, tmp_path: Path) -> None:
    rows = [*map(pair, range(3)), {"prompt": "say " + "please " * 30, "completion": "no"}]
    prepared = prepare(
        tmp_path / "x.jsonl", rows, max_length=50, overlong=overlong, max_eval_samples=1
    )
    assert len({row.row for row in read_rows(prepared.stream, lines)}) == lines
    assert prepared.stream.counts[counter] >= 1
    with pytest.raises(InputError, match=r"1 of 4 rows are longer than 50 tokens; .*x\.jsonl:4"):
        prepare(tmp_path / "x.jsonl", rows, max_length=50)
