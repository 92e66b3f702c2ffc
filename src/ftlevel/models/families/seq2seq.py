"""Encoder-decoder families: T5-like and BART-like models."""

from __future__ import annotations

from dataclasses import replace

from ftlevel.models.families.facts import (
    FFN,
    HIDDEN,
    Q_WIDTH,
    BlockLinear,
    Dims,
    Family,
    Head,
    ReleasedModel,
    Stack,
)

_LM = (Head("summarization", ("lm_head",)), Head("translation", ("lm_head",)))
_SEQUENCE = Head("text-classification", ("classification_head",))
_ANSWER = Head("question-answering", ("qa_outputs",))

_RELU = "T5 v1.0 (feed_forward_proj: relu)"
_GATED = "gated feed-forward: T5 v1.1, Flan-T5, mT5"


def _t5_attention(layer: int, name: str) -> tuple[BlockLinear, ...]:
    path = f"layer.{layer}.{name}"
    return (
        BlockLinear(f"{path}.q", HIDDEN, Q_WIDTH, attention=True),
        BlockLinear(f"{path}.k", HIDDEN, Q_WIDTH, attention=True),
        BlockLinear(f"{path}.v", HIDDEN, Q_WIDTH, attention=True),
        BlockLinear(f"{path}.o", Q_WIDTH, HIDDEN, attention=True),
    )


def _t5_feed_forward(layer: int) -> tuple[BlockLinear, ...]:
    path = f"layer.{layer}.DenseReluDense"
    return (
        BlockLinear(f"{path}.wi", HIDDEN, FFN, only=_RELU),
        BlockLinear(f"{path}.wi_0", HIDDEN, FFN, only=_GATED),
        BlockLinear(f"{path}.wi_1", HIDDEN, FFN, only=_GATED),
        BlockLinear(f"{path}.wo", FFN, HIDDEN),
    )


_T5 = Family(
    name="t5",
    kind="encoder-decoder",
    stacks=(
        Stack(
            "encoder.block.{i}",
            (*_t5_attention(0, "SelfAttention"), *_t5_feed_forward(1)),
            ("layer.0.layer_norm", "layer.1.layer_norm"),
        ),
        Stack(
            "decoder.block.{i}",
            (
                *_t5_attention(0, "SelfAttention"),
                *_t5_attention(1, "EncDecAttention"),
                *_t5_feed_forward(2),
            ),
            ("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
            role="decoder",
        ),
    ),
    attention_only=("q", "k", "v", "o"),
    heads=(*_LM, _SEQUENCE, Head("token-classification", ("classifier",)), _ANSWER),
    embeddings=(
        "shared",
        "encoder.embed_tokens",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
        "decoder.embed_tokens",
        "decoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
    ),
    outer_norms=("encoder.final_layer_norm", "decoder.final_layer_norm"),
    aliases=("t5-small", "t5-base", "t5-large", "t5-v1.1", "flan-t5", "byt5", "codet5"),
    example=ReleasedModel("T5-small", Dims(512, 2048, 6, 8, decoder_layers=6), (_RELU,)),
)
_MT5_SMALL = Dims(512, 1024, 8, 6, head_dim=64, decoder_layers=8)


def _bart_attention(name: str) -> tuple[BlockLinear, ...]:
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    return tuple(BlockLinear(f"{name}.{part}", HIDDEN, HIDDEN, attention=True) for part in parts)


_BART_FFN = (BlockLinear("fc1", HIDDEN, FFN), BlockLinear("fc2", FFN, HIDDEN))
_BART_EMBEDDINGS = (
    *("model.shared", "model.encoder.embed_tokens", "model.encoder.embed_positions"),
    *("model.decoder.embed_tokens", "model.decoder.embed_positions"),
)
_EMBEDDING_NORMS = ("model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding")
_FINAL_NORMS = ("model.encoder.layer_norm", "model.decoder.layer_norm")

_BART = Family(
    name="bart",
    kind="encoder-decoder",
    stacks=(
        Stack(
            "model.encoder.layers.{i}",
            (*_bart_attention("self_attn"), *_BART_FFN),
            ("self_attn_layer_norm", "final_layer_norm"),
        ),
        Stack(
            "model.decoder.layers.{i}",
            (*_bart_attention("self_attn"), *_bart_attention("encoder_attn"), *_BART_FFN),
            ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
            role="decoder",
        ),
    ),
    attention_only=("q_proj", "k_proj", "v_proj", "out_proj"),
    heads=(*_LM, _SEQUENCE, _ANSWER),
    embeddings=_BART_EMBEDDINGS,
    outer_norms=_EMBEDDING_NORMS,
    aliases=("bart-base", "bart-large", "distilbart"),
    example=ReleasedModel("BART-large", Dims(1024, 4096, 12, 16, decoder_layers=12)),
)


def _translator(
    name: str,
    outer_norms: tuple[str, ...],
    aliases: tuple[str, ...],
    example: ReleasedModel,
    embeddings: tuple[str, ...] = _BART_EMBEDDINGS,
) -> Family:
    """Build a family with BART's blocks and no classification heads."""
    return replace(
        _BART,
        name=name,
        heads=_LM,
        embeddings=embeddings,
        outer_norms=outer_norms,
        aliases=aliases,
        example=example,
    )


SEQ2SEQ_FAMILIES: tuple[Family, ...] = (
    _T5,
    replace(
        _T5, name="mt5", aliases=("mt0",), example=ReleasedModel("mT5-small", _MT5_SMALL, (_GATED,))
    ),
    replace(
        _T5, name="umt5", aliases=(), example=ReleasedModel("uMT5-small", _MT5_SMALL, (_GATED,))
    ),
    _BART,
    replace(
        _BART,
        name="mbart",
        outer_norms=(*_EMBEDDING_NORMS, *_FINAL_NORMS),
        aliases=("mbart50", "mbart-large-50"),
        example=ReleasedModel("mBART-large", Dims(1024, 4096, 12, 16, decoder_layers=12)),
    ),
    _translator(
        "pegasus",
        _FINAL_NORMS,
        ("pegasus-xsum",),
        ReleasedModel("PEGASUS-large", Dims(1024, 4096, 16, 16, decoder_layers=16)),
    ),
    _translator(
        "marian",
        (),
        ("opus-mt",),
        ReleasedModel("OPUS-MT en-de", Dims(512, 2048, 6, 8, decoder_layers=6)),
    ),
    _translator(
        "m2m_100",
        _FINAL_NORMS,
        ("nllb", "nllb-200"),
        ReleasedModel("M2M100-418M", Dims(1024, 4096, 12, 16, decoder_layers=12)),
        ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    ),
    _translator(
        "blenderbot",
        _FINAL_NORMS,
        (),
        ReleasedModel("Blenderbot-3B", Dims(2560, 10240, 2, 32, decoder_layers=24)),
    ),
)
