"""`generate`: right padding of batches, several adapters by name, files, sampling and chats."""

from __future__ import annotations

import builtins
import csv
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.generate import Chat, generate, generate_answers
from ftlevel.commands.predict import predict
from ftlevel.commands.train import train
from ftlevel.config import GenerateConfig, PredictConfig
from ftlevel.data.encoding.prompts import encode_prompt
from ftlevel.errors import ConfigError, InputError
from ftlevel.extras.serving.entry import ServedModel
from ftlevel.trained.generation import GenerationOptions, generate_texts
from ftlevel.trained.resolve import resolve_model
from run_files import ModelDir, short_config
from sampling import sample

PROMPTS = [
    "parser",
    "The parser reads a name, and a value, and a file of Paris, and then returns all of it.",
    "a file",
    "Return the string.",
    "The name is value 3, and the list is empty.",
]


COLUMNS = {"summarization": {"document": "en", "summary": "de"},
           "translation": {"source": "en", "target": "de"}}  # fmt: skip


def train_adapter(
    model: Path, rows: Path, out: Path, task: str = "text-generation", learning_rate: float = 0.004,
    columns: dict[str, str] | None = None, **method: Any,
) -> Path:  # fmt: skip
    data = {"columns": columns or COLUMNS.get(task, {}), "max_eval_samples": 1}
    steps = {"learning_rate": learning_rate, "predict_with_generate": False}
    train(short_config(model, rows, out, task, data=data, train=steps,
                       method=method or {"kind": "lora"}))  # fmt: skip
    return out


def answer_texts(name: Path | None, prompts: list[str] = PROMPTS, **settings: Any) -> list[str]:
    fields = {"max_new_tokens": 8, "device": "cpu", **settings}
    answers, _ = generate(None if name is None else str(name), prompts, **fields)
    return [answer.text for answer in answers]


PREFIX = {"kind": "prefix", "num_virtual_tokens": 3}


