"""`generate`: right padding of batches, several adapters by name, files, sampling and chats."""

from __future__ import annotations

import builtins
import csv
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import task_data
from ftlevel.cli.app import run
from ftlevel.commands.generate import Chat, generate, generate_answers
from ftlevel.commands.predict import predict
from ftlevel.commands.train import train
from ftlevel.config import GenerateConfig, PredictConfig, TrainConfig
from ftlevel.data.encoding.encode import encode_prompt
from ftlevel.errors import ConfigError, InputError
from ftlevel.extras.serving.entry import ServedModel
from ftlevel.trained.generation import GenerationOptions, generate_texts
from ftlevel.trained.resolve import resolve_model
from sampling import sample

ModelDir = Callable[..., Path]

PROMPTS = [
    "parser",
    "The parser reads a name, and a value, and a file of Paris, and then returns all of it.",
    "a file",
    "Return the string.",
    "The name is value 3, and the list is empty.",
]


def fit(
    model: Path,
    data: Path,
    out: Path,
    task: str = "text-generation",
    columns: dict[str, str] | None = None,
    learning_rate: float = 0.004,
    **method: Any,
) -> Path:
    pair = {"summarization": ("document", "summary"), "translation": ("source", "target")}
    columns = dict(zip(pair[task], ("en", "de"), strict=True)) if task in pair else columns or {}
    train(
        TrainConfig.model_validate(
            {
                "task": task,
                "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
                "method": method or {"kind": "lora"},
                "data": {"dataset": str(data), "columns": columns, "max_eval_samples": 1},
                "train": {
                    "max_steps": 3,
                    "learning_rate": learning_rate,
                    "predict_with_generate": False,
                },
                "output": {"dir": str(out)},
            }
        )
    )
    return out


def texts(name: Path | None, prompts: list[str] = PROMPTS, **settings: Any) -> list[str]:
    fields = {"max_new_tokens": 8, "device": "cpu", **settings}
    answers, _ = generate(None if name is None else str(name), prompts, **fields)
    return [answer.text for answer in answers]


PREFIX = {"kind": "prefix", "num_virtual_tokens": 3}


