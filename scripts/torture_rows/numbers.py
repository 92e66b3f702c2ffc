"""NaN and infinity in a base, a loss, a gradient, a weight, a checkpoint: found in that step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import Whole, judge
from torture_rows.lab import BAD, GOOD, HANG, STEPS, Case, Ended, Lab, certified, replace_methods

BAD_NUMBERS = {"NaN": float("nan"), "infinity": float("inf"), "-infinity": float("-inf")}
WAYS = ("loss", "gradient", "weight", "loss alone")


def injecting(way: str, step: int, value: float, times: int = 1) -> Callable[[], None]:
    """Return what puts `value` into a loss, a gradient or a weight of one step, from 0."""

    def begin() -> None:
        import torch

        from ftlevel.training.trainer import FtlevelTrainer

        left = [times]
        compute, training = FtlevelTrainer.compute_loss, FtlevelTrainer.training_step
        create = FtlevelTrainer.create_optimizer

        def is_time(trainer: FtlevelTrainer) -> bool:
            is_step = trainer.state.global_step == step and not trainer.is_alone
            return is_step and left[0] > 0

        def compute_loss(self, model, inputs, *more, **settings):  # type: ignore[no-untyped-def]
            loss = compute(self, model, inputs, *more, **settings)
            if way == "loss" and model.training and is_time(self):
                left[0] -= 1
                return loss * value
            if way == "loss alone" and model.training and is_time(self):
                left[0] -= 1
                return loss + (torch.tensor(value) - loss).detach()
            return loss

        def training_step(self, model, *more, **settings):  # type: ignore[no-untyped-def]
            loss = training(self, model, *more, **settings)
            if way == "gradient" and is_time(self):
                left[0] -= 1
                found = [p for p in model.parameters() if p.grad is not None]
                found[len(found) // 2].grad.view(-1)[0] = value
            return loss

        def create_optimizer(self, *more, **settings):  # type: ignore[no-untyped-def]
            optimizer = create(self, *more, **settings)

            def spoil(*_: object) -> None:
                if way == "weight" and is_time(self):
                    left[0] -= 1
                    weight = optimizer.param_groups[0]["params"][-1]
                    weight.data.view(-1)[0] = value

            optimizer.register_step_post_hook(spoil)
            return optimizer

        replace_methods(
            FtlevelTrainer, compute_loss=compute_loss, training_step=training_step,
            create_optimizer=create_optimizer,
        )  # fmt: skip

    return begin


def break_numbers(lab: Lab, count: int) -> Iterator[Case]:
    """In training at any step, with each of --on-nonfinite; in a base; in a checkpoint."""
    whole = Whole(lab)
    for number in range(count):
        word = lab.random.choice(list(BAD_NUMBERS))
        if number % 6 == 5:
            yield _in_the_base(lab, word)
        elif number % 6 == 4:
            yield _in_a_checkpoint(lab, word, whole)
        else:
            step = lab.random.choice((0, 1, STEPS // 2, STEPS - 1))
            yield _in_training(lab, WAYS[number % 4], step, word, whole)


def _in_training(lab: Lab, way: str, step: int, word: str, whole: Whole) -> Case:
    how = lab.random.choice(("stop", "stop", "skip", "rollback"))
    words = f"{word} in the {way} of step {step + 1}, {how}"
    run = lab.folder()
    ended = lab.run(lab.training(run, "--on-nonfinite", how),
                    injecting(way, step, BAD_NUMBERS[word]))  # fmt: skip
    if ended.hung:
        return Case(HANG, words)
    goes_on = how == "skip" and way != "weight"
    goes_on |= how == "rollback" and step > 0  # before the first checkpoint it stops
    if goes_on:
        good = ended.code == 0 and f"step {step + 1}" in ended.err and _is_finite(run)
        shutil.rmtree(run)
        return Case(GOOD if good else BAD, words, f"exit {ended.code}: {ended.err[-500:]}", how)
    if ended.code != 1 or ended.is_raw or f"step {step + 1}" not in ended.err:
        return Case(BAD, words, f"exit {ended.code}: {ended.err[-500:]}")
    if len(certified(run)) > step or not all(map(_is_finite, certified(run))):
        return Case(BAD, words, "it was saved")
    again = lab.run(lab.training(run, "--on-nonfinite", how, "--resume"))
    case = judge(words, run, again, whole.digest, "stopped, and went on")
    shutil.rmtree(run, ignore_errors=True)
    return case


def _in_the_base(lab: Lab, word: str) -> Case:
    from safetensors.torch import load_file, save_file

    copy = lab.folder()
    shutil.copytree(lab.base, copy)
    tensors = load_file(copy / "model.safetensors")
    name = lab.random.choice(sorted(tensors))
    value = lab.random.choice((BAD_NUMBERS[word], 3e38))
    tensors[name].view(-1)[lab.random.randrange(tensors[name].numel())] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    run = lab.folder()
    arguments = [str(copy) if a == str(lab.base) else a for a in lab.training(run)]
    ended = lab.run(arguments)
    shutil.rmtree(copy)
    named = name.removeprefix("model.") in ended.err or "model." + name in ended.err
    return _refused(f"{value} in {name} of the base", ended, named)


def _in_a_checkpoint(lab: Lab, word: str, whole: Whole) -> Case:
    """A certified checkpoint with NaN in it, as an older ftlevel may have left it."""
    from safetensors.torch import load_file, save_file

    from ftlevel.artifacts.checkpoints import certify

    run = lab.folder()
    lab.run(lab.training(run), injecting("weight", STEPS - 2, BAD_NUMBERS[word]))
    newest = certified(run)[-1]
    path = newest / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] = BAD_NUMBERS[word]
    save_file(tensors, path, metadata={"format": "pt"})
    certify(newest)
    ended = lab.run(lab.training(run, "--resume"))
    words = f"{word} in a certified checkpoint"
    case = judge(words, run, ended, whole.digest, "an older checkpoint")
    if case.verdict == GOOD and newest.name not in ended.err:
        case = Case(BAD, words, ended.err)
    shutil.rmtree(run)
    return case


def _refused(words: str, ended: Ended, named: bool) -> Case:
    if ended.hung:
        return Case(HANG, words)
    good = ended.code == 2 and not ended.is_raw and named
    return Case(GOOD if good else BAD, words, f"exit {ended.code}: {ended.err[-500:]}", "refused")


def _is_finite(folder: Path) -> bool:
    from ftlevel.artifacts.checkpoints import find_not_finite

    files = list(folder.rglob("*.safetensors"))
    return bool(files) and all(find_not_finite(path) is None for path in files)
