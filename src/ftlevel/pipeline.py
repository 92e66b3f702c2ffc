"""`FineTunePipeLine`: `TrainConfig` and `train` behind one constructor and `run()`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlevel.config import Layer, TrainConfig, build_config, load_recipe, put
from ftlevel.errors import ConfigError

_ORIGIN = "FineTunePipeLine({})"


def _warn(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=4)


class FineTunePipeLine:
    """Fine-tune a checkpoint on a dataset.

        model, tokenizer = FineTunePipeLine(
            task_type="summarization", checkpoint="google-t5/t5-small", dataset_name="samsum",
            peft_method="lora", peft_config={"r": 16},
        ).run()

    `args_dir` is a recipe (YAML or JSON); other arguments override it. `peft_config` and
    `training_args` have fields of the method and train sections. `use_accelerate=False` trains on
    the CPU. Raises ConfigError for invalid settings.
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
        layers = [] if args_dir is None else [load_recipe(Path(args_dir))]
        values = Layer()
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
                put(values, key, plain, _ORIGIN.format(argument))
        for section, fields in (("method", peft_config), ("train", training_args)):
            argument = "peft_config" if section == "method" else "training_args"
            if not isinstance(fields, Mapping | None):
                raise ConfigError(
                    f"{_ORIGIN.format(argument)}: {fields!r} is not a mapping. Expected names and "
                    "values, as in {'r': 16}."
                )
            for name, value in (fields or {}).items():
                put(values, (section, name), value, _ORIGIN.format(argument))
        self.config: TrainConfig = build_config([*layers, values], _warn)
        self.result: Any = None

    def run(self) -> tuple[Any, Any]:
        """Train, save, verify the saved adapter, and return the model and the tokenizer.

        The model is a `PeftModel` on its device, or a plain model for `full`.
        """
        from ftlevel.commands.train import train

        self.result = train(self.config)
        return self.result.model, self.result.tokenizer
