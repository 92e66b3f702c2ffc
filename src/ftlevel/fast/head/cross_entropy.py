"""Chunked cross-entropy on supervised tokens: head, loss and gradient, a chunk at a time.

    L = Σᵢ −log softmax(f(zᵢ))[yᵢ],  z = head(h)    ∂L/∂f(zᵢ) = softmax(f(zᵢ)) − onehot(yᵢ)

What depends on how likely each token is (`likelihoods`) gets these one by one, and gives each a
gradient of its own.

A language model scores every token of its vocabulary at every position, and most positions are
prompt or padding. Here the head's input is taken at the positions that predict a target, a chunk at
a time, so memory does not grow with the vocabulary times the sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftlevel.fast.kernels import NO_KERNELS, Kernels
from ftlevel.fast.packing import NotServedError
from ftlevel.models.hardware import free_memory_bytes

CHUNK_SCORES = 4_000_000
"""Scores of a chunk: 24 MB in float32 and bfloat16, which a CPU's last cache still holds."""

FEWEST = 64
"""Targets of a chunk at least: fewer would read the head's weights for too little work."""

GPU_TARGETS = 4096
"""Targets of a chunk at most, on a GPU, which has no cache that scores could stay in: with more the
products are no faster."""

GPU_SHARE = 16
"""The part of the free memory, one of so many, that a chunk's scores may take there."""

SCORE_BYTES = 14
"""Of a score: in half precision, in float32, its probability, and the gradient in both."""


