"""Pretrain `builtin:tiny-llama`, the model inside the package, on Python's own documentation.

It reads the standard library of the Python that runs it: the topics of `help()`, docstrings, and
source. Modules of the validation and test splits of `builtin:docstrings` are held out: neither
their source nor their docstrings are read, and a paragraph that they share with other text is
removed from that text.

    python scripts/pretrain_builtin.py        # writes src/ftlevel/models/builtin/tiny-llama
    python scripts/pretrain_builtin.py --steps 40 --output-dir DIR    # a quick look

The same Python, seed, thread count and machine give the same weights. Needs torch 2.9 for Muon.
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ftlevel.data.sources.docstrings import read_module, stdlib_modules

ROOT = Path(__file__).resolve().parent.parent
CARD = Path(__file__).resolve().parent / "pretrain_builtin_card.md"
BLOCK = 512
VOCABULARY = 3072
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, START, END]

# How often a text of each sort is read in a pass: docstrings are what the model is for, and source
# is nine tenths of the bytes.
REPEATS = {"topic": 2, "docstring": 3, "explained": 2, "source": 1}
# Shorter paragraphs that two modules share are idioms ("import os"), not copies.
MIN_COPIED_CHARACTERS = 40

# The split of Llama 3's tokenizer with single digits. White space before a word stays apart from
# line ends, so a text that begins with an indent does not merge with the newline of the chat
# template, and a rendered prompt is a token prefix of the rendered conversation.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class HeldOut:
    """How well the model predicts docstrings of modules that it never read.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        bits_per_byte: the same measure without the tokenizer in it.
        documents: how many docstrings.
        tokens: how many tokens in them.
    """

    perplexity: float
    bits_per_byte: float
    documents: int
    tokens: int


def main() -> None:
    """Build the corpus, the tokenizer and the model; train, measure and save."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()

    texts = training_texts()
    for sort, items in texts.items():
        size = sum(map(len, items))
        print(
            f"{sort:10} {len(items):6,} texts {size:12,} characters x {REPEATS[sort]}", flush=True
        )
    tokenizer = build_tokenizer(text for items in texts.values() for text in items)
    blocks = pack(texts, tokenizer, args.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {blocks.numel():,} tokens a pass", flush=True)

    validation = validation_docstrings()
    train(model, blocks, args, lambda: measure(model, tokenizer, validation))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    stored = LlamaForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    result = measure(stored, tokenizer, validation)
    minutes = (time.perf_counter() - started) / 60
    card = model_card(stored, args, blocks, result, minutes)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in args.output_dir.iterdir())
    print(f"{result}\n{size:,} bytes in {args.output_dir}, {minutes:.1f} minutes")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "src/ftlevel/models/builtin/tiny-llama"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=4, help=f"blocks of {BLOCK} tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--warmup-steps", type=int, default=40)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


# --- text -------------------------------------------------------------------------------------


def training_texts() -> dict[str, list[str]]:
    """Return the texts to train on by sort, without anything that held-out modules contain."""
    held_out = held_out_paragraphs()
    topics = importlib.import_module("pydoc_data.topics").topics
    texts: dict[str, list[str]] = {
        "topic": [topics[name] for name in sorted(topics)],
        "docstring": [],
        "explained": [],
        "source": [],
    }
    seen: set[str] = set()
    for _, file in stdlib_modules("train"):
        texts["source"].append(file.read_text(encoding="utf-8"))
        for item in read_module(file):
            if item.docstring in seen:
                continue
            seen.add(item.docstring)
            texts["docstring"].append(item.docstring)
            if item.source:
                texts["explained"].append(f"{item.source}\n\n{item.docstring}")
    kept = {sort: [without(held_out, text) for text in items] for sort, items in texts.items()}
    return {sort: [text for text in items if text] for sort, items in kept.items()}


def validation_docstrings() -> list[str]:
    """Return the distinct docstrings of the validation split, long enough to be predicted."""
    found = dict.fromkeys(
        item.docstring for _, file in stdlib_modules("validation") for item in read_module(file)
    )
    return [text for text in found if len(text) >= MIN_COPIED_CHARACTERS]


def held_out_paragraphs() -> set[str]:
    """Return what the validation and test modules contain, by paragraph, in `normal` form."""
    texts: list[str] = []
    for split in ("validation", "test"):
        for _, file in stdlib_modules(split):
            texts.append(file.read_text(encoding="utf-8"))
            texts.extend(item.docstring for item in read_module(file))
    found = {normal(paragraph) for text in texts for paragraph in text.split("\n\n")}
    return {paragraph for paragraph in found if len(paragraph) >= MIN_COPIED_CHARACTERS}


