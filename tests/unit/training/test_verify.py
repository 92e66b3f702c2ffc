"""Tests of `--verify-fast` and of the check on a few rows: detected errors, and no side effects."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.errors import RunError
from ftlevel.events import NullListener
from ftlevel.fast.fused_lora import FusedLoraFunction
from ftlevel.models.loading import silence_loggers
from ftlevel.training import verify as proof
from ftlevel.training.model import load_training_model
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.step_comparison import (
    Bounds,
    FastStepError,
    GradientDifference,
    StepResult,
    Steps,
    compare_gradients,
    get_tensor_type,
    perturb_weights,
)
from ftlevel.training.trainer import FtlevelTrainer
from ftlevel.training.verify import (
    MAX_TOKENS,
    cast_to_float64,
    check_fast_step,
    fits_in_float64,
    select_compared_rows,
    truncate_example,
    verify_step,
)


def build_run(
    model: object, dtype: str, *, data: Path | None = None, task: str | None = None, **method: Any
) -> Any:
    """Return a small run and its model with the fast step."""
    config = TrainConfig.model_validate({
        "task": task or "text-generation",
        "model": {"name_or_path": str(model), "dtype": dtype},
        "data": {"dataset": str(data or "builtin:docstrings"), "max_samples": 24,
                 "overlong": "drop"},
        "method": {"kind": "lora", **method},
        "train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    })  # fmt: skip
    with silence_loggers():
        run = resolve(config)
        return run, load_training_model(run, NullListener())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def small_run(request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]) -> Any:
    return build_run(tiny_model_dir("llama", chat=True), request.param)


def set_verify(run: Run, verify: bool | None) -> Run:
    return run.with_settings("speed", verify=verify)


def scale_gradient(argument: int, factor: float) -> Callable[..., Any]:
    """Return LoRA's fused backward pass with one gradient multiplied by `factor`."""
    original = FusedLoraFunction.backward

    def scaled_backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        results = list(original(ctx, *gradients))
        results[argument] = None if results[argument] is None else results[argument] * factor
        return tuple(results)

    return staticmethod(scaled_backward)


@pytest.mark.parametrize(
    ("argument", "factor"),
    [(2, -1.0), (2, 0.0), (2, 1.02), (2, 1.04), (3, 1.02), (3, 1.04)],
)
def test_wrong_lora_gradient_raises(small_run, monkeypatch, argument, factor):
    monkeypatch.setattr(FusedLoraFunction, "backward", scale_gradient(argument, factor))
    tensor = r"model\.layers\.\d\.[a-z_.]+\.lora_" + "xxAB"[argument]
    with pytest.raises(FastStepError, match=rf"gradients of {tensor} differ by .* in float32"):
        verify_step(*small_run, NullListener())


@pytest.mark.parametrize("factor", [1.01, 2.0])
def test_wrong_lora_update_raises(small_run, monkeypatch, factor):
    original = FusedLoraFunction.forward

    def wrong_forward(ctx: Any, x: torch.Tensor, dropped: Any, a: Any, b: Any, *others: Any) -> Any:
        output = original(ctx, x, dropped, a, b, *others)
        with torch.no_grad():
            return output + (factor - 1) * (x @ a.to(x.dtype).T @ b.to(x.dtype).T) * others[2]

    monkeypatch.setattr(FusedLoraFunction, "forward", staticmethod(wrong_forward))
    with pytest.raises(RunError, match="the fast step is not the plain one"):
        verify_step(*small_run, NullListener())


def test_wrong_target_count_raises(small_run, monkeypatch):
    original = FtlevelTrainer.count_targets
    monkeypatch.setattr(FtlevelTrainer, "count_targets", lambda *args: original(*args) + 1)
    with pytest.raises(RunError, match="losses differ by"):
        verify_step(*small_run, NullListener())


def test_correct_step_passes_without_side_effects(small_run):
    run, adapted = small_run
    before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    pointers = {name: p.data_ptr() for name, p in adapted.model.named_parameters()}
    result = verify_step(set_verify(run, True), adapted, NullListener())
    assert result.steps == 3
    assert result.rows == 24
    assert 0 < result.gradient < 1e-4
    assert result.dropout is None, "nothing is dropped"
    after = adapted.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pointers == {name: p.data_ptr() for name, p in adapted.model.named_parameters()}
    assert all(p.grad is None for p in adapted.model.parameters())
    assert verify_step(set_verify(run, False), adapted, NullListener()) is None


