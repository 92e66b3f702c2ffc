"""Export plain LoRA in the PEFT format, for vLLM, SGLang, TGI, OpenVINO GenAI, and PEFT itself."""

from __future__ import annotations

import functools
from pathlib import Path

from ftlevel.extras.serving.adapters import Writer, plan_adapters
from ftlevel.extras.serving.entry import ServedModel
from ftlevel.merging.normal_form import NormalForm, load_normal_form, save_normal_form
from ftlevel.weights.checkpoint import TOKENIZER_FILES, copy_files


class PeftWriter(Writer):
    """Write and read PEFT files; copies the adapter's tokenizer too."""

    def write(self, path: Path, lora: NormalForm, adapter: ServedModel) -> None:
        """Write `lora`, the plain LoRA of `adapter`, into the directory `path`."""
        save_normal_form(path, lora, adapter.peft_config, adapter.base_name)
        copy_files(adapter.ref.adapter_path, path, TOKENIZER_FILES)

    def read(self, path: Path, lora: NormalForm, _entry: ServedModel) -> NormalForm:
        """Load the files back; settings that they lack are those of `lora`."""
        return load_normal_form(path, lora)


plan_export = functools.partial(plan_adapters, PeftWriter())
"""Plan the export of one or several adapters."""
