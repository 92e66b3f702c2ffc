"""Save adapters with plain PEFT, in a process that never imports ftlevel.

Each case saves an adapter to FOLDER/<base>-<case>, and to FOLDER/<…>.pt the logits on `create_ids`
of the adapted model and of the float32 model after `merge_and_unload`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = [f"<new{number}>" for number in range(9)]
"""Tokens added to the vocabulary of resized models."""

CASES: dict[str, dict[str, Any]] = {
    "embed": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "both-tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "embed-in-full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head-in-full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both-in-full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both-in-full-tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40, 41]},
    "resized": {"target_modules": ["q_proj"], "resize": True},
    "resized-embed": {"target_modules": ["embed_tokens", "q_proj"], "resize": True},
    "resized-in-full": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "resize": True,
    },
    "resized-tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": "new",
        "resize": True,
    },
}
TIED_ONLY = ("both-tied", "both-in-full-tied")


def create_ids(vocabulary: int) -> torch.Tensor:
    """Return (2, 24) token ids; the last ones of the vocabulary and 3, 40, 41 are among them."""
    ids = torch.randint(10, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[0, :3] = torch.tensor([3, 40, 41])
    ids[1, 4:8] = torch.arange(vocabulary - 4, vocabulary)
    return ids


def save_case(base: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Save one adapter with its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    settings = dict(settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = model.config.vocab_size
    if settings.pop("resize", False):
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(NEW_TOKENS)
        tokenizer.save_pretrained(folder)
        rows = len(tokenizer)
        model.resize_token_embeddings(rows)
    if settings.get("trainable_token_indices") == "new":
        settings["trainable_token_indices"] = list(range(rows - len(NEW_TOKENS), rows))
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    adapted.save_pretrained(folder)
    ids = create_ids(rows)
    with torch.no_grad():
        logits = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    torch.save({"ids": ids, "logits": logits, "merged": merged}, f"{folder}.pt")


def save_prompt_adapter(base: Path, folder: Path, kind: str) -> None:
    """Save a soft prompt, the logits of the text tokens, and a greedy generation without cache."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**settings),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=32, **settings),
    }[kind]()
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    ids = generated = create_ids(model.config.vocab_size)[:1]
    with torch.no_grad():
        logits = adapted(ids).logits[:, 5:]
        for _ in range(6):
            generated = torch.cat([generated, adapted(generated).logits[:, -1:].argmax(-1)], 1)
    torch.save({"ids": ids, "logits": logits, "answer": generated}, f"{folder}.pt")


def main(untied: Path, tied: Path, folder: Path) -> None:
    """Save every case on both bases."""
    for kind in ("prompt", "p-tuning"):
        save_prompt_adapter(untied, folder / kind, kind)
    for name, base in (("untied", untied), ("tied", tied)):
        for case, settings in CASES.items():
            if name == "tied" or case not in TIED_ONLY:
                save_case(base, folder / f"{name}-{case}", settings)
