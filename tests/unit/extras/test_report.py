"""The HTML report: self-contained, escaped, small, and displayed correctly in a browser."""

from __future__ import annotations

import json
import re
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
    create_reported_run,
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

INJECTION = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
SUMMARY: dict[str, Any] = {
    "task": "text-classification", "method": "lora", "model": {"name": INJECTION}, "steps": 40,
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
    "choices": [{"name": "task", "value": INJECTION, "reason": INJECTION}],
    "versions": {"torch": "2"}, "finished": "today",
}  # fmt: skip


def make_records(count: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 9.75 if step == count // 2 else 1 / (step + 1),
         "learning_rate": 1e-3, "grad_norm": 0.5, "tokens": step * 10, "elapsed_s": step,
         "train_s": step * 0.1, "memory_bytes": 2**30 + step}
        for step in range(count)
    ]  # fmt: skip


def make_run(name: str = "run", count: int = 40, predictions: Any = None) -> ReportedRun:
    return ReportedRun(name, Path("runs") / name, SUMMARY, make_records(count), predictions)


ROWS = [
    {"row": 0, "where": "rows.csv:1", "loss": 0.1, "predicted": "a", "true": "a"},
    {"row": 1, "where": "rows.csv:2", "loss": 3.0, "predicted": "b", "true": "a"},
    {"row": 2, "where": "rows.csv:3", "loss": 0.2, "predicted": INJECTION, "true": INJECTION,
     "base_predicted": "before", "base_loss": 1.5, "input": INJECTION},
]  # fmt: skip


