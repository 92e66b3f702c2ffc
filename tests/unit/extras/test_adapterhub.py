"""AdapterHub adapters: logits recorded with its own package, and rejected adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adapterhub_cases import FAMILIES, Case, compute_logits, fill
from ftlevel.errors import InputError
from ftlevel.extras.adapterhub.adapter import is_adapterhub, load_head, load_hub_adapter
from ftlevel.extras.adapterhub.config_file import convert_config, create_hub_config
from ftlevel.methods.bottleneck.layer import INPUT_TYPES
from ftlevel.trained.adapt import add_adapter, load_adapter

FIGURES = json.loads(Path(__file__).with_name("adapterhub_figures.json").read_text())["cases"]
PRE_NORM = ("gpt2", "llama", "t5")
GPT2 = next(case for case in FIGURES if (case["family"], case["style"]) == ("gpt2", "seq_bn"))


def build_base(case: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(case["family"], **FAMILIES[case["family"]][1])
    model = getattr(transformers, case["auto_class"]).from_config(config)
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    return model.eval()


def write_hub(case: dict[str, Any], directory: Path, **settings: Any) -> Path:
    """Write the adapter in AdapterHub's format, with `settings` replaced in its config."""
    directory.mkdir(exist_ok=True)
    weights = {name: torch.empty(shape) for name, shape in case["shapes"].items()}
    for name, tensor in weights.items():
        fill(name, tensor)
    torch.save(weights, directory / "pytorch_adapter.bin")
    config = {**case["settings"]["config"], **settings}
    (directory / "adapter_config.json").write_text(
        json.dumps({**case["settings"], "config": config})
    )
    return directory


def last_logits(model: Any, case: dict[str, Any]) -> torch.Tensor:
    full_case = Case(0, case["family"], case["style"], case["auto_class"])
    return compute_logits(model, full_case)[:, -1, :6]


@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"{case['family']}-{case['style']}")
def test_logits_match_adapterhub(case: dict[str, Any], tmp_path: Path) -> None:
    base = build_base(case)
    before = last_logits(base, case)
    actual = last_logits(load_adapter(base, write_hub(case, tmp_path)), case)
    expected = torch.tensor(case["logits"])
    assert (expected - before).abs().max() > 0.1
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "case",
    [c for c in FIGURES if c["family"] in PRE_NORM and c["style"] in ("seq_bn", "par_bn")],
    ids=lambda case: f"{case['family']}-{case['style']}",
)
def test_older_placements_differ_on_pre_norm_models(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INPUT_TYPES, "seq_bn", "output")  # the input of pfeiffer
    monkeypatch.setitem(INPUT_TYPES, "par_bn", "input")  # the input of parallel
    actual = last_logits(load_adapter(build_base(case), write_hub(case, tmp_path)), case)
    assert (actual - torch.tensor(case["logits"])).abs().max() > 0.05


