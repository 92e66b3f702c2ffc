"""AdaLoRA's pruning of ranks while training, in a form that can be saved and resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.methods.upstream import importance_scores

FILE, RANKS = "adalora.safetensors", "adalora_ranks.json"


class Allocation(TrainerCallback):
    """Prune after every optimizer step, while its gradients are still there.

    PEFT keeps the ranks in its config, and then saves shrunken tensors that an optimizer's state no
    longer fits. So they are taken out of the config until training ends: a checkpoint holds whole
    tensors, and beside them the importance scores. Add it before the callback that certifies.

    Args:
        checkpoints: directory of the checkpoint-N directories.
        writes: whether this process writes to them: the first of several, which all know the same.
    """

    def __init__(self, checkpoints: Path, *, writes: bool = True) -> None:
        self.checkpoints = checkpoints
        self.writes = writes
        self.ranks: dict[str, list[bool]] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Take up the scores and ranks of the checkpoint that the run goes on from."""
        if state.global_step == 0:
            return
        directory = self.checkpoints / f"checkpoint-{state.global_step}"
        self.ranks = json.loads((directory / RANKS).read_text(encoding="utf-8"))
        scores, device = importance_scores(model), next(model.parameters()).device
        for key, value in load_file(directory / FILE).items():
            kind, _, name = key.partition("/")
            scores[kind][name] = value.to(device)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Update the importance of every weight and prune by it."""
        config = model.peft_config["default"]
        config.rank_pattern = self.ranks
        # Counted from 1, so that the last step is total_step even where tfinal is 0.
        model.base_model.update_and_allocate(state.global_step + 1)
        self.ranks, config.rank_pattern = config.rank_pattern, None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Write scores and ranks into the checkpoint that was just written."""
        if not self.writes:
            return
        directory = self.checkpoints / f"checkpoint-{state.global_step}"
        scores = {
            f"{kind}/{name}": value.contiguous().cpu()
            for kind, named in importance_scores(model).items()
            for name, value in named.items()
        }
        save_file(scores, directory / FILE)
        self.keep(directory)

    def keep(self, directory: Path) -> None:
        """Write the ranks, by which a model that is kept is saved."""
        (directory / RANKS).write_text(json.dumps(self.ranks), encoding="utf-8")

    def take_up(self, directory: Path, model: Any) -> None:
        """Give the config of `model` (mutated) the ranks that were kept, as training's end does."""
        ranks = json.loads((directory / RANKS).read_text(encoding="utf-8"))
        model.peft_config["default"].rank_pattern = ranks

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Give the final ranks to the config, by which PEFT saves only what is left."""
        model.peft_config["default"].rank_pattern = self.ranks