def parse_tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Return the start tags of a page with their attributes."""
    parser, tags = HTMLParser(), []
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(page)
    return tags


def test_user_texts_are_escaped():
    page = render_page([make_run(INJECTION, predictions=compute_prediction_stats(iter(ROWS)))])
    start_tags = parse_tags(page)
    assert [tag for tag, _ in start_tags].count("script") == 1
    assert "img" not in [tag for tag, _ in start_tags]
    assert not any(name.startswith("on") for _, attrs in start_tags for name in attrs)
    assert page.count("&lt;script&gt;alert") >= 4


def test_page_loads_no_resources():
    page = render_page([make_run()])
    for _, attrs in parse_tags(page):
        assert not attrs.get("src")
        assert (attrs.get("href") or "#").startswith("#")
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert "url(" not in page


def test_several_runs_are_compared():
    page = render_page([make_run("one"), make_run("two")])
    charts = list(draw_charts([make_run("one"), make_run("two")]))
    assert [line.run for line in charts[0].lines] == ["one", "two"]
    assert page.count("<polyline") == 2 * len(charts)
    assert page.count("accuracy: share of rows with the right answer.") == 1
    assert "0.5000 → 0.9000 [0.8500, 0.9500]" in page
    assert "Memory in use" in [chart.title for chart in charts]
    for chart in charts:  # text alternative for screen readers
        assert f"{chart.title} ({chart.unit}) by step. one: from" in chart.words


def test_runs_of_equal_names_are_shown_by_path():
    page = render_page([make_run(), replace(make_run(), path=Path("other") / "run")])
    assert "runs/run, other/run: training report" in page
    assert "<h3>other/run</h3>" in page


def test_long_log_is_thinned_but_keeps_peak():
    loss = next(chart for chart in draw_charts([make_run(count=100_000)]) if chart.name == "loss")
    points = loss.lines[0].points
    assert len(points) <= MAX_POINTS + 1
    assert max(y for _, y in points) == 9.75
    assert (points[0][0], points[-1][0]) == (0, 99_999)
    points = [(float(x), float(x % 7)) for x in range(MAX_POINTS)]
    assert thin(points) == points


def draw(**columns):
    """Return the charts, by name, of a log with a value of each column per step."""
    rows = zip(*columns.values(), strict=True)
    log = [dict(zip(columns, row, strict=True)) for row in rows]
    return {chart.name: chart for chart in draw_charts([replace(make_run(), records=log)])}


def test_tick_labels_are_unique_and_of_one_notation():
    steps, charts = range(5), draw(
        step=range(5), loss=[3.96, 3.965, 3.97, 3.975, 3.96],
        learning_rate=[2e-3 - step * 4e-4 for step in range(5)], clipped=[0.0] * 5,
        eval_length=[9.0 + step for step in range(5)],
    )  # fmt: skip
    labels = {name: [text for _, text in chart.ticks_y] for name, chart in charts.items()}
    assert labels["loss"] == ["3.96", "3.965", "3.97", "3.975"]
    assert labels["learning_rate"] == ["5e-4", "1e-3", "1.5e-3", "2e-3"]
    assert charts["clipped"].span[2:] == (0.0, 1.0)  # a share is not negative
    assert charts["eval_length"].unit == "tokens"
    rates = draw(step=steps, learning_rate=[1e-3 - step * 2.5e-4 for step in steps])
    ticks = {text for _, text in rates["learning_rate"].ticks_y}
    assert {"0", "2.5e-4", "7.5e-4", "1e-3"} <= ticks


@pytest.mark.parametrize(("count", "ticks"), [(2, ["1", "2"]), (11, ["5", "10"])])
def test_step_labels_are_whole_numbers(count, ticks):
    steps = range(1, count + 1)
    chart = draw(step=steps, loss=[1 / step for step in steps])["loss"]
    assert [text for _, text in chart.ticks_x] == ticks


def test_prediction_stats():
    rows = [*ROWS, {**ROWS[1], "true": "b"}]
    answers = compute_prediction_stats(iter(rows))
    assert answers.total == 4
    assert answers.counts["a"] == {"a": 1, "b": 1}
    (scores,) = (row[1:] for row in answers.per_class if row[0] == "b")
    assert scores == pytest.approx((0.5, 1.0, 2 / 3, 1))  # precision, recall, F1, rows
    losses = [row["loss"] for row in answers.best + answers.worst[::-1]]
    assert losses == sorted(row["loss"] for row in rows)


def test_predictions_without_rows_have_no_section():
    completions = compute_prediction_stats(iter([{"row": 0, "reward": 1.0}]))
    assert 'id="rows"' not in render_page([make_run(predictions=completions)])


def test_text_predictions_have_no_confusion_matrix():
    rows = ({"predicted": f"text {i}", "true": "t", "loss": float(i)} for i in range(25_000))
    answers = compute_prediction_stats(rows)
    assert answers.classes == []
    assert [row["loss"] for row in answers.worst[:2]] == [24_999.0, 24_998.0]
    assert answers.best[0]["loss"] == 0.0
    few = [{"predicted": f"text {i}", "true": "t", "loss": 1.0, "tokens": 2} for i in range(3)]
    assert compute_prediction_stats(iter(few)).classes == []


def test_answers_of_questions_are_plain_text():
    rows = [
        {"where": "row 1", "loss": 0.1, "input": "who?", "predicted": "", "true": []},
        {"where": "row 2", "loss": 0.2, "input": "where?", "predicted": "Ob", "true": ["Ob", "Om"]},
    ]
    page = render_page([make_run(predictions=compute_prediction_stats(iter(rows)))])
    assert page.count("<pre>(none)</pre>") == 2
    assert "<pre>Ob, Om</pre>" in page


def test_tags_are_counted_per_word():
    from sklearn.metrics import precision_recall_fscore_support

    true = [["B-A", "O", "O"], ["B-A", "O"], ["O", "B-C"]]
    predicted = [["B-A", "O", "B-A"], ["O", "O"], ["O", "B-C"]]
    rows = [{"true": t, "predicted": p, "loss": 1.0}
            for t, p in zip(true, predicted, strict=True)]  # fmt: skip
    answers = compute_prediction_stats(iter(rows))
    assert answers.unit == "words"
    assert answers.total == 3
    words = [[tag for row_tags in labels for tag in row_tags] for labels in (true, predicted)]
    expected = precision_recall_fscore_support(*words, labels=answers.classes)
    for index, (name, *scores) in enumerate(answers.per_class):
        assert name == answers.classes[index]
        assert scores == pytest.approx([figures[index] for figures in expected])
    page = render_page([make_run(predictions=answers)])
    assert "Words by correct class" in page
    assert '<th scope="col">tag</th>' in page


def test_command_is_quoted():
    page = render_page([make_run("my run")])
    assert "<pre>ftlevel train &#39;runs/my run/config.yaml&#39;</pre>" in page


def test_label_sets_are_no_tags():
    rows = [{"true": ["a", "b"], "predicted": ["b", "c"], "loss": 1.0}]
    assert compute_prediction_stats(rows).unit == "words"
    summary = SUMMARY | {"data": {"problem_type": "multi_label_classification"}}
    run = create_reported_run(Path("run"), summary, [], lambda: rows)
    assert run.answers.classes == []
    assert run.answers.worst == rows


def test_preference_rows_are_shown():
    pair = {"where": "row 1", "loss": 0.5, "base_loss": 0.75, "input": "which?", "chosen": "this",
            "rejected": "that", "reward_margin": 1.25, "tokens_right": 7,
            "base_tokens_right": 7}  # fmt: skip
    page = render_page([make_run(predictions=compute_prediction_stats(iter([pair])))])
    assert "row 1, loss 0.75 → 0.5, reward margin 1.25, correct tokens 7<" in page
    alone = compute_prediction_stats(iter([{k: v for k, v in pair.items() if k != "input"}]))
    assert ">prompt and chosen answer<" in render_page([make_run(predictions=alone)])
    for text in ("input", "which?", "chosen answer", "this", "rejected answer", "that"):
        assert re.search(f">{re.escape(text)}<", page), text
    assert ">prediction<" not in page


def test_loss_by_length_uses_first_answer():
    rows = [{"predicted": "x", "true": ["w " * (1 + i), "other"], "loss": float(i)}
            for i in range(10)]  # fmt: skip
    assert compute_prediction_stats(iter(rows)).lengths[4] == (5, 5, 1, 4.0)


def test_loss_by_length_of_texts():
    rows = [{"predicted": "x", "true": "w " * (1 + i % 50), "loss": float(i % 50)}
            for i in range(1_000)]  # fmt: skip
    answers = compute_prediction_stats(iter(rows))
    assert len(answers.lengths) == 10
    assert answers.lengths[0] == (1, 5, 100, 2.0)
    assert answers.lengths[-1] == (46, 50, 100, 47.0)
    page = render_page([make_run(predictions=answers)])
    assert "Loss by length of the correct answer" in page
    assert "<meter" in page


def test_page_of_large_run_is_small():
    rows = ({"where": f"rows.csv:{i}", "true": f"{INJECTION} {i}" * 20, "predicted": "p " * 2_000,
             "loss": float(i)} for i in range(10_000))  # fmt: skip
    page = render_page([make_run(count=100_000, predictions=compute_prediction_stats(rows))])
    assert len(page.encode()) < 3_000_000
    assert "<img" not in page


def get_headline(**changes: Any) -> list[str]:
    return list(headline({**SUMMARY, **changes}))


def test_headline_sentences():
    first, meaning, interval, change = get_headline()
    assert first == "accuracy 0.90 on 3 held-out rows, base 0.50; 95 % interval 0.85 to 0.95"
    assert meaning == "accuracy: share of rows with the right answer."
    assert interval == "With many more rows like these, the value would likely lie in the interval."
    assert change == "The value before training lies outside the interval: a real change is likely."
    *_, change = get_headline(metrics_before={"accuracy": 0.87})
    assert change.endswith("lies inside the interval: the difference may be chance.")
    first, _, hint = get_headline(metrics_before={}, intervals={"accuracy": [1.0, 1.0]})
    assert first == "accuracy 0.90 on 3 held-out rows"
    assert hint == "The model was not evaluated before training; --eval-on-start does that."
    assert "before this run 0.50" in get_headline(adapter={"name": "runs/first"})[0]
    new_head = {"name": "head learning rate", "value": 0.02, "reason": ""}
    assert "rows, random head 0.50" in get_headline(choices=[new_head])[0]
    _, meaning, *_ = get_headline(task="reward")
    assert meaning == "accuracy: share of pairs whose chosen answer has the higher score."
    values = {"headline": "f1", "metrics": {"f1": 1.0}, "metrics_before": {"f1": 0.0412}}
    first, meaning, *_ = get_headline(task="question-answering", intervals={}, **values)
    assert first == "f1 1.00 on 3 held-out rows, base 0.041"
    assert meaning.startswith("f1: overlap of the words")
    before, after = {"pseudo_perplexity": 47059.6671}, {"pseudo_perplexity": 265.0883}
    first, *_ = get_headline(headline="pseudo_perplexity", metrics=after, metrics_before=before)
    assert first == "pseudo perplexity 265 on 3 held-out rows, base 47,060"
    name = "logp_mean_accuracy"
    first, meaning, *_ = get_headline(headline=name, metrics={name: 0.5}, metrics_before={})
    assert first.startswith("log-probability mean accuracy 0.50 on 3")
    assert meaning.endswith("share of pairs whose chosen answer is more probable per token.")
    (only,) = get_headline(metrics={}, metrics_before={}, intervals={})
    assert only == (
        "Training loss 1.00, at the start 2.00. No held-out rows: the quality on new rows is not "
        "known."
    )


def test_data_findings_and_checks():
    assert list(data_findings(SUMMARY)) == [
        "HTML in a text: 2 of 9 train rows (rows.csv:4); action: warn"
    ]
    verified = {"rows": 4, "loss": 0.0, "gradient": 7.5e-6}
    (compared,) = checks({"speed": {"verified": verified}})
    assert compared.endswith("the loss differs by 0, gradients by 7.5e-06 (relative).")
    assert list(checks(SUMMARY)) == [
        "Every trained tensor received gradients (3 tensors).",
        "The 4 frozen tensors of the base model did not change, bit for bit.",
        "The saved files were loaded again and compared on 4 rows: outputs are equal.",
        "Training changed the outputs by up to 1.5.",
    ]
    proof = {"gradient_tensors": 74, "idle_tensors": 1, "reload_difference": 0.25, "probe_rows": 4}
    assert list(checks({"proof": proof})) == [
        "73 of 74 trained tensors received gradients.",
        "The saved files were loaded again and compared on 4 rows: outputs differ by at most 0.25.",
    ]
    assert list(checks({})) == list(data_findings({})) == []


def test_regions_have_aria_labels():
    answers = compute_prediction_stats(iter(ROWS))
    page = render_page([make_run(name, predictions=answers) for name in ("one", "two")])
    regions = [attrs for _, attrs in parse_tags(page) if attrs.get("role") == "region"]
    names = [attrs["aria-label"] for attrs in regions]
    assert len(names) == len(set(names)) > 4
    assert all(attrs.get("tabindex") == "0" for attrs in regions)


def test_directory_without_run_is_rejected(tmp_path, capsys):
    with pytest.raises(InputError, match="no such directory"):
        load_run(tmp_path / "none")
    assert run(["report", str(tmp_path)]) == 2
    assert "is not a run: it has no summary.json" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("{}")
    assert run(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "is an unfinished run: it has no summary.json. Resume it: ftlevel" in message
    assert f"--output-dir {tmp_path} --resume" in " ".join(message.split())


def test_report_command_writes_page(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(SUMMARY))
        lines = "".join(json.dumps(record) + "\n" for record in make_records(9))
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')  # cut off
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert run(["report", one, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == f"{one}/report.html"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert run(["report", one, "--predictions", str(empty)]) == 2
    assert "empty.jsonl is empty. Expected rows of" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    assert run(["report", str(tmp_path / "old")]) == 0
    assert run(["report", one, two]) == 2
    assert "--out report.html" in capsys.readouterr().err
    assert run(["report", one, two, "--out", str(tmp_path / "both.html")]) == 0
    assert "<polyline" in (tmp_path / "both.html").read_text()


def test_retrieval_stats():
    rows = [
        {"row": i, "where": f"row {i}", "query": f"query {i}", "document": "right",
         "retrieved": f"wrong {i}", "ndcg@10": float(i != 3), "positive_score": 0.1 * i,
         "negative_score": 0.5, "base_positive_score": 0.0, "base_negative_score": 1.0}
        for i in range(10)
    ]  # fmt: skip
    stats = compute_retrieval_stats(rows)
    assert stats.series == [
        "positives before", "positives", "best negatives before", "best negatives"
    ]  # fmt: skip
    assert len(stats.bands) == NUM_BARS
    assert [sum(counts) for counts in zip(*(c for _, _, c in stats.bands), strict=True)] == [10] * 4
    assert [row["row"] for row in stats.worst[:2]] == [3, 0]
    metrics = {"metrics": {"ndcg@10_dim_32": 0.75}, "metrics_before": {"ndcg@10_dim_32": 0.5}}
    page = render_page([replace(make_run(), retrieval=stats, summary={**SUMMARY, **metrics})])
    assert page.index("query 3") < page.index("query 0")
    assert "wrong 3" in page
    assert '<th scope="row" class="n">32</th><td class="n">0.5000</td><td class="n">0.7500' in page
    lists = [{"scores": [2.0, -1.0, 0.5], "labels": [0.0, 1.0, 0.0], "ndcg@10": 0.5}]
    (row,) = compute_retrieval_stats(lists).worst  # type: ignore[union-attr]
    assert (row["positive_score"], row["negative_score"]) == (-1.0, 2.0)
    assert compute_retrieval_stats([{"predicted": "a", "true": "b"}]) is None
