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
            linear.type,
            WIDTHS[linear.fan_in](dims),
            WIDTHS[linear.fan_out](dims),
            linear.only,
        )
        for stack in family.stacks
        for linear in stack.linears
    }


def test_every_family_has_tiny_config() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_table_lists_exactly_the_linear_layers_of_blocks(name: str, variant: int) -> None:
    family = FAMILIES[name]
    inspection = inspect_model(build(name, lm_task(family), variant))
    model = {
        kind.pattern: (kind.type, kind.in_features, kind.out_features)
        for kind in inspection.linears
        if kind.all_linear
    }
    table = get_table_layers(family)
    assert {pattern: table[pattern][:3] for pattern in model if pattern in table} == model
    missing = set(table) - set(model)
    assert all(table[pattern][3] for pattern in missing), "always there by the table, not here"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_optional_linear_layer_exists_in_a_variant(name: str) -> None:
    family = FAMILIES[name]
    patterns = {
        kind.pattern
        for variant in range(len(TINY[name]))
        for kind in inspect_model(build(name, lm_task(family), variant)).linears
    }
    assert set(get_table_layers(family)) <= patterns


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_count_matches_stack_role(name: str) -> None:
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
def test_table_lists_all_norms_and_embeddings(name: str) -> None:
    family = FAMILIES[name]
    inspection = inspect_model(build(name, lm_task(family)))
    norms = {f"{stack.path}.{norm}" for stack in family.stacks for norm in stack.norms}
    assert set(inspection.norms) == norms | set(family.outer_norms)
    assert set(inspection.embeddings) == set(family.embeddings)


@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_all_experts(name: str) -> None:
    family = FAMILIES[name]
    inspection = inspect_model(build(name, lm_task(family)))
    table = {
        f"{stack.path}.{expert.path}": (WIDTHS[expert.fan_in](DIMS), WIDTHS[expert.fan_out](DIMS))
        for stack in family.stacks
        for expert in stack.experts
    }
    assert {e.pattern: (e.in_features, e.out_features) for e in inspection.experts} == table
    assert family.target_parameters == tuple(e.pattern.split("{i}.")[1] for e in inspection.experts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_heads_of_every_task(name: str, task: str) -> None:
    heads = FAMILIES[name].heads
    assert has_model(name, task) == (task in heads)
    if task in heads:
        assert sorted(ModuleTree(build(name, task)).heads) == sorted(heads[task])


@pytest.mark.parametrize("name", FAMILIES)
def test_table_lists_language_model_heads(name: str) -> None:
    family = FAMILIES[name]
    heads = family.heads
    assert sorted(ModuleTree(build(name, lm_task(family))).heads) == sorted(heads[lm_task(family)])
    if family.kind == "encoder-decoder":
        assert heads["translation"] == heads["summarization"]


@pytest.mark.parametrize(("name", "task"), CLASSIFIERS)
def test_block_layer_names_do_not_depend_on_head(name: str, task: str) -> None:
    inspection = inspect_model(build(name, task))
    table_suffixes = {pattern.partition("{i}")[2] for pattern in get_table_layers(FAMILIES[name])}
    model_suffixes = {
        kind.pattern.partition("{i}")[2] for kind in inspection.linears if kind.all_linear
    }
    assert model_suffixes <= table_suffixes
    assert model_suffixes


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_only_targets_match_only_attention_layers(name: str) -> None:
    """PEFT matches suffixes of full module names, heads and poolers included."""
    family = FAMILIES[name]
    attention = {
        f"{stack.path}.{linear.path}"
        for stack in family.stacks
        for linear in stack.linears
        if linear.attention
    }
    for variant in range(len(TINY[name])):
        tree = ModuleTree(build(name, lm_task(family), variant))
        matched = {
            tree.pattern(module_name)
            for module_name, module in tree.modules.items()
            if linear_size(module)
            and any(f".{module_name}".endswith(f".{suffix}") for suffix in family.attention_only)
        }
        assert matched == attention & {tree.pattern(module_name) for module_name in tree.modules}


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_equal_all_linear(name: str) -> None:
    family = FAMILIES[name]
    model = build(name, lm_task(family))
    layer_names = {
        module_name.rpartition(".")[2] for module_name in resolve_targets(model, "all-linear")
    }
    targets = [target for target in family.default_targets if target in layer_names]
    assert resolve_targets(model, targets) == resolve_targets(model, "all-linear")
    assert resolve_targets(model, "auto") == resolve_targets(model, "all-linear")


# Families whose default config is the released model in the table.
DEFAULT_IS_EXAMPLE = (
    *("llama", "mistral", "smollm3", "olmo2", "gemma", "gemma2", "phi3", "phi", "starcoder2"),
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bert", "roberta", "xlm-roberta", "camembert"),
    *("distilbert", "electra", "mpnet", "modernbert", "bart", "mbart", "m2m_100", "blenderbot"),
    *("t5", "mt5", "umt5", "mixtral", "falcon"),
)


@pytest.mark.parametrize("name", DEFAULT_IS_EXAMPLE)
def test_example_parameter_counts_match_released_models(name: str) -> None:
    import torch
    import transformers

    family = FAMILIES[name]
    with torch.device("meta"):
        auto = getattr(transformers, AUTO[lm_task(family)])
        model = auto.from_config(AutoConfig.for_model(name))
    lora = inspect_model(model).lora
    assert lora is not None
    assert lora.trainable_parameters == example_lora_parameters(family, 8)


def test_llama_2_7b_example_parameter_count() -> None:
    assert example_lora_parameters(FAMILIES["llama"], 8) == 19_988_480
    assert example_lora_parameters(FAMILIES["llama"], 16) == 2 * 19_988_480


def test_family_without_example_raises_value_error() -> None:
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
def test_get_family_accepts_spelling_variants(spelling: str, family: str) -> None:
    assert get_family(spelling).name == family


def test_family_names_and_aliases_are_unique() -> None:
    spellings = [
        re.sub("_", "-", spelling.lower())
        for family in FAMILIES.values()
        for spelling in (family.name, *family.aliases)
    ]
    assert sorted(spellings) == sorted(set(spellings))


def test_unknown_family_suggests_nearest_and_lists_all() -> None:
    assert lookup_family("lama") is None
    with pytest.raises(InputError) as caught:
        get_family("lama")
    message = str(caught.value)
    assert message.startswith(
        "'lama' is neither a supported family nor a model. Did you mean 'llama'"
    )
    for name in FAMILIES:
        assert name in message
    assert caught.value.exit_code == 2


def test_unknown_family_without_near_match_lists_all() -> None:
    with pytest.raises(InputError, match=r"'zzzzzz' is neither .* nor a model\. Families: llama, "):
        get_family("zzzzzz")


def test_tiny_config_has_model_type_of_family() -> None:
    assert tiny_config("gemma3_text").model_type == "gemma3_text"


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("bart", "Bart"), ("mbart", "MBart"), ("mvp", "Mvp"), ("t5", "T5")],
)
def test_encoder_decoder_checkpoints_are_sequence_to_sequence(
    family: str, architecture: str
) -> None:
    """BART's class is also that of its masked LM, as which its quantization was measured."""
    config = AutoConfig.for_model(family, architectures=[f"{architecture}ForConditionalGeneration"])
    assert checkpoint_class(config) == "AutoModelForSeq2SeqLM"
