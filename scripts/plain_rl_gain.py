r"""Sample with plain PEFT and transformers from the adapter of a `--task rl` run, and score.

    python scripts/plain_rl_gain.py runs/rl-smollm2-brief/adapter .models/SmolLM2-135M-Instruct \
        data/docstring-summary/validation.jsonl document '^\S+( \S+){2,11}$' \
        --system 'Summarize the text in one sentence of at most 12 words.' --new-tokens 32

Prints the share of completions that match the pattern, with and without the adapter, and 95 %
bootstrap intervals over prompts. It imports nothing of ftlevel, so it checks that the gain is in
the saved adapter alone.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print the share with and without the adapter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("adapter", "base", "rows", "column", "pattern"):
        parser.add_argument(name)
    parser.add_argument("--system", default="")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    model = PeftModel.from_pretrained(model, options.adapter).eval()
    lines = Path(options.rows).read_text(encoding="utf-8").splitlines()[: options.prompts]
    system = [{"role": "system", "content": options.system}] if options.system else []
    prompts = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": json.loads(line)[options.column]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for line in lines
    ]

    def share() -> str:
        torch.manual_seed(0)
        means = []
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            written = model.generate(
                **ids,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=options.new_tokens,
                num_return_sequences=options.completions,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(
                written[:, ids["input_ids"].shape[1] :], skip_special_tokens=True
            )
            means.append(np.mean([bool(re.search(options.pattern, text)) for text in texts]))
        draws = np.random.default_rng(0).choice(means, (1000, len(means))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return f"{np.mean(means):.3f} ({low:.3f}–{high:.3f})"

    with torch.no_grad():
        with model.disable_adapter():
            print("base   ", share(), flush=True)
        print("adapter", share(), flush=True)


if __name__ == "__main__":
    main()