def without(held_out: set[str], text: str) -> str:
    """Return `text` without the paragraphs that are in `held_out`."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part for part in paragraphs if normal(part) not in held_out).strip()


def normal(paragraph: str) -> str:
    """Return a paragraph without what a copy of it may differ in: white space and quotes."""
    return " ".join(paragraph.replace('"""', " ").split())


def build_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can write any text, and give it the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(
    texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, seed: int
) -> torch.Tensor:
    """Return `(blocks, BLOCK + 1)` token ids: the shuffled texts, an end token after each."""
    sequences: list[list[int]] = []
    for sort, items in texts.items():
        encoded = tokenizer(items, verbose=False).input_ids
        sequences += [[*ids, tokenizer.eos_token_id] for ids in encoded] * REPEATS[sort]
    random.Random(seed).shuffle(sequences)
    stream = torch.tensor([token for sequence in sequences for token in sequence])
    count = len(stream) // (BLOCK + 1)
    return stream[: count * (BLOCK + 1)].view(count, BLOCK + 1)


# --- model ------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh Llama whose every width suits blockwise 4-bit quantization."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # The embeddings are also the head: with transformers' 0.02 the first logits are nearly equal
    # and the first few hundred steps go into making them larger.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=config.hidden_size**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train(
    model: LlamaForCausalLM,
    blocks: torch.Tensor,
    args: argparse.Namespace,
    evaluate: Callable[[], HeldOut],
) -> None:
    """Train in place, with linear warm-up and a cosine to a hundredth of the learning rate."""
    optimizers = build_optimizers(model, args)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, args.warmup_steps, args.steps)
        )
        for optimizer in optimizers
    ]
    order = batches(len(blocks), args.batch_size, args.seed)
    started = time.perf_counter()
    model.train()
    for step in range(1, args.steps + 1):
        batch = blocks[next(order)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        if step % 25 == 0 or step == args.steps:
            elapsed = time.perf_counter() - started
            speed = step * args.batch_size * BLOCK / elapsed
            print(
                f"step {step:5} loss {loss.item():.3f} norm {norm.item():.2f}"
                f" {speed:,.0f} tokens/s {elapsed:.0f} s",
                flush=True,
            )
        if step % args.eval_steps == 0:
            print(evaluate(), flush=True)


def build_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, AdamW for the embeddings and the norms.

    After 250,000 tokens AdamW alone is at 2.81 bits a byte where this is at 2.52.
    """
    blocks = [weight for weight in model.model.layers.parameters() if weight.dim() > 1]
    inside = {id(weight) for weight in blocks}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(
            blocks,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Return the share of the learning rate for a step counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the indices of one batch after another, in a new order each pass, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> HeldOut:
    """Predict each text on its own, after an end token, cut to the length of a block."""
    was_training = model.training
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    encoded = sorted((tokenizer(text, verbose=False).input_ids[:BLOCK] for text in texts), key=len)
    for start in range(0, len(encoded), 16):
        chunk = encoded[start : start + 16]
        width = max(map(len, chunk))
        inputs = torch.tensor(
            [[tokenizer.eos_token_id, *ids, *[0] * (width - len(ids))] for ids in chunk]
        )
        labels = torch.tensor([[*ids, *[-100] * (width - len(ids))] for ids in chunk])
        logits = model(input_ids=inputs[:, :-1], use_cache=False).logits.float()
        nats += functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += sum(map(len, chunk))
        size += sum(len(text.encode()) for text in tokenizer.batch_decode(chunk))
    model.train(was_training)
    return HeldOut(math.exp(nats / tokens), nats / math.log(2) / size, len(texts), tokens)


def model_card(
    model: LlamaForCausalLM,
    args: argparse.Namespace,
    blocks: torch.Tensor,
    result: HeldOut,
    minutes: float,
) -> str:
    """Return the README of the model, with the numbers of this run."""
    tokens = args.steps * args.batch_size * BLOCK
    return CARD.read_text(encoding="utf-8").format(
        args=args,
        config=model.config,
        result=result,
        minutes=minutes,
        parameters=model.num_parameters(),
        block=BLOCK,
        tokens=tokens,
        passes=tokens / blocks[:, 1:].numel(),
        autocast="bfloat16 autocast" if args.bf16 else "float32",
        command=" ".join(["python scripts/pretrain_builtin.py", *sys.argv[1:]]),
        python=platform.python_version(),
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
