"""What a checkpoint lacks of a task's model, and weights that go by another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from ftlevel.models.loading import load_config, load_model, rename_prefix
from ftlevel.models.module_tree import get_new_language_head
from ftlevel.models.sources import resolve_source

NEW = {
    "bert": ["cls.predictions.transform"],
    "roberta": ["lm_head.dense", "lm_head.layer_norm"],
    "distilbert": ["vocab_transform", "vocab_layer_norm"],
    "electra": ["generator_predictions"],
    "albert": ["predictions.LayerNorm", "predictions.dense"],
    "deberta-v2": ["cls.predictions.transform"],
    "modernbert": ["head"],
}


@pytest.mark.parametrize("family", NEW)
def test_language_heads_that_are_new(family: str) -> None:
    model = tiny_models.build(family, "mlm")
    model.config.architectures = ["SomethingModel"]
    new, heads = get_new_language_head(model)
    assert new == NEW[family]
    output = model.get_output_embeddings()
    assert all(part is not output for name in new for part in model.get_submodule(name).modules())
    assert all(any(f"{name}.".startswith(f"{head}.") for head in heads) for name in new)
    model.config.architectures = [type(model).__name__]
    assert get_new_language_head(model) == ([], [])


def test_the_discriminator_of_electra_is_no_language_head() -> None:
    model = tiny_models.build("electra", "mlm")
    model.config.architectures = ["ElectraForPreTraining"]
    assert get_new_language_head(model)[0] == NEW["electra"]


@pytest.mark.parametrize(
    ("family", "head"),
    [(f, h) for f, h in tiny_models.FAMILY_HEADS if h in ("qa", "tokcls", "seqcls")],
)
def test_every_base_weight_arrives(family: str, head: str, tmp_path: Path) -> None:
    """Upstream, the question answering of Llama and Qwen finds none of a checkpoint's weights."""
    base = tiny_models.build(family)
    base.save_pretrained(tmp_path)
    source = resolve_source(str(tmp_path))
    config = load_config(source)
    auto_class = tiny_models.AUTO_CLASSES[head]
    renamed = rename_prefix(config, auto_class)
    assert bool(renamed) == (head == "qa" and family in ("llama", "qwen2", "qwen3", "qwen3_moe"))
    model, missing = load_model(source, config, auto_class, dtype=torch.float32, device="cpu")
    shape = tuple(base.get_input_embeddings().weight.shape)
    assert torch.equal(
        model.get_input_embeddings().weight[: shape[0]], base.get_input_embeddings().weight
    )
    assert not [name for name in missing if "layer" in name and "norm" not in name.lower()]
    if renamed:  # what is saved can be loaded by anybody
        model.save_pretrained(tmp_path / "again")
        again, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
        assert not info["missing_keys"]
        assert_equal(again, model)


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    weights = other.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())