def test_error_under_dropout_is_detected_by_full_verification(monkeypatch, tiny_model_dir):
    run, adapted = build_run(tiny_model_dir("llama", chat=True), "float32", lora_dropout=0.2)
    clean = verify_step(set_verify(run, True), adapted, NullListener())
    assert clean.dropout is not None
    assert clean.dropout < 1e-4
    original = FusedLoraFunction.forward

    def wrong_forward(ctx: Any, x: torch.Tensor, dropped: torch.Tensor, *others: Any) -> Any:
        is_dropped = not torch.equal(dropped, x)
        return original(ctx, x, dropped * 1.02 if is_dropped else dropped, *others)

    monkeypatch.setattr(FusedLoraFunction, "forward", staticmethod(wrong_forward))
    assert verify_step(run, adapted, NullListener()) is not None, "nothing is dropped in it"
    with pytest.raises(RunError, match="gradients with dropout"):
        verify_step(set_verify(run, True), adapted, NullListener())


def test_rounding_of_equal_length_pairs_is_accepted(tmp_path):
    """Shared parts of two answers cancel, so the difference has a larger relative error.

    The fast step is nearer to float64 than the plain one here. Another order of rows changes the
    gradient by 1e-5; the two steps differ by 1.5e-3 on an AMD EPYC and by 4e-5 on an Intel Xeon
    with AMX.
    """
    rows = [
        {"prompt": f"What is {a}+{b}?", "chosen": f"It is {a + b}.", "rejected": f"It is {a + 1}."}
        for a in range(2, 5) for b in range(2, 5)
    ]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run, adapted = build_run("builtin:tiny-llama", "float32", data=data, task="reward")
    verified = verify_step(run, adapted, NullListener())
    assert verified.gradient > 2e-5  # more than another order of rows explains


def create_difference(difference: float, norm: float) -> GradientDifference:
    return GradientDifference(difference=difference**2, reference=norm**2)


def test_vanishing_gradient_is_compared_with_other_tensors():
    """Keys of a saturated attention: their gradient consists of rounding errors only."""
    names = [f"layers.{i}.q_proj.lora_A.default.weight" for i in range(8)]
    queries = dict.fromkeys(names, create_difference(1e-6, 1.0))
    key = "layers.0.k_proj.lora_A.default.weight"
    bounds = Bounds({**queries, key: create_difference(1e-8, 1e-8)}, 0.0)
    bounds.check_gradients({**queries, key: create_difference(9e-7, 1e-8)})
    with pytest.raises(FastStepError, match="k_proj"):
        bounds.check_gradients({**queries, key: create_difference(1e-3, 1e-8)})


def test_bias_whose_terms_cancel_has_rounding_errors():
    """Both gradients of the bias of scores under a softmax are sums of rounding errors."""

    def check(name):
        differences = {name: GradientDifference(1e-16, 1e-16), "w": create_difference(0, 1e-3)}
        bounds = Bounds(dict.fromkeys(differences, GradientDifference()), 0.0)
        return bounds.check_gradients(differences)

    assert check("classifier.bias") < 1e-4
    with pytest.raises(FastStepError, match=r"classifier\.weight"):
        check("classifier.weight")


def test_gradient_where_there_is_none_is_a_difference():
    bounds = Bounds({"w": GradientDifference()}, 0.0)
    assert bounds.check_gradients({"w": GradientDifference()}) == 0
    with pytest.raises(FastStepError, match="gradients of w differ by inf"):
        bounds.check_gradients({"w": create_difference(1e-3, 0.0)})