def targets_a_chunk(free: int | None, vocabulary: int) -> int:
    """Return how many targets are scored at once, over a `vocabulary`.

    Args:
        free: bytes of a GPU once the model is on it; None on a CPU.
        vocabulary: scores of a target.
    """
    if free is None:
        return max(FEWEST, CHUNK_SCORES // vocabulary)
    return max(FEWEST, min(GPU_TARGETS, free // GPU_SHARE // (SCORE_BYTES * vocabulary)))


Observe = Callable[[torch.Tensor, torch.Tensor], None]
LossAndGradient = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Scores (chunk, vocabulary), and which targets → their summed loss, its gradient by scores."""
LossesAndGradient = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Scores (chunk, vocabulary), and their targets → their losses, the gradient of the sum."""


def finish_scores(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what `model` does to the scores that its head gives.

    Args:
        model: a transformers model: Gemma caps its scores, Cohere and Granite scale them, BART adds
            a constant.
    """
    config: Any = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", 0) or 1)

    def finish(scores: torch.Tensor) -> torch.Tensor:
        if scale != 1:
            scores = scores * scale
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        bias = getattr(model, "final_logits_bias", None)  # the one that it has now
        return scores if bias is None else scores + bias.to(scores.device)

    return finish


class _Call(threading.local):
    """What a forward pass asks for and gets; several may be computed in parallel."""

    asked: tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None = None
    found: torch.Tensor | None = None


class ChunkedCrossEntropy:
    """Computes a model's head and loss at given positions, inside its forward pass.

    A hook takes the head's input, computes there what is asked for, and lets the model go on with
    one position, so that precision, adapters on the head and a trained head are the model's own.

    Args:
        model: a transformers model with a language head (mutated: a hook).

    Raises:
        NotServedError: the model has no such head.
    """

    def __init__(self, model: nn.Module, kernels: Kernels = NO_KERNELS) -> None:
        self._kernels = kernels
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise NotServedError(f"{type(model).__name__} has no language head")
        self._head = head
        self._finish = finish_scores(model)
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        self._vocabulary = vocabulary
        is_gpu = next(head.parameters()).device.type == "cuda"
        self.fit_chunks(free_memory_bytes("cuda") if is_gpu else None)
        self._call = _Call()
        self._hook = head.register_forward_pre_hook(self._take, prepend=True)

    def fit_chunks(self, free: int | None) -> None:
        """Have chunks be as large as `free` bytes of a GPU allow; None for those of a CPU."""
        self._chunk = targets_a_chunk(free, self._vocabulary)

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    def loss_sum(
        self,
        forward: Callable[[], Any],
        at: torch.Tensor,
        targets: torch.Tensor,
        observe: Observe | None = None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return the summed negative log likelihood of `targets` in nats (a scalar, float32).

        Args:
            forward: calls the model on a batch.
            at: (targets,) positions that predict them, in the flattened (batch, seq).
            targets: (targets,) token ids.
            observe: is given the scores and the targets of each chunk; only without gradients.
            smoothing: share ε of a target's probability that is spread over the vocabulary; only
                with gradients.

        Raises:
            NotServedError: the model never asked its head.
        """
        if torch.is_grad_enabled():

            def compute(scores: torch.Tensor, own: slice) -> tuple[torch.Tensor, torch.Tensor]:
                losses, gradient = self._losses(scores, targets[own], smoothing)
                return losses.sum(), gradient

            return self._compute(forward, at, lambda states: self._summed(states, compute))
        return self._compute(forward, at, lambda states: self._observe(states, targets, observe))

    def sum_of_losses(
        self,
        forward: Callable[[], Any],
        at: torch.Tensor,
        loss_of: Callable[[torch.Tensor, slice], torch.Tensor],
    ) -> torch.Tensor:
        """Return the sum of what `loss_of` makes of the scores of each chunk (a scalar, float32).

        Args:
            forward: calls the model on a batch.
            at: (targets,) positions, in the flattened (batch, seq).
            loss_of: is given scores (chunk, vocabulary) and which of the targets they are of, and
                returns a scalar.

        Raises:
            NotServedError: the model never asked its head.
        """

        def compute(scores: torch.Tensor, own: slice) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                leaf = scores.detach().float().requires_grad_()
                loss = loss_of(leaf, own)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return self._compute(forward, at, lambda states: self._summed(states, compute))

    def likelihoods(
        self, forward: Callable[[], Any], at: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the log-likelihood of each of `targets` in nats (targets,), in float32.

        Args:
            forward: calls the model on a batch.
            at: (targets,) positions that predict them, in the flattened (batch, seq).
            targets: (targets,) token ids.

        Raises:
            NotServedError: the model never asked its head.
        """

        def compute(states: torch.Tensor) -> torch.Tensor:
            each: torch.Tensor = _Likelihoods.apply(  # type: ignore[no-untyped-call]
                states, targets, self._scores, self._losses, self._chunk, *self._trained()
            )
            return each

        return self._compute(forward, at, compute)

    def _compute(
        self,
        forward: Callable[[], Any],
        at: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return what `compute` makes of the head's input (targets, hidden) at the places `at`."""
        self._call.asked, self._call.found = (at, compute), None
        try:
            forward()
        finally:
            self._call.asked = None
        if self._call.found is None:
            raise NotServedError("the model does not go through its language head")
        found, self._call.found = self._call.found, None
        return found

    def _take(self, head: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:  # noqa: ARG002 - a hook
        """Compute what is asked for from the head's input (batch, seq, hidden)."""
        if self._call.asked is None:
            return None
        at, compute = self._call.asked
        self._call.asked = None  # the head is called again below
        states = args[0]
        self._call.found = compute(states.flatten(0, -2).index_select(0, at))
        return (states[:1, :1],)

    def _losses(
        self, scores: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of `scores` (targets, vocabulary), and the gradient of their sum."""
        kind, vocabulary = scores.device.type, scores.shape[-1]
        formulas = self._kernels.cross_entropy(vocabulary, scores.dtype, kind)
        return formulas.cross_entropy(scores, targets, smoothing)

    def _trained(self) -> list[torch.Tensor]:
        return [p for p in self._head.parameters() if p.requires_grad]

    def _summed(self, states: torch.Tensor, compute: LossAndGradient) -> torch.Tensor:
        """Return the loss of all chunks, with its gradient."""
        total: torch.Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
            states, compute, self._scores, self._chunk, *self._trained()
        )
        return total

    def _scores(self, states: torch.Tensor) -> torch.Tensor:
        """Return (targets, vocabulary)."""
        # Without a batch dimension: with one, torch's backward pass copies the head's weight.
        scores: torch.Tensor = self._finish(self._head(states))
        return scores

    def _observe(
        self, states: torch.Tensor, targets: torch.Tensor, observe: Observe | None
    ) -> torch.Tensor:
        """Return the loss of all chunks, and show each to `observe`."""
        total = torch.zeros((), device=states.device)
        for chunk, wanted in _chunks(states, targets, self._chunk):
            scores = self._scores(chunk)
            total += functional.cross_entropy(scores.float(), wanted, reduction="sum")
            if observe is not None:
                observe(scores, wanted)
        return total


def _chunks(
    states: torch.Tensor, targets: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(torch.split(states, size), torch.split(targets, size), strict=True)


class _SummedLoss(torch.autograd.Function):
    """The loss summed over targets; its gradients are made while the scores are there."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        compute: LossAndGradient,
        scores_of: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss, and keep the gradient of `states` and of the head's `parameters`."""
        total = torch.zeros((), device=states.device)
        of_states = torch.empty_like(states)
        of_parameters = [torch.zeros_like(p) for p in parameters]
        begin = 0
        for chunk in torch.split(states, size):
            own = slice(begin, begin + len(chunk))
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                scores = scores_of(leaf)
            with torch.no_grad():
                loss, gradient = compute(scores, own)
                total += loss
            of_chunk, *of_head = torch.autograd.grad(
                scores, [leaf, *parameters], gradient.to(scores.dtype)
            )
            of_states[own] = of_chunk
            begin = own.stop
            for total_gradient, part in zip(of_parameters, of_head, strict=True):
                total_gradient += part
        ctx.save_for_backward(of_states, *of_parameters)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the kept gradients, times the gradient of the loss."""
        of_states, *of_parameters = ctx.saved_tensors
        return (
            of_states * upstream.to(of_states.dtype),
            None,
            None,
            None,
            *(part * upstream.to(part.dtype) for part in of_parameters),
        )


class _Likelihoods(torch.autograd.Function):
    """The log-likelihood of each target.

    The gradient of each with respect to its state is made while the scores are there. That of a
    head that is trained depends on what comes after, and so its scores are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        scores_of: Callable[[torch.Tensor], torch.Tensor],
        losses_of: LossesAndGradient,
        size: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Return (targets,), float32."""
        each = torch.empty(len(targets), device=states.device)
        wanted = states.requires_grad and not parameters
        of_states = torch.empty_like(states) if wanted else states
        begin = 0
        for chunk, own in _chunks(states, targets, size):
            here = slice(begin, begin + len(own))
            with torch.set_grad_enabled(wanted):
                leaf = chunk.detach().requires_grad_(wanted)
                scores = scores_of(leaf)
            with torch.no_grad():
                loss, gradient = losses_of(scores, own)
                each[here] = -loss
            if wanted:
                (of_states[here],) = torch.autograd.grad(scores, leaf, -gradient.to(scores.dtype))
            begin += len(own)
        ctx.save_for_backward(of_states, targets, *parameters)
        kind = states.device.type
        ctx.scores_of, ctx.losses_of = scores_of, losses_of
        ctx.size, ctx.has_gradient = size, wanted
        ctx.precision = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return each

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the states and of the head's parameters."""
        states, targets, *parameters = ctx.saved_tensors
        if ctx.has_gradient:
            return states * upstream[:, None].to(states.dtype), None, None, None, None
        of_states = torch.empty_like(states)
        of_parameters = [torch.zeros_like(p) for p in parameters]
        begin = 0
        for chunk, own in _chunks(states, targets, ctx.size):
            here = slice(begin, begin + len(own))
            with torch.enable_grad(), torch.autocast(*ctx.precision):
                leaf = chunk.detach().requires_grad_()
                scores = ctx.scores_of(leaf)
            _, gradient = ctx.losses_of(scores.detach(), own)
            gradient = gradient.float().mul_(-upstream[here, None])
            of_states[here], *of_head = torch.autograd.grad(
                scores, [leaf, *parameters], gradient.to(scores.dtype)
            )
            for total, part in zip(of_parameters, of_head, strict=True):
                total += part
            begin += len(own)
        return of_states, None, None, None, None, *of_parameters
