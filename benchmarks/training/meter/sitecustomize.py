"""Meter of a training process with any tool, loaded by Python through PYTHONPATH.

Writes a JSON line for every micro-batch and every optimizer step to the file named by TRAIN_METER
when the process ends. Steps are counted by torch's global optimizer hook. Micro-batches are counted
in `training_step` of transformers' Trainer (plain, TRL, Unsloth, LLaMA-Factory; ftlevel's gets a
whole optimizer step, split into micro-batches). These functions are wrapped; nothing else is
changed, and no module is imported that the tool does not import.

Each line has `kind`, `wall` (seconds since the epoch), `cpu` (seconds of the process). A `micro`
also has `began` (wall), `tokens` (without padding), `places` (with padding), `supervised`
(supervised tokens; rows, for classification) and `loss`; those of a step add up to its loss.
"""

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time

_EVENTS = []
_ACTIVE_STEPS = []


def _note(kind, **values):
    _EVENTS.append({"kind": kind, "wall": time.time(), "cpu": time.process_time(), **values})


def _count(ids, mask, labels):
    """Return tokens, places and supervised as tensors: reading them would wait for a GPU."""
    tokens = ids.numel()
    if mask is not None and mask.dim() == 2:
        tokens = mask.bool().sum()
    elif mask is not None and mask.dim() == 4:  # block-diagonal: a real token attends to itself
        visible = mask.diagonal(dim1=-2, dim2=-1)
        tokens = ((visible == 0) if mask.is_floating_point() else visible.bool()).sum()
    supervised = 0
    if labels is not None:
        same = labels.shape == ids.shape
        supervised = (labels[..., 1:] != -100).sum() if same else labels.numel()
    return {"tokens": tokens, "places": ids.numel(), "supervised": supervised}


def _watch_optimizer(module):
    module.register_optimizer_step_post_hook(lambda *_: _note("step"))


def _watch_training_step(owner):
    step = owner.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if not self.state.max_steps:  # ftlevel's verification before the run
            return step(self, model, inputs, *args, **kwargs)
        if _ACTIVE_STEPS:  # called by a subclass, which has counted this
            return step(self, model, inputs, *args, **kwargs)
        start = time.time()
        counts_of_parts = [
            _count(
                micro_batch["input_ids"],
                micro_batch.get("attention_mask"),
                micro_batch.get("labels"),
            )
            for micro_batch in inputs.get("micro_batches", [inputs])
        ]
        counts = {
            name: sum(micro_batch[name] for micro_batch in counts_of_parts)
            for name in counts_of_parts[0]
        }
        _ACTIVE_STEPS.append(self)
        try:
            loss = step(self, model, inputs, *args, **kwargs)
        finally:
            _ACTIVE_STEPS.pop()
        _note("micro", began=start, loss=loss.detach(), **counts)
        return loss

    owner.training_step = training_step


_WATCHED = {
    "torch.optim.optimizer": _watch_optimizer,
    "transformers.trainer": lambda module: _watch_training_step(module.Trainer),
    "ftlevel.training.trainer": lambda module: _watch_training_step(module.FtlevelTrainer),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Calls the function of `_WATCHED` after its module has been imported."""

    def find_spec(self, name, path=None, target=None):  # noqa: ARG002
        watch = _WATCHED.pop(name, None)
        if watch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            watch(module)

        spec.loader.exec_module = exec_module
        return spec


def _write():
    if not any(event["kind"] == "micro" for event in _EVENTS):
        return  # a launcher, not the training process
    import torch

    if torch.cuda.is_initialized():
        _note("cuda", mib=torch.cuda.max_memory_allocated() / 2**20)
    _note("threads", count=torch.get_num_threads())
    with open(os.environ["TRAIN_METER"], "w", encoding="utf-8") as file:  # noqa: PTH123
        for event in _EVENTS:
            plain = {k: v.item() if hasattr(v, "item") else v for k, v in event.items()}
            file.write(json.dumps(plain) + "\n")


if os.environ.get("TRAIN_METER"):
    sys.meta_path.insert(0, _Finder())
    atexit.register(_write)
