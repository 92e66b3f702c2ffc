from __future__ import annotations

import re

import pytest
from transformers import AutoConfig

from ftlevel.commands.list_targets import inspect_model
from ftlevel.errors import InputError
from ftlevel.models.families import (
    FAMILIES,
    WIDTHS,
    Dims,
    Family,
    example_lora_parameters,
    get_family,
    lookup_family,
)
from ftlevel.models.kinds import checkpoint_class
from ftlevel.models.module_tree import ModuleTree, linear_size
from ftlevel.models.targets import resolve_targets
from unit.models.meta_models import AUTO, build, has_model
from unit.models.tiny_configs import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, TINY

LM_TASK = {
    "decoder": "text-generation", "encoder": "masked-lm", "encoder-decoder": "summarization",
}  # fmt: skip


TASKS = [task for task in AUTO if task not in LM_TASK.values()]
CLASSIFIERS = [
    (family.name, task) for family in FAMILIES.values() for task in family.heads if task in TASKS
]
DIMS = Dims(HIDDEN, FFN, LAYERS, HEADS, kv_heads=KV_HEADS, decoder_layers=3)
# Families that ignore `num_key_value_heads` or fix the width of the feed-forward layer.
SPECIAL_DIMS = {
    "falcon": Dims(HIDDEN, FFN, LAYERS, HEADS, kv_heads=1),
    "gpt_bigcode": Dims(HIDDEN, FFN, LAYERS, HEADS, kv_heads=1),
    "bloom": Dims(HIDDEN, 4 * HIDDEN, LAYERS, HEADS),
}


def lm_task(family: Family) -> str:
    return LM_TASK[family.kind]


def get_table_layers(family: Family) -> dict[str, tuple[str, int, int, str]]:
    dims = SPECIAL_DIMS.get(family.name, DIMS)
    return {
        f"{stack.path}.{linear.path}": (
            linear.type, WIDTHS[linear.fan_in](dims), WIDTHS[linear.fan_out](dims), linear.only
        )
        for stack in family.stacks
        for linear in stack.linears
    }  # fmt: skip


def test_every_family_has_tiny_config():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_exactly_the_linear_layers_of_blocks(name):
    table, seen = get_table_layers(FAMILIES[name]), set()
    for variant in range(len(TINY[name])):
        inspection = inspect_model(build(name, lm_task(FAMILIES[name]), variant))
        model = {
            kind.pattern: (kind.type, kind.in_features, kind.out_features)
            for kind in inspection.linears
            if kind.all_linear
        }
        assert {pattern: table[pattern][:3] for pattern in model if pattern in table} == model
        missing = set(table) - set(model)
        assert all(table[pattern][3] for pattern in missing), "always there by the table, not here"
        seen |= set(model)
    assert seen == set(table), "each optional layer is in a variant"


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_count_matches_stack_role(name):
    family = FAMILIES[name]
    linears = inspect_model(build(name, lm_task(family))).linears
    counts = {kind.pattern: kind.count for kind in linears}
    blocks = {"layers": LAYERS, "decoder": 3, "shared": 1}
    for stack in family.stacks:
        for linear in stack.linears:
            if not linear.only:
                assert counts[f"{stack.path}.{linear.path}"] == blocks[stack.role]


@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_all_norms_and_embeddings(name):
    family = FAMILIES[name]
    inspection = inspect_model(build(name, lm_task(family)))
    norms = {f"{stack.path}.{norm}" for stack in family.stacks for norm in stack.norms}
    assert set(inspection.norms) == norms | set(family.outer_norms)
    assert set(inspection.embeddings) == set(family.embeddings)


@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_all_experts(name):
    family = FAMILIES[name]
    inspection = inspect_model(build(name, lm_task(family)))
    table = {
        f"{stack.path}.{expert.path}": (WIDTHS[expert.fan_in](DIMS), WIDTHS[expert.fan_out](DIMS))
        for stack in family.stacks
        for expert in stack.experts
    }
    assert {e.pattern: (e.in_features, e.out_features) for e in inspection.experts} == table
    assert family.target_parameters == tuple(e.pattern.split("{i}.")[1] for e in inspection.experts)


@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_heads_of_every_task(name):
    heads, own = FAMILIES[name].heads, lm_task(FAMILIES[name])
    for task in (own, *TASKS):
        assert task == own or has_model(name, task) == (task in heads)
        if task in heads:
            assert sorted(ModuleTree(build(name, task)).heads) == sorted(heads[task])
    if own == "summarization":
        assert heads["translation"] == heads["summarization"]


