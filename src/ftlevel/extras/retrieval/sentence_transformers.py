"""Configuration files of sentence-transformers: pooling, normalization, prompts and similarity.

The formats of sentence-transformers 3 to 5 and of 6 are read. The older one is written, since
text-embeddings-inference, vLLM, llama.cpp and all versions of sentence-transformers read it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import load_json, write_json
from ftlevel.errors import InputError, join_names

POOLING_MODES = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "last": "lasttoken",
    "max": "max_tokens",
}
"""Pooling mode -> the name in the booleans `pooling_mode_*` of `1_Pooling/config.json`."""
SIMILARITIES = ("cosine", "dot")
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompts that `encode_query` and `encode_document` apply, the first one found."""

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"
_POOLING_DIR = "1_Pooling"
_OTHER_LENGTHS = tuple(
    f"sentence_{name}_config.json"
    for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
FILES = (MODULES, SETTINGS, "sentence_*_config.json", "*_Pooling/config.json")
"""Glob patterns of the files that this module reads."""
_OTHER_POOLING = ("mean_sqrt_len_tokens", "weightedmean_tokens")
_NEW_POOLING = {"lasttoken": "last"}
"""Name of a pooling mode in sentence-transformers 6 → key of `POOLING_MODES`."""


@dataclass(frozen=True)
class EmbeddingFormat:
    """How a text becomes an embedding: prompt, length, pooling, normalization and similarity.

    Attributes:
        pooling: key of `POOLING_MODES`.
        similarity: member of `SIMILARITIES`.
        prompts: other prompts by name.
        max_length: maximum number of tokens; None for the tokenizer's.
        dims: number of leading dimensions that are kept; None for all.
        include_prompt: whether the tokens of the prompt are pooled.
        lowercase: whether texts are lowercased before they are tokenized.
    """

    pooling: str = "mean"
    normalize: bool = False
    similarity: str = "cosine"
    query_prompt: str = ""
    document_prompt: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    dims: int | None = None
    include_prompt: bool = True
    lowercase: bool = False

    @property
    def all_prompts(self) -> dict[str, str]:
        """All prompts by name, including those of queries and documents."""
        return {**self.prompts, "query": self.query_prompt, "document": self.document_prompt}


@dataclass(frozen=True)
class CrossEncoderFormat:
    """Activation, length and padding of a reranker.

    Attributes:
        activation: dotted path of a module of `torch.nn` that converts the logit to a score.
        max_length: maximum number of tokens of a pair; None for the tokenizer's.
        pad_token_id: padding token, by which a decoder finds the last token; None if the config has
            one.
    """

    activation: str = "torch.nn.modules.linear.Identity"
    max_length: int | None = None
    pad_token_id: int | None = None


def load_embedding_format(
    model_dir: Path, replaced: Collection[str] = ()
) -> EmbeddingFormat | None:
    """Load the embedding format of a model; None if it is not a SentenceTransformer.

    Raises InputError for modules, poolings and similarities that are not supported. With "pooling"
    or "similarity" in `replaced`, the default is returned for it.
    """
    if not (model_dir / MODULES).is_file():
        return None
    config = load_json(model_dir / SETTINGS)
    if config.get("model_type") == "CrossEncoder":
        return None
    pooling, include_prompt, normalize = "mean", True, False
    for entry in load_json(model_dir / MODULES, list):
        name = str(entry["type"]).rpartition(".")[2]
        path = str(entry.get("path", ""))
        if name == "Transformer":
            if path not in ("", "."):
                raise InputError(
                    f"{model_dir}: {MODULES} has its transformer in {path}. Load it with "
                    f"sentence-transformers 6 and save it again."
                )
        elif name == "Pooling":
            file = model_dir / path / "config.json"
            pooling, include_prompt = _load_pooling(file, is_replaced="pooling" in replaced)
        elif name == "Normalize":
            normalize = True
        else:
            raise InputError(
                f"{model_dir}: {MODULES} has a module {name}; supported are Transformer, Pooling "
                "and Normalize. Name a model without it."
            )
    check_modality(model_dir)
    prompts = {name: text for name, text in (config.get("prompts") or {}).items() if text}
    query = next((prompts.pop(name) for name in QUERY_PROMPTS if name in prompts), "")
    document = next((prompts.pop(name) for name in DOCUMENT_PROMPTS if name in prompts), "")
    similarity = config.get("similarity_fn_name") or "cosine"
    if "similarity" in replaced:
        similarity = "cosine"
    if similarity not in SIMILARITIES:
        raise InputError(
            f"{model_dir / SETTINGS}: similarity_fn_name is {similarity!r}; supported are "
            f"{join_names(SIMILARITIES)}. Pass --similarity."
        )
    return EmbeddingFormat(
        pooling,
        normalize,
        similarity,
        query,
        document,
        prompts,
        _load_length_setting(model_dir, "max_seq_length"),
        config.get("truncate_dim"),
        include_prompt,
        bool(_load_length_setting(model_dir, "do_lower_case")),
    )


def check_modality(model_dir: Path) -> None:
    """Raise InputError if sentence-transformers 6 renders texts by the model's chat template."""
    if "message" in (load_json(model_dir / LENGTHS).get("modality_config") or {}):
        raise InputError(
            f"{model_dir / LENGTHS}: modality_config has 'message', i.e. texts are put into the "
            "chat template; supported is 'text'. Remove 'message' if training used no template."
        )


def check_cross_encoder(model_dir: Path) -> None:
    """Raise InputError if a CrossEncoder changes texts: by a chat template or a default prompt."""
    check_modality(model_dir)
    config = load_json(model_dir / SETTINGS)
    name = config.get("default_prompt_name")
    if prompt := (config.get("prompts") or {}).get(name):
        raise InputError(
            f"{model_dir / SETTINGS}: the default prompt {name!r} puts {prompt!r} before texts, "
            "which is not supported for rerankers. Remove it if training used none."
        )


def _load_pooling(path: Path, *, is_replaced: bool) -> tuple[str, bool]:
    config = load_json(path)
    modes = config.get("pooling_mode")
    if modes is None:
        names = {word: mode for mode, word in POOLING_MODES.items()}
        names |= {word: word for word in _OTHER_POOLING}
        modes = [names[word] for word in names if config.get(f"pooling_mode_{word}")] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    modes = [_NEW_POOLING.get(mode, mode) for mode in modes]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        if is_replaced:
            return "mean", bool(config.get("include_prompt", True))
        raise InputError(
            f"{path}: pooling is {' and '.join(map(str, modes))}; supported is one of "
            f"{join_names(POOLING_MODES)}. Pass --pooling."
        )
    return modes[0], bool(config.get("include_prompt", True))


def _load_length_setting(model_dir: Path, key: str) -> int | None:
    """Returns `key`, such as max_seq_length, from the first file that has it; None without one."""
    for name in (LENGTHS, *_OTHER_LENGTHS):
        value = load_json(model_dir / name).get(key)
        if value is not None:
            return int(value)
    return None


def save_embedding_format(
    model_dir: Path, embedding_format: EmbeddingFormat, hidden_size: int
) -> list[str]:
    """Save the files that make a model or an adapter a SentenceTransformer; return their names."""
    modules = [("", "Transformer"), (_POOLING_DIR, "Pooling")]
    if embedding_format.normalize:
        modules.append(("2_Normalize", "Normalize"))
    config: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": embedding_format.all_prompts,
        "default_prompt_name": None,
        "similarity_fn_name": embedding_format.similarity,
    }
    if embedding_format.dims is not None:
        config["truncate_dim"] = embedding_format.dims
    mode = POOLING_MODES[embedding_format.pooling]
    modes = (*POOLING_MODES.values(), *_OTHER_POOLING)
    pooling = {"word_embedding_dimension": hidden_size}
    pooling |= {f"pooling_mode_{word}": word == mode for word in modes}
    pooling["include_prompt"] = embedding_format.include_prompt
    (model_dir / _POOLING_DIR).mkdir(exist_ok=True)
    files: dict[str, Any] = {
        MODULES: _modules(modules),
        SETTINGS: config,
        f"{_POOLING_DIR}/config.json": pooling,
    }
    if embedding_format.max_length is not None or embedding_format.lowercase:
        files[LENGTHS] = {
            "max_seq_length": embedding_format.max_length,
            "do_lower_case": embedding_format.lowercase,
        }
    for name, content in files.items():
        write_json(model_dir / name, content)
    return list(files)


