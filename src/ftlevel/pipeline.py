"""`FineTunePipeLine`: the whole of ftlevel behind one constructor and `run()`.

A thin face over `TrainConfig` and `train`: the same configuration, the same checks, the same run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlevel.config import Layer, TrainConfig, build_config, put, read_recipe
from ftlevel.errors import ConfigError

_ORIGIN = "FineTunePipeLine({})"


def _warn(line: str) -> None:
    warnings.warn(line, FutureWarning, stacklevel=4)


class FineTunePipeLine:
    """Fine-tune a checkpoint on a data set.

        model, tokenizer = FineTunePipeLine(
            task_type="summarization", checkpoint="google-t5/t5-small", dataset_name="samsum",
            peft_method="lora", peft_config={"r": 16},
        ).run()

    Args:
        args_dir: a YAML or JSON file of settings in the grammar of recipes; what else is given
            here wins over it.
        task_type: as in `--task`; underscores are accepted.
        checkpoint: Hub id, directory, .gguf file or builtin:NAME.
        dataset_name: local file or directory, Hub id, or builtin:docstrings.
        use_accelerate: False keeps the run on the CPU; True takes the GPU where there is one.
        peft_method: as in `--method`.
        peft_config: fields of the method, by PEFT's names.
        training_args: fields of the train section, by the Trainer's names.
        output_dir: where the run is written; a new directory under runs/ by default.

    Raises:
        ConfigError: a setting is unknown, out of range, or contradicts another.

    Attributes:
        config: the validated configuration.
        result: what `run` gave: the summary and the run directory; None before.
    """

    def __init__(
        self,
        args_dir: str | Path | None = None,
        *,
        task_type: str | None = None,
        checkpoint: str | None = None,
        dataset_name: str | None = None,
        use_accelerate: bool = True,
        peft_method: str | None = None,
        peft_config: Mapping[str, Any] | None = None,
        training_args: Mapping[str, Any] | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        layers = [] if args_dir is None else [read_recipe(Path(args_dir))]
        given = Layer()
        for key, value, argument in (
            (("task",), task_type, "task_type"),
            (("model", "name_or_path"), checkpoint, "checkpoint"),
            (("data", "dataset"), dataset_name, "dataset_name"),
            (("method", "kind"), peft_method, "peft_method"),
            (("output", "dir"), output_dir, "output_dir"),
            (("model", "device"), None if use_accelerate else "cpu", "use_accelerate"),
        ):
            if value is not None:
                plain = str(value) if isinstance(value, Path) else value
                put(given, key, plain, _ORIGIN.format(argument))
        for section, fields in (("method", peft_config), ("train", training_args)):
            argument = "peft_config" if section == "method" else "training_args"
            if not isinstance(fields, Mapping | None):
                raise ConfigError(
                    f"{_ORIGIN.format(argument)}: {fields!r} is no mapping. Expected names and "
                    "values, as in {'r': 16}."
                )
            for name, value in (fields or {}).items():
                put(given, (section, name), value, _ORIGIN.format(argument))
        self.config: TrainConfig = build_config([*layers, given], _warn)
        self.result: Any = None

    def run(self) -> tuple[Any, Any]:
        """Train, write the run directory, check the saved adapter, and return it.

        Returns:
            The trained model, a `PeftModel` on its device (a plain model for `full`), and the
            tokenizer.

        Raises:
            FtlevelError: as `ftlevel.train` does.
        """
        from ftlevel.commands.train import train

        self.result = train(self.config)
        return self.result.model, self.result.tokenizer
