"""`predict`: predictions of every row, compared with a plain PEFT loop."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import task_data
from command_line import Cli
from ftlevel import predict
from ftlevel.cli.app import run
from ftlevel.commands import predict as command
from ftlevel.commands.train import train
from ftlevel.config import PredictConfig
from ftlevel.data.prepare import inference
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation import answers as row_scores
from ftlevel.trained.model_ref import ModelRef
from run_files import ModelDir, short_config

SPAN = {"max_length": 192, "doc_stride": 12}
PAIR = {"columns": {"source": "en", "target": "de"}}
ROWS = 21


def train_run(model: Path, rows: Path, out: Path, task: str, **options: Any) -> Path:
    generation = {"max_new_tokens": 6, "predict_with_generate": False}
    train(short_config(model, rows, out, task, data={"max_eval_samples": 1, **options},
                       train=generation))  # fmt: skip
    return out


def load_with_peft(run: Path, auto_class: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return model, tokenizer and card of a run, loaded with transformers and PEFT."""
    adapter = run / "adapter"
    card = json.loads((adapter / "ftlevel.json").read_text(encoding="utf-8"))
    overrides = {"num_labels": len(card["labels"])} if card["labels"] else {}
    if card["options"].get("problem_type") == "regression":
        overrides["num_labels"] = 1
    base = getattr(transformers, auto_class).from_pretrained(card["base"]["name"], **overrides)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    base.config.pad_token_id = tokenizer.pad_token_id
    return PeftModel.from_pretrained(base, adapter).eval(), tokenizer, card


