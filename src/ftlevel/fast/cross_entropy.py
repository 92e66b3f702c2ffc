"""Chunked cross-entropy on supervised tokens: head, loss and gradient, one chunk at a time.

    L = Σᵢ −log softmax(f(zᵢ))[yᵢ],  z = head(h)    ∂L/∂f(zᵢ) = softmax(f(zᵢ)) − onehot(yᵢ)

h is the last hidden state, y a target, f the model's logit softcap or scale. The head runs only
where a target is predicted, so memory does not grow with vocabulary times sequence length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftlevel.fast.packing import UnsupportedModelError, current_layout, keep_packed
from ftlevel.models.hardware import free_memory_bytes

CHUNK_LOGITS = 8_000_000
"""Logits per chunk: 32 MB in float32, the size of a CPU's last-level cache."""

MIN_TARGETS = 64
"""Minimum targets per chunk; with fewer, reading the head's weights dominates."""

MAX_GPU_TARGETS = 4096
"""Maximum targets per chunk on a GPU; more are no faster."""

GPU_DIVISOR = 16
"""A chunk's logits may use 1 / GPU_DIVISOR of the free GPU memory."""

LOGIT_BYTES = 14
"""Bytes per logit: 2 (half), 4 (float32), 4 (probability, then gradient), 2 (half); 2 spare."""


FLOAT16_SCALE = 1024.0
"""Factor of gradients in float16 within the head: without it, probabilities below 3e-8 are 0."""


