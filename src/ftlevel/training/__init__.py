"""The training run: Trainer, callbacks, checkpoints, resume and verification.

May import `evaluation` and the packages below it, but neither `merging` nor `commands`. Reads rows
through `data.prepare` only.
"""
