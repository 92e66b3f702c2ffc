"""The test fixtures: every family and head builds, runs, and matches its tokenizer."""

from __future__ import annotations

import pytest
import torch
import transformers

from tiny_models import (
    AUTO_CLASSES,
    FAMILIES,
    FAMILY_HEADS,
    HEADS,
    LABELS,
    VOCAB,
    build,
    build_batch,
    build_config,
    compute_logits,
)
from tiny_tokenizers import build_tokenizer

TEXTS = ["Return the number of items in 2024.", "A much longer second text (that is, longer)."]


@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_every_head_returns_finite_loss_and_logits(family, head):
    model, inputs = build(family, head), build_batch(family, head)
    loss = model(**inputs).loss
    logits = compute_logits(model, inputs)
    width = {"seqcls": LABELS, "tokcls": LABELS, "qa": 24}.get(head, VOCAB)
    assert torch.isfinite(loss)
    assert torch.isfinite(logits).all()
    assert logits.shape[0] == 2
    assert logits.shape[-1] == width


@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_heads_match_transformers_auto_classes(family, head):
    auto_class = getattr(transformers, AUTO_CLASSES[head])
    assert type(build_config(family)) in auto_class._model_mapping


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_depend_only_on_seed(family):
    before = torch.random.get_rng_state()
    first, second, third = build(family), build(family), build(family, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(first.parameters(), third.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_trivially_symmetric(family):
    for name, parameter in build(family).named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoint_roundtrip(family, tiny_model_dir):
    folder = tiny_model_dir(family)
    assert tiny_model_dir(family) == folder
    auto_class = getattr(transformers, AUTO_CLASSES[HEADS[family][0]])
    loaded = auto_class.from_pretrained(folder, use_safetensors=True)
    inputs = build_batch(family)
    assert torch.equal(compute_logits(loaded, inputs), compute_logits(build(family), inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_round_trip(family, tiny_model_dir):
    built = build_tokenizer(family)
    loaded = transformers.AutoTokenizer.from_pretrained(tiny_model_dir(family))
    ids = loaded(TEXTS[0]).input_ids
    assert ids == built(TEXTS[0]).input_ids
    assert max(loaded.get_vocab().values()) < VOCAB
    decoded = loaded.decode(ids, skip_special_tokens=True)
    assert decoded.strip().lower().replace(" .", ".") == TEXTS[0].lower()
    assert loaded.model_max_length == 512


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_pads_or_has_no_pad_token(family, tiny_model_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir(family))
    if family in ("gpt2", "gpt_neo", "llama", "mistral", "mixtral"):
        assert tokenizer.pad_token is None
        with pytest.raises(ValueError, match="pad"):
            tokenizer(TEXTS, padding=True)
    else:
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all()
        assert (batch.attention_mask == 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_tokenizer_agree_on_special_tokens(family):
    config, tokenizer = build_config(family), build_tokenizer(family)
    if family != "gpt_neox":  # as in its checkpoints, the config has no pad token
        assert config.pad_token_id == tokenizer.pad_token_id
    for name in ("bos_token_id", "eos_token_id"):
        expected, configured = getattr(tokenizer, name), getattr(config, name, None)
        assert expected is None or configured is None or expected == configured, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "phi3", "llama"])
def test_chat_templates_render_to_special_tokens(family, tiny_model_dir):
    folder = tiny_model_dir(family, chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    specials = {"qwen2": 4, "qwen3": 4, "gemma3_text": 5, "phi3": 5, "llama": 2}[family]
    assert sum(token in tokenizer.all_special_ids for token in ids) == specials
    assert tokenizer.unk_token_id not in ids or tokenizer.unk_token_id == tokenizer.pad_token_id


def test_base_llama_has_no_chat_template(tiny_model_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    assert tokenizer.chat_template is None


def test_smollm2_tokenizer_and_gguf_size(smollm2, smollm2_gguf):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]
    assert tokenizer("a  45").tokens() == ["a", "ĠĠ", "4", "5"]
    assert smollm2_gguf.stat().st_size == 98_362_432


def test_minilm_similarities(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, use_safetensors=True).eval()
    texts = ["A dog barks.", "A puppy is barking.", "Interest rates rose."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert mean[0] @ mean[1] > 0.6 > 0.3 > mean[0] @ mean[2]
