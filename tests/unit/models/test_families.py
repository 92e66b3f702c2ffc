from __future__ import annotations

import re

import pytest
from transformers import AutoConfig

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
from ftlevel.models.module_tree import ModuleTree, linear_size
from ftlevel.models.targets import inspect_model, resolve_targets
from unit.models.meta_models import AUTO, build, has_model, tiny_config
from unit.models.tiny_configs import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, TINY

LM_TASK = {
    "decoder": "text-generation",
    "encoder": "masked-lm",
    "encoder-decoder": "summarization",
}
VARIANTS = [(name, number) for name in FAMILIES for number in range(len(TINY[name]))]
TASKS = [task for task in AUTO if task not in LM_TASK.values()]
CLASSIFIERS = [
    (family.name, task) for family in FAMILIES.values() for task in family.heads if task in TASKS
]
DIMS = Dims(HIDDEN, FFN, LAYERS, HEADS, kv_heads=KV_HEADS, decoder_layers=3)
# Families that ignore `num_key_value_heads` or fix the width of the feed-forward layer.
OWN_DIMS = {
    "falcon": Dims(HIDDEN, FFN, LAYERS, HEADS, kv_heads=1),
    "gpt_bigcode": Dims(HIDDEN, FFN, LAYERS, HEADS, kv_heads=1),
    "bloom": Dims(HIDDEN, 4 * HIDDEN, LAYERS, HEADS),
}


def lm_task(family: Family) -> str:
    return LM_TASK[family.kind]


def table_linears(family: Family) -> dict[str, tuple[str, int, int, str]]:
    dims = OWN_DIMS.get(family.name, DIMS)
    return {
        f"{stack.path}.{linear.path}": (
            linear.type,
            WIDTHS[linear.fan_in](dims),
            WIDTHS[linear.fan_out](dims),
            linear.only,
        )
        for stack in family.stacks
        for linear in stack.linears
    }


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_table_has_exactly_the_linears_of_the_blocks(name: str, variant: int) -> None:
    family = FAMILIES[name]
    found = inspect_model(build(name, lm_task(family), variant))
    model = {
        kind.pattern: (kind.type, kind.in_features, kind.out_features)
        for kind in found.linears
        if kind.location == "block"
    }
    table = table_linears(family)
    assert {pattern: table[pattern][:3] for pattern in model if pattern in table} == model
    missing = set(table) - set(model)
    assert all(table[pattern][3] for pattern in missing), "always there by the table, not here"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_optional_linear_exists_in_some_variant(name: str) -> None:
    family = FAMILIES[name]
    seen = {
        kind.pattern
        for variant in range(len(TINY[name]))
        for kind in inspect_model(build(name, lm_task(family), variant)).linears
    }
    assert set(table_linears(family)) <= seen


