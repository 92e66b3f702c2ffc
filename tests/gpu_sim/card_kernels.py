"""Operations that only a GPU has, computed on the host: flash attention, products in float32."""

from __future__ import annotations

from typing import Any

_libraries: list[Any] = []
MATH, FLASH, EFFICIENT = 0, 1, 2  # torch's SDPBackend


def register(torch: Any, capability: Any) -> None:
    """Register the operations for the CUDA device.

    Args:
        torch: the module.
        capability: function that returns the compute capability; flash attention needs 8.0.
    """
    aten = torch.library.Library("aten", "IMPL")
    _libraries.append(aten)
    view, Tensor = torch.ops.gpu_sim.host_view, torch.Tensor

    def on_card(tensor: Any, like: Any) -> Any:
        return torch.ops.gpu_sim.card_view(tensor.contiguous(), like.device.index)

    def implement(name: str) -> Any:
        return lambda function: aten.impl(name, function, "CUDA")

    # --- products whose result is wider than the operands

    def product(left: Any, right: Any, dtype: Any) -> Any:
        return torch.matmul(view(left).to(dtype), view(right).to(dtype))

    @implement("mm.dtype")
    def _(left: Tensor, right: Tensor, dtype: Any) -> Tensor:
        return on_card(product(left, right, dtype), left)

    @implement("bmm.dtype")
    def _(left: Tensor, right: Tensor, dtype: Any) -> Tensor:
        return on_card(product(left, right, dtype), left)

    @implement("addmm.dtype")
    def _(
        self: Tensor, left: Tensor, right: Tensor, dtype: Any, *, beta: Any = 1, alpha: Any = 1
    ) -> Tensor:
        return on_card(beta * view(self).to(dtype) + alpha * product(left, right, dtype), left)

    @implement("baddbmm.dtype")
    def _(
        self: Tensor, left: Tensor, right: Tensor, dtype: Any, *, beta: Any = 1, alpha: Any = 1
    ) -> Tensor:
        return on_card(beta * view(self).to(dtype) + alpha * product(left, right, dtype), left)

    # --- softmax of 16-bit logits with a float32 result

    for name in ("_softmax", "_log_softmax"):

        @implement(name)
        def _(
            self: Tensor, dim: int, half_to_float: bool, compute: Any = getattr(torch, name)
        ) -> Tensor:
            logits = view(self)
            return on_card(compute(logits.float() if half_to_float else logits, dim, False), self)

        @implement(f"{name}_backward_data")
        def _(grad_output: Tensor, output: Tensor, dim: int, input_dtype: Any,
              compute: Any = getattr(torch, f"{name}_backward_data")) -> Tensor:  # fmt: skip
            grad = compute(view(grad_output), view(output), dim, grad_output.dtype)
            return on_card(grad.to(input_dtype), grad_output)

    @implement("_grouped_mm")
    def _(
        self: Tensor, mat2: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> Tensor:
        ends, bias = (None if part is None else view(part) for part in (offs, bias))
        return on_card(torch._grouped_mm(view(self), view(mat2), ends, bias, out_dtype), self)

    @implement("histc")
    def _(self: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Tensor:
        return on_card(torch.histc(view(self).float(), bins, min, max).to(self.dtype), self)

    # --- attention that does not store its weights

    cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    @implement("_fused_sdp_choice")
    def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
          is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False) -> int:  # fmt: skip
        if query.dim() != 4 or query.shape[-1] != value.shape[-1] or dropout_p:
            return MATH  # with dropout, the fused kernels draw other masks than the CPU
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        if attn_mask is None and is_half and capability() >= (8, 0):
            return FLASH
        has_groups = query.shape[1] != key.shape[1]
        return MATH if has_groups or getattr(attn_mask, "requires_grad", False) else EFFICIENT

    def repeat(states: Any, heads: int) -> Any:
        return view(states).repeat_interleave(heads // states.shape[1], 1)

    @implement("_scaled_dot_product_flash_attention")
    def _(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0,
          is_causal: bool = False, return_debug_mask: bool = False, *, scale: Any = None) -> Any:  # fmt: skip
        heads = query.shape[1]
        output, sums = cpu_forward(
            view(query), repeat(key, heads), repeat(value, heads), 0.0, is_causal, scale=scale
        )
        seed = on_card(torch.zeros((), dtype=torch.long), query)
        output = on_card(output.transpose(1, 2), query).transpose(1, 2)
        return (output, on_card(sums, query), None, None, query.shape[2], key.shape[2], seed,
                seed.clone(), on_card(torch.zeros(0), query))  # fmt: skip

    @implement("_scaled_dot_product_flash_attention_backward")
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
          logsumexp: Tensor, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int,
          dropout_p: float, is_causal: bool, philox_seed: Tensor, philox_offset: Tensor, *,
          scale: Any = None) -> Any:  # fmt: skip
        heads = query.shape[1]
        of_query, *others = cpu_backward(
            view(grad_out), view(query), repeat(key, heads), repeat(value, heads), view(out),
            view(logsumexp), 0.0, is_causal, scale=scale,
        )  # fmt: skip
        sums = [part.unflatten(1, (key.shape[1], -1)).sum(2) for part in others]
        return tuple(on_card(part, query) for part in (of_query, *sums))

    @implement("_scaled_dot_product_efficient_attention")
    def _(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, compute_log_sumexp: bool,
          dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None) -> Any:  # fmt: skip
        mask = None if attn_bias is None else view(attn_bias)
        output, sums = cpu_forward(view(query), view(key), view(value), dropout_p, is_causal,
                                   attn_mask=mask, scale=scale)  # fmt: skip
        seed = on_card(torch.zeros((), dtype=torch.long), query)
        return (
            on_card(output.transpose(1, 2), query).transpose(1, 2),
            on_card(sums, query),
            seed,
            seed.clone(),
        )

    @implement("_scaled_dot_product_efficient_attention_backward")
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, out: Tensor,
          logsumexp: Tensor, philox_seed: Tensor, philox_offset: Tensor, dropout_p: float,
          grad_input_mask: Any, is_causal: bool = False, *, scale: Any = None) -> Any:  # fmt: skip
        mask = view(attn_bias) if attn_bias is not None and attn_bias.numel() else None
        gradients = cpu_backward(view(grad_out), view(query), view(key), view(value), view(out), view(logsumexp),
                                 dropout_p, is_causal, attn_mask=mask, scale=scale)  # fmt: skip
        return (*(on_card(part, query) for part in gradients), None)

    # --- attention of sequences in a packed row: (tokens, heads, head_dim)

    def check(*states: Any) -> None:
        query = states[0]
        if capability() < (8, 0):
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        if any(part.dtype not in (torch.float16, torch.bfloat16) for part in states):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if query.shape[-1] % 8 or query.shape[-1] > 256:
            raise RuntimeError(f"FlashAttention does not support head_dim {query.shape[-1]}")
        if any(part.stride(-1) != 1 for part in states):
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if query.shape[1] % states[1].shape[1]:
            raise RuntimeError("Number of heads in key/value must divide number of heads in query")

    def sequences(cum_q: Any, cum_k: Any) -> Any:
        ends_q, ends_k = view(cum_q).tolist(), view(cum_k).tolist()
        return zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)

    def scores(q: Any, k: Any, causal: bool, scale: Any, left: Any, right: Any) -> Any:
        """Return the masked scores (heads, queries, keys) of a sequence in float32."""
        groups = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(groups, 1)
        s = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal or (right is not None and right >= 0):
            hidden |= distance < -(0 if causal else right)
        if left is not None and left >= 0:
            hidden |= distance > left
        return s.masked_fill(hidden, float("-inf"))

    @implement("_flash_attention_forward")
    def _(query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Any, cum_seq_k: Any, max_q: int,
          max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
          scale: Any = None, window_size_left: Any = None, window_size_right: Any = None,
          seqused_k: Any = None, alibi_slopes: Any = None, block_table: Any = None,
          num_splits: Any = None) -> Any:  # fmt: skip
        check(query, key, value)
        if (
            seqused_k is not None
            or block_table is not None
            or alibi_slopes is not None
            or dropout_p
        ):
            raise NotImplementedError(
                "the simulated flash attention has no pages, slopes or dropout"
            )
        q, k, v = (view(part).float() for part in (query, key, value))
        output = torch.zeros_like(q)
        sums = torch.zeros(q.shape[1], len(q))
        groups = q.shape[1] // k.shape[1]
        for start, stop, first, last in sequences(cum_seq_q, cum_seq_k):
            s = scores(
                q[start:stop], k[first:last], is_causal, scale, window_size_left, window_size_right
            )
            sums[:, start:stop] = s.logsumexp(-1)
            weights = s.softmax(-1).nan_to_num(0.0)
            output[start:stop] = torch.einsum(
                "hqk,khd->qhd", weights, v[first:last].repeat_interleave(groups, 1)
            )
        state = torch.zeros(2, dtype=torch.uint64)
        return (on_card(output.to(query.dtype), query), on_card(sums, query), on_card(state, query),
                on_card(torch.zeros(()), query), on_card(torch.zeros(0), query))  # fmt: skip

    @implement("_flash_attention_backward")
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
          logsumexp: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
          dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
          scale: Any = None, window_size_left: Any = None, window_size_right: Any = None) -> Any:  # fmt: skip
        check(query, key, value)
        g, q, k, v, o = (view(part).float() for part in (grad_out, query, key, value, out))
        sums, groups = view(logsumexp), q.shape[1] // k.shape[1]
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        grads = [torch.zeros_like(part) for part in (q, k, v)]
        for start, stop, first, last in sequences(cum_seq_q, cum_seq_k):
            at, of = slice(start, stop), slice(first, last)
            s = scores(q[at], k[of], is_causal, scale, window_size_left, window_size_right)
            weights = (s - sums[:, at, None]).exp().nan_to_num(0.0)
            values, keys = (part[of].repeat_interleave(groups, 1) for part in (v, k))
            of_weights = torch.einsum("qhd,khd->hqk", g[at], values)
            rows = (g[at] * o[at]).sum(-1).T[:, :, None]
            of_scores = weights * (of_weights - rows) * factor
            grads[0][at] = torch.einsum("hqk,khd->qhd", of_scores, keys)
            shape = (len(keys), k.shape[1], groups, k.shape[-1])
            grads[1][of] = torch.einsum("hqk,qhd->khd", of_scores, q[at]).reshape(shape).sum(2)
            grads[2][of] = torch.einsum("hqk,qhd->khd", weights, g[at]).reshape(shape).sum(2)
        return tuple(on_card(part.to(query.dtype), query) for part in grads)
