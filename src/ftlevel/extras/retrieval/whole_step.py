"""Loss and gradients of an optimizer step whose loss depends on the vectors of all its texts.

    e = f(x; θ) without a graph → L(e), g = ∂L/∂e → by micro-batch, ∂(Σ e·g)/∂θ with a graph

e are the vectors of the texts. Each micro-batch is embedded twice, with the same dropout
(GradCache: arXiv:2101.06983), so memory holds the activations of one. If those of all fit, graphs
are kept and nothing is embedded twice. Gradients are added in the same order, so both give the same
bits. Every process computes the loss of all vectors, but only its own vectors' gradients.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlevel.extras.retrieval.rows import StepTexts
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.recompute import using_generator
from ftlevel.models.hardware import free_memory_bytes, send
from ftlevel.models.upstream.fake import storage_of
from ftlevel.training.memory import without_graph
from ftlevel.training.trainer import FtlevelTrainer

GRAPH_MEMORY_RATIO = 0.5
"""Share of the free memory that the activations of a step may take."""

MicroBatch = tuple[PackedLayout | None, Sequence[int], dict[str, Tensor]]
"""Layout, the number of first tokens of each text that are not pooled, and the model's inputs."""


@dataclass(frozen=True)
class RandomState:
    """State of the random generators of the CPU and of the current GPU."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Returns the current state of the CPU's generator and, on CUDA, of the GPU's."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu)

    def restore(self, device: torch.device) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


class WholeStep:
    """Computes optimizer steps whose loss needs the vectors of all texts.

    `grad_cache`: embed all texts without autograd graphs, then each micro-batch again with one:
    always (also with several processes), never, or auto (if the activations do not fit in memory).
    """

    def __init__(self, trainer: Any, grad_cache: str = "auto") -> None:
        self._trainer = trainer
        self._grad_cache = grad_cache
        self._bytes_per_token = 0.0

    def __call__(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Returns the mean loss of a step; the sum of all vectors for `inputs` without `texts`."""
        trainer = self._trainer
        model.train()
        batches: list[MicroBatch] = [
            (part.pop("layout", None), part.pop("unpooled", ()), dict(trainer.on_device(part)))
            for part in inputs.get("micro_batches", [inputs])
        ]
        for layout, _, part in batches:
            part.pop("labels")
            tokens = layout.tokens if layout else part["input_ids"].numel()
            trainer.tokens_computed += tokens
        in_parallel = bool(inputs.get("in_parallel"))
        forward = _Forward(self, model, batches, in_parallel=in_parallel)
        vectors = forward.embed()
        if (step := inputs.get("texts")) is None:
            grads = [torch.ones_like(part) for part in vectors]
            loss = torch.stack([part.sum() for part in vectors]).sum().detach()
        else:
            loss, grads = self._loss(vectors, inputs["parts"], step)
        forward.backward(grads)
        return loss

    def should_keep_graphs(self, count: int, tokens: int) -> bool:
        """Returns whether to keep the graphs of `count` micro-batches of `tokens` tokens in all."""
        trainer = self._trainer
        if count == 1:
            return True
        # DDP takes one forward pass before a backward pass.
        if self._grad_cache == "always" or trainer.processes.count > 1:
            return False
        if self._grad_cache == "never":
            return True
        memory = GRAPH_MEMORY_RATIO * free_memory_bytes(trainer.args.device.type)
        return tokens * self._bytes_per_token < memory

    @property
    def has_token_size(self) -> bool:
        """Whether the bytes per token that `should_keep_graphs` may need are known."""
        return self._grad_cache != "auto" or self._bytes_per_token > 0

    @contextlib.contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Measure bytes per token that a forward pass in the `with` block saves for backward."""
        sizes: dict[Any, int] = {}
        weights = {storage_of(p) for p in self._trainer.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = storage_of(tensor)
            if storage not in weights:
                sizes[storage] = tensor.untyped_storage().nbytes()
            return without_graph(tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self._bytes_per_token = max(sum(sizes.values()) / tokens, 1.0)

    def _loss(
        self, local_vectors: Sequence[Tensor], parts: Sequence[Sequence[int]], step: StepTexts
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss over all processes, and its gradient for each local micro-batch."""
        trainer = self._trainer
        order = [index for part in parts for index in part]
        vectors = torch.cat([part.detach().float() for part in local_vectors])
        inverse = torch.empty(len(order), dtype=torch.long)
        inverse[torch.tensor(order)] = torch.arange(len(order))
        leaf = vectors[send(inverse, vectors.device)].requires_grad_()
        everywhere, all_rows = self._gather(leaf, step)
        loss = trainer.objective.step_loss(everywhere, all_rows)
        (gradient,) = torch.autograd.grad(loss, [leaf])
        # Gradients are averaged over processes, and each has its own vectors' share only.
        gradient = gradient * trainer.processes.count
        return loss.detach(), [gradient[send(torch.tensor(part), leaf.device)] for part in parts]

    def _gather(self, leaf: Tensor, step: StepTexts) -> tuple[Tensor, StepTexts]:
        processes = self._trainer.processes
        if processes.count == 1:
            return leaf, step
        # Rows are objects and exchanged by gloo, while a GPU still computes the vectors.
        digests = tuple(blake2b(array("q", key).tobytes()).digest() for key in step.keys)
        guide = step.guide and [np.asarray(vector) for vector in step.guide]
        steps = processes.all_gather(replace(step, keys=digests, guide=guide))
        vectors = processes.gather_rows(leaf.detach(), [len(each.keys) for each in steps])
        vectors[processes.world.rank] = leaf
        return torch.cat(vectors), StepTexts.join(steps)


