"""Compare TRL's trainers with tests/preference_figures.json, on the same weights and rows.

    pip install --no-deps --target FOLDER trl==1.16.0
    PYTHONPATH=FOLDER python scripts/against_trl.py

Weights, pairs and figures are those that the tests hold ftlevel to; nothing of ftlevel computes
here. Each trainer gets the base and a LoRA to put onto it, as its users do, reads the texts with a
tokenizer of bytes, and computes the loss of one batch of all rows. Prints the versions, and for
each loss how far it and the norms of its gradient are from the figures, relative where a figure is
over 1. Fails where that is over 1e-5: float32, padded.

Not compared: cdpo (TRL 1.16 has none; with the default loss it ignores `label_smoothing`), ipo of
sums, rpo per answer, and orpo, whose own loss TRL takes over the prompt too.
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
    """Return the character that a tokenizer of bytes has for each byte, as GPT-2's."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def _pairs(*, margins: bool = False) -> Dataset:
    return Dataset.from_list([
        {"prompt": prompt, "chosen": good, "rejected": bad,
         **({"margin": given.MARGINS[i]} if margins else {})}
        for i, (prompt, good, bad) in enumerate(given.PAIRS)
    ])  # fmt: skip


def _judged() -> Dataset:
    """Return the good answers and then the bad ones, as TRL makes them of pairs."""
    return Dataset.from_list([
        {"prompt": pair[0], "completion": pair[which], "label": which == 1}
        for which in (1, 2)
        for pair in given.PAIRS
    ])  # fmt: skip


def measure(kind: Any, config: Any, told: dict[str, Any], rows: Dataset) -> list[float]:
    """Return loss, |A| and |B| of one batch of all `rows` by a trainer of `kind`."""
    scores = kind is RewardTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=given.build_base(scores=scores),
            args=config(
                output_dir=folder, per_device_train_batch_size=len(rows), report_to="none",
                use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
                max_length=None if kind is not CPOTrainer else 128, dataloader_drop_last=False,
                **told,
            ),
            train_dataset=rows,
            processing_class=build_tokenizer(),
            peft_config=given.adapter_config(scores=scores),
        )  # fmt: skip
        given.fill_adapter(trainer.model)
        trainer.model.train()
        [batch] = list(trainer.get_train_dataloader())
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return [loss.item(), *given.norms(trainer.model)]


def cases() -> Iterator[tuple[str, Any, list[float], Any]]:
    """Yield name, what TRL gives, and the figure, for each loss and beta."""
    for kind, config, losses, rows in (
        (DPOTrainer, DPOConfig, DPO, _pairs()),
        (CPOTrainer, CPOConfig, CPO, _pairs()),
        (KTOTrainer, KTOConfig, KTO, _judged()),
    ):
        for name, told in losses.items():
            for at, beta in enumerate(BETAS):
                found = measure(kind, config, {"beta": beta, **told}, rows)
                yield f"{name}, beta {beta:g}", kind, found, given.TABLE[name][1 + at]
    for name, told in REWARDS.items():
        rows = _pairs(margins=name == "margins")
        found = measure(RewardTrainer, RewardConfig, told, rows)
        yield f"reward, {name}", RewardTrainer, found, given.REWARDS[name][2]


def main() -> int:
    """Print how far TRL is from the figures; return 1 where that is too far."""
    disable_progress_bars()
    versions = {m.__name__: m.__version__ for m in (trl, transformers, peft, torch)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    worst = 0.0
    for name, kind, found, figures in cases():
        apart = max(
            abs(one - other) / max(1.0, abs(other))
            for one, other in zip(found, figures, strict=True)
        )
        worst = max(worst, apart)
        print(f"{name:22} {kind.__name__:14} loss {found[0]:10.5f}  apart {apart:.1e}", flush=True)
    print(f"largest {worst:.1e}, at most {BOUND:g} is allowed")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
