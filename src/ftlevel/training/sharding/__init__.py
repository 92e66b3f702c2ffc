"""A model that the processes of a run share: its Trainer, its proof, and what cannot be shared.

`training.memory.shards` shares it out by torch's FSDP2, block by block. accelerate's plugin for it
is not used: it shards what is trained together with the base, in one precision, and prepares the
model anew. Here the few tensors that a method trains stay whole in every process, so that
optimizer, clipping, checkpoints and the saved adapter are those of one process.

May import what `training` may; of `training` only `commands` and `build_trainer` import it.
"""
