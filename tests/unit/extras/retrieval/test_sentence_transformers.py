"""sentence-transformers configuration files: both formats are read, the older one is written."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ftlevel.errors import InputError
from ftlevel.extras.retrieval.sentence_transformers import (
    CrossEncoderFormat,
    EmbeddingFormat,
    check_cross_encoder,
    load_activation,
    load_embedding_format,
    save_cross_encoder_format,
    save_embedding_format,
)

MODULE_PREFIX = "sentence_transformers.models."


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(content))
    return directory


def build_v3_files(**pooling):
    """Return the files that sentence-transformers 3.4.1 writes for all-MiniLM-L6-v2."""
    modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    enabled = pooling or {"mean_tokens": True}
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": MODULE_PREFIX + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": MODULE_PREFIX + "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": MODULE_PREFIX + "Normalize"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 384,
            **{f"pooling_mode_{mode}": enabled.get(mode, False) for mode in modes},
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "3.4.1"},
            "prompts": {"query": "query: ", "passage": "passage: ", "title": "title: "},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    }


def build_v6_files():
    """Return files that sentence-transformers 6.2.0 writes."""
    base = "sentence_transformers.base.modules."
    pooling = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": base + "transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": pooling},
        ],
        "1_Pooling/config.json": {
            "embedding_dimension": 384,
            "pooling_mode": "lasttoken",
            "include_prompt": False,
        },
        "sentence_bert_config.json": {"transformer_task": "feature-extraction"},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "truncate_dim": 128,
        },
    }


def test_load_format_of_versions_3_to_5(tmp_path):
    assert load_embedding_format(write(tmp_path, build_v3_files())) == EmbeddingFormat(
        "mean", True, "dot", "query: ", "passage: ", {"title": "title: "}, 256
    )


def test_load_format_of_version_6(tmp_path):
    assert load_embedding_format(write(tmp_path, build_v6_files())) == EmbeddingFormat(
        "last", dims=128, include_prompt=False
    )


def test_load_and_save_do_lower_case(tmp_path):
    write(tmp_path, build_v3_files())
    write(tmp_path, {"sentence_bert_config.json": {"do_lower_case": True}})
    embedding_format = load_embedding_format(tmp_path)
    assert embedding_format.lowercase
    save_embedding_format(tmp_path, replace(embedding_format, max_length=128), 384)
    lengths = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert lengths == {"max_seq_length": 128, "do_lower_case": True}


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"activation_fn": "torch.nn.Identity"}, {}, "torch.nn.Identity"),  # versions 5 and 6
        ({}, {"sentence_transformers": {"activation_fn": "a.B"}}, "a.B"),  # version 4
        ({}, {"sbert_ce_default_activation_function": "a.C"}, "a.C"),  # version 3
        ({}, {}, None),
    ],
)
def test_load_activation_of_every_version(tmp_path, settings, config, expected):
    write(tmp_path, {"config_sentence_transformers.json": settings})
    assert load_activation(tmp_path, SimpleNamespace(**config)) == expected


def test_bare_model_and_cross_encoder_have_no_embedding_format(tmp_path):
    assert load_embedding_format(tmp_path) is None
    save_cross_encoder_format(tmp_path, CrossEncoderFormat())
    assert load_embedding_format(tmp_path) is None


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_save_and_load_roundtrip(tmp_path, pooling):
    expected = EmbeddingFormat(pooling, True, "dot", "q: ", "d: ", {"x": "y"}, 128, 64, False)
    names = save_embedding_format(tmp_path, expected, 384)
    assert load_embedding_format(tmp_path) == expected
    assert all((tmp_path / name).is_file() for name in names)
    config = json.loads((tmp_path / "1_Pooling/config.json").read_text())
    assert [name for name, on in config.items() if on is True and "mode" in name] == [
        {
            "mean": "pooling_mode_mean_tokens",
            "cls": "pooling_mode_cls_token",
            "last": "pooling_mode_lasttoken",
            "max": "pooling_mode_max_tokens",
        }[pooling]
    ]


def test_saved_keys_required_by_text_embeddings_inference(tmp_path):
    save_embedding_format(tmp_path, EmbeddingFormat(max_length=256), 384)
    pooling = json.loads((tmp_path / "1_Pooling/config.json").read_text())
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= pooling.keys()
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        MODULE_PREFIX + "Transformer",
        MODULE_PREFIX + "Pooling",
    ]


def test_cross_encoder_format_extends_config(tmp_path):
    write(tmp_path, {"config.json": {"model_type": "bert"}})
    expected = CrossEncoderFormat("torch.nn.modules.activation.Sigmoid", 512)
    save_cross_encoder_format(tmp_path, expected)
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    lengths = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert (settings["activation_fn"], lengths["max_seq_length"]) == (expected.activation, 512)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model_type": "bert",
        "sentence_transformers": {"activation_fn": expected.activation},
    }


def test_cross_encoder_adapter_saves_pad_token_id(tmp_path):
    save_cross_encoder_format(tmp_path, CrossEncoderFormat(pad_token_id=3))
    lengths = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert lengths["config_kwargs"] == {"pad_token_id": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, "cls and mean"),
        ({"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}, "weightedmean"),
        ({"config_sentence_transformers.json": {"similarity_fn_name": "euclidean"}}, "euclidean"),
        ({"modules.json": [{"type": MODULE_PREFIX + "Dense", "path": "2_Dense"}]}, "Dense"),
        (
            {"modules.json": [{"type": MODULE_PREFIX + "Transformer", "path": "0_Transformer"}]},
            "0_Trans",
        ),
        ({"modules.json": {}}, "not a list"),
    ],
)
def test_unsupported_format_raises(tmp_path, change, message):
    write(tmp_path, build_v3_files() | change)
    with pytest.raises(InputError, match=message):
        load_embedding_format(tmp_path)


@pytest.mark.parametrize(
    ("change", "flag", "default"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "pooling", "mean"),
        (
            {"config_sentence_transformers.json": {"similarity_fn_name": "euclidean"}},
            "similarity",
            "cosine",
        ),
    ],
)
def test_flag_replaces_unsupported_setting(tmp_path, change, flag, default):
    write(tmp_path, build_v3_files() | change)
    with pytest.raises(InputError, match=f"Pass --{flag}"):
        load_embedding_format(tmp_path)
    assert getattr(load_embedding_format(tmp_path, replaced=[flag]), flag) == default


def test_texts_in_a_chat_template_are_refused(tmp_path):
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    files = build_v3_files()
    files["sentence_bert_config.json"] = {"modality_config": {"text": text}}
    assert load_embedding_format(write(tmp_path, files)).pooling == "mean"
    files["sentence_bert_config.json"]["modality_config"]["message"] = {**text, "format": "flat"}
    with pytest.raises(InputError, match="modality_config has 'message'"):
        load_embedding_format(write(tmp_path, files))


def test_default_prompt_of_cross_encoder_is_refused(tmp_path):
    settings = {"prompts": {"task": "Rank: ", "none": ""}, "default_prompt_name": "none"}
    for name in ("none", None):
        settings["default_prompt_name"] = name
        check_cross_encoder(write(tmp_path, {"config_sentence_transformers.json": settings}))
    settings["default_prompt_name"] = "task"
    with pytest.raises(InputError, match="default prompt 'task' puts 'Rank: ' before texts"):
        check_cross_encoder(write(tmp_path, {"config_sentence_transformers.json": settings}))
