"""How a command line is read: dashes or underscores, second names, and one line for a mistake."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from ftlevel.errors import Interrupted

SECOND_NAMES: dict[str, str] = {
    "--peft-method": "--method",
    "--model-name-or-path": "--model",
    "--dataset-name": "--dataset",
    "--task-type": "--task",
    "--quantization-type": "--quant",
    "--bnb-4bit-quant-type": "--quant-type",
    "--bnb-4bit-use-double-quant": "--double-quant",
    "--use-double-quant": "--double-quant",
    "--lora-rank": "--lora-r",
    "--rank": "--lora-r",
    "--lora-target-modules": "--target-modules",
    "--use-dora": "--dora",
    "--use-rslora": "--rslora",
    "--init-lora-weights": "--init",
    "--loraplus-lr-ratio": "--lora-plus-ratio",
    "--torch-dtype": "--dtype",
    "--max-seq-length": "--max-length",
    "--model-max-length": "--max-length",
    "--max-train-samples": "--max-samples",
    "--epochs": "--num-train-epochs",
    "--lr": "--learning-rate",
    "--train-batch-size": "--per-device-train-batch-size",
    "--batch-size": "--per-device-train-batch-size",
    "--overwrite-output-dir": "--overwrite",
    "--resume-from-checkpoint": "--resume",
}
"""Spellings that people have in their scripts → the flag of the commands that have it."""


def canonical(argument: str) -> str:
    """Return `argument` in ftlevel's spelling: `--lora_r=8` is `--lora-r=8`."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    return SECOND_NAMES.get(name, name) + equals + value


class Command(TyperCommand):
    """A command that accepts the second spellings of its flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite flags to their canonical spelling before they are parsed."""
        known = {option for parameter in self.params for option in parameter.opts}
        rewritten = []
        for argument in args:
            name = canonical(argument)
            rewritten.append(name if name.partition("=")[0] in known else _dashed(argument))
        return super().parse_args(ctx, rewritten)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C is said, which Typer would turn into a bare exit code.

        Raises:
            Interrupted: the user pressed Ctrl-C, and the command had nothing to keep.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was kept.") from None


def _dashed(argument: str) -> str:
    """Turn underscores into dashes in a flag's name, so that the nearest flag can be found."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
