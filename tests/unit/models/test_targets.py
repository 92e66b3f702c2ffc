from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen2MoeConfig,
)

from ftlevel.commands.list_targets import TargetReport, inspect_model
from ftlevel.errors import InputError
from ftlevel.methods.base import shortest_names
from ftlevel.models.module_tree import (
    ModuleTree,
    get_blocks,
    get_heads,
    get_modules_to_not_convert,
)
from ftlevel.models.targets import (
    build_meta_model,
    parse_targets,
    resolve_targets,
)
from unit.models.meta_models import build, tiny_config

LLAMA_NAMES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def build_meta_causal_lm(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_lora_parameters(report: TargetReport) -> int:
    assert report.lora is not None
    return report.lora.trainable_parameters


def count_trainable(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_llama_2_7b_parameter_counts_are_exact():
    model = build_meta_causal_lm(LlamaConfig())
    inspection = inspect_model(model)
    assert count_lora_parameters(inspection) == 19_988_480
    assert inspection.total_parameters == 6_738_415_616
    assert len(resolve_targets(model, "all-linear")) == 7 * 32


def test_gpt2_small_layers_and_counts_are_exact():
    inspection = inspect_model(build_meta_causal_lm(GPT2Config()))
    assert inspection.total_parameters == 124_439_808  # the tied head is counted once
    assert count_lora_parameters(inspection) == 1_179_648
    assert [
        (k.name, k.type, k.in_features, k.out_features, k.count) for k in inspection.linears
    ] == [
        ("c_attn", "Conv1D", 768, 2304, 12),
        ("c_proj", "Conv1D", 768, 768, 12),
        ("c_fc", "Conv1D", 768, 3072, 12),
        ("c_proj", "Conv1D", 3072, 768, 12),
    ]
    assert inspection.heads == {"GPT2LMHeadModel": ("lm_head",)}


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "text-generation"),
        ("gpt2", "text-generation"),
        ("bert", "masked-lm"),
        ("albert", "masked-lm"),
        ("deberta-v2", "masked-lm"),
        ("t5", "summarization"),
        ("bart", "summarization"),
        ("mixtral", "text-generation"),
    ],
)
def test_lora_parameter_count_matches_peft(family: str, task: str) -> None:
    model = build(family, task, device="cpu")
    expected = count_lora_parameters(inspect_model(model, r=4))
    targets = resolve_targets(model, "all-linear")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    assert count_trainable(wrapped) == expected > 0


def test_expert_lora_parameter_count_matches_peft():
    model = build("mixtral", "text-generation", device="cpu")
    experts = inspect_model(model, r=4).experts
    assert [(row.name, row.shape[:4], row.count) for row in experts] == [
        ("gate_up_proj", "4 of", 2),
        ("down_proj", "4 of", 2),
    ]
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=[], target_parameters=names)
    wrapped = get_peft_model(model, config)
    assert count_trainable(wrapped) == sum(row.lora_parameters or 0 for row in experts)


