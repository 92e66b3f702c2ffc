"""`ftlevel generate`: try what was trained, beside its base if wished."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ftlevel.cli.flags import option_of
from ftlevel.cli.heavy_imports import uncollected_imports
from ftlevel.config import GenerateConfig, build_section, normal_task
from ftlevel.errors import ConfigError, InputError

Text = Optional[str]  # noqa: UP045 - Typer evaluates these at run time on Python 3.10 as well
Texts = Optional[list[str]]  # noqa: UP045
Int = Optional[int]  # noqa: UP045
Float = Optional[float]  # noqa: UP045
Place = Optional[Path]  # noqa: UP045


_option = partial(option_of, GenerateConfig)


def generate(
    context: typer.Context,
    name: Annotated[Text, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What to ask.")] = None,
    prompt: Annotated[
        Texts, typer.Option("--prompt", "-p", help="What to say; repeatable.")
    ] = None,
    prompts: Annotated[
        Place,
        typer.Option("--prompts", help="File of prompts: a line each, or JSONL with 'prompt'."),
    ] = None,
    out: Annotated[
        Place, typer.Option("--out", help="Write the answers to this JSONL file; must not exist.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk in the terminal; /help shows its commands.")
    ] = False,
    adapter: Annotated[
        Texts,
        typer.Option(
            "--adapter",
            metavar="NAME[=DIR]",
            help="An adapter of the same base, or one of --adapters-dir; repeatable.",
        ),
    ] = None,
    adapters_dir: Annotated[Place, _option("adapters_dir")] = None,
    passage: Annotated[Text, _option("context", "--context")] = None,
    compare_base: Annotated[bool, _option("compare_base")] = False,
    task: Annotated[Text, _option("task")] = None,
    max_new_tokens: Annotated[Int, _option("max_new_tokens")] = None,
    temperature: Annotated[Float, _option("temperature")] = None,
    top_p: Annotated[Float, _option("top_p")] = None,
    seed: Annotated[Int, _option("seed")] = None,
    batch_size: Annotated[Int, _option("batch_size")] = None,
    device: Annotated[Text, _option("device")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose.")
    ] = False,
) -> None:
    """Let a trained run, an adapter or a model answer a prompt.

    The prompt is laid out as in training, by the run's own template, and decoding is greedy unless
    --temperature is given. A run answers as its task does: with text, a class, the classes above
    one half, a number, the words with their tags, the words for each [MASK], or the span of
    --context that answers.
    """
    config = _read_config(context.params)
    if chat:
        if prompt or prompts or out or as_json:
            raise ConfigError(
                "--chat asks in the terminal. Drop --prompt, --prompts, --out, --json."
            )
        from ftlevel.cli.chat import talk

        talk(config)
        return
    asked = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not asked:
        raise ConfigError("there is nothing to ask. Add --prompt TEXT, --prompts FILE or --chat.")
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        from ftlevel.artifacts.files import check_absent, write_text

        with uncollected_imports():
            from ftlevel.commands.generate import answer_all

        if out is not None:
            check_absent("--out", out)
        answers, notes = answer_all(config, asked)
        for note in notes:
            screen.warn(note)
    lines = [vars(answer) for answer in answers]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json_module.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(out, text)
    if as_json:
        typer.echo(json_module.dumps({"answers": lines}))
    elif out is not None:
        typer.echo(f"{len(lines):,} answers in {out}")
    else:
        _show(answers, config)


def _read_config(parameters: Mapping[str, Any]) -> GenerateConfig:
    """Turn the flags into the configuration; `--adapter` names, or names and places."""
    fields = {key: parameters.get(key) for key in GenerateConfig.model_fields}
    fields["context"] = parameters["passage"]
    fields["task"] = normal_task(parameters["task"]) if parameters["task"] else None
    adapters, chosen = {}, []
    for given in parameters["adapter"] or []:
        label, equals, place = given.partition("=")
        if not label or (equals and not place):
            raise ConfigError(f"--adapter {given}: expected NAME, or NAME=DIR.")
        if label in adapters:
            raise ConfigError(f"two adapters are called {label!r}. Name one otherwise.")
        if equals:
            adapters[label] = place
        chosen.append(label)
    if adapters and len(adapters) == len(chosen):
        chosen = []  # all that are placed answer, and what else is named
    return build_section(GenerateConfig, {**fields, "adapters": adapters, "chosen": chosen})


def _read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file.

    Raises:
        InputError: it cannot be read, or a line of JSONL has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}.") from None
    if path.suffix not in (".jsonl", ".json"):
        return [line for line in lines if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json_module.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error}). Fix the line.") from None
        text = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: has no 'prompt' of text. Fix the line.")
        found.append(text)
    return found


def _show(answers: Sequence[Any], config: GenerateConfig) -> None:
    several = len({answer.adapter for answer in answers}) > 1
    asked = len({answer.prompt for answer in answers}) > 1
    before = None
    for answer in answers:
        is_new = answer.prompt != before
        before = answer.prompt
        if asked and is_new:
            typer.secho(f"» {answer.prompt}", dim=True)
        if answer.base is not None and is_new:
            typer.secho("base:  ", fg="yellow", nl=False)
            typer.echo(answer.base)
        if several or answer.base is not None:
            label = f"{answer.adapter}: " if several else "tuned: "
            typer.secho(label, fg="green", nl=False)
        typer.echo(answer.text)
        top = sorted(answer.scores.items(), key=lambda item: -item[1])[:3]
        if top:
            typer.secho("  " + ", ".join(f"{label} {p:.1%}" for label, p in top), dim=True)
