"""How a step is computed: what changes the speed and never the result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ftlevel.config.sections import Positive, Section


class SpeedConfig(Section):
    """Parts of the fast step; a part is on where it is known to give the plain step's numbers."""

    fast: bool = Field(
        True,
        description="Use the faster forms of the step; off leaves every part to the libraries.",
    )
    pack: bool = Field(
        True,
        description="Lay the rows of a micro-batch end to end, each attending to itself alone.",
    )
    chunked_cross_entropy: bool = Field(
        True,
        description="Compute a language head and its loss at supervised tokens only, in chunks.",
    )
    prune_last_layer: bool = Field(
        True,
        description="Compute the last block at the tokens that a head or a classifier needs, and "
        "of the others only what attention needs.",
    )
    fused_lora: bool = Field(
        True,
        description="Compute LoRA's base and update in one autograd function, in the base's "
        "precision.",
    )
    fused_norm_glu: bool = Field(
        True,
        description="Compute norms and gated linear units of frozen weights in one autograd "
        "function each, which keeps less for the backward pass.",
    )
    triton_kernels: bool = Field(
        True,
        description="On an NVIDIA GPU, compute fused norms and GLUs, rotary embeddings and the "
        "loss by Triton kernels, where these give the same numbers and are faster.",
    )
    attention_kernel: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+@[\w.-]+$")] | None = Field(
        None,
        description="On an NVIDIA GPU, attend to packed rows by this kernel of the Hugging Face "
        "hub, OWNER/NAME@VERSION (kernels-community/flash-attn3@1), which the package kernels "
        "fetches; none is torch's flash attention.",
    )
    share_prefixes: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Compute a prefix that rows of a step have in common once; auto where it saves "
        "5 % of the tokens and nothing is dropped at random.",
    )
    liger_kernel: bool = Field(
        False,
        description="On a CUDA GPU, use liger-kernel's norms, rotary embedding and activation "
        "where the package is installed and has them for the model. Off until it is measured.",
    )
    tokens_per_micro_batch: Positive | Literal["auto", "memory"] = Field(
        "auto",
        description="Most tokens in the micro-batches that are computed at once, which bounds the "
        "memory; auto is what per_device_train_batch_size rows of max_length would have, on a CPU "
        "2,048 at most, an eighth more where prefixes are shared; memory is as many as the plan's "
        "forecast fits into the memory that is free (--auto-micro-batch). The rows of a step stay.",
    )
    memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="GiB that the run may use at its peak, for tokens_per_micro_batch=memory; the "
        "default is what is free.",
    )
    parallel_workers: Positive | Literal["auto"] = Field(
        "auto",
        description="On a CPU, workers that compute a micro-batch each, with their share of the "
        "threads; auto is one a thread, 4 at most, where nothing is dropped at random.",
    )
    verify: bool | None = Field(
        None,
        description="Compute whole first steps the plain way too, in float32 and in the run's own "
        "precision, with dropout and without, and compare loss and gradients. By default a few "
        "rows are compared in float32 before every run; off compares nothing.",
    )
