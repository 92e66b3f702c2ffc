"""Every task trains on tiny models, and its result is saved, reloaded, compared and used.

`train` itself verifies the saved adapter: it loads it into a fresh base and raises unless logits
are equal and differ from those of the base.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import task_data
import tiny_tokenizers
from command_line import Cli
from ftlevel.commands.generate import generate
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.trained.generation import GenerationOptions
from run_files import ModelDir, read_rows, short_config
from sampling import sample

TASKS = {
    "tags": ("token-classification", {}),
    "span": ("question-answering", {"max_length": 48, "doc_stride": 12}),
    "span-v2": ("question-answering", {"max_length": 48, "doc_stride": 12}),
    "mask": ("masked-lm", {}),
    "class": ("text-classification", {}),
    "multi": ("text-classification", {}),
    "regression": ("text-classification", {}),
    "pair": ("translation", {"columns": {"source": "en", "target": "de"}}),
}

METRICS = {
    "tags": {"precision", "recall", "f1", "accuracy"},
    "span": {"exact_match", "f1"},
    "span-v2": {"exact_match", "f1"},
    "mask": {"pseudo_perplexity", "masked_accuracy"},
    "class": {"accuracy", "f1", "mcc"},
    "multi": {"micro_f1", "macro_f1", "subset_accuracy"},
    "regression": {"rmse", "pearson", "spearman"},
    "pair": {"perplexity", "token_accuracy", "chrf", "bleu"},
}

# The head of the base checkpoint: None for the default, "mlm" for a masked language model.
CELLS = [
    ("tags", "bert", "mlm"),
    ("tags", "roberta", "mlm"),
    ("tags", "gpt2", None),
    ("tags", "llama", None),
    ("tags", "t5", None),
    ("span", "bert", "mlm"),
    ("span-v2", "deberta-v2", "mlm"),
    ("span", "gpt2", None),
    ("span", "llama", None),
    ("span", "t5", None),
    ("span", "bart", None),
    ("mask", "bert", "mlm"),
    ("mask", "modernbert", "mlm"),
    ("mask", "roberta", "seqcls"),
    ("mask", "distilbert", "seqcls"),
    ("multi", "bert", "mlm"),
    ("multi", "llama", None),
    ("multi", "bart", None),
    ("regression", "electra", "mlm"),
    ("regression", "gpt2", None),
    ("regression", "t5", None),
    ("pair", "t5", None),
    ("pair", "bart", None),
    ("pair", "llama", None),
    ("pair", "qwen2", None),
]


def create_config(model: Path, rows: Path, name: str, out: Path, **settings: Any) -> TrainConfig:
    task, options = TASKS[name]
    return short_config(
        model, rows, out, task, data=options, train={"max_new_tokens": 8, **settings}
    )


@pytest.mark.parametrize(("name", "family", "head"), sample(CELLS))
def test_task_trains_saves_and_generates(
    name: str, family: str, head: str | None, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = task_data.write(tmp_path / "data", name)
    config = create_config(tiny_model_dir(family, head), data, name, tmp_path / "run")
    result = train(config)
    summary = result.summary
    assert set(summary["metrics"]) == {"loss"} | METRICS[name]
    assert all(math.isfinite(value) for value in summary["metrics"].values())
    assert summary["headline"] in summary["metrics"]
    assert summary["proof"]["reload_difference"] <= 1e-4
    assert summary["proof"]["adapter_effect"] > 1e-3
    assert_run_generates(name, tmp_path / "run", summary)


def assert_run_generates(name: str, run: Path, summary: Any) -> None:
    """Assert that the saved run generates a valid answer."""
    prompt = {"mask": "the [MASK] of a [MASK]", "span": "What is the name?"}.get(
        name.partition("-")[0], "The file of Paris."
    )
    context = "string value. The name is parser 3. " * 8 if name.startswith("span") else None
    [answer], _ = generate(str(run), [prompt], context=context, max_new_tokens=5, device="cpu")
    if name == "tags":
        assert [word for word, _ in answer.tags] == ["The", "file", "of", "Paris", "."]
        assert {tag for _, tag in answer.tags} <= set(summary["data"]["labels"])
    elif name.startswith("span"):
        assert answer.text in (context or "") or answer.text == "(no answer)"
    elif name == "mask":
        assert "[MASK]" not in answer.text
        assert answer.text.startswith("the ")
        assert len(answer.scores) == 5
    elif name == "multi":
        predicted_labels = [
            label for label, probability in answer.scores.items() if probability > 0.5
        ]
        assert answer.text == (", ".join(predicted_labels) or "(no label)")
        assert list(answer.scores) == ["x", "y", "z"]
    elif name == "regression":
        assert math.isfinite(float(answer.text))


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("name", "family", "head", "overrides"),
    [
        ("tags", "bert", "mlm", NO_DROPOUT),
        ("span", "bert", "mlm", NO_DROPOUT),
        ("mask", "bert", "mlm", NO_DROPOUT),
        ("class", "bert", "mlm", NO_DROPOUT),
        pytest.param("multi", "bert", "mlm", NO_DROPOUT, marks=pytest.mark.sweep),
        pytest.param("regression", "bert", "mlm", NO_DROPOUT, marks=pytest.mark.sweep),
        pytest.param("pair", "llama", None, {}, marks=pytest.mark.sweep),
        ("pair", "t5", None, {"dropout_rate": 0.0}),
    ],
)
def test_gradient_accumulation_gives_same_losses(
    name: str,
    family: str,
    head: str | None,
    overrides: dict[str, Any],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    data = task_data.write(tmp_path / "data", name, rows=24)
    model = tiny_model_dir(family, head, **overrides)
    loss_curves = []
    for batch in (8, 2):
        out = tmp_path / str(batch)
        config = create_config(
            model, data, name, out,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            predict_with_generate=False,
        )  # fmt: skip
        train(config)
        records = read_rows(out / "metrics.jsonl")
        loss_curves.append([(r["loss"], r["grad_norm"]) for r in records if "loss" in r])
    assert len(loss_curves[0]) == 3
    for one_batch, accumulated in zip(*loss_curves, strict=True):
        assert accumulated == pytest.approx(one_batch, rel=2e-5)


def test_resumed_masked_lm_matches_uninterrupted_run(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The run is resumed in its second epoch; losses and weights are equal."""
    data = task_data.write(tmp_path / "data", "mask")
    model = tiny_model_dir("bert", "mlm")
    uninterrupted, resumed = tmp_path / "whole", tmp_path / "broken"
    settings = {"max_steps": 7, "save_steps": 5, "per_device_train_batch_size": 4}
    expected = train(
        create_config(model, data, "mask", uninterrupted, **settings)
    ).model.state_dict()

    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "adapter")
    shutil.rmtree(resumed / "checkpoints/checkpoint-7")
    (resumed / "metrics.jsonl").unlink()
    config = create_config(model, data, "mask", resumed, **settings)
    output = config.output.model_copy(update={"resume": True})
    actual = train(config.model_copy(update={"output": output})).model.state_dict()

    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    before, after = losses(uninterrupted), losses(resumed)
    assert sorted(after) == [6, 7]
    assert {step: before[step] for step in after} == after