def save_cross_encoder_format(model_dir: Path, reranker_format: CrossEncoderFormat) -> list[str]:
    """Save the files that make a classifier with one label a CrossEncoder; return their names.

    The activation is in `config_sentence_transformers.json`, and in `config.json` if there is one,
    where vLLM and sentence-transformers 3 to 5 read it.
    """
    lengths: dict[str, Any] = {
        "transformer_task": "sequence-classification",
        "do_lower_case": False,
    }
    if reranker_format.max_length is not None:
        lengths["max_seq_length"] = reranker_format.max_length
    is_model = (model_dir / "config.json").is_file()
    if reranker_format.pad_token_id is not None and not is_model:  # an adapter has the base's
        lengths["config_kwargs"] = {"pad_token_id": reranker_format.pad_token_id}
    files: dict[str, Any] = {
        MODULES: _modules([("", "Transformer")]),
        SETTINGS: {
            "model_type": "CrossEncoder",
            "prompts": {},
            "default_prompt_name": None,
            "activation_fn": reranker_format.activation,
        },
        LENGTHS: lengths,
    }
    if is_model:
        config = load_json(model_dir / "config.json")
        inner = {
            **(config.get("sentence_transformers") or {}),
            "activation_fn": reranker_format.activation,
        }
        files["config.json"] = {**config, "sentence_transformers": inner}
    for name, content in files.items():
        write_json(model_dir / name, content)
    return list(files)


def get_task_type(model_dir: Path) -> str | None:
    """Returns "embedding" or "reranking" for a sentence-transformers directory; None for others."""
    if not (model_dir / MODULES).is_file():
        return None
    is_reranker = load_json(model_dir / SETTINGS).get("model_type") == "CrossEncoder"
    return "reranking" if is_reranker else "embedding"


def load_activation(model_dir: Path, model_config: Any) -> str | None:
    """Returns the dotted path of a CrossEncoder's activation; None if no file has one.

    sentence-transformers 5 and 6 save it in `config_sentence_transformers.json`, versions 4 and 3
    in `config.json`.
    """
    inner = getattr(model_config, "sentence_transformers", None) or {}
    old = getattr(model_config, "sbert_ce_default_activation_function", None)
    return load_json(model_dir / SETTINGS).get("activation_fn", inner.get("activation_fn", old))


def scores_by_tokens(model_dir: Path) -> bool:
    """Returns whether `model_dir` has a CrossEncoder whose score is the logit of a token."""
    return any(
        str(entry.get("type", "")).endswith(".LogitScore")
        for entry in load_json(model_dir / MODULES, list)
    )


def _modules(entries: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(entries)
    ]
