"""Compare the samplers of reinforcement learning on a CPU, with an adapter in float32.

    python benchmarks/sampling.py --model .models/SmolLM2-135M-Instruct --text docs/rl.md

Completions of 64 tokens after prompts of about 300: 8 of one prompt, and 8 of each of four. Prints
CPU seconds, and how many completions equal those of ftlevel's decoder.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlevel.extras.rl.paged_sampling import PagedSampler
from ftlevel.extras.rl.sampling import GenerateSampler, GroupSampler, Noise, SamplingOptions
from ftlevel.models.hardware import evaluating

GROUP, PROMPT_TOKENS = 8, 300


def main() -> None:
    """Measure the samplers and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path, help="file that prompts are cut from")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"]
    prompts = [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS - i] for i in range(4)]
    samplers = {
        "decoder": partial(GroupSampler, model, tokenizer),
        "generate": partial(GenerateSampler, model, tokenizer),
        "continuous batching": partial(PagedSampler, model, tokenizer, "sdpa", "float32"),
    }
    for count in (1, 4):
        rows, expected = count * GROUP, list[list[int]]()
        options = SamplingOptions(GROUP, 1.0, args.new_tokens, (), most_rows=rows)
        for name, create in samplers.items():
            with evaluating(model, "cpu", "float32"), closing(create()) as sampler:
                start = time.process_time()
                groups = sampler.sample(prompts[:count], range(count), options, Noise(0, 0))
                seconds = time.process_time() - start
            completions = [completion.ids for group in groups for completion in group]
            expected = expected or completions
            same = sum(a == b for a, b in zip(completions, expected, strict=True))
            print(f"{rows:3} completions, {name}: {seconds:.1f} s, {same} equal", flush=True)


if __name__ == "__main__":
    main()
