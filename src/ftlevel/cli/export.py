"""`ftlevel export`: a run or a model as one file for llama.cpp and Ollama."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from ftlevel.cli.flags import Given
from ftlevel.config import ExportConfig


def export(given: Given, *, out: str | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Write a run or a model as one file for llama.cpp and Ollama.

    A run's adapter is merged into its base first. One tensor is in memory at a time. What was
    written is read back through transformers and compared with the model before it is put in
    place.
    """
    nowhere = {"out": "model.gguf", "overwrite": True} if dry_run and out is None else {}
    config = given.section(ExportConfig, **nowhere)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        from ftlevel.commands.export import export as run

        result = run(config, listener=screen, dry_run=dry_run)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
    elif not quiet:
        for line in result_lines(result.summary):
            typer.echo(f"  {line}")


def result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what came out, a line each."""
    size = f"{summary['tensor_bytes'] / 2**20:,.1f} MiB"
    yield f"{summary['architecture']}: {summary['tensors']:,} tensors, {summary['outtype']}, {size}"
    if summary.get("dry_run"):
        yield "dry run: everything was checked, nothing was written."
        return
    if summary["merged"] is not None:
        check = "checked as ftlevel merge does" if summary["merged"]["verified"] else "not checked"
        yield f"the adapter was merged onto the {summary['merged']['onto']} weights, {check}"
    if (check := summary["check"]) is None:
        yield "not verified (--no-verify)"
    else:
        yield from _check_lines(check, summary)
    yield f"saved {summary['out']} and {summary['modelfile']}  ({summary['seconds']:.1f} s)"


def _check_lines(check: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    exact, model = check["beside_rounded"], check["beside_model"]
    yield (
        f"read back: over {exact['targets']:,} tokens, logits differ from the model's in "
        f"{summary['outtype']} by {exact['max_difference']:.2g} at most"
    )
    yield (
        f"beside the model itself: KL {model['kl']:.2g}, top-1 {model['top1']:.1%}, "
        f"loss {model['loss']:.4f} (the model {model['loss_reference']:.4f})"
    )
    if check["settings_of_the_model"]:
        own_settings = ", ".join(check["settings_of_the_model"])
        yield f"transformers does not read {own_settings} from a .gguf; the model's own was used"
    how = (
        "" if check["splitting_read"]
        else f" (how it splits text is named, {summary['tokenizer']['pre']}; transformers does not "
        "read that)"
    )  # fmt: skip
    yield f"the same tokens for {check['texts']} texts{how}"
