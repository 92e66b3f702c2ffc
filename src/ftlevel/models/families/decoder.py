"""Decoder-only families: Llama-like and GPT-like models."""

from __future__ import annotations

from dataclasses import replace

from ftlevel.models.families.facts import (
    FFN,
    FUSED_QKV,
    HIDDEN,
    KV_WIDTH,
    Q_WIDTH,
    THREE_HIDDEN,
    TWO_FFN,
    BlockLinear,
    Dims,
    ExpertTensor,
    Family,
    Head,
    ReleasedModel,
    Stack,
)

_LM = Head("text-generation", ("lm_head",))
_SEQUENCE = Head("text-classification", ("score",))
_TOKEN_SCORE = Head("token-classification", ("score",))
_TOKEN_CLASSIFIER = Head("token-classification", ("classifier",))
_ANSWER = Head("question-answering", ("qa_outputs",))
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_LLAMA_ATTENTION = (
    BlockLinear("self_attn.q_proj", HIDDEN, Q_WIDTH, attention=True),
    BlockLinear("self_attn.k_proj", HIDDEN, KV_WIDTH, attention=True),
    BlockLinear("self_attn.v_proj", HIDDEN, KV_WIDTH, attention=True),
    BlockLinear("self_attn.o_proj", Q_WIDTH, HIDDEN, attention=True),
)
_LLAMA_MLP = (
    BlockLinear("mlp.gate_proj", HIDDEN, FFN),
    BlockLinear("mlp.up_proj", HIDDEN, FFN),
    BlockLinear("mlp.down_proj", FFN, HIDDEN),
)

_LLAMA = Family(
    name="llama",
    kind="decoder",
    stacks=(
        Stack(
            "model.layers.{i}",
            (*_LLAMA_ATTENTION, *_LLAMA_MLP),
            ("input_layernorm", "post_attention_layernorm"),
        ),
    ),
    attention_only=("q_proj", "k_proj", "v_proj", "o_proj"),
    heads=(_LM, _SEQUENCE, _TOKEN_SCORE, _ANSWER),
    embeddings=("model.embed_tokens",),
    outer_norms=("model.norm",),
    aliases=(
        *("llama-2", "llama-3", "llama2", "llama3", "codellama", "tinyllama", "vicuna"),
        *("smollm", "smollm2", "yi"),
    ),
    example=ReleasedModel("Llama-2-7B", Dims(4096, 11008, 32, 32)),
)


def _llama_like(
    name: str,
    *,
    linears: tuple[BlockLinear, ...] = _LLAMA.stacks[0].linears,
    norms: tuple[str, ...] = _LLAMA.stacks[0].norms,
    experts: tuple[ExpertTensor, ...] = (),
    heads: tuple[Head, ...] = _LLAMA.heads,
    aliases: tuple[str, ...] = (),
    example: ReleasedModel | None = None,
    note: str = "",
) -> Family:
    """Build a family that differs from Llama in the arguments."""
    return replace(
        _LLAMA,
        name=name,
        stacks=(Stack("model.layers.{i}", linears, norms, experts=experts),),
        heads=heads,
        aliases=aliases,
        example=example,
        note=note,
    )


_SPARSE_NOTE = "Each expert is a slice of one 3-D tensor, not a linear; the router stays frozen."
_DENSE_LAYERS = "layers listed in mlp_only_layers"
_EXPERTS = (
    ExpertTensor("mlp.experts.gate_up_proj", HIDDEN, TWO_FFN),
    ExpertTensor("mlp.experts.down_proj", FFN, HIDDEN),
)
_PLAIN = _LLAMA.stacks[0].norms

