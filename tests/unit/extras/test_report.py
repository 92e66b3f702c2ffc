"""The page about runs: whole, alone, escaped, small, and right in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run
from ftlevel.errors import InputError
from ftlevel.extras.report.facts import (
    NUM_BARS,
    ReportedRun,
    compute_prediction_stats,
    compute_retrieval_stats,
    load_run,
)
from ftlevel.extras.report.page import (
    MAX_POINTS,
    checks,
    data_findings,
    draw_charts,
    headline,
    render_page,
    thin,
)

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
SUMMARY: dict[str, Any] = {
    "task": "text-classification", "method": "lora", "model": {"name": EVIL}, "steps": 40,
    "trainable_parameters": 10, "total_parameters": 1000, "loss_first": 2.0, "loss_last": 1.0,
    "loss_first_spread": 0.1, "loss_last_spread": 0.1, "loss_window": 5, "headline": "accuracy",
    "metrics_before": {"accuracy": 0.5}, "metrics": {"accuracy": 0.9},
    "intervals": {"accuracy": [0.85, 0.95]},
    "data": {"name": "rows.csv", "train_rows": 9, "validation_rows": 3, "tokens": 99,
             "gate": [{"title": "HTML in a text", "count": 2, "total": 9, "split": "train",
                       "places": ["rows.csv:4"], "action": "warn"}]},
    "proof": {"gradient_tensors": 3, "frozen_tensors": 4, "probe_rows": 4,
              "reload_difference": 0.0, "adapter_effect": 1.5},
    "timings": {"total_s": 12.0, "tokens_per_s": 100.0}, "memory": {"peak_bytes": 2**30},
    "choices": [{"name": "task", "value": EVIL, "reason": EVIL}], "versions": {"torch": "2"},
    "finished": "today",
}  # fmt: skip


def records(count: int) -> list[dict[str, Any]]:
    return [
        {"step": at, "loss": 9.75 if at == count // 2 else 1 / (at + 1), "learning_rate": 1e-3,
         "grad_norm": 0.5, "tokens": at * 10, "elapsed_s": at, "train_s": at * 0.1,
         "memory_bytes": 2**30 + at}
        for at in range(count)
    ]  # fmt: skip


def facts(name: str = "run", count: int = 40, answers: Any = None) -> ReportedRun:
    return ReportedRun(name, Path("runs") / name, SUMMARY, records(count), answers)


ROWS = [
    {"row": 0, "where": "rows.csv:1", "loss": 0.1, "predicted": "a", "true": "a"},
    {"row": 1, "where": "rows.csv:2", "loss": 3.0, "predicted": "b", "true": "a"},
    {"row": 2, "where": "rows.csv:3", "loss": 0.2, "predicted": EVIL, "true": EVIL,
     "base_predicted": "before", "base_loss": 1.5, "input": EVIL},
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.seen


def test_what_users_wrote_is_text() -> None:
    page = render_page([facts(EVIL, answers=compute_prediction_stats(iter(ROWS)))])
    found = tags(page)
    assert [tag for tag, _ in found].count("script") == 1
    assert "img" not in [tag for tag, _ in found]
    assert not any(name.startswith("on") for _, attrs in found for name in attrs)
    assert page.count("&lt;script&gt;alert") >= 4


def test_nothing_is_fetched() -> None:
    page = render_page([facts()])
    for _, attrs in tags(page):
        assert not attrs.get("src")
        assert (attrs.get("href") or "#").startswith("#")
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert "url(" not in page


def test_runs_stand_side_by_side() -> None:
    page = render_page([facts("one"), facts("two")])
    charts = list(draw_charts([facts("one"), facts("two")]))
    assert [line.run for line in charts[0].lines] == ["one", "two"]
    assert page.count("<polyline") == 2 * len(charts)
    assert "0.5000 → 0.9000 [0.8500, 0.9500]" in page
    assert "Memory in use" in [chart.title for chart in charts]
    for chart in charts:  # a text for who does not see it
        assert f"{chart.title} ({chart.unit}) by step. one: from" in chart.words


def test_a_long_log_makes_a_small_page_with_its_peak() -> None:
    page = render_page([facts(count=100_000)])
    assert len(page.encode()) < 3_000_000
    loss = next(chart for chart in draw_charts([facts(count=100_000)]) if chart.name == "loss")
    assert len(loss.lines[0].points) <= MAX_POINTS + 1
    assert max(y for _, y in loss.lines[0].points) == 9.75
    assert loss.lines[0].points[0][0] == 0
    assert loss.lines[0].points[-1][0] == 99_999


def test_no_two_ticks_of_a_flat_curve_say_the_same() -> None:
    run = facts(count=3)
    records = [{"step": step, "loss": 3.96 + step / 200} for step in range(4)]
    (chart, *_) = draw_charts([replace(run, records=records)])
    assert [text for _, text in chart.ticks_y] == ["3.96", "3.965", "3.97", "3.975"]


def test_labels_of_small_ticks_fit_left_of_the_axis() -> None:
    records = [{"step": step, "learning_rate": 1e-3 - step * 2.5e-4} for step in range(5)]
    (chart,) = draw_charts([replace(facts(count=3), records=records)])
    assert {"2.5e-4", "7.5e-4", "0.001"} <= {text for _, text in chart.ticks_y}


def test_few_points_are_all_there() -> None:
    points = [(float(x), float(x % 7)) for x in range(MAX_POINTS)]
    assert thin(points) == points


def test_answers_are_counted() -> None:
    rows = [*ROWS, {**ROWS[1], "true": "b"}]
    answers = compute_prediction_stats(iter(rows))
    assert answers.total == 4
    assert answers.counts["a"] == {"a": 1, "b": 1}
    name, precision, recall, f1, count = next(one for one in answers.per_class if one[0] == "b")
    assert (name, precision, recall, count) == ("b", 0.5, 1.0, 1)
    assert f1 == pytest.approx(2 / 3)
    assert answers.worst[0]["loss"] == 3.0
    assert answers.best[0]["loss"] == 0.1
    assert [row["loss"] for row in answers.best + answers.worst[::-1]] == sorted(
        row["loss"] for row in rows
    )


def test_answers_without_rows_have_no_section() -> None:
    completions = compute_prediction_stats(iter([{"row": 0, "reward": 1.0}]))
    assert 'id="rows"' not in render_page([facts(answers=completions)])


def test_texts_have_no_matrix() -> None:
    rows = ({"predicted": f"text {at}", "true": "t", "loss": float(at)} for at in range(25_000))
    answers = compute_prediction_stats(rows)
    assert answers.classes == []
    assert [row["loss"] for row in answers.worst[:2]] == [24_999.0, 24_998.0]
    assert answers.best[0]["loss"] == 0.0


def test_tags_are_counted_word_by_word() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    true = [["B-A", "O", "O"], ["B-A", "O"], ["O", "B-C"]]
    predicted = [["B-A", "O", "B-A"], ["O", "O"], ["O", "B-C"]]
    rows = [{"true": t, "predicted": p, "loss": 1.0}
            for t, p in zip(true, predicted, strict=True)]  # fmt: skip
    answers = compute_prediction_stats(iter(rows))
    assert answers.unit == "words"
    assert answers.total == 3
    words = [[tag for tags in said for tag in tags] for said in (true, predicted)]
    expected = precision_recall_fscore_support(*words, labels=answers.classes)
    for at, (name, *scores) in enumerate(answers.per_class):
        assert name == answers.classes[at]
        assert scores == pytest.approx([figures[at] for figures in expected])
    page = render_page([facts(answers=answers)])
    assert "Words by correct class" in page
    assert '<th scope="col">tag</th>' in page


def test_answers_of_other_kinds_are_shown() -> None:
    pair = {"where": "row 1", "loss": 0.5, "base_loss": 0.75, "input": "which?", "chosen": "this",
            "rejected": "that", "reward_margin": 1.25, "tokens": 7, "base_tokens": 7}  # fmt: skip
    page = render_page([facts(answers=compute_prediction_stats(iter([pair])))])
    assert "row 1, loss 0.75 → 0.5, reward margin 1.25, tokens 7<" in page
    for text in ("input", "which?", "chosen answer", "this", "rejected answer", "that"):
        assert re.search(f">{re.escape(text)}<", page), text
    assert ">prediction<" not in page


def test_questions_have_their_loss_by_the_length_of_the_first_answer() -> None:
    rows = [{"predicted": "x", "true": ["w " * (1 + at), "other"], "loss": float(at)}
            for at in range(10)]  # fmt: skip
    assert compute_prediction_stats(iter(rows)).lengths[4] == (5, 5, 1, 4.0)


def test_texts_have_their_loss_by_length() -> None:
    rows = [{"predicted": "x", "true": "w " * (1 + at % 50), "loss": float(at % 50)}
            for at in range(1_000)]  # fmt: skip
    answers = compute_prediction_stats(iter(rows))
    assert len(answers.lengths) == 10
    assert answers.lengths[0] == (1, 5, 100, 2.0)
    assert answers.lengths[-1] == (46, 50, 100, 47.0)
    page = render_page([facts(answers=answers)])
    assert "Loss by length of the correct answer" in page
    assert "<meter" in page


def test_many_rows_and_a_long_log_make_a_small_page_that_opens_at_once(tmp_path: Path) -> None:
    rows = ({"where": f"rows.csv:{at}", "true": f"{EVIL} {at}" * 20, "predicted": "p " * 2_000,
             "loss": float(at)} for at in range(10_000))  # fmt: skip
    page = render_page([facts(count=100_000, answers=compute_prediction_stats(rows))])
    assert len(page.encode()) < 3_000_000
    assert "<img" not in page
    if shutil.which("chromium") is None:
        return
    # The best of three: a busy machine stretches the clock.
    ask = ("<script>onload = () => { document.body.offsetHeight;"
           "document.title = performance.now() }</script></body>")  # fmt: skip
    (tmp_path / "page.html").write_text(page.replace("</body>", ask))
    taken = []
    for attempt in range(3):
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             f"--user-data-dir={tmp_path / f'profile{attempt}'}",
             f"file://{tmp_path / 'page.html'}"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title is not None, done.stderr[-500:]
        taken.append(float(title[1]))
    assert min(taken) < 1_000, taken


def sentences(**changes: Any) -> list[str]:
    return list(headline({**SUMMARY, **changes}))


def test_the_result_is_a_sentence() -> None:
    first, meaning, interval, change = sentences()
    assert first == "accuracy 0.90 on 3 held-out rows, base 0.50; 95 % interval 0.85 to 0.95"
    assert meaning == "accuracy: share of rows with the right answer."
    assert interval == "With many more rows like these, the value would likely lie in the interval."
    assert change == "The value before training lies outside the interval: a real change is likely."
    *_, change = sentences(metrics_before={"accuracy": 0.87})
    assert change.endswith("lies inside the interval: the difference may be chance.")
    first, _, hint = sentences(metrics_before={}, intervals={"accuracy": [1.0, 1.0]})
    assert first == "accuracy 0.90 on 3 held-out rows"
    assert hint == "The model was not evaluated before training; --eval-on-start does that."
    assert "before this run 0.50" in sentences(adapter={"name": "runs/first"})[0]
    (only,) = sentences(metrics={}, metrics_before={}, intervals={})
    assert only == (
        "Training loss 1.00, at the start 2.00. No held-out rows: the quality on new rows is not "
        "known."
    )


def test_data_and_checks_are_sentences() -> None:
    assert list(data_findings(SUMMARY)) == [
        "HTML in a text: 2 of 9 train rows (rows.csv:4); action: warn"
    ]
    assert list(checks(SUMMARY)) == [
        "Every trained tensor received gradients (3 tensors).",
        "The 4 frozen tensors of the base model did not change, bit for bit.",
        "The saved files were loaded again and compared on 4 rows: outputs are equal.",
        "Training changed the outputs: logits moved by up to 1.5.",
    ]
    assert list(checks({})) == list(data_findings({})) == []


def test_regions_and_tables_have_names() -> None:
    answers = compute_prediction_stats(iter(ROWS))
    found = tags(render_page([facts("one", answers=answers), facts("two", answers=answers)]))
    names = [attrs["aria-label"] for _, attrs in found if attrs.get("role") == "region"]
    assert len(names) == len(set(names)) > 4
    assert all(attrs.get("tabindex") == "0" for _, attrs in found if attrs.get("role") == "region")


def test_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_run(tmp_path / "none")
    assert run(["report", str(tmp_path)]) == 2
    assert "is not a run that is done: it has no summary.json" in capsys.readouterr().err


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(SUMMARY))
        lines = "".join(json.dumps(record) + "\n" for record in records(9))
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')  # a kill
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert run(["report", one, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == f"{one}/report.html"
    assert run(["report", one, two]) == 2
    assert "--out report.html" in capsys.readouterr().err
    assert run(["report", one, two, "--out", str(tmp_path / "both.html")]) == 0
    assert "<polyline" in (tmp_path / "both.html").read_text()


_ASK = """<script>
const svg = document.querySelector("svg"), r = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: r.left + r.width / 2, clientY: r.top}));
document.title = JSON.stringify({wide: document.documentElement.scrollWidth, view: innerWidth,
  hover: document.querySelector("output").textContent});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt install chromium")
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    page = render_page([facts("one", answers=compute_prediction_stats(iter(ROWS))), facts("two")])
    # The narrowest window of a browser is wider than a phone: the page is in a frame.
    (tmp_path / "page.html").write_text(page.replace("</body>", _ASK))
    frame = (
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "onload = () => document.title = document.querySelector('iframe').contentDocument.title"
        "</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--allow-file-access-from-files", "--window-size=1600,1000",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    found = json.loads(title[1])
    assert found["view"] == width
    assert found["wide"] <= width
    assert found["hover"].startswith("step ")
    assert "one " in found["hover"]
    assert "CONSOLE" not in done.stderr


def test_scores_of_queries_are_counted_and_the_worst_shown() -> None:
    rows = [
        {"row": at, "where": f"row {at}", "query": f"query {at}", "document": "right",
         "retrieved": f"wrong {at}", "ndcg@10": float(at != 3), "positive_score": 0.1 * at,
         "negative_score": 0.5, "base_positive_score": 0.0, "base_negative_score": 1.0}
        for at in range(10)
    ]  # fmt: skip
    found = compute_retrieval_stats(rows)
    assert found is not None
    assert found.series == [
        "positives before", "positives", "best negatives before", "best negatives"
    ]  # fmt: skip
    assert len(found.bands) == NUM_BARS
    assert [sum(counts) for counts in zip(*(c for _, _, c in found.bands), strict=True)] == [10] * 4
    assert [row["row"] for row in found.worst[:2]] == [3, 0]
    run_ = replace(
        facts(),
        retrieval=found,
        summary={
            **SUMMARY,
            "metrics": {"ndcg@10_dim_32": 0.75},
            "metrics_before": {"ndcg@10_dim_32": 0.5},
        },
    )
    page = render_page([run_])
    assert page.index("query 3") < page.index("query 0")
    assert "wrong 3" in page
    assert '<th scope="row" class="n">32</th><td class="n">0.5000</td><td class="n">0.7500' in page
    lists = [{"scores": [2.0, -1.0, 0.5], "labels": [0.0, 1.0, 0.0], "ndcg@10": 0.5}]
    (row,) = compute_retrieval_stats(lists).worst  # type: ignore[union-attr]
    assert (row["positive_score"], row["negative_score"]) == (-1.0, 2.0)
    assert compute_retrieval_stats([{"predicted": "a", "true": "b"}]) is None
