"""Small configs of every family in the table, with variants."""

from __future__ import annotations

from typing import Any

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 64, 160, 2, 4, 2

_TOKENS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 128,
}
_ENCODER: dict[str, Any] = {**_TOKENS, **_SIZES}
_DECODER: dict[str, Any] = {**_ENCODER, "num_key_value_heads": KV_HEADS}
_GPT: dict[str, Any] = {
    **_TOKENS,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": FFN,
    "n_positions": 128,
}
_T5: dict[str, Any] = {
    "vocab_size": 200,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": FFN,
    "num_layers": LAYERS,
    "num_decoder_layers": 3,
    "num_heads": HEADS,
}
_BART: dict[str, Any] = {
    **_TOKENS,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "max_position_embeddings": 128,
}
_SPARSE = {**_DECODER, "head_dim": 16}

# model_type -> one dictionary of settings a variant.
TINY: dict[str, list[dict[str, Any]]] = {
    **{name: [_DECODER] for name in ("llama", "mistral", "qwen2", "smollm3", "granite", "olmo2")},
    **{name: [_DECODER] for name in ("phi3", "phi", "starcoder2")},
    **{name: [{**_DECODER, "head_dim": 16}] for name in ("qwen3", "gemma", "gemma2")},
    "gemma3_text": [
        {**_DECODER, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    ],
    "mixtral": [{**_DECODER, "num_local_experts": 4}],
    "qwen3_moe": [
        {**_SPARSE, "num_experts": 4, "moe_intermediate_size": FFN},
        {**_SPARSE, "num_experts": 4, "moe_intermediate_size": FFN, "mlp_only_layers": [0]},
    ],
    "gpt2": [_GPT],
    "gptj": [{**_GPT, "rotary_dim": 8}],
    "gpt_bigcode": [_GPT],
    "gpt_neo": [
        {
            **_TOKENS,
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "intermediate_size": FFN,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        }
    ],
    "gpt_neox": [_ENCODER],
    "bloom": [{**_TOKENS, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}],
    "falcon": [{**_ENCODER, "ffn_hidden_size": FFN}],
    "opt": [{**_ENCODER, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN}],
    **{name: [_ENCODER] for name in ("bert", "roberta", "xlm-roberta", "camembert")},
    **{name: [_ENCODER] for name in ("mpnet", "modernbert")},
    **{name: [{**_ENCODER, "embedding_size": HIDDEN}] for name in ("electra", "albert")},
    "distilbert": [
        {
            **_TOKENS,
            "dim": HIDDEN,
            "hidden_dim": FFN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": 128,
        }
    ],
    "deberta-v2": [
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "share_att_key": shared,
        }
        for shared in (True, False)
    ],
    "t5": [_T5, {**_T5, "feed_forward_proj": "gated-gelu"}],
    "mt5": [
        {**_T5, "feed_forward_proj": "relu"},
        {**_T5, "feed_forward_proj": "gated-gelu"},
    ],
    "umt5": [
        {**_T5, "feed_forward_proj": "relu"},
        {**_T5, "feed_forward_proj": "gated-gelu"},
    ],
    **{name: [_BART] for name in ("bart", "mbart", "pegasus", "m2m_100", "blenderbot")},
    "marian": [{**_BART, "decoder_vocab_size": 200}],
}
