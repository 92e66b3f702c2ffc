"""Let a run that goes on follow its settings where they are others than they were."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FollowSettings(TrainerCallback):
    """Take intervals and learning rates from the settings, not from the checkpoint.

    Trainer reads the steps between two logs, evaluations or checkpoints from the checkpoint, and
    the optimizer goes on at the rate that it had. After a run was made longer, that would be the
    old schedule's for one more step: 0 at the end of a linear one. Where nothing has changed, the
    values are the same.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Set both."""
        if state.global_step == 0:
            return
        state.compute_steps(args, state.max_steps)
        if not hasattr(lr_scheduler, "lr_lambdas"):
            return  # reduce_lr_on_plateau: its rate comes of the losses so far, not of the settings
        rates = [
            base * share(lr_scheduler.last_epoch)
            for base, share in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "_last_lr": rates})  # is logged
