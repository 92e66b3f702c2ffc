"""Configuration files of sentence-transformers: both forms are read, the older one is written."""

import json

import pytest

from ftlevel.artifacts.sentence_transformers import (
    CrossEncoderFormat,
    EmbeddingFormat,
    load_embedding_format,
    save_cross_encoder_format,
    save_embedding_format,
)
from ftlevel.errors import InputError

PLACE = "sentence_transformers.models."


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(content))
    return directory


def old_form(**pooling):
    """What sentence-transformers 3.4.1 writes for all-MiniLM-L6-v2."""
    modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    chosen = pooling or {"mean_tokens": True}
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": PLACE + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": PLACE + "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": PLACE + "Normalize"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 384,
            **{f"pooling_mode_{mode}": chosen.get(mode, False) for mode in modes},
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


def new_form():
    """What sentence-transformers 6.2.0 writes."""
    base = "sentence_transformers.base.modules."
    own = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": base + "transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": own},
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


def test_reads_the_form_of_versions_3_to_5(tmp_path):
    assert load_embedding_format(write(tmp_path, old_form())) == EmbeddingFormat(
        "mean", True, "dot", "query: ", "passage: ", {"title": "title: "}, 256
    )


def test_reads_the_form_of_version_6(tmp_path):
    assert load_embedding_format(write(tmp_path, new_form())) == EmbeddingFormat(
        "last", dims=128, include_prompt=False
    )


def test_a_bare_model_and_a_cross_encoder_have_none(tmp_path):
    assert load_embedding_format(tmp_path) is None
    save_cross_encoder_format(tmp_path, CrossEncoderFormat())
    assert load_embedding_format(tmp_path) is None


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_reads_what_it_writes(tmp_path, pooling):
    form = EmbeddingFormat(pooling, True, "dot", "q: ", "d: ", {"x": "y"}, 128, 64, False)
    names = save_embedding_format(tmp_path, form, 384)
    assert load_embedding_format(tmp_path) == form
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


def test_writes_what_text_embeddings_inference_requires(tmp_path):
    save_embedding_format(tmp_path, EmbeddingFormat(max_length=256), 384)
    pooling = json.loads((tmp_path / "1_Pooling/config.json").read_text())
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= pooling.keys()
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"] for module in modules] == [PLACE + "Transformer", PLACE + "Pooling"]


def test_a_cross_encoder_keeps_its_config(tmp_path):
    write(tmp_path, {"config.json": {"model_type": "bert"}})
    form = CrossEncoderFormat("torch.nn.modules.activation.Sigmoid", 512)
    save_cross_encoder_format(tmp_path, form)
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    lengths = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert (settings["activation_fn"], lengths["max_seq_length"]) == (form.activation, 512)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model_type": "bert",
        "sentence_transformers": {"activation_fn": form.activation},
    }


def test_an_adapter_names_the_padding_token_that_its_base_lacks(tmp_path):
    save_cross_encoder_format(tmp_path, CrossEncoderFormat(pad_token_id=3))
    lengths = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert lengths["config_kwargs"] == {"pad_token_id": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, "cls and mean"),
        ({"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}, "weightedmean"),
        ({"config_sentence_transformers.json": {"similarity_fn_name": "euclidean"}}, "euclidean"),
        ({"modules.json": [{"type": PLACE + "Dense", "path": "2_Dense"}]}, "Dense"),
        ({"modules.json": [{"type": PLACE + "Transformer", "path": "0_Transformer"}]}, "0_Trans"),
        ({"modules.json": {}}, "no list"),
    ],
)
def test_refuses_what_it_cannot_train(tmp_path, change, words):
    write(tmp_path, old_form() | change)
    with pytest.raises(InputError, match=words):
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
def test_a_flag_replaces_what_is_not_supported(tmp_path, change, flag, default):
    write(tmp_path, old_form() | change)
    with pytest.raises(InputError, match=f"Pass --{flag}"):
        load_embedding_format(tmp_path)
    assert getattr(load_embedding_format(tmp_path, replaced=[flag]), flag) == default