@pytest.mark.parametrize("name", FAMILIES)
def test_count_of_blocks_follows_the_role(name: str) -> None:
    family = FAMILIES[name]
    counts = {
        kind.pattern: kind.count for kind in inspect_model(build(name, lm_task(family))).linears
    }
    blocks = {"layers": LAYERS, "decoder": 3, "shared": 1}
    for stack in family.stacks:
        for linear in stack.linears:
            if not linear.only:
                assert counts[f"{stack.path}.{linear.path}"] == blocks[stack.role]


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_embeddings_are_complete(name: str) -> None:
    family = FAMILIES[name]
    found = inspect_model(build(name, lm_task(family)))
    norms = {f"{stack.path}.{norm}" for stack in family.stacks for norm in stack.norms}
    assert {norm.pattern for norm in found.norms} == norms | set(family.outer_norms)
    assert {part.pattern for part in found.embeddings} == set(family.embeddings)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_complete(name: str) -> None:
    family = FAMILIES[name]
    found = inspect_model(build(name, lm_task(family)))
    table = {
        f"{stack.path}.{expert.path}": (WIDTHS[expert.fan_in](DIMS), WIDTHS[expert.fan_out](DIMS))
        for stack in family.stacks
        for expert in stack.experts
    }
    assert {e.pattern: (e.in_features, e.out_features) for e in found.experts} == table
    assert family.target_parameters == tuple(e.pattern.split("{i}.")[1] for e in found.experts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_of_every_task_that_exists(name: str, task: str) -> None:
    heads = FAMILIES[name].heads
    assert has_model(name, task) == (task in heads)
    if task in heads:
        assert sorted(ModuleTree(build(name, task)).heads) == sorted(heads[task])


@pytest.mark.parametrize("name", FAMILIES)
def test_head_of_the_language_model(name: str) -> None:
    family = FAMILIES[name]
    heads = family.heads
    assert sorted(ModuleTree(build(name, lm_task(family))).heads) == sorted(heads[lm_task(family)])
    if family.kind == "encoder-decoder":
        assert heads["translation"] == heads["summarization"]


@pytest.mark.parametrize(("name", "task"), CLASSIFIERS)
def test_blocks_keep_their_names_under_every_head(name: str, task: str) -> None:
    found = inspect_model(build(name, task))
    tails = {pattern.partition("{i}")[2] for pattern in table_linears(FAMILIES[name])}
    here = {kind.pattern.partition("{i}")[2] for kind in found.linears if kind.location == "block"}
    assert here <= tails
    assert here


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_only_names_pick_the_attention_and_nothing_else(name: str) -> None:
    """By PEFT's rule, which is a suffix of the whole name, heads and poolers included."""
    family = FAMILIES[name]
    attention = {
        f"{stack.path}.{linear.path}"
        for stack in family.stacks
        for linear in stack.linears
        if linear.attention
    }
    for variant in range(len(TINY[name])):
        tree = ModuleTree(build(name, lm_task(family), variant))
        picked = {
            tree.pattern(full)
            for full, module in tree.modules.items()
            if linear_size(module)
            and any(f".{full}".endswith(f".{wish}") for wish in family.attention_only)
        }
        assert picked == attention & {tree.pattern(full) for full in tree.modules}


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_are_all_linears_of_the_blocks(name: str) -> None:
    family = FAMILIES[name]
    model = build(name, lm_task(family))
    leaves = {full.rpartition(".")[2] for full in resolve_targets(model, "all-linear")}
    named = [target for target in family.default_targets if target in leaves]
    assert resolve_targets(model, named) == resolve_targets(model, "all-linear")
    assert resolve_targets(model, "auto") == resolve_targets(model, "all-linear")


# These configurations default to the released model that the table takes as its example.
DEFAULT_IS_EXAMPLE = (
    *("llama", "mistral", "smollm3", "olmo2", "gemma", "gemma2", "phi3", "phi", "starcoder2"),
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bert", "roberta", "xlm-roberta", "camembert"),
    *("distilbert", "electra", "mpnet", "modernbert", "bart", "mbart", "m2m_100", "blenderbot"),
    *("t5", "mt5", "umt5", "mixtral", "falcon"),
)


@pytest.mark.parametrize("name", DEFAULT_IS_EXAMPLE)
def test_example_counts_are_those_of_the_released_model(name: str) -> None:
    import torch
    import transformers

    family = FAMILIES[name]
    with torch.device("meta"):
        auto = getattr(transformers, AUTO[lm_task(family)])
        model = auto.from_config(AutoConfig.for_model(name))
    assert inspect_model(model).lora_parameters(8) == example_lora_parameters(family, 8)


def test_llama_2_7b_example() -> None:
    assert example_lora_parameters(FAMILIES["llama"], 8) == 19_988_480
    assert example_lora_parameters(FAMILIES["llama"], 16) == 2 * 19_988_480


def test_no_example_is_an_error_of_ours() -> None:
    with pytest.raises(ValueError, match="granite has no example"):
        example_lora_parameters(FAMILIES["granite"], 8)


@pytest.mark.parametrize(
    ("spelling", "family"),
    [
        ("llama", "llama"),
        ("Llama", "llama"),
        ("GPT2", "gpt2"),
        ("distilgpt2", "gpt2"),
        ("gpt-neo", "gpt_neo"),
        ("gpt_neo", "gpt_neo"),
        ("GPT_NeoX", "gpt_neox"),
        ("xlm_roberta", "xlm-roberta"),
        ("deberta_v2", "deberta-v2"),
        ("deberta-v3", "deberta-v2"),
        ("qwen3-moe", "qwen3_moe"),
        ("gemma3", "gemma3_text"),
        ("flan-t5", "t5"),
        ("Llama-3", "llama"),
        ("nllb", "m2m_100"),
        (" bert ", "bert"),
    ],
)
def test_spellings(spelling: str, family: str) -> None:
    assert get_family(spelling).name == family


def test_no_alias_belongs_to_two_families_or_names_another() -> None:
    spellings = [
        re.sub("_", "-", spelling.lower())
        for family in FAMILIES.values()
        for spelling in (family.name, *family.aliases)
    ]
    assert sorted(spellings) == sorted(set(spellings))


def test_unknown_family_names_the_nearest_and_the_list() -> None:
    assert lookup_family("lama") is None
    with pytest.raises(InputError) as caught:
        get_family("lama")
    text = str(caught.value)
    assert text.startswith("'lama' is neither a supported family nor a model. Did you mean 'llama'")
    for name in FAMILIES:
        assert name in text
    assert caught.value.exit_code == 2


def test_unknown_family_with_nothing_near() -> None:
    with pytest.raises(InputError, match=r"'zzzzzz' is neither .* nor a model\. Families: llama, "):
        get_family("zzzzzz")


def test_tiny_config_is_of_the_family() -> None:
    assert tiny_config("gemma3_text").model_type == "gemma3_text"