def reference_classes(run: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    model, tokenizer, card = load_with_peft(run, "AutoModelForSequenceClassification")
    problem = card["options"]["problem_type"]
    for row in rows:
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        if problem == "regression":
            yield {"prediction": float(logits[0])}
            continue
        is_multi_label = problem == "multi_label_classification"
        probabilities = (logits.sigmoid() if is_multi_label else logits.softmax(-1)).tolist()
        by_label = dict(zip(card["labels"], probabilities, strict=True))
        best = sorted(by_label, key=lambda label: -by_label[label])
        yield {
            "prediction": [k for k, v in by_label.items() if v > 0.5]
            if is_multi_label
            else best[0],
            **{
                f"prediction_probability_{label}": probability
                for label, probability in by_label.items()
            },
            "prediction_top": [{"answer": k, "probability": by_label[k]} for k in best[:2]],
        }


def reference_tags(run: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    model, tokenizer, card = load_with_peft(run, "AutoModelForTokenClassification")
    for row in rows:
        text = " ".join(row["tokens"])
        encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoding.pop("offset_mapping")[0].tolist()
        probabilities = model(**encoding).logits[0].softmax(-1)
        tags, confidences, begin = [], [], 0
        for word in row["tokens"]:
            end = begin + len(word)
            first = next(i for i, (a, b) in enumerate(offsets) if begin < b <= end and a < b)
            tags.append(card["labels"][int(probabilities[first].argmax())])
            confidences.append(float(probabilities[first].max()))
            begin = end + 1
        yield {"prediction": tags, "prediction_probability": confidences}


def reference_spans(run: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    model, tokenizer, _ = load_with_peft(run, "AutoModelForQuestionAnswering")
    for row in rows:
        encoding = tokenizer(
            row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True
        )
        offsets, sequence_ids = encoding.pop("offset_mapping")[0].tolist(), encoding.sequence_ids(0)
        out = model(**encoding)
        assert encoding["input_ids"].shape[1] <= SPAN["max_length"], "one window each"
        spans = {
            (i, j): float(out.start_logits[0, i] + out.end_logits[0, j])
            for i in range(len(sequence_ids)) for j in range(i, min(i + 30, len(sequence_ids)))
            if sequence_ids[i] == sequence_ids[j] == 1
        }  # fmt: skip
        first, last = max(spans, key=lambda span: spans[span])
        begin, end = offsets[first][0], offsets[last][1]
        text = row["context"][begin:end]
        begin += len(text) - len(text.lstrip())
        text = text.strip()
        yield {"prediction": text, "prediction_start": begin, "prediction_end": begin + len(text),
               "prediction_score": spans[first, last]}  # fmt: skip


def reference_masks(run: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    model, tokenizer, _ = load_with_peft(run, "AutoModelForMaskedLM")
    for row in rows:
        encoding = tokenizer(row["text"], return_tensors="pt")
        positions = (encoding["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
        probabilities = model(**encoding).logits[0, positions, : len(tokenizer)].softmax(-1)
        words = [tokenizer.decode([i]).strip() for i in probabilities.argmax(-1).tolist()]
        text = row["text"]
        for word in words:
            text = text.replace("[MASK]", word, 1)
        tops = [probability.topk(2) for probability in probabilities]
        yield {
            "prediction": text,
            "prediction_words": words,
            "prediction_top": [
                [{"answer": tokenizer.convert_ids_to_tokens(i), "probability": p}
                 for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
                for top in tops
            ],
        }  # fmt: skip


def reference_texts(run: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    model, tokenizer, card = load_with_peft(run, "AutoModelForSeq2SeqLM")
    prefix = card["prompt"]["instruction"]
    for row in rows:
        encoding = tokenizer(f"{prefix}\n\n{row['en']}", return_tensors="pt")
        generated = model.generate(**encoding, max_new_tokens=6, do_sample=False)
        yield {"prediction": tokenizer.decode(generated[0], skip_special_tokens=True).strip()}


def masked_row(i: int) -> dict[str, Any]:
    words = str(task_data.ROWS["mask"](i)["text"]).split()
    words[i % 3] = words[-1] = "[MASK]"
    return {"text": " ".join(words)}


Reference = Callable[[Path, list[dict[str, Any]]], Iterator[dict[str, Any]]]
CELLS: dict[str, tuple[str, str, str, str | None, dict[str, Any], Reference, dict[str, Any]]] = {
    "class": ("class", "text-classification", "bert", "mlm", {}, reference_classes,
              {"probabilities": True, "top_k": 2}),
    "decoder class": ("class", "text-classification", "llama", None, {}, reference_classes,
                           {"probabilities": True, "top_k": 2}),
    "multi-label": ("multi", "text-classification", "bert", "mlm", {}, reference_classes,
                {"probabilities": True, "top_k": 2}),
    "regression": ("regression", "text-classification", "bert", "mlm", {}, reference_classes, {}),
    "tags": ("tags", "token-classification", "bert", "mlm", {}, reference_tags,
             {"probabilities": True}),
    "span": ("span", "question-answering", "bert", "mlm", SPAN, reference_spans, {}),
    "mask": ("mask", "masked-lm", "bert", "mlm", {}, reference_masks, {"top_k": 2}),
    "text": ("pair", "translation", "t5", None, PAIR, reference_texts, {}),
}  # fmt: skip
TARGETS = ("label", "tags", "answers", "de")


def test_tags_are_written_as_conll(tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli) -> None:
    data = task_data.write(tmp_path / "data", "tags")
    out = train_run(tiny_model_dir("bert", "mlm"), data, tmp_path / "run", "token-classification")
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    command = ["predict", str(out), "--dataset", str(data / "validation.jsonl"), "--device", "cpu"]
    cli(*command, f"--output {tmp_path / 'p.conll'}")
    tags = [json.loads(line)["prediction"] for line in cli(*command, "--output -").splitlines()]
    expected = [list(map(list, zip(row["tokens"], row["tags"], own, strict=True)))
                for row, own in zip(rows, tags, strict=True)]  # fmt: skip
    command = ["evaluate", str(out), "--dataset", str(data / "validation.jsonl"), "--no-base",
               "--predictions", str(tmp_path / "e.conll")]  # fmt: skip
    cli(*command)
    for name in ("p", "e"):
        blocks = (tmp_path / f"{name}.conll").read_text().strip().split("\n\n")
        assert [[line.split() for line in block.splitlines()] for block in blocks] == expected


@pytest.mark.parametrize("cell", CELLS)
def test_predictions_match_reference(
    cell: str, tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, task, family, head, options, reference, outputs = CELLS[cell]
    data = task_data.write(tmp_path / "data", name)
    run_dir = train_run(tiny_model_dir(family, head), data, tmp_path / "run", task, **options)
    make_row = masked_row if name == "mask" else task_data.ROWS[name]
    rows = [{"id": i, **{k: v for k, v in make_row(i).items() if k not in TARGETS},
             "more": [None, 0.5]} for i in range(30, 30 + ROWS)]  # fmt: skip
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(row_scores, "MIN_FAST_ROWS", 2)  # packs rows as for a large file
    monkeypatch.setattr(row_scores, "CPU_TOKENS", 96)
    monkeypatch.setattr(command, "WINDOW", 8)
    packed: list[bool] = []
    forward = row_scores.RowScorer._forward

    def record_packing(self: Any, batch: Any) -> Any:
        packed.append(self._is_packed)
        return forward(self, batch)

    monkeypatch.setattr(row_scores.RowScorer, "_forward", record_packing)
    config = PredictConfig(name=str(run_dir), dataset=str(tmp_path / "new.jsonl"), device="cpu",
                           output=tmp_path / "told.jsonl", **outputs)  # fmt: skip
    summary = predict(config).summary
    predictions = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    with torch.no_grad():
        expected = list(reference(run_dir, rows))
    assert [{k: row[k] for k in rows[0]} for row in predictions] == rows
    assert summary["columns"] == [k for k in predictions[0] if k not in rows[0]]
    answers = [{k: row[k] for k in summary["columns"]} for row in predictions]
    for original, reference_answer in zip(answers, expected, strict=True):
        assert_equal(original, reference_answer)
    assert all(packed)
    assert (task == "translation") is not bool(packed)
    assert len({json.dumps(original) for original in answers}) > 1


def assert_equal(actual: Any, expected: Any) -> None:
    """Assert equality, of floats to 1e-5."""
    if isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=1e-5)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_equal(actual_item, expected_item)
    else:
        assert actual == expected


@pytest.fixture(scope="module")
def classifier(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    data = task_data.write(folder / "data", "class")
    return train_run(tiny_model_dir("bert", "mlm"), data, folder / "run", "text-classification")


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with Path("rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "note"])
        for i in range(ROWS):
            note = 'two\r\nlines, "quoted" 🦊' if i % 4 == 0 else ""
            writer.writerow([f"0{i}", task_data.ROWS["class"](i)["text"], note])
    return tmp_path


def read_csv(name: str) -> list[dict[str, str]]:
    with Path(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_predict(classifier: Path, *arguments: str, dataset: str = "rows.csv") -> int:
    return run(["predict", str(classifier), "--dataset", dataset, "--device", "cpu", *arguments])


def test_csv_columns_are_kept_and_stdout_is_json_lines(
    classifier: Path, work_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert run_predict(classifier, "--output", "told.csv", "--column", "kind") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "columns: text: 'text'; not used: 'id', 'note'" in captured.err
    predictions = read_csv("told.csv")
    assert list(predictions[0]) == ["id", "text", "note", "kind"]
    assert [{k: row[k] for k in ("id", "text", "note")} for row in predictions] == read_csv(
        "rows.csv"
    )
    assert {row["kind"] for row in predictions} <= {"a", "b"}
    content = Path("rows.csv").read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert run_predict(classifier, "--limit", "3", "--quiet", "--column", "kind", dataset="-") == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == predictions[:3]
    assert captured.err == ""
    assert run_predict(classifier, "--output", "told.csv") == 2
    assert "told.csv exists" in capsys.readouterr().err
    assert run_predict(classifier, "--column", "note", "--output", "new.csv") == 2
    assert "rows.csv has 'note' already" in capsys.readouterr().err
    assert run_predict(classifier, "--json") == 2
    assert "Pass --output FILE, or drop --json." in capsys.readouterr().err


def test_resume_continues_after_last_complete_row(
    classifier: Path, work_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = ("--probabilities", "--output")
    assert run_predict(classifier, *flags, "whole.csv") == 0
    complete = Path("whole.csv").read_bytes()
    length = complete.index(b"\n", len(complete) // 2) + 9  # in the middle of a row
    Path("told.csv.partial").write_bytes(complete[:length])
    assert run_predict(classifier, *flags, "told.csv") == 2
    assert "Resume it with --resume" in capsys.readouterr().err
    assert run_predict(classifier, *flags, "told.csv", "--resume", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["kept"] < summary["rows"] == ROWS
    resumed = read_csv("told.csv")
    for resumed_row, complete_row in zip(resumed, read_csv("whole.csv"), strict=True):
        assert {k: v for k, v in resumed_row.items() if "prob" not in k} == {
            k: v for k, v in complete_row.items() if "prob" not in k
        }
    monkeypatch.setattr(ModelRef, "load", None)  # weights are not loaded without remaining rows
    assert run_predict(classifier, *flags, "whole.csv", "--resume") == 0
    assert Path("whole.csv").read_bytes() == complete
    assert run_predict(classifier, "--output", "whole.csv", "--resume") == 2
    assert (
        "Use the flags of the interrupted command, or choose another --output."
        in capsys.readouterr().err
    )
    Path("rows.csv").write_bytes(Path("rows.csv").read_bytes().replace(b"03,", b"3,"))
    assert run_predict(classifier, *flags, "whole.csv", "--resume") == 2
    assert "row 4 of whole.csv is not rows.csv:" in capsys.readouterr().err
    assert Path("whole.csv").read_bytes() == complete


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_second_process_does_not_write_to_same_file(
    classifier: Path, work_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, suffix: str, flag: str,
) -> None:  # fmt: skip
    output, window, codes = ("--output", f"p.{suffix}"), command._predict_window, []

    def start_second(*arguments: Any) -> Any:
        if not codes:
            codes.append(None)
            codes[0] = run_predict(classifier, *output, flag)
        return window(*arguments)

    monkeypatch.setattr(command, "WINDOW", 8)
    monkeypatch.setattr(command, "_predict_window", start_second)
    assert run_predict(classifier, *output) == 0
    assert codes == [2]
    assert (
        f"--output p.{suffix}.partial: another process is writing to it" in capsys.readouterr().err
    )
    monkeypatch.undo()
    monkeypatch.chdir(work_dir)
    assert run_predict(classifier, *output, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == ROWS


def test_invalid_rows_raise_or_have_no_prediction(
    classifier: Path, work_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "WINDOW", 2)
    lines = ['{"text": "a", "n": 1}', '{"text": "b"}', '{"text": ""}', "no json", '{"n": 2}',
             json.dumps({"text": "word " * 600}), '{"text": "c", "more": [1]}']  # fmt: skip
    Path("bad.jsonl").write_text("\n".join(lines) + "\n")
    assert run_predict(classifier, "--output", "p.jsonl", dataset="bad.jsonl") == 2
    error = capsys.readouterr().err
    assert "bad.jsonl:3: 'text' is empty." in error
    assert "2 rows are in p.jsonl.partial: --resume continues with them" in error
    assert run_predict(classifier, "--output", "p.jsonl", "--resume", "--on-bad-row", "skip",
                       dataset="bad.jsonl") == 0  # fmt: skip
    error = capsys.readouterr().err
    for message in ("3: 'text' is empty", "4: not valid JSON", "5: has no 'text'", "6: has "):
        assert f"bad.jsonl:{message}" in error
    assert "and the model allows 512" in error
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["prediction"] is None for row in rows] == [0, 0, 1, 1, 1, 1, 0]
    assert [row.get("text") for row in rows][:4] == ["a", "b", "", None]
    assert rows[6]["more"] == [1]
    assert run_predict(classifier, "--output", "p.csv", "--on-bad-row", "skip", "--overlong",
                       "truncate-prompt", dataset="bad.jsonl") == 0  # fmt: skip
    assert "1 rows were shortened" in capsys.readouterr().err
    assert [bool(row["prediction"]) for row in read_csv("p.csv")] == [1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "0"], "top_k must be ≥ 1"),
        (["--output", "p.xml"], "cannot write '.xml'"),
        (["--resume"], "--resume needs --output FILE. Add"),
        (["--map", "text=nothing"], "no column 'nothing'"),
        (["--task", "summarization"], "was trained for text-classification"),
    ],
)
def test_invalid_options_are_rejected_before_loading(
    arguments: list[str], message: str, classifier: Path, work_dir: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ModelRef, "load", None)
    assert run_predict(classifier, *arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in work_dir.iterdir()] == ["rows.csv"]


def test_predict_from_python(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PredictConfig(name=str(classifier), device="cpu", batch_size=3)
    rows = [{"text": f"the file {i}", "i": i} for i in range(inference.CHUNK_ROWS + 3)]
    predictions = predict(config, iter(rows)).rows
    assert predictions is not None
    assert [{k: row[k] for k in ("text", "i")} for row in predictions] == rows
    assert {row["prediction"] for row in predictions} <= {"a", "b"}
    with pytest.raises(ConfigError, match="no rows to predict"):
        predict(config)
    with pytest.raises(InputError, match="0 rows"):
        predict(config, [])


def test_interrupt_keeps_written_predictions(
    classifier: Path, work_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "WINDOW", 8)
    calls = []

    def interrupt_second_call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    original = command.predict_rows
    monkeypatch.setattr(command, "predict_rows", interrupt_second_call)
    assert run_predict(classifier, "--output", "p.tsv") == 130
    assert "8 rows are in p.tsv.partial: --resume continues" in capsys.readouterr().err
    assert not Path("p.tsv").exists()
    assert run_predict(classifier, "--output", "p.tsv", "--resume") == 0
    assert len(Path("p.tsv").read_text(encoding="utf-8").split("\tprediction\n")) == 2
