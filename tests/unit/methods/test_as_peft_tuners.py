"""Our tuners from Python, without ftlevel's commands: they do what PEFT's own do when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from ftlevel.methods import METHODS
from tiny_models import build, build_batch, compute_logits

for method in METHODS.values():
    if method.register is not None:
        method.register()

from ftlevel.methods.bottleneck.config import BottleneckConfig  # noqa: E402 - makes a PeftType
from ftlevel.methods.prefix.config import PrefixKvConfig  # noqa: E402 - likewise
from ftlevel.methods.soft_prompt.config import SoftPromptConfig  # noqa: E402 - likewise

CONFIGS = {
    "bottleneck": lambda: BottleneckConfig(init_weights=False),
    "parallel": lambda: BottleneckConfig(placement="parallel", init_weights=False),
    "prefix": PrefixKvConfig,
    "projected": lambda: PrefixKvConfig(prefix_projection=True),
    "prompt": SoftPromptConfig,
    "lstm": lambda: SoftPromptConfig(encoder="LSTM"),
}
every_tuner = pytest.mark.parametrize("tuner", CONFIGS)


def dtypes_of(model: Any, name: str) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if model.prefix in n and f".{name}" in n}


@every_tuner
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_in_the_precision_that_is_asked_for(
    tuner: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    for is_cast, expected in ((True, torch.float32), (False, dtype)):
        choice = {"autocast_adapter_dtype": is_cast}
        model = get_peft_model(build(family).to(dtype), CONFIGS[tuner](), **choice)
        model.add_adapter("other", CONFIGS[tuner](), **choice)
        assert dtypes_of(model, "default") == dtypes_of(model, "other") == {expected}
        assert torch.isfinite(compute_logits(model.eval(), build_batch(family))).all()
        model.save_pretrained(str(tmp_path))
        for how in (choice, {**choice, "low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(build(family).to(dtype), str(tmp_path), **how)
            loaded.load_adapter(str(tmp_path / "other"), "other", **how)
            assert dtypes_of(loaded, "default") == dtypes_of(loaded, "other") == {expected}
            for name in ("default", "other"):
                loaded.set_adapter(name)
                model.set_adapter(name)
                logits = compute_logits(model, build_batch(family))
                assert torch.equal(compute_logits(loaded, build_batch(family)), logits)
