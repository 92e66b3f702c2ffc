"""`evaluate`: metrics equal to training's, base metrics, intervals and predictions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig, get_peft_model

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import Evaluation, evaluate
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig
from ftlevel.errors import ConfigError, InputError
from run_files import ModelDir, read_json, read_rows, short_config, write_rows

SPAN = {"max_length": 48, "doc_stride": 12}
PAIR = {"columns": {"source": "en", "target": "de"}}
SUMMARY = {"columns": {"document": "en", "summary": "de"}}
GENERATION = {"max_new_tokens": 6, "per_device_eval_batch_size": 4, "max_generate_samples": 5}
CELLS: list[tuple[str, str, str, str | None, dict[str, Any]]] = [
    ("class", "text-classification", "bert", "mlm", {}),
    ("multi", "text-classification", "bert", "mlm", {}),
    ("regression", "text-classification", "bert", "mlm", {}),
    ("tags", "token-classification", "bert", "mlm", {}),
    ("span", "question-answering", "bert", "mlm", SPAN),
    ("span-v2", "question-answering", "llama", None, SPAN),
    ("mask", "masked-lm", "bert", "mlm", {}),
    ("mask", "text-generation", "llama", None, {}),
    ("mask", "text-generation", "llama", None, {"max_length": 12, "overlong": "split"}),
    ("pair", "summarization", "t5", None, SUMMARY),
    ("pair", "summarization", "llama", None, SUMMARY),
    ("pair", "translation", "bart", None, PAIR),
]


def run_evaluation(name: Path, **overrides: Any) -> Evaluation:
    fields = {"name": str(name), "resamples": 40, "device": "cpu", **overrides}
    return evaluate(EvaluateConfig.model_validate(fields))


@pytest.mark.parametrize(("name", "task", "family", "head", "options"), CELLS)
def test_evaluation_matches_metrics_of_training(
    name: str,
    task: str,
    family: str,
    head: str | None,
    options: dict[str, Any],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    data = task_data.write(tmp_path / "data", name)
    config = short_config(tiny_model_dir(family, head), data, tmp_path / "run", task, data=options,
                          train=GENERATION)  # fmt: skip
    summary = train(config).summary
    result = run_evaluation(tmp_path / "run", predictions=tmp_path / "p.jsonl", resamples=200)
    assert result.metrics == summary["metrics"]
    assert_intervals_contain_metrics(result)
    lines, run_lines = (
        read_rows(path) for path in (tmp_path / "p.jsonl", tmp_path / "run" / "validation.jsonl")
    )
    assert run_lines == [  # predictions of the run, which have no base predictions
        {name: value for name, value in line.items() if not name.startswith("base_")}
        | {"where": Path(line["where"]).name} for line in lines
    ]  # fmt: skip
    for metric, bounds in summary["intervals"].items():
        assert bounds == pytest.approx(result.summary["intervals"][metric]), metric
    leaked = {
        location
        for finding in summary["data"]["gate"]
        if (finding["name"], finding["split"]) == ("leaked", "validation")
        for location in finding["places"]
    }
    expected_rows = {f"{data}/validation.jsonl:{line}" for line in range(1, 7)} - leaked
    assert len(lines) == result.summary["data"]["examples"] == len(expected_rows)
    assert {line["where"] for line in lines} == expected_rows
    assert_predictions_match_metrics(name, lines, result)
    has_new_head = task in ("text-classification", "token-classification", "question-answering")
    assert bool(result.base) is not has_new_head
    if result.base:
        assert result.base["loss"] != result.metrics["loss"]


def assert_intervals_contain_metrics(result: Evaluation) -> None:
    intervals = result.summary["intervals"]
    assert set(intervals) <= set(result.metrics)
    assert "loss" in intervals
    for name, (low, high) in intervals.items():
        assert low <= high
        if name not in ("precision", "f1", "mcc", "bleu", "pearson", "spearman"):
            assert low - 1e-6 <= result.metrics[name] <= high + 1e-6, name


def assert_predictions_match_metrics(
    name: str, lines: list[dict[str, Any]], result: Evaluation
) -> None:
    """Compute metrics from the prediction lines and compare."""
    metrics = result.metrics
    if name in ("class",):
        correct = sum(line["predicted"] == line["true"] for line in lines)
        assert correct / len(lines) == pytest.approx(metrics["accuracy"])
        assert sum(line["loss"] for line in lines) / 6 == pytest.approx(metrics["loss"], rel=1e-4)
    elif name == "multi":
        correct = sum(line["predicted"] == line["true"] for line in lines)
        assert correct / len(lines) == pytest.approx(metrics["subset_accuracy"])
    elif name == "regression":
        squares = [(line["predicted"] - line["true"]) ** 2 for line in lines]
        assert math.sqrt(sum(squares) / 6) == pytest.approx(metrics["rmse"], rel=1e-4)
    elif name == "tags":
        pairs = [p for line in lines for p in zip(line["predicted"], line["true"], strict=True)]
        correct = sum(predicted == true for predicted, true in pairs)
        assert correct / len(pairs) == pytest.approx(metrics["accuracy"])
    elif name == "mask":
        tokens = sum(line["tokens"] for line in lines)
        loss = sum(line["loss"] * line["tokens"] for line in lines) / tokens
        assert loss == pytest.approx(metrics["loss"], rel=1e-4)
        correct = sum(line["tokens_right"] for line in lines)
        accuracy = metrics.get("masked_accuracy", metrics.get("token_accuracy"))
        assert correct / tokens == pytest.approx(accuracy)
    elif name == "pair":
        assert sum("predicted" in line for line in lines) == 5
        assert all("base_predicted" in line for line in lines[:5])


def test_evaluation_on_training_rows_warns(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    data = task_data.write(tmp_path / "data", "class") / "train.jsonl"
    train(
        short_config(tiny_model_dir("bert", "mlm"), data, tmp_path / "run", "text-classification")
    )
    description = "the training rows: no validation split was held out"
    command = ["evaluate", str(tmp_path / "run"), "--resamples", "0", "--device", "cpu"]
    captured = cli.run(*command, f"--quiet --predictions {tmp_path / 'p.csv'}")
    assert description in captured.out.splitlines()[0]
    assert f"warning: these are {description}" in captured.err
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["where"] for line in lines] == [f"{data}:{i}" for i in range(1, 17)]
    assert {line["predicted"] for line in lines} <= {"a", "b"}
    data_summary = cli.json(*command, "--json")["data"]
    assert (data_summary["split"], data_summary["training_rows"]) == (description, True)
    other_rows = task_data.write(tmp_path / "other", "class") / "train.jsonl"
    assert "(all rows)" in cli(*command, f"--dataset {other_rows}")


def test_evaluation_on_training_file_says_that_it_includes_training_rows(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    data = task_data.write(tmp_path / "data", "class") / "train.jsonl"
    train(short_config(tiny_model_dir("bert", "mlm"), data, tmp_path / "run",
                       "text-classification", data={"validation_split": 0.25}))  # fmt: skip
    command = ["evaluate", str(tmp_path / "run"), "--resamples", "0", "--device", "cpu"]
    captured = cli.run(*command, f"--dataset {data}")
    assert "(all rows, including those of training)" in captured.out
    assert "warning: these are all rows, including those of training" in captured.err


@pytest.mark.parametrize("kind", ["full", "prefix", "qlora"])
def test_evaluation_supports_other_methods(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = task_data.write(tmp_path / "data", "mask")
    method = {"kind": kind} if kind != "prefix" else {"kind": kind, "num_virtual_tokens": 4}
    config = short_config(tiny_model_dir("llama"), data, tmp_path / "run", method=method)
    expected = train(config).summary["metrics"]
    result = run_evaluation(tmp_path / "run")
    assert result.metrics == expected
    assert result.base["loss"] > expected["loss"]
    if kind == "qlora":
        float_base = run_evaluation(tmp_path / "run", quant="none")
        assert float_base.metrics["loss"] != expected["loss"]
        assert float_base.metrics["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.fixture(scope="module")
def classifier(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    data = task_data.write(folder / "data", "class")
    train(short_config(tiny_model_dir("bert", "mlm"), data, folder / "run", "text-classification"))
    return folder


def test_other_splits_and_files_are_evaluated(classifier: Path, tmp_path: Path) -> None:
    rows = [json.dumps(task_data.ROWS["class"](i)) for i in range(40, 50)]
    (classifier / "data/test.jsonl").write_text("\n".join(rows))
    test = run_evaluation(classifier / "run", split="test")
    assert test.summary["data"]["examples"] == 10
    assert test.summary["data"]["split"] == "test"
    one_file = run_evaluation(
        classifier / "run/adapter", dataset=str(classifier / "data/test.jsonl")
    )
    assert one_file.metrics == test.metrics
    assert one_file.summary["data"]["split"] == "all rows"
    few = run_evaluation(classifier / "run", split="test", max_eval_samples=4, batch_size=1)
    assert few.summary["data"]["examples"] == 4
    (classifier / "data/test.jsonl").unlink()
    with pytest.raises(InputError, match=r"--split test: .* has none. Splits here: train, valid"):
        run_evaluation(classifier / "run", split="test")
    (tmp_path / "odd.jsonl").write_text('{"text": "a", "label": "z"}\n{"text": "b", "label": "a"}')
    with pytest.raises(InputError, match=r"label 'z' .* is not a class of the training rows"):
        run_evaluation(classifier / "run", dataset=str(tmp_path / "odd.jsonl"))


def test_resampling_is_seeded(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = task_data.write(tmp_path / "data", "mask")
    train(short_config(tiny_model_dir("llama"), data, tmp_path / "run"))
    first, second = (run_evaluation(tmp_path / "run", seed=3).summary for _ in range(2))
    assert first == second
    other = run_evaluation(tmp_path / "run", seed=4).summary
    assert other["metrics"] == first["metrics"]
    assert other["intervals"] != first["intervals"]
    low, high = first["difference_intervals"]["loss"]
    change = first["metrics"]["loss"] - first["base"]["loss"]
    assert low <= change <= high


def test_classes_of_plain_peft_adapter_are_named(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    """A classifier of plain PEFT whose base has no class names."""
    base = tiny_model_dir("gpt2")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    settings = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"])
    get_peft_model(model, settings, autocast_adapter_dtype=False).save_pretrained(
        tmp_path / "plain"
    )
    rows = [{"text": f"the word {i}", "label": "abc"[i % 3]} for i in range(12)]
    data = tmp_path / "rows.jsonl"
    write_rows(data, rows)
    command = ["evaluate", str(tmp_path / "plain"), "--model", str(base), "--dataset", str(data)]
    assert "pass them by --labels, in its order" in cli.fails(*command)
    assert "plain has 3 classes. Name all in order." in cli.fails(*command, "--labels a,b")
    predictions = tmp_path / "predicted.jsonl"
    options = ["--labels", "c,a,b", "--predictions", str(predictions)]
    cli(*command, *options, "--limit 6")
    lines = read_rows(predictions)
    assert [line["true"] for line in lines] == list("abcabc")
    assert {line["predicted"] for line in lines} <= set("abc")
    output = tmp_path / "out.jsonl"
    predict = ["predict", *command[1:], "--labels", "c,a,b", "--output", str(output)]
    cli(*predict, "--limit 6")
    predicted = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert predicted == [line["predicted"] for line in lines]


def test_plain_model_needs_head_and_dataset(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = task_data.write(tmp_path / "data", "class")
    rows = str(data / "validation.jsonl")
    with pytest.raises(InputError, match=r"has no trained head for --task text-classification"):
        run_evaluation(tiny_model_dir("bert", "mlm"), task="text-classification", dataset=rows)
    masked = task_data.write(tmp_path / "masked", "mask")
    result = run_evaluation(
        tiny_model_dir("bert", "mlm"), task="masked-lm", dataset=str(masked / "validation.jsonl")
    )
    assert result.metrics["pseudo_perplexity"] > 1
    assert not result.base
    with pytest.raises(ConfigError, match=r"does not record its dataset\. Add --dataset FILE\."):
        run_evaluation(tiny_model_dir("bert", "mlm"), task="masked-lm")


def test_evaluate_command_output_and_errors(classifier: Path, tmp_path: Path, cli: Cli) -> None:
    name = str(classifier / "run")
    output = cli(f"evaluate {name} --resamples 20 --device cpu")
    assert "accuracy" in output
    heads = read_json(classifier / "run/adapter/ftlevel.json")["heads"]
    assert heads == ["bert.pooler", "classifier"]
    assert f"without the adapter its head ({', '.join(heads)}) is random" in output
    result = cli.json(f"evaluate {name} --json --resamples 20 --device cpu")
    assert set(result["metrics"]) == {"loss", "accuracy", "f1", "mcc"}
    existing_file = tmp_path / "mine.jsonl"
    existing_file.write_text("mine")
    assert "--predictions" in cli.fails(f"evaluate {name} --predictions {existing_file}")
    assert existing_file.read_text() == "mine"
    error = cli.fails(f"evaluate {name} --task token_classification")
    assert "was trained for text-classification, not for token-classification" in (error)
    error = cli.fails(f"evaluate {name} --split dev")
    assert "--split: 'dev' is not known. Expected one of train, validation, test." in (error)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--dataset", "typo.jsonl"], "typo.jsonl"),
        (["--map", "text=review"], "review"),
        (["--metrics", "bleu"], "bleu"),
    ],
)
def test_evaluate_finds_errors_before_weights_load(
    options: list[str], error: str, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(classifier / "run"), "--device", "cpu", "--resamples", "20"]
    assert run([*command, *options]) == 2
    output = "".join(capsys.readouterr())
    assert error in output
    assert "loading the model" not in output
    assert run(command) == 0
    assert "loading the model" in "".join(capsys.readouterr())


def test_rows_longer_than_training_rows_are_evaluated(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    data, base = task_data.write(tmp_path / "data", "mask"), tiny_model_dir("llama")
    train(short_config(base, data, tmp_path / "run"))
    positions = transformers.AutoConfig.from_pretrained(base).max_position_embeddings
    rows = tmp_path / "long.jsonl"
    texts = ["a b", "a b " * (positions // 8), "a b c d " * positions]
    write_rows(rows, ({"text": text} for text in texts))
    result = run_evaluation(tmp_path / "run", dataset=str(rows))
    assert (result.summary["data"]["rows"], result.summary["data"]["dropped"]) == (2, 1)
    command = ["evaluate", str(tmp_path / "run"), "--dataset", str(rows), "--device", "cpu"]
    message = cli.run(*command, "--resamples 0").err
    assert "1 row is too long and not scored; the numbers are of the other 2." in message


def test_dataset_option_replaces_all_datasets_of_run(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """A run on several datasets evaluates only the given one."""
    first_dataset, second_dataset = (
        task_data.write(tmp_path / "one", "class"),
        tmp_path / "two.jsonl",
    )
    second_dataset.write_bytes((first_dataset / "train.jsonl").read_bytes())
    model = tiny_model_dir("bert", "mlm")
    options = {"also": [str(second_dataset)], "mix": [1, 1]}
    train(short_config(model, first_dataset, tmp_path / "run", "text-classification", data=options))
    result = run_evaluation(tmp_path / "run", dataset=str(first_dataset / "validation.jsonl"))
    assert result.summary["data"]["examples"] == 6


def test_validation_rows_all_in_training_raise(tmp_path: Path, cli: Cli) -> None:
    text = "".join(json.dumps({"text": f"{i} is a number like {i + 1}"}) + "\n" for i in range(8))
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    message = cli.fails(f"evaluate builtin:tiny-llama --dataset {tmp_path}")
    assert "row of" in message
    assert "is left to score: also a training row: 8 of 8 validation rows" in message
    assert "--split train" in message
