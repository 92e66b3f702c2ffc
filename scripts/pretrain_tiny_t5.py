"""Pretrain a tiny T5, a few minutes on a CPU, for measurements of encoder-decoders.

It learns to fill the gaps of short names and definitions in four languages (Raffel et al., 2020,
section 3.1.4: spans of 3 tokens, 15 % of a text), and nothing of what belongs to what: it can be
fine-tuned, and it is good for nothing else.

    python scripts/build_data.py cldr-names wordnet-define
    python scripts/pretrain_tiny_t5.py runs/tiny-t5
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

VOCABULARY = 3000
SPAN, SHARE = 3, 0.15


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    texts = list(read_texts(options.data))
    tokenizer = build_tokenizer(texts)
    rows = [ids for ids in tokenizer(texts, add_special_tokens=False).input_ids if len(ids) > SPAN]
    model = build_model(tokenizer, options.width)
    print(f"{model.num_parameters():,} parameters, {len(rows):,} texts", flush=True)
    train(model, tokenizer, rows, options)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)


def read_texts(data: Path) -> Iterator[str]:
    """Yield the training texts, each in its language alone."""
    for line in (data / "cldr-names/train.jsonl").read_text().splitlines():
        yield from json.loads(line).values()
    for line in (data / "wordnet-define/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield from (row["instruction"], row["input"], row["output"])


def build_tokenizer(texts: Sequence[str]) -> Any:
    """Return T5's tokenizer with a vocabulary of these texts."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    core.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=VOCABULARY, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
    )
    pieces = json.loads(core.to_str())["model"]["vocab"]
    learned = [(piece, float(score)) for piece, score in pieces if piece != "<unk>"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *learned])


def build_model(tokenizer: Any, width: int) -> T5ForConditionalGeneration:
    """Return a fresh T5 of two blocks on either side."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=4 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5ForConditionalGeneration(config)


def hide_spans(ids: list[int], tokenizer: Any, draw: random.Random) -> tuple[list[int], list[int]]:
    """Return a text with gaps, and what is in them, as T5 is pretrained."""
    gaps = max(1, round(len(ids) * SHARE / SPAN))
    starts = sorted(draw.sample(range(0, len(ids) - SPAN + 1), min(gaps, len(ids) - SPAN)))
    source, target, at = [], [], 0
    for number, start in enumerate(start for start in starts):
        if start < at:
            continue
        mark = tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>")
        source += [*ids[at:start], mark]
        target += [mark, *ids[start : start + SPAN]]
        at = start + SPAN
    end = tokenizer.eos_token_id
    return [*source, *ids[at:], end], [*target, end]


def train(model: Any, tokenizer: Any, rows: list[list[int]], options: argparse.Namespace) -> None:
    """Train in place: AdamW, a tenth of warm-up, then linear to zero."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    warmup = options.steps // 10

    def factor(step: int) -> float:
        left = (options.steps - step) / (options.steps - warmup)
        return float(min((step + 1) / warmup, left))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in range(1, options.steps + 1):
        hidden = [hide_spans(ids, tokenizer, draw) for ids in draw.sample(rows, options.batch_size)]
        sources, targets = zip(*hidden, strict=True)
        inputs = tokenizer.pad({"input_ids": list(sources)}, return_tensors="pt")
        labels = tokenizer.pad({"input_ids": list(targets)}, return_tensors="pt")
        expected = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        loss = model(**inputs, labels=expected).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5} loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