class _Forward:
    """Forward passes of a step over its micro-batches; a second pass has the same dropout masks."""

    def __init__(
        self, step: WholeStep, model: Any, micro_batches: Sequence[MicroBatch], *, in_parallel: bool
    ) -> None:
        self._step, self._model, self._parts = step, model, micro_batches
        self._trainer = step._trainer
        fast = self._trainer.fast
        self._workers = fast.workers if in_parallel and fast is not None else None
        self._tokens = [
            layout.tokens if layout else part["input_ids"].numel()
            for layout, _, part in micro_batches
        ]
        self._calls = self._trainer.num_forward_passes(len(micro_batches))
        self._outputs: list[Tensor] = []
        self._states: list[RandomState] = []
        self._seed: int | None = None

    def embed(self) -> list[Tensor]:
        """Returns the vectors of each micro-batch, with their graphs if `should_keep_graphs`."""
        step = self._step
        needs_measuring = len(self._parts) > 1 and not step.has_token_size
        keep_graphs = needs_measuring or step.should_keep_graphs(self._calls, sum(self._tokens))
        if self._workers is not None:
            self._seed = int(torch.randint(2**62, ())) if self._workers.is_random else None
            if needs_measuring:
                with step.measure(self._tokens[0]), using_generator(self._seed):
                    self._embed(0, keep_graph=True)
                keep_graphs = step.should_keep_graphs(self._calls, sum(self._tokens))
            vectors = self._workers.forward(
                lambda number: self._embed(number, keep_graph=keep_graphs),
                len(self._parts),
                self._seed,
            )
            self._outputs = vectors if keep_graphs else []
            return vectors
        vectors = []
        for number in range(self._calls):
            self._states.append(RandomState.now(self._trainer.args.device))
            if needs_measuring and not number:
                with step.measure(self._tokens[0]):
                    vectors.append(self._embed(0, keep_graph=True))
                keep_graphs = step.should_keep_graphs(self._calls, sum(self._tokens))
                vectors = vectors if keep_graphs else [vectors[0].detach()]
                continue
            vectors.append(self._embed(number, keep_graph=keep_graphs))
        self._outputs = vectors if keep_graphs else []
        return vectors[: len(self._parts)]

    def backward(self, grads: Sequence[Tensor]) -> None:
        """Accumulate the parameters' gradients, given the gradients `grads` of the vectors."""
        trainer = self._trainer
        if self._workers is not None:
            trained = [p for p in self._model.parameters() if p.requires_grad]

            def compute(number: int) -> Tensor:
                return self._partial_loss(number, grads)

            calls = [(layout, number) for number, (layout, *_) in enumerate(self._parts)]
            self._workers.backward(compute, calls, trained, self._seed)
            return
        after = RandomState.now(trainer.args.device)
        for number in range(self._calls):
            is_last = number == self._calls - 1
            sync_context = (
                contextlib.nullcontext() if is_last else trainer.accelerator.no_sync(self._model)
            )
            with sync_context, using_layout(self._parts[number % len(self._parts)][0]):
                if not self._outputs:
                    self._states[number].restore(trainer.args.device)
                loss = self._partial_loss(number, grads)
                if is_last and trainer.penalty is not None:
                    extra = trainer.penalty(trainer.accelerator.unwrap_model(self._model))
                    if extra is not None:
                        loss = loss + (extra - extra.detach())
                trainer.accelerator.backward(loss)
        after.restore(trainer.args.device)

    def _partial_loss(self, number: int, grads: Sequence[Tensor]) -> Tensor:
        vectors = self._outputs[number] if self._outputs else self._embed(number, keep_graph=True)
        if number >= len(self._parts):  # it equalizes the number of passes in all processes
            return vectors.sum() * 0
        return (vectors * grads[number]).sum()

    def _embed(self, number: int, *, keep_graph: bool) -> Tensor:
        layout, unpooled, part = self._parts[number % len(self._parts)]
        trainer = self._trainer
        is_worker = self._workers is not None
        with (
            torch.set_grad_enabled(keep_graph),
            using_layout(layout, this_thread=is_worker),
            trainer.compute_loss_context_manager(),
        ):
            outputs = self._model(**part)
            return trainer.objective.embed(outputs, part["attention_mask"], unpooled)


class EmbeddingTrainer(FtlevelTrainer):
    """Trainer of embedding models; `grad_cache` is as in `WholeStep`."""

    def __init__(self, *, grad_cache: str, **arguments: Any):
        super().__init__(**arguments)
        self._whole_step = WholeStep(self, grad_cache)

    def compute_batch(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._is_padding = bool(inputs.pop("is_padding", False))
        return self._whole_step(model, self.on_device(inputs))