@pytest.mark.parametrize(
    ("family", "method"),
    sample(list(product(("llama", "gpt2", "t5", "bart"), ({"kind": "lora"}, PREFIX)))),
)
def test_a_batch_says_what_each_prompt_says_alone(
    family: str,
    method: dict[str, Any],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = task_data.write(tmp_path / "data", "pair")
    name = fit(tiny_model_dir(family), data, tmp_path / "run", "summarization", **method)
    trained = resolve_model(str(name), device="cpu").load("cpu")
    assert trained.ref.prompt_format is not None
    ids = [encode_prompt(trained.tokenizer, trained.ref.prompt_format, text) for text in PROMPTS]
    numbers, seen = Numbers(trained.tokenizer.pad_token_id), []
    original = trained.model.generate

    def generate_and_keep(**arguments: Any) -> Any:
        found = original(**arguments, output_logits=True, return_dict_in_generate=True)
        seen.append(torch.stack(found.logits, 1))  # (batch, steps, vocabulary)
        return found.sequences

    monkeypatch.setattr(trained.model, "generate", generate_and_keep)
    with torch.no_grad():
        together, alone = (
            generate_texts(trained.model, numbers, ids, "cpu", size, GenerationOptions(8))
            for size in (5, 1)
        )
    batch, single = seen[0], torch.cat(seen[1:])
    assert together == alone
    assert torch.allclose(batch, single, atol=2e-5)
    between_prompts = (single[1:, 0] - single[:-1, 0]).abs().amax(-1)
    assert (between_prompts > 1e-3).all()  # the prompts matter
    assert all(len(text.split()) >= 8 for text in alone)


class Numbers:
    """A tokenizer that shows every id; these models mostly say special tokens."""

    eos_token_id = 703  # no tokenizer of the tests uses it

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(scope="module")
def shelf(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of two runs on one base, of two tasks."""
    folder = tmp_path_factory.mktemp("shelf")
    data = task_data.write(folder.parent / "shelf-data", "pair")
    fit(tiny_model_dir("llama"), data, folder / "german-1.0", "translation")
    fit(tiny_model_dir("llama"), data, folder / "short", "summarization", kind="lora", r=4)
    return folder


def test_several_adapters_say_what_each_says_alone(shelf: Path, tiny_model_dir: ModelDir) -> None:
    german, short = shelf / "german-1.0", shelf / "short"
    alone = [texts(german), texts(short)]
    assert alone[0] != alone[1]
    expected = [text for pair in zip(*alone, strict=True) for text in pair]
    assert texts(german, adapters={"s": short}) == expected
    assert texts(None, adapters_dir=shelf) == expected
    assert texts(tiny_model_dir("llama"), adapters_dir=shelf) == expected
    assert texts(None, adapters_dir=shelf, chosen=["short"]) == alone[1]
    answers, _ = generate(
        None, PROMPTS[:2], adapters_dir=shelf, compare_base=True, max_new_tokens=8, device="cpu"
    )
    assert [answer.adapter for answer in answers] == ["german-1.0", "short"] * 2
    base, _ = generate(str(german), PROMPTS[:2], compare_base=True, max_new_tokens=8, device="cpu")
    assert [answer.base for answer in answers[::2]] == [answer.base for answer in base]


def test_what_does_not_go_together(shelf: Path, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--adapter shrt: .* Did you mean 'short'\?"):
        texts(None, adapters_dir=shelf, chosen=["shrt"])
    with pytest.raises(InputError, match="contains no adapter"):
        texts(None, adapters_dir=tmp_path)
    with pytest.raises(InputError, match="is no adapter but a model"):
        texts(shelf / "short", adapters={"x": tiny_model_dir("llama")})
    with pytest.raises(
        ConfigError,
        match=(
            r"no model given\. Pass a run, an adapter or a model, "
            r"or --adapter NAME=DIR or --adapters-dir DIR\."
        ),
    ):
        texts(None)
    data = task_data.write(tmp_path / "data", "pair")
    other = fit(tiny_model_dir("llama", seed=1), data, tmp_path / "other", "translation")
    with pytest.raises(InputError, match="'short' and 'o' differ in base"):
        texts(shelf / "short", adapters={"o": other})
    with pytest.raises(InputError, match="has other weights"):
        texts(tiny_model_dir("llama", seed=1), adapters_dir=shelf)
    prefix = fit(tiny_model_dir("llama"), data, tmp_path / "prefix", "translation", **PREFIX)
    with pytest.raises(InputError, match="cannot be loaded together with the others:"):
        texts(shelf / "short", adapters={"p": prefix})


def test_a_plain_peft_adapter_answers(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    base = tiny_model_dir("gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    answers, notes = generate(
        str(tmp_path / "adapter"), ["a"], compare_base=True, max_new_tokens=5, device="cpu"
    )
    assert answers[0].text != answers[0].base
    assert "was not created by ftlevel: its base," in notes[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_plain_text_is_continued_as_typed(
    family: str, tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts get the tokens that transformers gives them, however they are asked."""
    base, data = tiny_model_dir(family), tmp_path / "rows.jsonl"
    words = ("name", "value", "file", "parser")
    rows = [{"verse": f"The {a} of the {b} is the string."} for a in words for b in words]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": "verse"}
    name = fit(base, data, tmp_path / "run", columns=columns, learning_rate=1e-4)
    asked = ["The value", "The parser of the"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, name / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def continued(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(written, skip_special_tokens=True)).strip()

    expected = [continued(text) for text in asked]
    assert expected != [continued(f"{text}\n") for text in asked]
    assert texts(name, asked) == texts(name, [f"{text} " for text in asked]) == expected
    (tmp_path / "p.txt").write_text("\n".join(asked) + "\n")
    answers, _ = generate_answers(settings(name), [], tmp_path / "p.txt")
    assert [answer.text for answer in answers] == expected
    assert [Chat(settings(name)).reply(text, len) for text in asked] == expected
    predicted = predict(
        PredictConfig(name=str(name), device="cpu", max_new_tokens=8),
        [{"verse": text} for text in asked],
    )
    assert [row["prediction"] for row in predicted.rows or ()] == expected
    entry = ServedModel("a", resolve_model(str(name), device="cpu"))
    seen = [(prompt.ids, tokenizer(prompt.text)["input_ids"]) for prompt in entry.prompts()]
    plain = resolve_model(str(base), device="cpu").load("cpu")
    assert plain.ref.prompt_format is not None
    seen += [(encode_prompt(plain.tokenizer, plain.ref.prompt_format, t), tokenizer(t)["input_ids"])
             for t in asked]  # fmt: skip
    assert [ids for ids, _ in seen] == [ids for _, ids in seen]


def settings(name: Path) -> GenerateConfig:
    return GenerateConfig(name=str(name), device="cpu", max_new_tokens=8)


def test_sampling_is_seeded(shelf: Path) -> None:
    name = shelf / "short"
    first, again, other = (texts(name, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert texts(name, temperature=1.0, top_p=1e-6) == texts(name)  # nothing but the likeliest


def test_files_of_prompts_and_answers(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n\n")
    rows = [json.dumps({"prompt": prompt, "id": 1}) for prompt in PROMPTS]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    name, expected = str(shelf / "short"), texts(shelf / "short")
    for number, file in enumerate(("p.txt", "p.jsonl")):
        out = tmp_path / f"{number}.jsonl"
        code = run(["generate", name, "--prompts", str(tmp_path / file), "--out", str(out),
                    "--max-new-tokens", "8", "--device", "cpu"])  # fmt: skip
        assert code == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["text"] for line in lines] == expected
        assert [line["prompt"] for line in lines] == PROMPTS
    assert run(["generate", name, "--prompt", "a", "--out", str(out)]) == 2
    assert "already exists and is not overwritten. Choose another." in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}')
    assert run(["generate", name, "--prompts", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl:2: has no 'prompt'." in capsys.readouterr().err
    assert run(["generate", name]) == 2
    assert "no prompt. Add --prompt TEXT, --prompts FILE or --chat." in capsys.readouterr().err
    assert run(["generate", name, "--chat", "--prompt", "a"]) == 2
    assert "--chat reads from the terminal" in capsys.readouterr().err


def test_a_table_of_prompts_is_asked_row_by_row(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*PROMPTS[:2], 'two\nlines, "quoted"']
    name, expected = str(shelf / "short"), texts(shelf / "short", asked)
    told = ["--max-new-tokens", "8", "--device", "cpu", "--json"]
    for column, more in (("document", []), ("words", ["--map", "document=words"])):
        with (tmp_path / "p.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["id", column], *enumerate(asked)])
        code = run(["generate", name, "--prompts", str(tmp_path / "p.csv"), *more, *told])
        answers = json.loads(capsys.readouterr().out)["answers"]
        assert code == 0
        assert [answer["prompt"] for answer in answers] == asked
        assert [answer["text"] for answer in answers] == expected
    assert run(["generate", name, "--prompts", str(tmp_path / "p.csv"), *told]) == 2
    assert "the columns do not say what to ask" in capsys.readouterr().err


def test_the_answers_of_several_adapters_are_labelled(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--adapter", f"g={shelf / 'german-1.0'}", "--adapter",
                 f"s={shelf / 'short'}", "--compare-base", "--prompt", "a file",
                 "--max-new-tokens", "4", "--device", "cpu"]  # fmt: skip
    assert run(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["base", "g", "s"]


@pytest.fixture(scope="module")
def talker(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on a base with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    data = folder / "data.jsonl"
    rows = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return fit(tiny_model_dir("llama", chat=True), data, folder / "talker")


def chat_with(monkeypatch: pytest.MonkeyPatch, lines: list[str], arguments: list[str]) -> int:
    left = iter(lines)

    def read(_: str = "") -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    return run(["generate", *arguments, "--chat", "--max-new-tokens", "6", "--device", "cpu"])


def test_a_chat_remembers_and_switches(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = talker.parent / "twin"
    shutil.copytree(talker, twin, dirs_exist_ok=True)
    lines = ["what is 3", "/base", "what is 3", "/adapter t", "/adapter", "/adapter nobody",
             "/reset", "/help", "what is 3", "/quit", "never"]  # fmt: skip
    code = chat_with(monkeypatch, lines, [str(talker), "--adapter", f"t={twin}"])
    shown = capsys.readouterr().out
    assert code == 0
    assert "talker answers. /help" in shown
    assert "base answers. /help" in shown
    assert "t answers. /help" in shown
    assert "talker, t\n" in shown
    assert "no adapter is called 'nobody'" in shown
    assert "/reset          clear the conversation" in shown
    assert chat_with(monkeypatch, ["what is 3"], [str(talker)]) == 0  # Ctrl-D


def test_a_chat_is_the_template_over_all_that_was_said(talker: Path) -> None:
    chat = Chat(GenerateConfig(name=str(talker), max_new_tokens=6, device="cpu"))
    pieces: list[str] = []
    first = chat.reply("what is 3", pieces.append)
    assert "".join(pieces).strip() == first == texts(talker, ["what is 3"], max_new_tokens=6)[0]
    assert chat.uses_history
    second = chat.reply("what is 4", pieces.append)
    trained = resolve_model(str(talker), device="cpu").load("cpu")
    messages = [
        {"role": "user", "content": "what is 3"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "what is 4"},
    ]
    text = trained.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = trained.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = trained.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :]
    assert second == trained.tokenizer.decode(written, skip_special_tokens=True).strip()
    chat.reset()
    assert chat.reply("what is 3", pieces.append) == first
    chat.switch("base")
    chat.reply("what is 3", pieces.append)
    for _ in range(40):  # more than the positions hold
        chat.reply("what is 3, and 4, and 5, and 6, and 7, and 8?", pieces.append)
    assert chat.num_dropped > 0


def test_an_answer_that_is_broken_off_leaves_no_question(talker: Path) -> None:
    chat = Chat(GenerateConfig(name=str(talker), max_new_tokens=6, device="cpu"))

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply("what is 3", stop)
    assert chat.messages == []


def test_single_prompts_are_asked_alone(shelf: Path) -> None:
    chat = Chat(GenerateConfig(name=str(shelf / "short"), max_new_tokens=6, device="cpu"))
    assert not chat.uses_history
    first = chat.reply(PROMPTS[1], lambda _: None)
    assert chat.reply(PROMPTS[1], lambda _: None) == first