def test_loss_of_zero_is_compared():
    """The first loss of reinforcement learning is 0; its terms cancel."""
    bounds = Bounds({}, 1e-7)
    assert bounds.check_loss(2e-8, 0.0) == pytest.approx(2e-5)
    with pytest.raises(FastStepError, match=r"losses differ by 0\.001 of 0 in float32"):
        bounds.check_loss(1e-3, 0.0)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_compare_gradients_in_chunks(chunk_size, monkeypatch):
    monkeypatch.setattr("ftlevel.training.step_comparison._CHUNK_SIZE", chunk_size)
    actual = {"w": torch.arange(10.0).reshape(2, 5), "extra": torch.ones(4)}
    expected = {"w": torch.full((2, 5), 2.0), "zero": torch.zeros(2)}
    assert compare_gradients(actual, expected) == {
        "w": GradientDifference(145.0, 40.0),  # Σ (n − 2)², Σ 4
        "extra": GradientDifference(4.0, 0.0),
        "zero": GradientDifference(0.0, 0.0),
    }
    assert create_difference(0.5, 5.0).distance == pytest.approx(0.1)
    assert GradientDifference(4.0, 0.0).distance == float("inf"), "where there should be none"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "lora_A"),
        ("base_model.model.model.layers.3.mlp.adapters.default.down.bias", "down.bias"),
        ("base_model.model.classifier.modules_to_save.default.weight", "modules_to_save"),
        ("model.layers.11.mlp.up_proj.weight", "up_proj.weight"),
        ("vera_lambda_d.default", "vera_lambda_d"),
    ],
)
def test_get_tensor_type(name, kind):
    assert get_tensor_type(name) == kind


def test_perturb_weights_changes_and_restores_zeros():
    model = torch.nn.Linear(16, 8, bias=False)
    torch.nn.init.zeros_(model.weight)
    with perturb_weights(model):
        assert float(model.weight.detach().std()) == pytest.approx(0.05, rel=0.3)
    assert not model.weight.any()


def row(length: int, labels: Any) -> Encoded:
    return Encoded(list(range(length)), labels, 0)


def test_select_compared_rows_within_token_limit():
    rows = [row(length, [IGNORED] * (length - 1) + [1]) for length in (90, 30, 500, 60, 80, 70)]
    selected = select_compared_rows(rows)
    assert [len(r.input_ids) for r in selected] == [30, 60, 70, 80]
    assert sum(len(r.input_ids) for r in selected) <= MAX_TOKENS
    assert len(select_compared_rows(rows[2:3] * 2)) == 2, (
        "two at least, so that they could see each other"
    )


def test_truncate_example_keeps_targets():
    truncated = truncate_example(row(502, [IGNORED] * 300 + [7, 8] + [IGNORED] * 200), 100)
    assert truncated.input_ids == list(range(202, 302))
    assert truncated.labels[-2:] == [7, 8]
    classified = truncate_example(row(502, 3), 100)
    assert (classified.input_ids, classified.labels) == (list(range(100)), 3)
    span = row(502, (400, 410))
    assert truncate_example(span, 100) is span
    assert truncate_example(row(2000, (400, 410)), 100) is None