def test_safetensors_and_second_adapter(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    case = next(c for c in FIGURES if (c["family"], c["style"]) == ("gpt2", "par_bn"))
    first, second = write_hub(GPT2, tmp_path / "one"), write_hub(case, tmp_path / "two")
    weights = torch.load(second / "pytorch_adapter.bin", weights_only=True)
    (second / "pytorch_adapter.bin").unlink()
    save_file(weights, second / "adapter.safetensors")
    model = load_adapter(build_base(GPT2), first, "first")
    add_adapter(model, second, "second")
    assert (last_logits(model, GPT2) - torch.tensor(GPT2["logits"])).abs().max() < 1e-5
    model.set_adapter("second")
    assert (last_logits(model, case) - torch.tensor(case["logits"])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phm_layer": True}, "phm_layer True .Compacter"),
        ({"inv_adapter": "nice"}, "inv_adapter 'nice'"),
        ({"invertible_adapter": {"block_type": "nice"}}, "invertible_adapter"),
        ({"use_gating": True}, "use_gating True"),
        ({"ln_before": True}, "ln_before True"),
        ({"ln_after": True}, "ln_after True"),
        ({"architecture": "prefix_tuning", "flat": False}, "architecture 'prefix_tuning'"),
        ({"architecture": "lora"}, "architecture 'lora' is not a bottleneck adapter"),
        ({"new_key": 1}, "new_key is not a key of adapters 1.3.0"),
        ({"mh_adapter": True}, "mh_adapter True.*matches no placement"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln 'post_add'"),
        ({"original_ln_after": False}, "original_ln_after False"),
        ({"reduction_factor": {"0": 2, "default": 4}}, "reduction_factor .*one number"),
        ({"non_linearity": "wavy"}, "non_linearity 'wavy'"),
        ({"scaling": "odd"}, "scaling 'odd'"),
        ({"output_adapter": False}, "output_adapter False"),
        ({"reduction_factor": 2}, "does not fit its base model.*size mismatch"),
        ({"scaling": "learned"}, "2 weights of the adapter are missing"),
        ({"leave_out": [0]}, "0 weights of the adapter are missing and 4 match no module"),
    ],
)
def test_unsupported_setting_raises(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_adapter(build_base(GPT2), write_hub(GPT2, tmp_path, **settings))


def test_pickle_with_code_raises(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    directory = write_hub(GPT2, tmp_path / "hub")
    torch.save({"weight": Malicious()}, directory / "pytorch_adapter.bin")
    with pytest.raises(InputError, match="objects other than tensors"):
        load_adapter(build_base(GPT2), directory)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no file of torch"])
def test_damaged_file_raises(content: bytes, tmp_path: Path) -> None:
    directory = write_hub(GPT2, tmp_path)
    (directory / "pytorch_adapter.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_adapter\.bin"):
        load_adapter(build_base(GPT2), directory)


def test_adapter_of_another_base_raises(tmp_path: Path) -> None:
    llama = next(case for case in FIGURES if case["family"] == "llama")
    with pytest.raises(InputError, match="match no module of the base model, such as"):
        load_adapter(build_base(llama), write_hub(GPT2, tmp_path))


def test_peft_adapter_is_not_adapterhub(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert not is_adapterhub(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"config": {}}')
    assert is_adapterhub(tmp_path)
    with pytest.raises(InputError, match=r"names no base model.*model_name"):
        load_hub_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"head_type": "dependency_parsing"}}, "head_type 'dependency_parsing'"),
        ({"config": None, "model_class": "BertForNextSentencePrediction"}, "model_class"),
        ({"model_type": "bert", "config": {"head_type": "classification", "layers": 3}},
         "layers 3 is not what transformers' bert computes"),
    ],
)  # fmt: skip
def test_unsupported_head_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_head(settings)


def test_head_labels_are_ordered_by_id() -> None:
    config = {"head_type": "tagging", "layers": 1, "num_labels": 3, "label2id": {"B": 2, "O": 0}}
    assert load_head({"model_type": "bert", "config": config}).labels == ["O", "LABEL_1", "B"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "seq_bn", "par_bn", "adapter_plus"])
@pytest.mark.parametrize("width", [{"reduction_factor": 4.0}, {"bottleneck_dim": 5}])
def test_hub_config_roundtrip(family: str, placement: str, width: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][1])
    scaling = "channel" if placement == "adapter_plus" else 2.0
    settings = {"placement": placement, "non_linearity": "silu", "scaling": scaling, **width}
    converted = convert_config(
        {"config": create_hub_config(settings, config), "version": "x"}, config
    )
    assert (converted["placement"], converted["scaling"]) == (placement, scaling)
    assert converted["target_modules"] is None
    assert converted["exclude_modules"] is None
    expected = width.get("bottleneck_dim", config.hidden_size // 4)
    assert int(config.hidden_size // converted["reduction_factor"]) == expected


def test_writing_parallel_for_pre_norm_model_raises() -> None:
    config = transformers.AutoConfig.for_model("gpt2")
    settings = {"placement": "parallel", "non_linearity": "relu", "scaling": 4.0}
    with pytest.raises(InputError, match=r"no placement parallel in gpt2.*par_bn"):
        create_hub_config(settings, config)
