"""Compare TRL's trainers with tests/preference_figures.json, on the same weights and rows.

    pip install --no-deps --target FOLDER trl==1.16.0
    PYTHONPATH=FOLDER python scripts/against_trl.py

Weights, pairs and reference values are those of ftlevel's tests; no code of ftlevel runs here. Each
trainer gets the base and a LoRA config, reads the texts with a byte tokenizer, and computes the
loss of one batch of all rows in float32, padded. Prints the versions, and for each loss the largest
difference of loss and gradient norms to the reference (relative where the reference exceeds 1).
Fails if one exceeds 1e-5.

Not compared: cdpo (TRL 1.16 has none; with the default loss it ignores `label_smoothing`), ipo of
sums, rpo per answer, and orpo, whose loss TRL also computes on the prompt.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import preference_figures as given

BOUND = 1e-5
BETAS = (0.1, 0.5)
DPO: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "dpo-norm": {"loss_type": ["sigmoid_norm"]},
    "ld-dpo": {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
    "rpo-token": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
}
CPO: dict[str, dict[str, Any]] = {
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0},
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0},
}
KTO: dict[str, dict[str, Any]] = {"kto": {}, "kto-weighed": {"undesirable_weight": 1.33}}
REWARDS: dict[str, dict[str, Any]] = {
    "plain": {}, "margins": {}, "centred": {"center_rewards_coefficient": 0.01}
}  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are bytes."""
    alphabet = _alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=alphabet[given.EOS], pad_token=alphabet[given.PAD]
    )


def _alphabet() -> list[str]:
    """Return the character of each byte in a byte-level tokenizer, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _pairs(*, margins: bool = False) -> Dataset:
    return Dataset.from_list([
        {"prompt": prompt, "chosen": chosen, "rejected": rejected,
         **({"margin": given.MARGINS[i]} if margins else {})}
        for i, (prompt, chosen, rejected) in enumerate(given.PAIRS)
    ])  # fmt: skip


def _labeled() -> Dataset:
    """Return the chosen answers, then the rejected ones, in TRL's order."""
    return Dataset.from_list([
        {"prompt": pair[0], "completion": pair[column], "label": column == 1}
        for column in (1, 2)
        for pair in given.PAIRS
    ])  # fmt: skip


def measure(kind: Any, config: Any, settings: dict[str, Any], rows: Dataset) -> list[float]:
    """Return loss, |A| and |B| of one batch of all `rows` by a trainer of `kind`."""
    scores = kind is RewardTrainer
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = kind(
            model=given.build_base(has_score_head=scores),
            args=config(
                output_dir=output_dir, per_device_train_batch_size=len(rows), report_to="none",
                use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
                max_length=None if kind is not CPOTrainer else 128, dataloader_drop_last=False,
                **settings,
            ),
            train_dataset=rows,
            processing_class=build_tokenizer(),
            peft_config=given.adapter_config(has_score_head=scores),
        )  # fmt: skip
        given.fill_adapter(trainer.model)
        trainer.model.train()
        [batch] = list(trainer.get_train_dataloader())
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return [loss.item(), *given.gradient_norms(trainer.model)]


def cases() -> Iterator[tuple[str, Any, list[float], Any]]:
    """Yield name, trainer, TRL's values and reference values for each loss and beta."""
    for kind, config, losses, rows in (
        (DPOTrainer, DPOConfig, DPO, _pairs()),
        (CPOTrainer, CPOConfig, CPO, _pairs()),
        (KTOTrainer, KTOConfig, KTO, _labeled()),
    ):
        for name, settings in losses.items():
            for index, beta in enumerate(BETAS):
                actual = measure(kind, config, {"beta": beta, **settings}, rows)
                yield f"{name}, beta {beta:g}", kind, actual, given.TABLE[name][1 + index]
    for name, settings in REWARDS.items():
        rows = _pairs(margins=name == "margins")
        actual = measure(RewardTrainer, RewardConfig, settings, rows)
        yield f"reward, {name}", RewardTrainer, actual, given.REWARDS[name][2]


def main() -> int:
    """Print the differences to the reference values; return 1 if one exceeds the bound."""
    disable_progress_bars()
    versions = {m.__name__: m.__version__ for m in (trl, transformers, peft, torch)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    worst = 0.0
    for name, kind, actual, reference in cases():
        difference = max(
            abs(a - b) / max(1.0, abs(b)) for a, b in zip(actual, reference, strict=True)
        )
        worst = max(worst, difference)
        print(
            f"{name:22} {kind.__name__:14} loss {actual[0]:10.5f}  difference {difference:.1e}",
            flush=True,
        )
    print(f"largest difference {worst:.1e}, bound {BOUND:g}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