def losses(run_directory: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_rows(run_directory / "metrics.jsonl") if "loss" in r}


def test_new_head_is_saved_in_float32(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = task_data.write(tmp_path / "data", "mask")
    config = create_config(tiny_model_dir("roberta", "seqcls"), data, "mask", tmp_path / "run")
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"dtype": "bfloat16"})}
    )
    summary = train(config).summary
    assert summary["proof"]["reload_difference"] == 0
    card = json.loads((tmp_path / "run/adapter/ftlevel.json").read_text())
    assert card["heads"] == ["lm_head.dense", "lm_head.layer_norm"]


def test_question_answering_train_and_generate_commands(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    data, out = task_data.write(tmp_path / "data", "span"), str(tmp_path / "run")
    arguments = ["--model", str(tiny_model_dir("bert", "mlm")), "--dataset", str(data),
                 "--task", "question_answering", "--max-length", "48", "--set",
                 "data.doc_stride=12", "--max-steps", "2", "--output-dir", out]  # fmt: skip
    output = cli("train", *arguments)
    assert "questions: 16 (each has an answer)" in output
    assert "more windows than questions" in output
    assert f"next ftlevel evaluate {out}" in output
    assert f"ftlevel predict {out} --dataset FILE" in output
    generate_command = ["generate", out, "--prompt", "What is the name?"]
    error = cli.fails(*generate_command)
    assert "question-answering looks for an answer in a text. Add --context TEXT." in (error)
    [answer] = cli.json(*generate_command, "--context 'The name is value 3.' --json")["answers"]
    assert answer["text"] in "The name is value 3."


def test_wrong_answer_start_is_reported(tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli) -> None:
    data = task_data.write(tmp_path / "data", "span")
    path = data / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["answers"]["answer_start"][0] += 1
    path.write_text("\n".join(map(json.dumps, rows)))
    error = cli.fails(
        f"train --model {tiny_model_dir('bert', 'mlm')} --dataset {data} --task "
        f"question-answering --output-dir {tmp_path / 'run'}"
    )
    assert f"{path}:3: the answer " in error


def test_invalid_bio_tags_are_rejected_or_dropped(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    data = task_data.write(tmp_path / "data", "tags")
    path = data / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["tags"][0] = "I-LOC"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["train", "--model", str(tiny_model_dir("bert", "mlm")), "--dataset", str(data),
                 "--task", "token-classification", "--dry-run"]  # fmt: skip
    assert f"{path}:5: tag 1, 'I-LOC', begins the row" in cli.fails(*arguments)
    assert "15 rows" in cli(*arguments, "--on-bad-row skip")


def test_languages_come_from_columns_or_options(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    data = task_data.write(tmp_path / "data", "pair")
    command = ["train", "--dataset", str(data), "--task", "translation", "--dry-run"]
    mapping = ["--set", "data.columns.source=en", "--set", "data.columns.target=de"]
    llama, t5 = (["--model", str(tiny_model_dir(family))] for family in ("llama", "t5"))
    output = cli(*command, *llama, *mapping)
    assert "languages: English to German" in output
    assert "prompt: plain (Translate from English to German.)" in output
    assert "prompt: seq2seq (translate English to Swiss German:)" in cli(
        *command, *t5, *mapping, "--set 'data.target_language=Swiss German'"
    )
    assert "), and the source language is not given. Add" in cli.fails(*command, *llama)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "masked-lm"],
            "--task masked-lm cannot be used with llama, which is a decoder; it needs an encoder. "
            "Use --task text-generation.",
        ),
        (
            ["--task", "masked-lm", "--overlong", "truncate-prompt"],
            "--overlong truncate-prompt cannot be used with --task masked-lm. Use --overlong drop "
            "or split.",
        ),
        (
            ["--set", "data.problem_type=regression"],
            "--problem-type regression has no effect with --task text-generation: it is for --task "
            "text-classification. Drop it, or change the task.",
        ),
        (
            ["--task", "token-classification", "--overlong", "split"],
            "--overlong split cannot be used with --task token-classification. Use --overlong",
        ),
    ],
)
def test_invalid_task_options_are_rejected(arguments: list[str], message: str, cli: Cli) -> None:
    assert message in cli.fails("train --dry-run", *arguments)


