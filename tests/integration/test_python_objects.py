"""`train` with rows, a model, a tokenizer and callbacks in memory."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    TrainerCallback,
)

from command_line import Cli
from ftlevel import EvaluateConfig, PredictConfig, TrainConfig, evaluate, generate, predict, train
from ftlevel.artifacts.checkpoints import get_last_valid_checkpoint, listed
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.training import resume
from run_files import ModelDir, read_json, read_weights, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")

WORDS = ("argument", "parser", "module", "string", "value", "object", "default", "file")
VALIDATION_ROWS = [{"prompt": f"say {word}", "completion": f"{word}!"} for word in WORDS[:3]]
ROWS = [{"prompt": f"name the {word}", "completion": f"the {word}"} for word in WORDS]
WORKERS = {"parallel_workers": 2, "tokens_per_micro_batch": 64}
SHORT = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture
def base(tiny_model_dir: ModelDir) -> Path:
    return tiny_model_dir("llama", chat=True)


def create_config(base: Path | None, out: str = "run", **overrides: Any) -> TrainConfig:
    model = {} if base is None else {"model": base}
    return TrainConfig(**model, train=SHORT, output={"dir": out}, **overrides)


def load_card(out: str = "run") -> dict[str, Any]:
    fields: dict[str, Any] = read_json(Path(out, "adapter/ftlevel.json"))
    return fields


def test_rows_in_memory_match_rows_of_file(base: Path) -> None:
    write_rows("rows.jsonl", ROWS)
    train(create_config(base, "file", data="rows.jsonl"))
    train(create_config(base, "frame", data=pd.DataFrame(ROWS)))
    train(create_config(base, "list"), ROWS)
    assert read_weights("file") == read_weights("frame") == read_weights("list")
    stored = yaml.safe_load(Path("frame/config.yaml").read_text())
    assert stored["data"]["dataset"] == "in memory"


def test_run_on_rows_in_memory_needs_dataset_again(base: Path, cli: Cli) -> None:
    result = train(create_config(base), ROWS, eval_dataset=pd.DataFrame(VALIDATION_ROWS))
    assert result.summary["data"]["validation_rows"] == 3
    for command in (["evaluate", "run"], ["train", "run/config.yaml"], ["preview", "run"]):
        error = cli.fails(*command)
        assert error == (
            "ftlevel: run was trained on rows in memory, which are not saved. Pass --dataset "
            "FILE, or the same rows in Python.  [adapters]\n"
        )
    evaluation = evaluate(
        EvaluateConfig(name="run", dataset=pd.DataFrame(VALIDATION_ROWS), resamples=0)
    )
    assert evaluation.metrics["loss"] == pytest.approx(result.summary["metrics"]["loss"])
    prompts = [{"prompt": "name the file"}, {"prompt": "say a word"}]
    predictions = result.predict(prompts)
    assert [row["prompt"] for row in predictions] == [row["prompt"] for row in prompts]
    frame = pd.DataFrame(prompts)
    for rows in (frame, datasets.Dataset.from_list(prompts), iter(prompts)):
        assert result.predict(rows) == predictions
        assert predict(PredictConfig(name="run"), frame).rows == predictions
    answers, _ = generate("run", frame["prompt"])
    assert [item.prompt for item in answers] == list(frame["prompt"])
    assert "ftlevel evaluate" not in " ".join(result.summary["next"])


def test_resume_requires_same_rows_in_memory(base: Path) -> None:
    train(create_config(base), ROWS)
    before = read_weights("run")
    resume_config = create_config(base).model_copy(
        update={"output": create_config(base).output.model_copy(update={"resume": True})}
    )
    Path("run/adapter/adapter_model.safetensors").unlink()
    train(resume_config, ROWS)
    assert read_weights("run") == before
    with pytest.raises(ConfigError, match=r"not the same run: data\.fingerprint \(rows\) was"):
        train(resume_config, ROWS[1:])


def test_model_in_memory_matches_files_and_is_not_modified(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    before = {name: current.clone() for name, current in model.state_dict().items()}
    train(create_config(None, "given"), ROWS, model=model, tokenizer=tokenizer)
    train(create_config(base, "named"), ROWS)
    assert read_weights("given") == read_weights("named")
    assert load_card("given")["base"]["name"] == str(base)
    assert not Path("given/base").exists()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not hasattr(model, "peft_config")


def test_modified_model_is_saved_with_run(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[100, 3] += 1  # not in a sample of the file
    result = train(create_config(None), ROWS, model=model)
    choice = next(c for c in result.summary["choices"] if c["name"] == "given model")
    assert "has other weights than" in choice["value"]
    saved_weights = AutoModelForCausalLM.from_pretrained("run/base").state_dict()
    assert all(
        torch.equal(saved_weights[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert load_card()["base"]["path"] == "../base"
    Path("run").rename("moved")
    predictions = predict(PredictConfig(name="moved"), [{"prompt": "name the file"}]).rows
    assert predictions is not None
    with pytest.raises(ConfigError, match="has other weights"):
        predict(PredictConfig(name="moved", base_model=str(base)), [{"prompt": "x"}])


def test_base_copied_by_killed_process_is_copied_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[100, 3] += 1

    def move_partly(source: Path, target: Path) -> None:  # to another disk
        target.mkdir()
        shutil.copy(Path(source, "config.json"), target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.shutil, "move", move_partly)
        with pytest.raises(KeyboardInterrupt):
            train(create_config(None), ROWS, model=model)
    output = create_config(None).output.model_copy(update={"resume": True})
    train(create_config(None).model_copy(update={"output": output}), ROWS, model=model)
    saved_weights = AutoModelForCausalLM.from_pretrained("run/base").state_dict()
    assert all(
        torch.equal(saved_weights[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert not Path("run/.base.partial").exists()


def test_modified_tokenizer_is_saved_with_run(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    train(create_config(base), ROWS, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained("run/base").chat_template == tokenizer.chat_template


def test_model_without_files_requires_tokenizer(base: Path) -> None:
    from tiny_models import build

    model = build("llama")
    with pytest.raises(ConfigError, match="so its tokenizer is unknown"):
        train(create_config(None), ROWS, model=model)


@pytest.mark.slow
def test_quantized_model_in_memory_keeps_its_quantization(base: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    train(create_config(None), ROWS, model=model)
    assert load_card()["quantization"]["kind"] == "4bit"
    assert load_card()["base"]["name"] == str(base)
    with pytest.raises(ConfigError, match="model= is quantized already: 4-bit nf4"):
        train(create_config(None, quant="8bit"), ROWS, model=model)


class CountSteps(TrainerCallback):
    """Counts the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count one."""
        self.steps += 1


def test_callbacks_run_and_timings_start_at_call(base: Path) -> None:
    counter, start = CountSteps(), time.perf_counter()
    result = train(create_config(base), ROWS, callbacks=[counter])
    elapsed = time.perf_counter() - start
    assert counter.steps == 2
    assert result.summary["timings"]["to_first_step_s"] > 0
    assert result.summary["timings"]["total_s"] <= elapsed  # not since the start of the process
    assert result.summary["timings"]["to_first_step_cpu_s"] <= elapsed * 4


class Interrupt(TrainerCallback):
    """Interrupts a run before its second step."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Raise KeyboardInterrupt."""
        if state.global_step:
            raise KeyboardInterrupt


