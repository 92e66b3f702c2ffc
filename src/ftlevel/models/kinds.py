"""What kind of transformer a config describes, and how long a sequence it takes."""

from __future__ import annotations

from typing import Any, Literal

from ftlevel.models.upstream.architectures import has_masked_lm, model_classes

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]


def model_kind(config: Any) -> ModelKind:
    """Return whether `config` is of an encoder, a decoder or an encoder-decoder.

    A model type that has a masked-LM head in transformers is an encoder even where it also has a
    causal one (BERT, RoBERTa).
    """
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if has_masked_lm(config.model_type):
        return "encoder"
    return "decoder"


def width_of(config: Any) -> int:
    """Return the width of the hidden states."""
    return int(config.get_text_config().hidden_size)


TASK_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""transformers' auto classes of the tasks."""


def checkpoint_class(config: Any) -> str:
    """Return the auto class that a checkpoint was saved as, by its `architectures`.

    Where a config names none, as of a .gguf file, what models of its kind are for; `AutoModel`, a
    model without head, where the name is unknown.
    """
    if not config.architectures:
        usual = {
            "decoder": "AutoModelForCausalLM",
            "encoder-decoder": "AutoModelForSeq2SeqLM",
        }
        return usual.get(model_kind(config), "AutoModel")

    def is_made_by(name: str, architecture: str) -> bool:
        mapping = model_classes(name)
        return type(config) in mapping and mapping[type(config)].__name__ == architecture

    for architecture in config.architectures or ():
        for name in (*TASK_CLASSES, "AutoModelForImageTextToText"):
            if is_made_by(name, architecture):
                return name
        # BERT's pretraining head has the masked language model's in it; ELECTRA's has another.
        if (
            architecture.endswith("ForPreTraining")
            and type(config) in model_classes("AutoModelForMaskedLM")
            and config.model_type != "electra"
        ):
            return "AutoModelForMaskedLM"
    return "AutoModel"


def max_positions(config: Any) -> int | None:
    """Return the longest sequence in tokens that the model was built for, or None if unbounded.

    RoBERTa-like models number positions from `pad_token_id + 1` and lose that many.
    """
    if config.model_type in ("t5", "mt5", "umt5"):  # relative positions
        return None
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        positions = getattr(config.get_text_config(), name, None)
        if isinstance(positions, int) and positions > 0:
            offset = config.model_type in _OFFSET_POSITIONS
            return positions - (config.pad_token_id or 0) - 1 if offset else positions
    return None


_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm"}