def targets_per_chunk(free_bytes: int | None, vocab_size: int) -> int:
    """Returns the number of targets per chunk, given free GPU memory in bytes (CPU: None)."""
    if free_bytes is None:
        return max(MIN_TARGETS, CHUNK_LOGITS // vocab_size)
    return max(
        MIN_TARGETS, min(MAX_GPU_TARGETS, free_bytes // GPU_DIVISOR // (LOGIT_BYTES * vocab_size))
    )


Observe = Callable[[Tensor, Tensor], None]
LossAndGradient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits (chunk, vocabulary) and the slice of targets → summed loss, and its gradient."""


def losses_and_gradient(
    logits: Tensor, targets: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the losses (targets,) and the gradient of their sum for `logits`, in float32.

    `logits` has the shape (targets, vocabulary). The largest probability p gives the normalizer
    cheaply: log Σⱼ exp xⱼ = max x − log max p.
    """
    x32 = logits.float()
    target_logits = x32.gather(-1, targets[:, None])[:, 0]
    probabilities = torch.softmax(x32, -1)
    normalizer = x32.amax(-1) - probabilities.amax(-1).log()
    ones = probabilities.new_full((len(targets), 1), smoothing - 1.0)
    if smoothing:
        target_logits = (1 - smoothing) * target_logits + smoothing * x32.mean(-1)
        probabilities -= smoothing / x32.shape[-1]
    return normalizer - target_logits, probabilities.scatter_add_(-1, targets[:, None], ones)


def get_logits_transform(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns the function from the head's output to logits: it applies scale, softcap and bias."""
    config: Any = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", 0) or 1)

    def transform(logits: Tensor) -> Tensor:
        if scale != 1:
            logits = logits * scale
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        bias = getattr(model, "final_logits_bias", None)  # its current value
        return logits if bias is None else logits + bias.to(logits.device)

    return transform


class _Call(threading.local):
    """Per-thread `request` (positions, function) to the hook on the head, and its `result`."""

    request: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None
    result: Tensor | None = None


class ChunkedCrossEntropy:
    """Computes a model's head and loss at given positions, inside its forward pass.

    A hook on the head of `model` (modified) computes the result from the head's input; afterwards
    the head runs on no position. Precision, adapters and head weights are the model's own.
    Raises UnsupportedModelError if the model has no language head.
    """

    def __init__(self, model: nn.Module) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no language head")
        self._head = head
        self._transform = get_logits_transform(model)
        vocab_size = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        self._vocab_size = vocab_size
        is_gpu = next(head.parameters()).device.type == "cuda"
        self.fit_chunks(free_memory_bytes("cuda") if is_gpu else None)
        self._call = _Call()
        self._hook = head.register_forward_pre_hook(self._on_head, prepend=True)

    def fit_chunks(self, free_bytes: int | None) -> None:
        """Set the number of targets per chunk for free GPU memory in bytes (CPU: None)."""
        self._chunk = targets_per_chunk(free_bytes, self._vocab_size)

    def remove(self) -> None:
        """Remove the hook from the model's head."""
        self._hook.remove()

    def loss_sum(
        self,
        forward: Callable[[], Any],
        at: Tensor,
        targets: Tensor,
        observe: Observe | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Returns the summed negative log-likelihood of `targets` in nats (a scalar, float32).

        Args:
            forward: calls the model on a batch; UnsupportedModelError if that does not call the
                head.
            at: (targets,) flat indices into (batch, seq) of the positions that predict the targets.
            targets: (targets,) token ids.
            observe: receives the logits and targets of each chunk; only without gradients.
            smoothing: label smoothing ε; only with gradients.
        """
        if torch.is_grad_enabled():

            def compute(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
                losses, gradient = losses_and_gradient(logits, targets[chunk], smoothing)
                return losses.sum(), gradient

            return self._compute(forward, at, partial(self._sum_loss, compute=compute))
        return self._compute(forward, at, partial(self._observe, targets=targets, observe=observe))

    def custom_loss_sum(
        self, forward: Callable[[], Any], at: Tensor, loss_of: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """Returns the sum of `loss_of` over the chunks (a scalar, float32).

        `loss_of` maps logits (chunk, vocabulary) and the chunk's slice of the targets to a scalar.
        Other arguments are those of `loss_sum`.
        """

        def compute(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = logits.detach().float().requires_grad_()
                loss = loss_of(leaf, chunk)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return self._compute(forward, at, partial(self._sum_loss, compute=compute))

    def likelihoods(
        self, forward: Callable[[], Any], at: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Returns the log-likelihood of each target in nats, (targets,) in float32.

        Logits are divided by `temperature`. Other arguments are those of `loss_sum`.
        """

        def scale_logits(hidden_states: Tensor) -> Tensor:
            return self._logits(hidden_states) / temperature

        def compute(hidden_states: Tensor) -> Tensor:
            compute_logits = self._logits if temperature == 1 else scale_logits
            return _Likelihoods.apply(  # type: ignore[no-untyped-call]
                hidden_states, targets, compute_logits, self._chunk, *self._trained()
            )

        return self._compute(forward, at, compute)

    def _compute(
        self, forward: Callable[[], Any], at: Tensor, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Run `forward`; returns `compute` of the head's input hidden states (targets, hidden)."""
        self._call.request, self._call.result = (at, compute), None
        try:
            with keep_packed():
                forward()
        finally:
            self._call.request = None
        if self._call.result is None:
            raise UnsupportedModelError("the model does not call its language head")
        result, self._call.result = self._call.result, None
        return result

    def _on_head(self, head: nn.Module, args: tuple[Tensor, ...]) -> Any:  # noqa: ARG002 - a hook
        if self._call.request is None:
            return None
        at, compute = self._call.request
        self._call.request = None  # the head is called again below
        hidden_states, layout = args[0], current_layout()
        if layout is not None and not layout.is_single_row:  # `keep_packed`
            at = layout.restore.index_select(0, at)
        self._call.result = compute(hidden_states.flatten(0, -2).index_select(0, at))
        return (hidden_states[:1, :0],)

    def _trained(self) -> list[Tensor]:
        return [p for p in self._head.parameters() if p.requires_grad]

    def _sum_loss(self, hidden_states: Tensor, compute: LossAndGradient) -> Tensor:
        return _SummedLoss.apply(  # type: ignore[no-untyped-call]
            hidden_states, compute, self._logits, self._chunk, *self._trained()
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        # No batch dimension: with one, torch's backward pass copies the head's weight.
        return self._transform(self._head(hidden_states))

    def _observe(self, hidden_states: Tensor, targets: Tensor, observe: Observe | None) -> Tensor:
        total = torch.zeros((), device=hidden_states.device)
        for chunk, labels in _chunks(hidden_states, targets, self._chunk):
            logits = self._logits(chunk)
            total += functional.cross_entropy(logits.float(), labels, reduction="sum")
            if observe is not None:
                observe(logits, labels)
        return total


def _chunks(hidden_states: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden_states, size), torch.split(targets, size), strict=True)


def _cast_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * FLOAT16_SCALE if dtype == torch.float16 else gradient).to(dtype)


class _SummedLoss(torch.autograd.Function):
    """Loss summed over targets; forward also computes the gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        compute: LossAndGradient,
        compute_logits: Callable[[Tensor], Tensor],
        size: int,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=hidden_states.device)
        grad_hidden_states = torch.empty_like(hidden_states)
        grad_parameters = [torch.zeros_like(p) for p in parameters]
        start = 0
        for chunk in torch.split(hidden_states, size):
            positions = slice(start, start + len(chunk))
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                logits = compute_logits(leaf)
            with torch.no_grad():
                loss, gradient = compute(logits, positions)
                total += loss
            ctx.scale = FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
            grad_chunk, *grad_head = torch.autograd.grad(
                logits, [leaf, *parameters], _cast_gradient(gradient, logits.dtype)
            )
            grad_hidden_states[positions] = grad_chunk
            start = positions.stop
            for total_gradient, part in zip(grad_parameters, grad_head, strict=True):
                total_gradient += part
        ctx.save_for_backward(grad_hidden_states, *grad_parameters)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = grad_output / ctx.scale  # in float32: the gradient scaler's exceed float16
        gradients = (part * grad_output.to(part.dtype) for part in ctx.saved_tensors)
        grad_hidden_states, *grad_parameters = gradients
        return grad_hidden_states, None, None, None, *grad_parameters


class _Likelihoods(torch.autograd.Function):
    """Log-likelihoods of targets; if the head is frozen, forward computes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        targets: Tensor,
        compute_logits: Callable[[Tensor], Tensor],
        size: int,
        *parameters: Tensor,
    ) -> Tensor:
        likelihoods = torch.empty(len(targets), device=hidden_states.device)
        needs_gradient = hidden_states.requires_grad and not parameters
        grad_hidden_states = torch.empty_like(hidden_states) if needs_gradient else hidden_states
        start = 0
        for chunk, chunk_targets in _chunks(hidden_states, targets, size):
            positions = slice(start, start + len(chunk_targets))
            with torch.set_grad_enabled(needs_gradient):
                leaf = chunk.detach().requires_grad_(needs_gradient)
                logits = compute_logits(leaf)
            with torch.no_grad():
                loss, gradient = losses_and_gradient(logits, chunk_targets)
                likelihoods[positions] = -loss
            if needs_gradient:
                ctx.scale = FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
                (grad_hidden_states[positions],) = torch.autograd.grad(
                    logits, leaf, -_cast_gradient(gradient, logits.dtype)
                )
            start += len(chunk_targets)
        ctx.save_for_backward(grad_hidden_states, targets, *parameters)
        device = hidden_states.device.type
        ctx.compute_logits, ctx.size, ctx.has_gradient = compute_logits, size, needs_gradient
        ctx.precision = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        return likelihoods

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, targets, *parameters = ctx.saved_tensors
        if ctx.has_gradient:
            grad_output = grad_output / ctx.scale
            return hidden_states * grad_output[:, None].to(hidden_states.dtype), None, None, None
        grad_hidden_states = torch.empty_like(hidden_states)
        grad_parameters = [torch.zeros_like(p) for p in parameters]
        start = 0
        for chunk, chunk_targets in _chunks(hidden_states, targets, ctx.size):
            positions = slice(start, start + len(chunk_targets))
            with torch.enable_grad(), torch.autocast(*ctx.precision):
                leaf = chunk.detach().requires_grad_()
                logits = ctx.compute_logits(leaf)
            _, gradient = losses_and_gradient(logits.detach(), chunk_targets)
            gradient = gradient.float().mul_(-grad_output[positions, None])
            grad_hidden_states[positions], *grad_head = torch.autograd.grad(
                logits, [leaf, *parameters], gradient.to(logits.dtype)
            )
            for total, part in zip(grad_parameters, grad_head, strict=True):
                total += part
            start += len(chunk_targets)
        return grad_hidden_states, None, None, None, *grad_parameters