def test_run_resumes_in_new_thread_of_interrupted_process(base: Path) -> None:
    """Threads inherit the number of torch's threads that was set last."""
    resumed = create_config(base).output.model_copy(update={"resume": True})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(Interrupted):
            train(create_config(base, speed=WORKERS), ROWS, callbacks=[Interrupt()])
        assert [t for t in threading.enumerate() if t.name.startswith("ftlevel-worker")] == []
        config = create_config(base, speed=WORKERS).model_copy(update={"output": resumed})
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(train, config, ROWS).result().summary["steps"] == 2
    finally:
        torch.set_num_threads(threads)


class EvaluateAlways(TrainerCallback):
    """Requests an evaluation after each step."""

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Request it."""
        control.should_evaluate = True


def test_callback_cannot_evaluate_without_validation_rows(base: Path) -> None:
    with pytest.raises(ConfigError, match="should_evaluate, and there are no validation rows"):
        train(create_config(base), ROWS, callbacks=[EvaluateAlways()])


class SaveExtra(TrainerCallback):
    """Writes a file of its own into each checkpoint."""

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write it."""
        Path(args.output_dir, f"checkpoint-{state.global_step}", "extra.json").write_text("{}")


def test_checkpoint_with_file_of_callback_is_valid(base: Path) -> None:
    train(create_config(base), ROWS, callbacks=[SaveExtra()])
    checkpoint, rejected = get_last_valid_checkpoint(Path("run/checkpoints"))
    assert (checkpoint, rejected) == (Path("run/checkpoints/checkpoint-2"), [])
    assert "extra.json" in listed(checkpoint)


def wrapped_model(base: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2))


@pytest.mark.parametrize(
    ("create_arguments", "message"),
    [
        (lambda base: {"model": wrapped_model(base)}, "model= already has an adapter"),
        (lambda base: {"model": wrapped_model(base).base_model.model},
         "model= already has an adapter"),
        (lambda base: {"model": torch.nn.Linear(2, 2)}, "model= is of type Linear"),
        (lambda base: {"model": str(base)}, "model= is of type str"),
        (lambda base: {"tokenizer": "gpt2"}, "tokenizer= is of type str"),
        (lambda base: {"callbacks": [CountSteps]}, "callbacks= has CountSteps. Expected instances"),
        (lambda base: {"callbacks": [print]}, "callbacks= has one of type builtin"),
        (lambda base: {"callbacks": [EarlyStoppingCallback(3)]},
         "Use TrainConfig(train={'early_stopping_patience': 3})."),
        (lambda base: {"dataset": 7}, "dataset= is of type int"),
        (lambda base: {"eval_dataset": b"SECRET"}, "eval_dataset= is of type bytes"),
        (lambda base: {"dataset": ROWS, "config": {"data": "x.csv"}}, "has data.dataset too"),
        (lambda base: {"model": AutoModelForCausalLM.from_pretrained(base),
                       "config": {"model": "x"}}, "and x in the configuration are both given"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_reported(
    create_arguments: Callable[[Path], dict[str, Any]], message: str, base: Path
) -> None:
    arguments = create_arguments(base)
    with pytest.raises(ConfigError) as error:
        train(TrainConfig(**arguments.pop("config", {})), **arguments)
    assert message in str(error.value)
    assert not Path("runs").exists()


def test_dry_run_writes_nothing(base: Path) -> None:
    result = train(create_config(base), ROWS, dry_run=True)
    assert result.summary["steps"] == 2
    assert list(Path().iterdir()) == []
