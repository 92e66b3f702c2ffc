"""What happens in a training process, whatever tool runs in it; found by Python through PYTHONPATH.

Writes a JSON line for every micro-batch and every optimizer step to the file named by TRAIN_METER
when the process ends. A step is seen by torch's own global hook. A micro-batch is seen where the
tools have it in common: `training_step` of transformers' Trainer (plain, TRL, Unsloth,
LLaMA-Factory, ms-swift; ftlevel's is given a whole optimizer step, split into micro-batches), in
LitGPT the model's forward and the loss. Those are wrapped in one function that counts and calls
them; nothing else is touched, and nothing is imported that the tool does not import.

Each line has `kind`, `wall` (seconds since the epoch), `cpu` (seconds of the process). A `micro`
also has `began` (wall), `tokens` (without padding), `places` (with), `supervised` (tokens with a
label that the model is scored on; rows, in classification) and `loss`, with `share` of the step's
loss: true where the losses of a step's micro-batches add up to it, false where they are averaged.
"""

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time

_EVENTS = []
_INSIDE = []
_LITGPT = {}


def _note(kind, **more):
    _EVENTS.append({"kind": kind, "wall": time.time(), "cpu": time.process_time(), **more})


def _count(ids, mask, labels):
    """Return tokens, places and supervised, as tensors: reading them would wait for a GPU."""
    tokens = ids.numel()
    if mask is not None and mask.dim() == 2:
        tokens = mask.bool().sum()
    elif mask is not None and mask.dim() == 4:  # block-diagonal: a token that sees itself is real
        seen = mask.diagonal(dim1=-2, dim2=-1)
        tokens = ((seen == 0) if mask.is_floating_point() else seen.bool()).sum()
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
        if not self.state.max_steps:  # a step that ftlevel compares before its run
            return step(self, model, inputs, *args, **kwargs)
        if _INSIDE:  # of a subclass's own step, which has counted this
            return step(self, model, inputs, *args, **kwargs)
        began = time.time()
        parts = [
            _count(part["input_ids"], part.get("attention_mask"), part.get("labels"))
            for part in inputs.get("micro_batches", [inputs])
        ]
        counts = {name: sum(part[name] for part in parts) for name in parts[0]}
        _INSIDE.append(self)
        try:
            loss = step(self, model, inputs, *args, **kwargs)
        finally:
            _INSIDE.pop()
        _note("micro", began=began, loss=loss.detach(), share=True, **counts)
        return loss

    owner.training_step = training_step


def _watch_litgpt_model(module):
    forward = module.GPT.forward

    def counted(self, idx, *args, **kwargs):
        _LITGPT.update(began=time.time(), ids=idx)
        return forward(self, idx, *args, **kwargs)

    module.GPT.forward = counted


def _watch_litgpt_loss(module):
    entropy = module.chunked_cross_entropy

    def chunked_cross_entropy(logits, targets, *args, **kwargs):
        loss = entropy(logits, targets, *args, **kwargs)
        if loss.requires_grad:
            ids = _LITGPT["ids"]
            # It pads with 0 and no id of a row is 0 but by chance; targets are shifted already.
            counts = {"tokens": (ids != 0).sum(), "places": ids.numel()}
            counts["supervised"] = (targets != -100).sum()
            _note("micro", began=_LITGPT["began"], loss=loss.detach(), share=False, **counts)
        return loss

    module.chunked_cross_entropy = chunked_cross_entropy


_WATCHED = {
    "torch.optim.optimizer": _watch_optimizer,
    "transformers.trainer": lambda module: _watch_training_step(module.Trainer),
    "ftlevel.training.trainer": lambda module: _watch_training_step(module.FtlevelTrainer),
    "litgpt.lora": _watch_litgpt_model,
    "litgpt.utils": _watch_litgpt_loss,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Calls the function of `_WATCHED` when its module has been imported."""

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
        return  # a launcher, not the process that trains
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
