"""Which token fills a batch for a tokenizer that has none."""

from __future__ import annotations

from typing import Any

from ftlevel.config.choices import Choice

_RESERVED = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endofprompt|>",
             "<|reserved_special_token_0|>", "<|fim_pad|>", "<unk>")  # fmt: skip


def pad_apart_from_eos(tokenizer: Any) -> Choice | None:
    """Give `tokenizer` another padding token than EOS (mutated), where these are one.

    What finds the end of a row by its padding would not read an EOS there.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    vocabulary = tokenizer.get_vocab()
    known = (*_RESERVED, tokenizer.bos_token, *sorted(vocabulary, key=vocabulary.__getitem__)[:2])
    tokenizer.pad_token = next(t for t in known if t in vocabulary and t != tokenizer.eos_token)
    return Choice("pad token", tokenizer.pad_token, "EOS is read as the end of an answer")


def choose_pad_token(tokenizer: Any) -> Choice | None:
    """Give `tokenizer` a padding token (mutated) if it has none.

    A reserved or unknown token that the vocabulary already has is taken, so that no row is added
    to the embedding; EOS is the last resort. Labels are masked by position and never by id, so
    EOS stays a label even then.

    Returns:
        What was chosen, or None if the tokenizer had one.
    """
    if tokenizer.pad_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in _RESERVED:
        if token in vocabulary and token not in taken:
            tokenizer.pad_token = token
            return Choice("pad token", token, "the tokenizer has none")
    tokenizer.pad_token = tokenizer.eos_token
    return Choice(
        "pad token", tokenizer.eos_token, "the tokenizer has none; EOS is still learned as a label"
    )