def test_full_model_keeps_its_parameter_names(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    """Parameters of Llama begin with `model`, those of its QA class with `transformer`."""
    data = task_data.write(tmp_path / "data", "span")
    config = create_config(tiny_model_dir("llama"), data, "span", tmp_path / "run")
    raw = config.model_dump(mode="json") | {"method": {"kind": "full"}}
    result = train(TrainConfig.model_validate(raw))
    assert result.summary["proof"]["reload_difference"] == 0
    assert_run_generates("span", tmp_path / "run", result.summary)


def test_multilingual_translation_uses_the_languages_of_the_tokenizer(
    tmp_path: Path, cli: Cli
) -> None:
    """NLLB's source begins with its language, and so does the target; generation forces it."""
    parts = tiny_tokenizers._metaspace_parts(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = transformers.NllbTokenizer(**parts)
    config = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 64)
    config |= {f"{side}_{n}": 2 for side in ("encoder", "decoder")
               for n in ("layers", "attention_heads")}  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(vocab_size=len(tokenizer), max_position_embeddings=64, **config)
    )
    for name, languages in (("unset", {}), ("set", {"tgt_lang": "deu_Latn"})):
        model.save_pretrained(tmp_path / name)
        transformers.NllbTokenizer(**parts, src_lang="eng_Latn", **languages).save_pretrained(
            tmp_path / name
        )
    data = task_data.write(tmp_path / "data", "pair")
    command = ["--task", "translation", "--source-language", "en", "--dataset", str(data)]
    command += ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--device", "cpu"]
    error = cli.fails(f"train --model {tmp_path / 'unset'}", *command)
    assert "src_lang is 'eng_Latn' and tgt_lang is None" in error
    output = cli(f"train --model {tmp_path / 'set'}", *command)
    assert "language tokens: eng_Latn to deu_Latn" in output
    row = cli.json(f"preview {tmp_path / 'run'} --json")["rows"][0]
    example = task_data.ROWS["pair"](row["number"] - 1)
    trained = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    expected = trained(example["en"], text_target=example["de"])  # as NLLB was trained
    assert [token["id"] for token in row["tokens"]] == expected["input_ids"]
    assert [token["id"] for token in row["target"]] == expected["labels"]
    german = trained.convert_tokens_to_ids("deu_Latn")
    assert expected["labels"][0] == german
    arguments = GenerationOptions(4).arguments(model, trained)
    assert arguments["forced_bos_token_id"] == german
