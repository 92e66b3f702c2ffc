"""The run: what a configuration becomes before weights load, the Trainer, its callbacks, its proof.

May import evaluation and what is below it; not merging, which stands beside it, nor a command. It
reads rows only through `data.prepare`.
"""