def test_transposed_experts_report_in_and_out_features():
    fields = {**TINY, "hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 2}
    experts = inspect_model(build_meta_causal_lm(GptOssConfig(**fields, head_dim=16))).experts
    sizes = {e.name: (e.in_features, e.out_features) for e in experts}
    assert sizes == {"gate_up_proj": (64, 320), "down_proj": (160, 64)}


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "masked-lm"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2"])
def test_all_linear_excludes_heads_and_poolers(family, task):
    model = build(family, task)
    targets = resolve_targets(model, "all-linear")
    excluded = ("pooler", "classifier", "cls.", "lm_head", "head.", "vocab_", "decoder")
    assert not [name for name in targets if any(part in name for part in excluded)]
    assert len({name.rpartition(".")[2] for name in targets}) >= 3


def test_all_linear_of_encoder_decoder_covers_both_stacks():
    targets = resolve_targets(build("t5", "text-classification"), "all-linear")
    assert {name.split(".")[1] for name in targets} == {"encoder", "decoder"}
    assert len(targets) == 2 * 6 + 3 * 10
    assert not [name for name in targets if "classification_head" in name]


def test_all_linear_excludes_linear_router():
    fields = {"num_experts": 4, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32}
    model = build_meta_causal_lm(Qwen2MoeConfig(**TINY, **fields, num_key_value_heads=2))
    targets = resolve_targets(model, "all-linear")
    assert not [name for name in targets if name.endswith(("gate", "router"))]
    assert "model.layers.0.mlp.shared_expert.gate_proj" in targets
    locations = {
        part.name.rpartition(".")[2]: part.location for part in ModuleTree(model).linears()
    }
    assert locations["shared_expert_gate"] == "router"
    assert resolve_targets(model, ["shared_expert_gate"]) == [
        f"model.layers.{block}.mlp.shared_expert_gate" for block in range(2)
    ]


class UnknownNetwork(nn.Module):
    """A model of an unknown family, with its own block names."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.steps = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 8)}) for _ in range(3))
        self.out = nn.Linear(4, 10)


def test_all_linear_works_for_unknown_family():
    model = UnknownNetwork()
    assert resolve_targets(model, "all-linear") == ["steps.0.mix", "steps.1.mix", "steps.2.mix"]
    (mix,) = inspect_model(model, r=2).linears
    assert (mix.pattern, mix.count, mix.lora_parameters) == ("steps.{i}.mix", 3, 72)
    assert get_heads(model) == ["out"]


def test_model_without_blocks_raises():
    with pytest.raises(InputError, match=r"--target-modules: Linear has no linear in its blocks\."):
        resolve_targets(nn.Linear(2, 2), "all-linear")


@pytest.mark.parametrize(
    ("family", "task", "target_modules", "count", "expected"),
    [
        ("llama", "text-generation", ["q_proj", "v_proj"], 4, "model.layers.1.self_attn.v_proj"),
        ("llama", "text-generation", "q_proj, v_proj", 4, "model.layers.0.self_attn.q_proj"),
        ("llama", "text-generation", r".*\.0\..*_proj", 7, "model.layers.0.mlp.up_proj"),
        ("llama", "text-generation", ["layers.1.mlp.up_proj"], 1, "model.layers.1.mlp.up_proj"),
        ("llama", "text-generation", ["all-linear"], 14, "model.layers.1.mlp.down_proj"),
        ("gpt2", "text-generation", ["attn.c_proj"], 2, "transformer.h.0.attn.c_proj"),
        ("gpt2", "text-generation", ["c_proj"], 4, "transformer.h.0.mlp.c_proj"),
        ("bert", "masked-lm", ["dense"], 6, "bert.encoder.layer.0.intermediate.dense"),
        ("bert", "text-classification", ["pooler.dense"], 1, "bert.pooler.dense"),
        ("bart", "summarization", ["q_proj"], 8, "model.decoder.layers.2.encoder_attn.q_proj"),
    ],
)
def test_resolve_targets_of_names_suffixes_and_patterns(
    family, task, target_modules, count, expected
):
    targets = resolve_targets(build(family, task), target_modules)
    assert len(targets) == count
    assert expected in targets
    assert targets == sorted(targets)


LINEARS = {
    "gpt2": "c_attn, c_fc, c_proj",
    "llama": LLAMA_NAMES,
    "mixtral": "k_proj, o_proj, q_proj, v_proj",
}


@pytest.mark.parametrize(
    ("family", "target_modules", "problems"),
    [
        ("gpt2", ["q_projj"], "'q_projj' matches no module of gpt2. …. Did you mean 'c_proj'?"),
        ("llama", ["q_proj", "v_porj", "xyz"],
         "'v_porj' matches no module of llama. …. Did you mean 'v_proj'?\n"
         "'xyz' matches no module of llama. …."),
        ("gpt2", ["wte"], "'wte' matches no linear of gpt2, only Embedding. --modules-to-save "
         "trains it in full. …."),
        ("gpt2", ["lm_head"], "'lm_head' is the output head of gpt2: adapters are added to the "
         "blocks. Drop it; --modules-to-save trains it in full. …."),
        ("gpt2", ["c_attn", "score"], "'score' is a task head of gpt2 (score): heads are trained "
         "in full and saved with the adapter. Drop it. …."),
        ("mixtral", ["experts.gate_up_proj"], "'experts.gate_up_proj' is a tensor of experts in "
         "mixtral, not a module: PEFT reaches it by target_parameters. …."),
        ("gpt2", r".*\.q_proj$", r"'.*\\.q_proj$' matches no module of gpt2. …."),
        ("gpt2", "(c_attn", "'(c_attn' is not a regular expression (missing ), unterminated "
         "subpattern at position 0). …."),
        ("gpt2", [], "no names given. …."),
    ],
)  # fmt: skip
def test_unmatched_target_modules_raise(family, target_modules, problems):
    task = "text-classification" if "score" in target_modules else "text-generation"
    with pytest.raises(InputError) as caught:
        resolve_targets(build(family, task), target_modules)
    assert caught.value.problems == [
        f"--target-modules: {problem} Try: ftlevel list-targets {family}".replace(
            "…", f"Linear modules here: {LINEARS[family]}"
        )
        for problem in problems.splitlines()
    ]


def test_error_uses_model_name():
    with pytest.raises(InputError, match=r"of gpt2-xl\..*list-targets gpt2-xl$"):
        resolve_targets(build("gpt2", "text-generation"), ["x"], model_name="gpt2-xl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        (" auto ", "auto"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("attn.c_proj,c_fc", ["attn.c_proj", "c_fc"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_parse_targets(text, expected):
    assert parse_targets(text) == expected


def test_peft_targets_exactly_the_resolved_modules():
    """PEFT shortens long lists to suffixes, which must match the same modules."""
    for family, task in [("bert", "masked-lm"), ("t5", "summarization"), ("roberta", "masked-lm")]:
        model = build(family, task, device="cpu")
        targets = resolve_targets(model, "all-linear")
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        assert sorted(wrapped.base_model.targeted_module_names) == targets


def test_quantized_layers_report_same_sizes():
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama", "text-generation", device="cpu")
    plain = resolve_targets(model, "all-linear")
    for name in plain:
        old = model.get_submodule(name)
        model.set_submodule(name, bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False))
    assert resolve_targets(model, "all-linear") == plain
    report = inspect_model(model)
    assert {row.type for row in report.linears} == {"Linear4bit"}
    assert report.lora == inspect_model(build("llama", "text-generation")).lora


@pytest.mark.parametrize(
    ("family", "architectures", "class_name"),
    [
        ("bert", ["BertForSequenceClassification"], "BertForSequenceClassification"),
        ("bert", None, "BertForMaskedLM"),
        ("bert", ["NotInTransformers"], "BertForMaskedLM"),
        ("t5", None, "T5ForConditionalGeneration"),
        ("llama", None, "LlamaForCausalLM"),
    ],
)
def test_meta_model_has_saved_architecture(family, architectures, class_name):
    model = build_meta_model(tiny_config(family, architectures=architectures))
    assert type(model).__name__ == class_name
    assert all(weight.is_meta for weight in model.parameters())


def test_short_target_names_match_no_other_module():
    names = ["blocks.0.q_proj", "blocks.1.q_proj", "head.q_proj"]
    assert shortest_names(names, names) == {"q_proj"}
    assert shortest_names(names[:2], names) == {"0.q_proj", "1.q_proj"}


def find_scans() -> dict[str, set[str]]:
    """Returns model types with a Mamba scan -> linear layers whose weight the scan reads."""
    models = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text() for path in models.glob("*/modeling_*.py")}
    return {
        family: set(re.findall(r"self\.(\w+_proj)\.weight(?:,$| @)", text, re.MULTILINE))
        for family, text in sources.items()
        if "mamba_ssm" in text
    }


@pytest.mark.parametrize(
    ("family", "read"), [(f, names) for f, names in find_scans().items() if names]
)
def test_layers_read_by_scans_are_neither_adapted_nor_quantized(family, read):
    """With mamba-ssm installed, training reads these weights past their modules."""
    linears = {name: nn.Linear(2, 2) for name in (*read, "in_proj")}
    model = nn.Module()
    model.config = SimpleNamespace(model_type=family)  # type: ignore[assignment]
    model.layers = nn.ModuleList([nn.ModuleDict(linears)])
    locations = {
        part.name.rpartition(".")[2]: part.location for part in ModuleTree(model).linears()
    }
    assert locations == {**dict.fromkeys(read, "kernel"), "in_proj": "block"}
    assert set(get_modules_to_not_convert(model)) == {f"layers.0.{name}" for name in read}


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def test_layers_of_a_vision_tower_are_not_adapted():
    text = {**TINY, "head_dim": 8, "num_key_value_heads": 1}
    config = Gemma3Config(text_config=text, vision_config={**TINY, "image_size": 28})
    model = build_meta_causal_lm(config)
    targets = resolve_targets(model, "all-linear")
    assert {name.partition(".layers.")[0] for name in targets} == {"model.language_model"}
    assert len(targets) == 7 * 2
    assert targets == resolve_targets(model, LLAMA_NAMES)
    assert get_heads(model) == ["lm_head"]
    assert len(get_blocks(model)) == 2
    assert not [name for name in ModuleTree(model).norm_names() if "vision" in name]
    (explicit,) = resolve_targets(model, r".*vision_tower.*layers\.0\.mlp\.fc1")
    assert explicit == "model.vision_tower.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_layers_without_gradient_and_routers_are_not_adapted(family):
    """An indexer only ranks tokens, and its scores have no gradient."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    heads = {"n_group": 1, "topk_group": 1, "num_key_value_heads": 2}
    model = build_meta_causal_lm(AutoConfig.for_model(family, **TINY, **experts, **heads))
    names = {part.name for part in ModuleTree(model).linears() if part.location == "aside"}
    assert {name.rpartition(".")[2] for name in names} == {"weights_proj", "wk", "wq_b"}
    assert names.isdisjoint(resolve_targets(model, "all-linear"))


_DECODER = {"vocab_size": 60, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48, "max_position_embeddings": 32, "encoder_layers": 2,
            "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "family", ["bart", "mbart", "pegasus", "blenderbot", "blenderbot-small", "marian", "plbart"]
)
def test_decoder_without_encoder_has_no_cross_attention(family):
    config = AutoConfig.for_model(family, **_DECODER, decoder_vocab_size=60)
    pair = ModuleTree(transformers.AutoModelForSeq2SeqLM.from_config(config))
    assert any(part.location == "block" and "encoder_attn" in part.name for part in pair.linears())
    assert all(map(pair.is_called, pair.modules))
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    modules = dict(model.named_modules())
    in_blocks = [part.name for part in ModuleTree(model).linears() if part.location != "head"]
    called = sorted(name for name in in_blocks if modules[name].weight.grad is not None)
    assert len(called) == 2 * 6
    assert resolve_targets(model, "all-linear") == called
    assert resolve_targets(model, "q_proj") == [n for n in called if n.endswith(".q_proj")]
    tree = ModuleTree(model)
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(filter(tree.is_called, trainable)) == with_gradient


def test_adapters_that_peft_loses_are_no_default(tmp_path):
    """PEFT renames `shared_experts` while it loads; else remove the exception."""
    config = AutoConfig.for_model(
        "laguna", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    shared = [name for name in dict(model.named_modules()) if name.endswith("shared_experts")]
    assert shared
    assert not any("shared_experts" in name for name in resolve_targets(model, "all-linear"))
    lora = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path)


@pytest.mark.parametrize(("family", "router"), [("hunyuan_v1_moe", "wg"), ("doge", "router_gate")])
def test_all_linear_excludes_routers_of_any_name(family, router):
    fields = {"head_dim": 8, "num_experts": 4, "is_moe": True, "num_key_value_heads": 2}
    model = build_meta_causal_lm(AutoConfig.for_model(family, **TINY, **fields))
    assert any(part.name.endswith(f".{router}") for part in ModuleTree(model).linears())
    assert not any(name.endswith(f".{router}") for name in resolve_targets(model, "all-linear"))
