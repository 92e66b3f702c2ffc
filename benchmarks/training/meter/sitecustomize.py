"""Stamps of a training process, whatever tool runs in it; found by Python through PYTHONPATH.

Writes a line to the file named by TRAIN_METER at the first forward pass of a model and at the end
of every optimizer step, by torch's own global hooks: kind, wall seconds since the epoch, CPU
seconds of the process; and at exit the most MiB that CUDA allocated. The tools are not changed, and
nothing is imported that they do not import.
"""

import atexit
import importlib.abc
import importlib.util
import os
import sys
import time


def _stamp(kind):
    with open(os.environ["TRAIN_METER"], "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(f"{kind} {time.time()} {time.process_time()}\n")


def _stamp_cuda():
    import torch

    if torch.cuda.is_initialized():
        with open(os.environ["TRAIN_METER"], "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"cuda {torch.cuda.max_memory_allocated() / 2**20}\n")


def _install():
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def first_forward(module, _inputs):
        if hasattr(module, "config") and any(p.requires_grad for p in module.parameters()):
            handle.remove()
            _stamp("forward")

    handle = register_module_forward_pre_hook(first_forward)
    register_optimizer_step_post_hook(lambda *_: _stamp("step"))
    atexit.register(_stamp_cuda)


class _WhenTorchIsThere(importlib.abc.MetaPathFinder):
    """Calls `_install` at torch.optim.lr_scheduler: torch.nn and the optimizers are there."""

    def find_spec(self, name, path=None, target=None):  # noqa: ARG002
        if name != "torch.optim.lr_scheduler":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _install()

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("TRAIN_METER"):
    sys.meta_path.insert(0, _WhenTorchIsThere())
