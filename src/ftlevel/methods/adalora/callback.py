"""Callback for AdaLoRA's rank pruning that resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from ftlevel.artifacts.files import read_json
from ftlevel.methods.upstream import importance_scores
from ftlevel.safe_io import save_text

FILE, RANKS = "adalora.safetensors", "adalora_ranks.json"


class RankPruningCallback(TrainerCallback):
    """Trainer callback that prunes ranks after every optimizer step, while gradients exist.

    If the config has `rank_pattern`, PEFT saves pruned tensors, which do not fit the optimizer
    state. The config therefore gets it only after training, and checkpoints have full tensors and
    importance scores. Add this callback before the one that writes manifests of checkpoints.
    """

    def __init__(self, checkpoint_dir: Path, *, should_save: bool = True) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.should_save = should_save
        self.ranks: dict[str, list[bool]] | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Load scores and ranks from the checkpoint that the run resumes from."""
        if state.global_step == 0:
            return
        checkpoint_dir = self.checkpoint_dir / f"checkpoint-{state.global_step}"
        self.ranks = read_json(checkpoint_dir / RANKS)
        scores, device = importance_scores(model), next(model.parameters()).device
        for key, value in load_file(checkpoint_dir / FILE).items():
            kind, _, name = key.partition("/")
            scores[kind][name] = value.to(device)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Update the importance scores and prune ranks."""
        config = model.peft_config["default"]
        config.rank_pattern = self.ranks
        # 1-based, so that the last step is total_step even if tfinal is 0.
        model.base_model.update_and_allocate(state.global_step + 1)
        self.ranks, config.rank_pattern = config.rank_pattern, None

    def on_save(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Save scores and ranks in the new checkpoint."""
        if not self.should_save:
            return
        checkpoint_dir = self.checkpoint_dir / f"checkpoint-{state.global_step}"
        scores = {
            f"{kind}/{name}": value.contiguous().cpu()
            for kind, by_name in importance_scores(model).items()
            for name, value in by_name.items()
        }
        save_file(scores, checkpoint_dir / FILE)
        self.save_state(checkpoint_dir)

    def save_state(self, checkpoint_dir: Path) -> None:
        """Save the ranks in `checkpoint_dir`, to be restored by `load_state` or a resumed run."""
        save_text(checkpoint_dir / RANKS, json.dumps(self.ranks))

    def load_state(self, checkpoint_dir: Path, model: Any) -> None:
        """Load the ranks from `checkpoint_dir` into the config of `model` (modified)."""
        ranks = read_json(checkpoint_dir / RANKS)
        model.peft_config["default"].rank_pattern = ranks

    def on_train_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Set `rank_pattern` of the PEFT config, so that PEFT saves only the ranks that remain."""
        model.peft_config["default"].rank_pattern = self.ranks