_LLAMA_LIKE = (
    _LLAMA,
    _llama_like(
        "mistral",
        aliases=("mistral-7b", "zephyr"),
        example=ReleasedModel("Mistral-7B", Dims(4096, 14336, 32, 32, kv_heads=8)),
    ),
    _llama_like(
        "qwen2",
        aliases=("qwen2.5", "qwq"),
        example=ReleasedModel("Qwen2.5-0.5B", Dims(896, 4864, 24, 14, kv_heads=2)),
    ),
    _llama_like(
        "qwen3",
        norms=(*_HEAD_NORMS, *_PLAIN),
        example=ReleasedModel("Qwen3-0.6B", Dims(1024, 3072, 28, 16, kv_heads=8, head_dim=128)),
    ),
    _llama_like(
        "smollm3", example=ReleasedModel("SmolLM3-3B", Dims(2048, 11008, 36, 16, kv_heads=4))
    ),
    _llama_like("granite", heads=(_LM,)),
    _llama_like(
        "olmo2",
        norms=(*_HEAD_NORMS, "post_attention_layernorm", "post_feedforward_layernorm"),
        heads=(_LM, _SEQUENCE),
        aliases=("olmo-2",),
        example=ReleasedModel("OLMo-2-7B", Dims(4096, 11008, 32, 32)),
    ),
    _llama_like(
        "gemma",
        heads=(_LM, _SEQUENCE, _TOKEN_SCORE),
        aliases=("codegemma",),
        example=ReleasedModel("Gemma-7B", Dims(3072, 24576, 28, 16, head_dim=256)),
    ),
    _llama_like(
        "gemma2",
        norms=_FOUR_NORMS,
        heads=(_LM, _SEQUENCE, _TOKEN_SCORE),
        aliases=("gemma-2", "shieldgemma"),
        example=ReleasedModel("Gemma-2-2B", Dims(2304, 9216, 26, 8, kv_heads=4, head_dim=256)),
    ),
    _llama_like(
        "gemma3_text",
        norms=(*_HEAD_NORMS, *_FOUR_NORMS),
        heads=(_LM, _SEQUENCE),
        aliases=("gemma3", "gemma-3"),
        example=ReleasedModel("Gemma-3-1B", Dims(1152, 6912, 26, 4, kv_heads=1, head_dim=256)),
        note="The multimodal checkpoints (gemma3) keep these blocks under another path.",
    ),
    _llama_like(
        "mixtral",
        linears=_LLAMA_ATTENTION,
        experts=_EXPERTS,
        example=ReleasedModel("Mixtral-8x7B", Dims(4096, 14336, 32, 32, kv_heads=8)),
        note=_SPARSE_NOTE,
    ),
    _llama_like(
        "qwen3_moe",
        linears=(*_LLAMA_ATTENTION, *(replace(part, only=_DENSE_LAYERS) for part in _LLAMA_MLP)),
        norms=(*_HEAD_NORMS, *_PLAIN),
        experts=_EXPERTS,
        example=ReleasedModel("Qwen3-30B-A3B", Dims(2048, 768, 48, 32, kv_heads=4, head_dim=128)),
        note=_SPARSE_NOTE + " ffn is moe_intermediate_size there.",
    ),
    replace(
        _llama_like(
            "phi3",
            linears=(
                BlockLinear("self_attn.qkv_proj", HIDDEN, FUSED_QKV, attention=True),
                BlockLinear("self_attn.o_proj", Q_WIDTH, HIDDEN, attention=True),
                BlockLinear("mlp.gate_up_proj", HIDDEN, TWO_FFN),
                BlockLinear("mlp.down_proj", FFN, HIDDEN),
            ),
            heads=(_LM, _SEQUENCE, _TOKEN_SCORE),
            aliases=("phi-3", "phi-3.5", "phi-4"),
            example=ReleasedModel("Phi-3-mini", Dims(3072, 8192, 32, 32)),
        ),
        attention_only=("qkv_proj", "o_proj"),
    ),
    replace(
        _llama_like(
            "phi",
            linears=(
                *_LLAMA_ATTENTION[:3],
                BlockLinear("self_attn.dense", Q_WIDTH, HIDDEN, attention=True),
                BlockLinear("mlp.fc1", HIDDEN, FFN),
                BlockLinear("mlp.fc2", FFN, HIDDEN),
            ),
            norms=("input_layernorm",),
            heads=(_LM, _SEQUENCE, _TOKEN_SCORE),
            aliases=("phi-1", "phi-1.5", "phi-2"),
            example=ReleasedModel("Phi-1.5", Dims(2048, 8192, 24, 32)),
        ),
        attention_only=("q_proj", "k_proj", "v_proj", "dense"),
        outer_norms=("model.final_layernorm",),
    ),
    _llama_like(
        "starcoder2",
        linears=(
            *_LLAMA_ATTENTION,
            BlockLinear("mlp.c_fc", HIDDEN, FFN),
            BlockLinear("mlp.c_proj", FFN, HIDDEN),
        ),
        heads=(_LM, _SEQUENCE, _TOKEN_SCORE),
        example=ReleasedModel("StarCoder2-3B", Dims(3072, 12288, 30, 24, kv_heads=2)),
    ),
)


def _gpt_like(
    name: str,
    linears: tuple[BlockLinear, ...],
    attention_only: tuple[str, ...],
    *,
    heads: tuple[Head, ...] = (_LM, _SEQUENCE, _TOKEN_CLASSIFIER, _ANSWER),
    norms: tuple[str, ...] = ("ln_1", "ln_2"),
    embeddings: tuple[str, ...] = ("transformer.wte", "transformer.wpe"),
    outer_norms: tuple[str, ...] = ("transformer.ln_f",),
    aliases: tuple[str, ...] = (),
    example: ReleasedModel | None = None,
) -> Family:
    """Build a family with GPT-2's module tree, `transformer.h.{i}`."""
    return Family(
        name=name,
        kind="decoder",
        stacks=(Stack("transformer.h.{i}", linears, norms),),
        attention_only=attention_only,
        heads=heads,
        embeddings=embeddings,
        outer_norms=outer_norms,
        aliases=aliases,
        example=example,
    )


_FOUR_H_MLP = (
    BlockLinear("mlp.dense_h_to_4h", HIDDEN, FFN),
    BlockLinear("mlp.dense_4h_to_h", FFN, HIDDEN),
)
_GPT_MLP = (
    BlockLinear("mlp.c_fc", HIDDEN, FFN),
    BlockLinear("mlp.c_proj", FFN, HIDDEN),
)