@pytest.fixture
def run_with_hidden_rounding(small_run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a run whose rounding errors do not show when rows are reordered.

    As with `olora` on an encoder-decoder whose rows share a prefix: there the plain step is 2.5e-4
    from float64 in either order, and the fast one 3e-5.
    """
    original = Steps.reference

    def rounded_reference(self: Steps, rows: Any, size: int) -> StepResult:
        step = original(self, rows, size)
        if next(iter(step.gradients.values())).dtype == torch.float64:
            return step
        return replace(step, gradients={n: g * 1.001 for n, g in step.gradients.items()})

    monkeypatch.setattr(Steps, "reference", rounded_reference)
    monkeypatch.setattr(
        Steps,
        "perturbed_reference",
        lambda self, rows: self.reference(rows, len(rows)),
    )
    return small_run


def test_float64_accepts_fast_step_if_plain_step_is_inexact(run_with_hidden_rounding):
    result = verify_step(*run_with_hidden_rounding, NullListener())
    assert result.exact == pytest.approx(1e-3, rel=0.1)
    assert result.gradient < 1e-4


@pytest.mark.parametrize(
    ("argument", "factor"),
    [(2, 1.001), (3, 1.001),
     pytest.param(2, 1.02, marks=pytest.mark.sweep), pytest.param(3, 0.0, marks=pytest.mark.sweep)],
)  # fmt: skip
def test_wrong_gradient_raises_in_float64(run_with_hidden_rounding, monkeypatch, argument, factor):
    """Errors of 1.001 are as large as the plain step's own in float32."""
    monkeypatch.setattr(FusedLoraFunction, "backward", scale_gradient(argument, factor))
    with pytest.raises(FastStepError, match=r"gradients of .* .rounding explains 0\.0001"):
        verify_step(*run_with_hidden_rounding, NullListener())


def scale_in_float32(gradient: float, loss: float) -> Any:
    """Return a fast step that is scaled in float32 and correct in float64."""
    original = Steps.fast

    def scaled_step(self: Steps, rows: Any) -> StepResult:
        step = original(self, rows)
        if next(iter(step.gradients.values())).dtype == torch.float64:
            return step
        gradients = {name: g * gradient for name, g in step.gradients.items()}
        return replace(step, loss=step.loss * loss, gradients=gradients)

    return scaled_step


@pytest.mark.parametrize(("gradient", "loss"), [(0.97, 1.0), (0.0, 1.0), (0.994, 1.001)])
def test_error_larger_than_kinks_explain_raises(
    run_with_hidden_rounding, monkeypatch, gradient, loss
):
    monkeypatch.setattr(Steps, "fast", scale_in_float32(gradient, loss))
    with pytest.raises(RunError, match="the fast step is not the plain one"):
        verify_step(*run_with_hidden_rounding, NullListener())


def test_step_correct_in_float64_only_is_accepted(run_with_hidden_rounding, monkeypatch):
    """As where rounding moves an activation across ReLU's kink: 6e-3 on a tiny T5."""
    monkeypatch.setattr(Steps, "fast", scale_in_float32(0.994, 1.0))
    result = verify_step(*run_with_hidden_rounding, NullListener())
    assert result.kinks
    assert result.gradient < 1e-5


@pytest.mark.parametrize("small_run", ["float32"], indirect=True)
def test_difference_raises_without_memory_for_float64(run_with_hidden_rounding, monkeypatch):
    monkeypatch.setattr(proof, "fits_in_float64", lambda *_: False)
    with pytest.raises(RunError, match=r"differ by 0\.001"):
        verify_step(*run_with_hidden_rounding, NullListener())


def test_cast_to_float64_restores_dtype_and_memory():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    before = {name: p.clone() for name, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    assert fits_in_float64(model, "cpu")
    with cast_to_float64(model):
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model[1].weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert not fits_in_float64(model, "cpu"), "nothing dequantizes it to float64"


class Choices(NullListener):
    """Collects the lines that a run prints."""

    def __init__(self) -> None:
        self.lines: list[Choice] = []

    def choices(self, _: str, choices: Any) -> None:
        self.lines += choices


def raise_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


@pytest.mark.parametrize("small_run", ["bfloat16"], indirect=True)
@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        (proof, "free_memory_bytes", lambda _: 1 << 20, "too little memory for it in float32"),
        (Steps, "reference", raise_out_of_memory, "too little memory for it in float32"),
        (proof, "is_sharded", lambda _: True, "the sharded weights are in bfloat16"),
        (proof, "has_forced_tf32", lambda _: True,
         "NVIDIA_TF32_OVERRIDE rounds float32 products to TF32"),
    ],
)  # fmt: skip
def test_comparison_is_skipped_with_a_note(small_run, monkeypatch, owner, name, value, reason):
    monkeypatch.setattr(owner, name, value)
    listener = Choices()
    assert verify_step(*small_run, listener) is None
    assert listener.lines == [Choice("fast step", "not compared with the plain", reason)]


@pytest.mark.parametrize("small_run", ["bfloat16"], indirect=True)
def test_settings_of_the_run_do_not_change_the_comparison(small_run, monkeypatch):
    """Products are exact although TF32 is on, and losses are not scaled as float16 needs."""
    settings, scaler = [], torch.amp.GradScaler("cpu", init_scale=65_536.0)  # type: ignore[attr-defined]
    original, trainers = Steps.fast, []

    def fast(self: Steps, rows: Any) -> StepResult:
        settings.append(torch.backends.cuda.matmul.fp32_precision)
        self.trainer.accelerator.scaler = scaler
        trainers.append(self.trainer)
        return original(self, rows)

    monkeypatch.setattr(Steps, "fast", fast)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        result = verify_step(*small_run, NullListener())
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert result.gradient < 1e-4
    assert settings == ["ieee"]
    assert trainers[0].accelerator.scaler is scaler


def test_error_in_another_process_is_raised(small_run):
    class Others(Processes):
        def all_gather(self, value: Any) -> Any:
            return [value, "gradients of w differ by 2"]

    assert check_fast_step(*small_run, Processes(), NullListener()) is not None
    with pytest.raises(FastStepError) as error:
        check_fast_step(*small_run, Others(), NullListener())
    assert error.value.problem == "gradients of w differ by 2"
