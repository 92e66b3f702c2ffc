"""Encoder families: BERT-like models."""

from __future__ import annotations

from dataclasses import replace

from ftlevel.models.families.facts import (
    FFN,
    HIDDEN,
    THREE_HIDDEN,
    TWO_FFN,
    BlockLinear,
    Dims,
    Family,
    Head,
    ReleasedModel,
    Stack,
)

_BASE = Dims(768, 3072, 12, 12)
_TOKEN = Head("token-classification", ("classifier",))
_ANSWER = Head("question-answering", ("qa_outputs",))


def _heads(
    masked_lm: tuple[str, ...], sequence: tuple[str, ...] = ("classifier",)
) -> tuple[Head, ...]:
    return (
        Head("masked-lm", masked_lm),
        Head("text-classification", sequence),
        _TOKEN,
        _ANSWER,
    )


def _square(names: tuple[str, ...], only: str = "") -> tuple[BlockLinear, ...]:
    return tuple(BlockLinear(name, HIDDEN, HIDDEN, attention=True, only=only) for name in names)


_BERT_FFN = (
    BlockLinear("intermediate.dense", HIDDEN, FFN),
    BlockLinear("output.dense", FFN, HIDDEN),
)
_BERT_LINEARS = (
    *_square(
        (
            *("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
        )
    ),
    *_BERT_FFN,
)
_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
_BERT_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def _bert_like(
    name: str,
    prefix: str,
    heads: tuple[Head, ...],
    *,
    linears: tuple[BlockLinear, ...] = _BERT_LINEARS,
    attention_only: tuple[str, ...] = ("query", "key", "value", "attention.output.dense"),
    norms: tuple[str, ...] = _BERT_NORMS,
    embeddings: tuple[str, ...] = _BERT_EMBEDDINGS,
    aliases: tuple[str, ...] = (),
    example: ReleasedModel | None = None,
) -> Family:
    """Build a family with BERT's module tree, `PREFIX.encoder.layer.{i}`."""
    return Family(
        name=name,
        kind="encoder",
        stacks=(Stack(f"{prefix}.encoder.layer.{{i}}", linears, norms),),
        attention_only=attention_only,
        heads=heads,
        embeddings=tuple(f"{prefix}.embeddings.{part}" for part in embeddings),
        outer_norms=(f"{prefix}.embeddings.LayerNorm",),
        aliases=aliases,
        example=example,
    )


_BERT = _bert_like(
    "bert",
    "bert",
    _heads(("cls.predictions",)),
    aliases=("bert-base-uncased", "bert-base-cased", "bert-large-uncased", "tinybert", "minilm"),
    example=ReleasedModel("BERT-base", _BASE),
)
_ROBERTA = _bert_like(
    "roberta",
    "roberta",
    _heads(("lm_head",)),
    aliases=("roberta-base", "roberta-large", "distilroberta", "distilroberta-base", "codebert"),
    example=ReleasedModel("RoBERTa-base", _BASE),
)
_ALBERT = Family(
    name="albert",
    kind="encoder",
    stacks=(
        Stack(
            "albert.encoder.albert_layer_groups.{i}.albert_layers.{j}",
            (
                *_square(
                    (
                        *("attention.query", "attention.key", "attention.value"),
                        "attention.dense",
                    )
                ),
                BlockLinear("ffn", HIDDEN, FFN),
                BlockLinear("ffn_output", FFN, HIDDEN),
            ),
            ("attention.LayerNorm", "full_layer_layer_norm"),
            role="shared",
        ),
    ),
    attention_only=("query", "key", "value", "attention.dense"),
    heads=_heads(("predictions",)),
    embeddings=tuple(f"albert.embeddings.{part}" for part in _BERT_EMBEDDINGS),
    outer_norms=("albert.embeddings.LayerNorm",),
    aliases=("albert-base-v2",),
    example=ReleasedModel("ALBERT-base-v2", _BASE),
    note="All layers share one block, so an adapter is shared by them too.",
)
_DISTILBERT = Family(
    name="distilbert",
    kind="encoder",
    stacks=(
        Stack(
            "distilbert.transformer.layer.{i}",
            (
                *_square(
                    (
                        *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                        "attention.out_lin",
                    )
                ),
                BlockLinear("ffn.lin1", HIDDEN, FFN),
                BlockLinear("ffn.lin2", FFN, HIDDEN),
            ),
            ("sa_layer_norm", "output_layer_norm"),
        ),
    ),
    attention_only=("q_lin", "k_lin", "v_lin", "out_lin"),
    heads=_heads(
        ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        ("pre_classifier", "classifier"),
    ),
    embeddings=(
        "distilbert.embeddings.word_embeddings",
        "distilbert.embeddings.position_embeddings",
    ),
    outer_norms=("distilbert.embeddings.LayerNorm",),
    aliases=("distilbert-base-uncased", "distilbert-base-cased"),
    example=ReleasedModel("DistilBERT-base", Dims(768, 3072, 6, 12)),
)
_MODERNBERT = Family(
    name="modernbert",
    kind="encoder",
    stacks=(
        Stack(
            "model.layers.{i}",
            (
                BlockLinear("attn.Wqkv", HIDDEN, THREE_HIDDEN, attention=True),
                BlockLinear("attn.Wo", HIDDEN, HIDDEN, attention=True),
                BlockLinear("mlp.Wi", HIDDEN, TWO_FFN),
                BlockLinear("mlp.Wo", FFN, HIDDEN),
            ),
            ("attn_norm", "mlp_norm"),
        ),
    ),
    attention_only=("Wqkv", "attn.Wo"),
    heads=(
        Head("masked-lm", ("head", "decoder")),
        Head("text-classification", ("head", "classifier")),
        Head("token-classification", ("head", "classifier")),
        Head("question-answering", ("head", "classifier")),
    ),
    embeddings=("model.embeddings.tok_embeddings",),
    outer_norms=("model.embeddings.norm", "model.final_norm"),
    aliases=("modernbert-base", "modernbert-large"),
    example=ReleasedModel("ModernBERT-base", Dims(768, 1152, 22, 12)),
)
_DEBERTA_ATTENTION = "attention.self"
_DEBERTA = replace(
    _bert_like(
        "deberta-v2",
        "deberta",
        _heads(("cls.predictions",), ("pooler", "classifier")),
        linears=(
            *_square(
                (
                    f"{_DEBERTA_ATTENTION}.query_proj",
                    f"{_DEBERTA_ATTENTION}.key_proj",
                    f"{_DEBERTA_ATTENTION}.value_proj",
                )
            ),
            *_square(
                (f"{_DEBERTA_ATTENTION}.pos_key_proj", f"{_DEBERTA_ATTENTION}.pos_query_proj"),
                only="configurations with share_att_key false",
            ),
            *_square(("attention.output.dense",)),
            *_BERT_FFN,
        ),
        attention_only=(
            *("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"),
            "attention.output.dense",
        ),
        aliases=("deberta-v3", "deberta-v3-base", "mdeberta-v3"),
        example=ReleasedModel("DeBERTa-v3-base", _BASE),
    ),
    embeddings=("deberta.embeddings.word_embeddings", "deberta.encoder.rel_embeddings"),
    outer_norms=("deberta.embeddings.LayerNorm", "deberta.encoder.LayerNorm"),
)

_MPNET = _bert_like(
    "mpnet",
    "mpnet",
    _heads(("lm_head",)),
    linears=(
        *_square(("attention.attn.q", "attention.attn.k", "attention.attn.v")),
        *_square(("attention.attn.o",)),
        *_BERT_FFN,
    ),
    attention_only=("q", "k", "v", "o"),
    norms=("attention.LayerNorm", "output.LayerNorm"),
    embeddings=("word_embeddings", "position_embeddings"),
    aliases=("all-mpnet-base-v2", "mpnet-base"),
    example=ReleasedModel("MPNet-base", _BASE),
)

ENCODER_FAMILIES: tuple[Family, ...] = (
    _BERT,
    _ROBERTA,
    replace(
        _ROBERTA,
        name="xlm-roberta",
        aliases=("xlm-r", "xlm-roberta-base", "xlm-roberta-large"),
        example=ReleasedModel("XLM-RoBERTa-base", _BASE),
    ),
    replace(
        _ROBERTA,
        name="camembert",
        aliases=("camembert-base",),
        example=ReleasedModel("CamemBERT-base", _BASE),
    ),
    _DISTILBERT,
    _bert_like(
        "electra",
        "electra",
        _heads(("generator_predictions", "generator_lm_head")),
        aliases=("electra-small", "electra-base"),
        example=ReleasedModel("ELECTRA-small", Dims(256, 1024, 12, 4)),
    ),
    _ALBERT,
    replace(
        _MPNET,
        embeddings=(*_MPNET.embeddings, "mpnet.encoder.relative_attention_bias"),
    ),
    _DEBERTA,
    _MODERNBERT,
)