@pytest.mark.parametrize(("name", "task"), CLASSIFIERS)
def test_block_layer_names_do_not_depend_on_head(name, task):
    inspection = inspect_model(build(name, task))
    table_suffixes = {pattern.partition("{i}")[2] for pattern in get_table_layers(FAMILIES[name])}
    model_suffixes = {
        kind.pattern.partition("{i}")[2] for kind in inspection.linears if kind.all_linear
    }
    assert model_suffixes <= table_suffixes
    assert model_suffixes


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_only_targets_match_only_attention_layers(name):
    """PEFT matches suffixes of full module names, heads and poolers included."""
    family = FAMILIES[name]
    attention = {f"{s.path}.{x.path}" for s in family.stacks for x in s.linears if x.attention}
    suffixes = tuple(f".{suffix}" for suffix in family.attention_only)
    for variant in range(len(TINY[name])):
        tree = ModuleTree(build(name, lm_task(family), variant))
        linears = [name for name, module in tree.modules.items() if linear_size(module)]
        matched = {tree.pattern(name) for name in linears if f".{name}".endswith(suffixes)}
        assert matched == attention & {tree.pattern(name) for name in tree.modules}


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_equal_all_linear(name):
    family = FAMILIES[name]
    model = build(name, lm_task(family))
    expected = resolve_targets(model, "all-linear")
    layers = {module_name.rpartition(".")[2] for module_name in expected}
    targets = [target for target in family.default_targets if target in layers]
    assert resolve_targets(model, targets) == resolve_targets(model, "auto") == expected


# Families whose default config is the released model in the table.
DEFAULT_IS_EXAMPLE = (
    *("llama", "mistral", "smollm3", "olmo2", "gemma", "gemma2", "phi3", "phi", "starcoder2"),
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bert", "roberta", "xlm-roberta", "camembert"),
    *("distilbert", "electra", "mpnet", "modernbert", "bart", "mbart", "m2m_100", "blenderbot"),
    *("t5", "mt5", "umt5", "mixtral", "falcon"),
)


@pytest.mark.parametrize("name", DEFAULT_IS_EXAMPLE)
def test_example_parameter_counts_match_released_models(name):
    import torch
    import transformers

    family = FAMILIES[name]
    with torch.device("meta"):
        auto = getattr(transformers, AUTO[lm_task(family)])
        model = auto.from_config(AutoConfig.for_model(name))
    lora = inspect_model(model).lora
    assert lora is not None
    assert lora.trainable_parameters == example_lora_parameters(family, 8)


def test_family_without_example_raises_value_error():
    with pytest.raises(ValueError, match="granite has no example"):
        example_lora_parameters(FAMILIES["granite"], 8)


SPELLINGS = {
    "Llama": "llama", "GPT2": "gpt2", "distilgpt2": "gpt2", "gpt-neo": "gpt_neo",
    "GPT_NeoX": "gpt_neox", "xlm_roberta": "xlm-roberta", "deberta_v2": "deberta-v2",
    "deberta-v3": "deberta-v2", "qwen3-moe": "qwen3_moe", "gemma3": "gemma3_text",
    "flan-t5": "t5", "Llama-3": "llama", "nllb": "m2m_100", " bert ": "bert",
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_get_family_accepts_spelling_variants(spelling):
    assert get_family(spelling).name == SPELLINGS[spelling]


def test_family_names_and_aliases_are_unique():
    spellings = [
        re.sub("_", "-", spelling.lower())
        for family in FAMILIES.values()
        for spelling in (family.name, *family.aliases)
    ]
    assert sorted(spellings) == sorted(set(spellings))


def test_unknown_family_suggests_nearest_and_lists_all():
    assert lookup_family("lama") is None
    with pytest.raises(InputError) as caught:
        get_family("lama")
    start = "'lama' is neither a supported family nor a model. Did you mean 'llama'"
    assert str(caught.value).startswith(start)
    assert all(name in str(caught.value) for name in FAMILIES)
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match=r"'zzzzzz' is neither .* nor a model\. Families: llama, "):
        get_family("zzzzzz")


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("bart", "Bart"), ("mbart", "MBart"), ("mvp", "Mvp"), ("t5", "T5")],
)
def test_encoder_decoder_checkpoints_are_sequence_to_sequence(family, architecture):
    """BART's class is also that of its masked LM, as which its quantization was measured."""
    config = AutoConfig.for_model(family, architectures=[f"{architecture}ForConditionalGeneration"])
    assert checkpoint_class(config) == "AutoModelForSeq2SeqLM"
