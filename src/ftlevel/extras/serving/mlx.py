"""Export plain LoRA for mlx-lm: transposed matrices with scale 1.

mlx-lm adapts the modules `keys` of the last `num_layers` layers, and modules outside the layers by
full name (`mlx_lm.tuner.utils.linear_to_lora_layers`, 0.32.2). Modules that the file lacks silently
keep initial values, so every layer gets the same modules.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

from ftlevel.artifacts.files import write_json
from ftlevel.extras.serving.adapters import Writer, plan_adapters
from ftlevel.extras.serving.entry import ServedModel
from ftlevel.merging.normal_form import NormalForm
from ftlevel.methods.lora_conversion import Factors

_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
_WEIGHTS = "adapters.safetensors"


class MlxWriter(Writer):
    """Write and read mlx-lm's adapters.safetensors and adapter_config.json."""

    def write(self, path: Path, lora: NormalForm, adapter: ServedModel) -> None:
        """Write `lora`, the plain LoRA of `adapter`, into the directory `path`."""
        from safetensors.torch import save_file

        lora = lora.on_every_layer(adapter.base.model)
        tensors = {}
        for name, update in lora.factors.items():
            tensors[f"{name}.lora_a"] = update.a.T.float().contiguous()
            tensors[f"{name}.lora_b"] = update.b.T.float().contiguous()
        save_file(tensors, str(path / _WEIGHTS), {"format": "mlx"})
        inside = (match[1] for name in lora.factors if (match := _LAYER.fullmatch(name)))
        config = {
            "fine_tune_type": "lora",
            "model": adapter.base_name,
            "num_layers": adapter.ref.model_config.num_hidden_layers,
            "lora_parameters": {
                "rank": lora.rank,
                "scale": 1.0,
                "dropout": 0.0,
                "keys": sorted(set(inside)),
            },
        }
        write_json(path / "adapter_config.json", config)

    def read(self, path: Path, lora: NormalForm, _entry: ServedModel) -> NormalForm:
        """Load the file back; settings that it lacks are those of `lora`."""
        from safetensors.torch import load_file

        tensors = load_file(str(path / _WEIGHTS))
        factors = {
            name.removesuffix(".lora_a"): Factors(tensor.T, tensors[name.removesuffix("a") + "b"].T)
            for name, tensor in tensors.items()
            if name.endswith(".lora_a")
        }
        return replace(lora, factors=factors)


plan_export = functools.partial(plan_adapters, MlxWriter(), server="mlx")
"""Plan the export of one or several adapters."""