def _square_attention(prefix: str) -> tuple[BlockLinear, ...]:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return tuple(BlockLinear(f"{prefix}.{name}", HIDDEN, HIDDEN, True) for name in names)


_GPT_LIKE = (
    _gpt_like(
        "gpt2",
        (
            BlockLinear("attn.c_attn", HIDDEN, THREE_HIDDEN, attention=True, type="Conv1D"),
            BlockLinear("attn.c_proj", HIDDEN, HIDDEN, attention=True, type="Conv1D"),
            *(replace(part, type="Conv1D") for part in _GPT_MLP),
        ),
        ("c_attn", "attn.c_proj"),
        aliases=("distilgpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "dialogpt"),
        example=ReleasedModel("GPT-2 (124M)", Dims(768, 3072, 12, 12)),
    ),
    _gpt_like(
        "gpt_neo",
        (*_square_attention("attn.attention"), *_GPT_MLP),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        example=ReleasedModel("GPT-Neo-1.3B", Dims(2048, 8192, 24, 16)),
    ),
    _gpt_like(
        "gptj",
        (
            *_square_attention("attn"),
            BlockLinear("mlp.fc_in", HIDDEN, FFN),
            BlockLinear("mlp.fc_out", FFN, HIDDEN),
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        heads=(_LM, _SEQUENCE, _ANSWER),
        norms=("ln_1",),
        embeddings=("transformer.wte",),
        aliases=("gpt-j", "gpt-j-6b"),
        example=ReleasedModel("GPT-J-6B", Dims(4096, 16384, 28, 16)),
    ),
    _gpt_like(
        "gpt_bigcode",
        (
            BlockLinear("attn.c_attn", HIDDEN, FUSED_QKV, attention=True),
            BlockLinear("attn.c_proj", HIDDEN, HIDDEN, attention=True),
            *_GPT_MLP,
        ),
        ("c_attn", "attn.c_proj"),
        heads=(_LM, _SEQUENCE, _TOKEN_CLASSIFIER),
        aliases=("starcoder", "santacoder"),
    ),
    _gpt_like(
        "bloom",
        (
            BlockLinear("self_attention.query_key_value", HIDDEN, THREE_HIDDEN, attention=True),
            BlockLinear("self_attention.dense", HIDDEN, HIDDEN, attention=True),
            *_FOUR_H_MLP,
        ),
        ("query_key_value", "dense"),
        norms=("input_layernorm", "post_attention_layernorm"),
        embeddings=("transformer.word_embeddings",),
        outer_norms=("transformer.word_embeddings_layernorm", "transformer.ln_f"),
        aliases=("bloomz",),
        example=ReleasedModel("BLOOM-560M", Dims(1024, 4096, 24, 16)),
    ),
    _gpt_like(
        "falcon",
        (
            BlockLinear("self_attention.query_key_value", HIDDEN, FUSED_QKV, attention=True),
            BlockLinear("self_attention.dense", HIDDEN, HIDDEN, attention=True),
            *_FOUR_H_MLP,
        ),
        ("query_key_value", "dense"),
        norms=("input_layernorm",),
        embeddings=("transformer.word_embeddings",),
        example=ReleasedModel("Falcon-7B", Dims(4544, 18176, 32, 71, kv_heads=1)),
    ),
    Family(
        name="gpt_neox",
        kind="decoder",
        stacks=(
            Stack(
                "gpt_neox.layers.{i}",
                (
                    BlockLinear("attention.query_key_value", HIDDEN, THREE_HIDDEN, attention=True),
                    BlockLinear("attention.dense", HIDDEN, HIDDEN, attention=True),
                    *_FOUR_H_MLP,
                ),
                ("input_layernorm", "post_attention_layernorm"),
            ),
        ),
        attention_only=("query_key_value", "dense"),
        heads=(_LM, _SEQUENCE, _TOKEN_CLASSIFIER, _ANSWER),
        embeddings=("gpt_neox.embed_in",),
        outer_norms=("gpt_neox.final_layer_norm",),
        aliases=("pythia", "dolly"),
        example=ReleasedModel("GPT-NeoX-20B", Dims(6144, 24576, 44, 64)),
    ),
    Family(
        name="opt",
        kind="decoder",
        stacks=(
            Stack(
                "model.decoder.layers.{i}",
                (
                    *_square_attention("self_attn"),
                    BlockLinear("fc1", HIDDEN, FFN),
                    BlockLinear("fc2", FFN, HIDDEN),
                ),
                ("self_attn_layer_norm", "final_layer_norm"),
            ),
        ),
        attention_only=("q_proj", "k_proj", "v_proj", "out_proj"),
        heads=(_LM, _SEQUENCE, _ANSWER),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        outer_norms=("model.decoder.final_layer_norm",),
        aliases=("galactica",),
        example=ReleasedModel("OPT-125M", Dims(768, 3072, 12, 12)),
    ),
)

DECODER_FAMILIES: tuple[Family, ...] = (*_LLAMA_LIKE, *_GPT_LIKE)
