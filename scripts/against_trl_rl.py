"""Compare TRL's GRPOTrainer and RLOOTrainer with the losses of tests/rl_figures.py.

    pip install --no-deps --target FOLDER trl==1.16.0
    PYTHONPATH=FOLDER python scripts/against_trl_rl.py

Completions, weights and reference values are those of ftlevel's tests; no ftlevel code runs. Each
trainer gets the base and a LoRA config; `_compute_loss` gets one float32 batch of all completions,
with old and reference log-probabilities and advantages. Prints for each loss the largest difference
of loss and gradient norms to the reference (relative where the reference exceeds 1); fails if one
exceeds 1e-5.

Not compared: reinforce++, which TRL does not have; the KL penalty of RLOO, which its trainer
subtracts from rewards before `_compute_loss` (the advantages here have it); and the value of RLOO's
loss with masked completions, to which TRL adds their advantages, without a gradient.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import preference_figures as base
import rl_figures as given
from against_trl import build_tokenizer

BOUND = 1e-5


def create_trainer(case: given.Case, folder: str) -> Any:
    """Return TRL's trainer of a loss, with the reference weights."""
    low, high = given.CLIP[case.loss]
    settings: dict[str, Any] = {
        "epsilon": 0.2 if case.loss == "cispo" else low,
        "epsilon_high": high,
    }
    kind, config = (RLOOTrainer, RLOOConfig) if case.loss == "rloo" else (GRPOTrainer, GRPOConfig)
    if case.loss != "rloo":
        settings |= {
            "loss_type": "grpo" if case.loss == "gspo" else case.loss,
            "importance_sampling_level": "sequence" if case.loss == "gspo" else "token",
            "use_bias_correction_kl": case.corrected,
        }
    trainer = kind(
        model=base.build_base(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(
            output_dir=folder,
            per_device_train_batch_size=len(given.REWARDS),
            report_to="none",
            num_generations=given.GROUP,
            max_completion_length=given.LENGTH,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            beta=case.beta,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _ in given.COMPLETIONS]),
        processing_class=build_tokenizer(),
        peft_config=base.adapter_config(),
    )
    base.fill_adapter(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def build_batch(case: given.Case) -> dict[str, Any]:
    """Return the inputs of `_compute_loss`: prompts left-padded, completions right-padded."""
    policy = [logps.detach() for logps in given.log_probabilities(base.build_model().double())]
    reference = given.reference_log_probabilities()
    old = given.old_log_probabilities(policy, case)
    advantages = given.expected_advantages(case, old, reference)
    pairs = list(given.rows())
    max_lengths = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]

    def pad_right(values: list[Any], dtype: Any) -> torch.Tensor:
        padded = torch.zeros(len(values), max_lengths[1], dtype=dtype)
        for row, row_values in zip(padded, values, strict=True):
            row[: len(row_values)] = torch.as_tensor(row_values, dtype=dtype)
        return padded

    masks = [
        [int(given.is_active(i, case))] * len(completion) for i, (_, completion) in enumerate(pairs)
    ]
    mask = pad_right(masks, torch.long)
    return {
        "prompt_ids": torch.tensor([[base.PAD] * (max_lengths[0] - len(p)) + p for p, _ in pairs]),
        "prompt_mask": torch.tensor(
            [[0] * (max_lengths[0] - len(p)) + [1] * len(p) for p, _ in pairs]
        ),
        "completion_ids": pad_right([completion for _, completion in pairs], torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float32),
        "old_per_token_logps": pad_right(old, torch.float32),
        "ref_per_token_logps": pad_right(reference, torch.float32),
        "old_logps": torch.stack(
            [logps.sum() * given.is_active(i, case) for i, logps in enumerate(old)]
        ).float(),
        "num_items_in_batch": mask.sum(),
    }


def measure(case: given.Case) -> list[float]:
    """Return loss, |A| and |B| of one batch by TRL."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = create_trainer(case, output_dir)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, build_batch(case))
        loss.backward()
        return [loss.item(), *base.gradient_norms(trainer.model)]


def main() -> int:
    """Print the differences to the reference values; return 1 if one exceeds the bound."""
    disable_progress_bars()
    versions = {m.__name__: m.__version__ for m in (trl, transformers, peft, torch)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    worst = 0.0
    for case in given.CASES:
        if case.loss == "reinforce++":
            continue
        actual, reference = measure(case), given.loss_and_norms(case)
        if case.loss == "rloo" and case.masked:
            actual[0] = reference[0]
        difference = max(
            abs(a - b) / max(1.0, abs(b)) for a, b in zip(actual, reference, strict=True)
        )
        worst = max(worst, difference)
        print(f"{case!s:28} loss {actual[0]:10.6f}  difference {difference:.1e}", flush=True)
    print(f"largest difference {worst:.1e}, bound {BOUND:g}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