@pytest.mark.parametrize(
    ("family", "method"),
    sample(list(product(("llama", "gpt2", "t5", "bart"), ({"kind": "lora"}, PREFIX)))),
)
def test_batched_generation_matches_single_prompts(
    family: str,
    method: dict[str, Any],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = task_data.write(tmp_path / "data", "pair")
    name = train_adapter(tiny_model_dir(family), data, tmp_path / "run", "summarization", **method)
    trained = resolve_model(str(name), device="cpu").load("cpu")
    assert trained.ref.prompt_format is not None
    ids = [encode_prompt(trained.tokenizer, trained.ref.prompt_format, text) for text in PROMPTS]
    tokenizer, logits = IdTokenizer(trained.tokenizer.pad_token_id), []
    original = trained.model.generate

    def generate_and_record(**arguments: Any) -> Any:
        output = original(**arguments, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(output.logits, 1))  # (batch, steps, vocabulary)
        return output.sequences

    trained.model.generation_config.eos_token_id = None  # no text ends early
    monkeypatch.setattr(trained.model, "generate", generate_and_record)
    with torch.no_grad():
        batched, unbatched = (
            generate_texts(trained.model, tokenizer, ids, "cpu", size, GenerationOptions(8))
            for size in (5, 1)
        )
    batch, single = logits[0], torch.cat(logits[1:])
    assert batched == unbatched
    assert torch.allclose(batch, single, atol=2e-5)
    between_prompts = (single[1:, 0] - single[:-1, 0]).abs().amax(-1)
    assert (between_prompts > 1e-3).all()  # the prompts matter
    assert all(len(text.split()) >= 8 for text in unbatched)


class IdTokenizer:
    """A tokenizer that decodes to ids, since tiny models mostly generate special tokens."""

    eos_token_id = 703  # no tokenizer of the tests uses it

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(scope="module")
def adapters_dir(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of two runs of different tasks on one base."""
    folder = tmp_path_factory.mktemp("shelf")
    data = task_data.write(folder.parent / "shelf-data", "pair")
    train_adapter(tiny_model_dir("llama"), data, folder / "german-1.0", "translation")
    train_adapter(
        tiny_model_dir("llama"), data, folder / "short", "summarization", kind="lora", r=4
    )
    return folder


def test_several_adapters_match_each_adapter_alone(
    adapters_dir: Path, tiny_model_dir: ModelDir
) -> None:
    german, short = adapters_dir / "german-1.0", adapters_dir / "short"
    separate = [answer_texts(german), answer_texts(short)]
    assert separate[0] != separate[1]
    expected = [text for pair in zip(*separate, strict=True) for text in pair]
    assert answer_texts(german, adapters={"s": short}) == expected
    assert answer_texts(None, adapters_dir=adapters_dir) == expected
    assert answer_texts(tiny_model_dir("llama"), adapters_dir=adapters_dir) == expected
    assert answer_texts(None, adapters_dir=adapters_dir, chosen=["short"]) == separate[1]
    answers, _ = generate(
        None,
        PROMPTS[:2],
        adapters_dir=adapters_dir,
        compare_base=True,
        max_new_tokens=8,
        device="cpu",
    )
    assert [answer.adapter for answer in answers] == ["german-1.0", "short"] * 2
    base, _ = generate(str(german), PROMPTS[:2], compare_base=True, max_new_tokens=8, device="cpu")
    assert [answer.base for answer in answers[::2]] == [answer.base for answer in base]


def test_incompatible_adapters_raise(
    adapters_dir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--adapter shrt: .* Did you mean 'short'\?"):
        answer_texts(None, adapters_dir=adapters_dir, chosen=["shrt"])
    with pytest.raises(InputError, match="contains no adapter"):
        answer_texts(None, adapters_dir=tmp_path)
    with pytest.raises(InputError, match="is a model, not an adapter"):
        answer_texts(adapters_dir / "short", adapters={"x": tiny_model_dir("llama")})
    with pytest.raises(
        ConfigError,
        match=(
            r"no model given\. Pass a run, an adapter or a model, "
            r"or --adapter NAME=DIR or --adapters-dir DIR\."
        ),
    ):
        answer_texts(None)
    data = task_data.write(tmp_path / "data", "pair")
    other_run = train_adapter(
        tiny_model_dir("llama", seed=1), data, tmp_path / "other", "translation"
    )
    with pytest.raises(InputError, match="'short' and 'o' differ in base"):
        answer_texts(adapters_dir / "short", adapters={"o": other_run})
    with pytest.raises(InputError, match="has other weights"):
        answer_texts(tiny_model_dir("llama", seed=1), adapters_dir=adapters_dir)
    prefix = train_adapter(
        tiny_model_dir("llama"), data, tmp_path / "prefix", "translation", **PREFIX
    )
    with pytest.raises(InputError, match="cannot be loaded together with the others:"):
        answer_texts(adapters_dir / "short", adapters={"p": prefix})


def test_plain_peft_adapter_generates(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    base = tiny_model_dir("gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    answers, notes = generate(
        str(tmp_path / "adapter"), ["a"], compare_base=True, max_new_tokens=5, device="cpu"
    )
    assert answers[0].text != answers[0].base
    assert "was not created by ftlevel: its base," in notes[0]


@pytest.mark.parametrize("model_class", ["BartForCausalLM", "MBartForCausalLM"])
def test_decoder_without_position_ids_generates_as_alone(
    model_class: str, tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    """transformers' decoder of BART ignores padding, so that it would shift the positions."""
    torch.manual_seed(0)
    source = tiny_model_dir("bart")
    config = transformers.AutoConfig.from_pretrained(source, forced_eos_token_id=None)
    if model_class == "MBartForCausalLM":
        names = {**config.to_dict(), "model_type": "mbart"}
        config = transformers.MBartConfig.from_dict(names)
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "decoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path / "decoder")
    expected = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer(prompt)["input_ids"][:-1]
        ids = [*prompt_ids]
        while len(ids) < len(prompt_ids) + 6 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        new_ids = ids[len(prompt_ids) :]
        expected.append(tokenizer.decode(new_ids, skip_special_tokens=True).strip())
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    options = ["--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu", "--json"]
    answers = json.loads(
        cli(f"generate {tmp_path / 'decoder'}", *prompts, *options).splitlines()[-1]
    )["answers"]
    assert [answer["text"] for answer in answers] == expected
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a file", "completion": "the list"}\n' * 4)
    data = ["--dataset", str(tmp_path / "rows.jsonl"), "--max-steps", "1", "--dtype", "float32"]
    paths = ["--model", str(tmp_path / "decoder"), "--output-dir", str(tmp_path / "run")]
    assert "fast step verified on" in cli("train", *data, *paths)


def test_run_in_directory_called_base_uses_its_adapter(adapters_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters_dir / "short" / "adapter", tmp_path / "base")
    assert answer_texts(tmp_path / "base") == answer_texts(adapters_dir / "short")


def test_plain_peft_adapter_is_used_beside_run(
    adapters_dir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    base, plain = tiny_model_dir("llama"), tmp_path / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(plain)
    separate = [answer_texts(adapters_dir / "short"), answer_texts(plain, dtype="float32")]
    expected = [text for pair in zip(*separate, strict=True) for text in pair]
    assert answer_texts(adapters_dir / "short", adapters={"p": plain}) == expected


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_text_prompts_match_transformers(
    family: str, tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are tokenized as by transformers in every command."""
    base, data = tiny_model_dir(family), tmp_path / "rows.jsonl"
    nouns = ("name", "value", "file", "parser")
    rows = [{"verse": f"The {a} of the {b} is the string."} for a in nouns for b in nouns]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": "verse"}
    name = train_adapter(base, data, tmp_path / "run", columns=columns, learning_rate=1e-4)
    prompts = ["The value", "The parser of the"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, name / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def reference_continuation(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        generated = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(generated, skip_special_tokens=True)).strip()

    expected = [reference_continuation(text) for text in prompts]
    assert expected != [reference_continuation(f"{text}\n") for text in prompts]
    assert (
        answer_texts(name, prompts)
        == answer_texts(name, [f"{text} " for text in prompts])
        == expected
    )
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    answers, _ = generate_answers(create_generate_config(name), [], tmp_path / "p.txt")
    assert [answer.text for answer in answers] == expected
    assert [Chat(create_generate_config(name)).reply(text, len) for text in prompts] == expected
    predicted = predict(
        PredictConfig(name=str(name), device="cpu", max_new_tokens=8),
        [{"verse": text} for text in prompts],
    )
    assert [row["prediction"] for row in predicted.rows or ()] == expected
    entry = ServedModel("a", resolve_model(str(name), device="cpu"))
    encoded = [(prompt.ids, tokenizer(prompt.text)["input_ids"]) for prompt in entry.prompts()]
    base_model = resolve_model(str(base), device="cpu").load("cpu")
    assert base_model.ref.prompt_format is not None
    encoded += [(encode_prompt(base_model.tokenizer, base_model.ref.prompt_format, t),
                 tokenizer(t)["input_ids"]) for t in prompts]  # fmt: skip
    assert [ids for ids, _ in encoded] == [ids for _, ids in encoded]


def create_generate_config(name: Path) -> GenerateConfig:
    return GenerateConfig(name=str(name), device="cpu", max_new_tokens=8)


def test_sampling_is_seeded(adapters_dir: Path) -> None:
    name = adapters_dir / "short"
    first, repeated, other = (answer_texts(name, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == repeated != other
    assert answer_texts(name, temperature=1.0, top_p=1e-6) == answer_texts(
        name
    )  # only the most likely token


def test_prompt_files_give_same_answers_as_prompts(
    adapters_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    prompts = [*PROMPTS, "a form feed\fis part of a line"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n")
    rows = [json.dumps({"prompt": prompt, "id": 1}) for prompt in prompts]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    name, expected = str(adapters_dir / "short"), answer_texts(adapters_dir / "short", prompts)
    for number, file in enumerate(("p.txt", "p.jsonl")):
        out = tmp_path / f"{number}.jsonl"
        cli(
            f"generate {name} --prompts {tmp_path / file} --out {out} --max-new-tokens 8 "
            "--device cpu"
        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["text"] for line in lines] == expected
        assert [line["prompt"] for line in lines] == prompts
    text = "\ufefffirst\u2028line\x0c\r\nsecond\n\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    out = tmp_path / "lines.jsonl"
    cli(f"generate {name} --prompts {tmp_path / 'p.txt'} --out {out}")
    shown = [json.loads(line)["prompt"] for line in out.open()]
    assert shown == ["first\u2028line\x0c", "second"]
    answers, _ = generate(name, "one", max_new_tokens=1)  # not a letter at a time
    assert generate(name, (text for text in ["one"]), max_new_tokens=1)[0] == answers  # type: ignore[arg-type]
    assert [answer.prompt for answer in answers] == ["one"]
    for invalid in ([None], ["a", 3], pd.DataFrame({"prompt": ["a"]})):
        with pytest.raises(ConfigError, match=r"^a prompt is of type \w+\. Pass texts: a list"):
            generate(name, invalid)  # type: ignore[arg-type]
    (tmp_path / "p.txt").write_text("\n \n")
    error = cli.fails(f"generate {name} --prompts {tmp_path / 'p.txt'}")
    assert "p.txt has no line with text. Use a file of prompts." in error
    error = cli.fails(f"generate {name} --prompt a --out {out}")
    assert "already exists and is not overwritten. Choose another." in error
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}')
    error = cli.fails(f"generate {name} --prompts {tmp_path / 'bad.jsonl'}")
    assert "bad.jsonl:2: has no 'prompt'." in error
    error = cli.fails(f"generate {name}")
    assert "no prompt. Add --prompt TEXT, --prompts FILE or --chat." in error
    assert "--chat reads from the terminal" in cli.fails(f"generate {name} --chat --prompt a")


def test_csv_prompts_are_answered_per_row(adapters_dir: Path, tmp_path: Path, cli: Cli) -> None:
    prompts = [*PROMPTS[:2], 'two\nlines, "quoted"']
    name, expected = (
        str(adapters_dir / "short"),
        answer_texts(adapters_dir / "short", prompts),
    )
    options = ["--max-new-tokens", "8", "--device", "cpu", "--json"]
    for column, mapping in (("document", []), ("words", ["--map", "document=words"])):
        with (tmp_path / "p.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["id", column], *enumerate(prompts)])
        answers = cli.json(f"generate {name} --prompts {tmp_path / 'p.csv'}", *mapping, *options)[
            "answers"
        ]
        assert [answer["prompt"] for answer in answers] == prompts
        assert [answer["text"] for answer in answers] == expected
    error = cli.fails(f"generate {name} --prompts {tmp_path / 'p.csv'}", *options)
    assert "no format matches the columns" in error


def test_answers_are_labeled_by_adapter(adapters_dir: Path, cli: Cli) -> None:
    arguments = ["generate", "--adapter", f"g={adapters_dir / 'german-1.0'}", "--adapter",
                 f"s={adapters_dir / 'short'}", "--compare-base", "--prompt", "a file",
                 "--max-new-tokens", "4", "--device", "cpu"]  # fmt: skip
    lines = cli(*arguments).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["base", "g", "s"]


def test_two_models_answer_each_prompt(adapters_dir: Path, cli: Cli) -> None:
    names = [str(adapters_dir / name) for name in ("german-1.0", "short")]
    prompts = [option for prompt in PROMPTS[:2] for option in ("--prompt", prompt)]
    command = ["generate", names[0], "--against", names[1], *prompts, "--max-new-tokens", "8",
               "--device", "cpu"]  # fmt: skip
    answers = cli.json(*command, "--json")["answers"]
    assert [(a["prompt"], a["adapter"]) for a in answers] == [
        (prompt, name) for prompt in PROMPTS[:2] for name in names
    ]
    expected = [answer_texts(Path(name), PROMPTS[:2]) for name in names]
    assert [a["text"] for a in answers] == [expected[k][i] for i in range(2) for k in range(2)]
    lines = cli(*command).splitlines()
    assert [line.partition(": ")[0] for line in lines if not line.startswith("»")] == names * 2


@pytest.fixture(scope="module")
def chat_run(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on a base with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    data = folder / "data.jsonl"
    rows = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return train_adapter(tiny_model_dir("llama", chat=True), data, folder / "talker")


def chat_with(monkeypatch: pytest.MonkeyPatch, lines: list[str], arguments: list[str]) -> int:
    remaining = iter(lines)

    def read(_: str = "") -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    return run(["generate", *arguments, "--chat", "--max-new-tokens", "6", "--device", "cpu"])


def test_chat_commands_switch_adapters(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = chat_run.parent / "twin"
    shutil.copytree(chat_run, copy, dirs_exist_ok=True)
    lines = ["what is 3", "/base", "what is 3", "/adapter t", "/adapter", "/adapter nobody",
             "/reset", "/help", "what is 3", "/quit", "never"]  # fmt: skip
    code = chat_with(monkeypatch, lines, [str(chat_run), "--adapter", f"t={copy}"])
    output = capsys.readouterr().out
    assert code == 0
    assert "talker answers. /help" in output
    assert "base answers. /help" in output
    assert "t answers. /help" in output
    assert "talker, t\n" in output
    assert "no adapter is called 'nobody'" in output
    assert "/reset          clear the conversation" in output
    assert chat_with(monkeypatch, ["what is 3"], [str(chat_run)]) == 0  # Ctrl-D


def test_chat_uses_template_over_conversation(chat_run: Path) -> None:
    chat = Chat(GenerateConfig(name=str(chat_run), max_new_tokens=6, device="cpu"))
    pieces: list[str] = []
    first_answer = chat.reply("what is 3", pieces.append)
    assert (
        "".join(pieces).strip()
        == first_answer
        == answer_texts(chat_run, ["what is 3"], max_new_tokens=6)[0]
    )
    assert chat.uses_history
    second = chat.reply("what is 4", pieces.append)
    trained = resolve_model(str(chat_run), device="cpu").load("cpu")
    messages = [
        {"role": "user", "content": "what is 3"},
        {"role": "assistant", "content": first_answer},
        {"role": "user", "content": "what is 4"},
    ]
    text = trained.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = trained.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        generated = trained.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :]
    assert second == trained.tokenizer.decode(generated, skip_special_tokens=True).strip()
    chat.reset()
    assert chat.reply("what is 3", pieces.append) == first_answer
    chat.switch("base")
    chat.reply("what is 3", pieces.append)
    for _ in range(40):  # more than the positions hold
        chat.reply("what is 3, and 4, and 5, and 6, and 7, and 8?", pieces.append)
    assert chat.num_dropped > 0


def test_interrupted_answer_leaves_no_message(chat_run: Path) -> None:
    chat = Chat(GenerateConfig(name=str(chat_run), max_new_tokens=6, device="cpu"))

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply("what is 3", stop)
    assert chat.messages == []


def test_chat_without_history_repeats_answer(adapters_dir: Path) -> None:
    chat = Chat(GenerateConfig(name=str(adapters_dir / "short"), max_new_tokens=6, device="cpu"))
    assert not chat.uses_history
    first_answer = chat.reply(PROMPTS[1], lambda _: None)
    assert chat.reply(PROMPTS[1], lambda _: None) == first_answer
