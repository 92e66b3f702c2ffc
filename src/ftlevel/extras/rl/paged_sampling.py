"""Sample completions on a GPU with transformers' continuous batching.

Keys and values are stored in pages, and those of a prompt are shared by its completions. The cache
exists only while completions are sampled. transformers schedules and computes; tokens are drawn by
`draw`, with the same random numbers as on a CPU, so they do not depend on the schedule.

The computation runs in a thread. Autocast, which is local to a thread, is enabled by hooks.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ftlevel.artifacts.hub import first_line
from ftlevel.errors import is_out_of_memory
from ftlevel.extras.rl.sampling import (
    PREFILL_TOKENS,
    Completion,
    Noise,
    SamplingOptions,
    advance,
    draw,
)
from ftlevel.fast.gpu_attention import AttentionOptions, supports_varlen, window_of
from ftlevel.fast.likelihoods import base_model
from ftlevel.fast.packing import UnsupportedModelError
from ftlevel.models.hardware import DTYPES, autocast
from ftlevel.models.upstream.architectures import attention_of, set_attention_name, supports_flash
from ftlevel.models.upstream.batching import (
    RequestProcessor,
    count_tokens,
    create_manager,
    get_thread_error,
    parse_request_id,
    silence_manager,
)
from ftlevel.trained.generation import has_stop_text

FLASH = "ftlevel_flash_paged"
"""Name of `paged_attention`. transformers uses no mask for names with "flash" in them."""

PAGE_TOKENS, FLASH_PAGE_TOKENS = 32, 256
"""Tokens of a page. flash-attn's kernels read the pages themselves, in multiples of 256 tokens."""

MEMORY_SHARE = 0.8
"""Share of free memory that sampling may use by estimate; graphs and fragments need the rest."""

LOGITS_COPIES = 6
"""Float32 copies of the logits that exist while tokens are drawn."""

TEST_TOKENS = 12
"""Length in tokens of the prompt that a model is checked with."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def paged_attention(
    module: torch.nn.Module,  # noqa: ARG001 - the signature is transformers'
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    dropout: float = 0.0,  # noqa: ARG001
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of the sequences of a paged batch with torch's `varlen_attn`.

    `query` is `(1, heads, tokens, head_dim)`, `key` and `value` are `(1, key heads, keys,
    head_dim)`. Returns `(1, tokens, heads, head_dim)`, and None for the weights. Raises
    UnsupportedModelError if the attention has a softcap, sinks or a bias.
    """
    if any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise UnsupportedModelError("its attention is not plain softmax attention")
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    output: Any = varlen_attn(
        query,
        key,
        value,
        kwargs["cu_seq_lens_q"],
        kwargs["cu_seq_lens_k"],
        kwargs["max_length_q"],
        kwargs["max_length_k"],
        scale=scaling,  # None: 1 / √head_dim
        window_size=window_of(True, sliding_window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def select_paged_attention(model: Any, dtype: str) -> str:
    """Returns the attention for continuous batching; "" if none computes it without a mask.

    Without flash attention, each token would be compared with the keys of all sequences.
    """
    base: Any = base_model(model)
    if dtype == "float32":
        return ""
    for version, is_available in ((3, is_flash_attn_3_available), (2, is_flash_attn_2_available)):
        if supports_flash(base) and is_available():
            return f"flash_attention_{version}"
    head_dim = _head_dim(base.config.get_text_config())
    states = torch.empty(1, head_dim, device=base.device, dtype=DTYPES[dtype])
    return FLASH if supports_varlen([states] * 3, AttentionOptions()) else ""


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_token_bytes(config: Any, dtype: str) -> int:
    """Returns the bytes of the keys and values of one token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = DTYPES[dtype].itemsize
    return int(2 * text.num_hidden_layers * heads * _head_dim(text) * size)


def count_rows_in_memory(config: Any, dtype: str, tokens: int, memory: int) -> int:
    """Returns how many rows of `tokens` can be sampled together in `memory` bytes, at least 1.

    Each row is counted with its prompt. Continuous batching, where completions share it, needs
    less.
    """
    logits = 4 * LOGITS_COPIES * config.get_text_config().vocab_size
    row = (tokens + PAGE_TOKENS) * cache_token_bytes(config, dtype) + logits
    return max(1, int(MEMORY_SHARE * memory / row))


def count_prefill_tokens(rows: int) -> int:
    """Returns the tokens of prompts computed together when `rows` completions are sampled."""
    return max(rows, min(PREFILL_TOKENS, 64 * rows))


class _Draw(RequestProcessor):
    """Logits processor that draws tokens, and stores their log-probabilities and entropies.

    A token's argument is its slot: completion · max_new_tokens + position. The last slot is for
    padding of CUDA graphs and for tokens after the end of a completion.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        noise: Noise,
        device: torch.device,
    ) -> None:
        self._prompts, self._options = prompts, options
        count = len(rows) * options.count
        states = noise.begin(
            [row for row in rows for _ in range(options.count)],
            list(range(options.count)) * len(rows),
        )
        self._states = torch.cat([states, states[:1]]).to(device)  # one for the last slot
        self._unused = count * options.max_new_tokens
        self._values = torch.zeros(2, self._unused + 1, device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Set the last slot for all tokens."""
        int32_tensor.fill_(self._unused)

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Returns the slot of each request's next token, and the last slot for padding."""
        slots = [self._unused] * self._options.most_rows
        for at, request in enumerate(requests_with_new_token):
            number = self.get_number(request.state.request_id)
            prompt = self._prompts[number // self._options.count]
            position = count_tokens(request) - len(prompt)
            if position < self._options.max_new_tokens:
                slots[at] = number * self._options.max_new_tokens + position
        return torch.tensor(slots, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Returns logits of 0 for the drawn token of each row and -inf for all others."""
        slots = tensor_arg[: len(scores)].long()
        length = self._options.max_new_tokens
        keys = advance(self._states[slots // length], slots % length)
        tokens, logps, entropies = draw(scores, self._options.temperature, keys)
        self._values[:, slots] = torch.stack([logps, entropies])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def get_number(self, request_id: str) -> int:
        """Returns the number of a completion; requests have the index of their prompt as id."""
        prompt, copy = parse_request_id(request_id)
        return int(prompt) * self._options.count + copy

    def complete(self, ids: Sequence[list[int]], ended: Sequence[bool]) -> list[list[Completion]]:
        """Returns the completions with token ids `ids`, per prompt."""
        length, count = self._options.max_new_tokens, self._options.count
        logps, entropies = self._values[:, :-1].view(2, len(ids), length).tolist()
        completions = [
            Completion(own, logps[i][: len(own)], entropies[i][: len(own)], ended[i])
            for i, own in enumerate(ids)
        ]
        return [completions[i : i + count] for i in range(0, len(ids), count)]


class PagedSampler:
    """Sampler with transformers' continuous batching; sets the attention of `model` until `close`.

    `dtype` is that of autocast.
    """

    def __init__(self, model: Any, tokenizer: Any, attention: str, dtype: str) -> None:
        self._base: Any = base_model(model)
        self._tokenizer, self._attention = tokenizer, attention
        self._device = self._base.device
        self._attention_before = attention_of(self._base)
        if attention == FLASH:
            AttentionInterface.register(FLASH, paged_attention)
            set_attention_name(self._base, FLASH)
        else:
            self._base.set_attn_implementation(attention)
        stack = contextlib.ExitStack()

        def enter(*_: Any) -> None:
            # CUDA graphs allow no cache of casts.
            stack.enter_context(autocast(self._device.type, dtype, cache=False))

        def leave(*_: Any) -> None:
            stack.close()

        self._hooks = [
            self._base.register_forward_pre_hook(enter),
            self._base.register_forward_hook(leave, always_call=True),
        ]

    def close(self) -> None:
        """Restore the model's attention."""
        for hook in self._hooks:
            hook.remove()
        self._base.set_attn_implementation(self._attention_before)

    def sample(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        noise: Noise,
    ) -> list[list[Completion]]:
        """Returns `options.count` completions per prompt, seeded by `noise` and row indices."""
        drawing = _Draw(prompts, rows, options, noise, self._device)
        ids: list[list[int]] = [[] for _ in range(len(prompts) * options.count)]
        ended = [False] * len(ids)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), silence_manager():  # transformers sets a seed
            manager = self._create_manager(prompts, options, drawing)
            try:
                manager.warmup()
                manager.start()
                self._collect(manager, options, drawing.get_number, ids, ended)
            finally:
                manager.stop(block=True, hard_stop=True)
        return drawing.complete(ids, ended)

    def _create_manager(
        self, prompts: Sequence[list[int]], options: SamplingOptions, drawing: _Draw
    ) -> Any:
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=list(options.stops) or [-1],
        )
        settings.num_return_sequences = options.count  # a constructor refuses it for argmax
        config = self._get_config(prompts, options)
        manager = create_manager(self._base, settings, config, drawing)
        for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            # Texts have to be searched after each token.
            manager.add_request(prompts[index], str(index), streaming=bool(options.stop_texts))
        return manager

    def _get_config(
        self, prompts: Sequence[list[int]], options: SamplingOptions
    ) -> ContinuousBatchingConfig:
        reads_pages = self._attention.startswith("flash_attention")
        page = FLASH_PAGE_TOKENS if reads_pages else PAGE_TOKENS
        longest = max(map(len, prompts))
        per_row = math.ceil((longest + options.max_new_tokens) / page) + 1
        shared = (longest - 1) // page
        # A prompt is computed to its last token but one, then shared by its completions.
        num_blocks = math.ceil(options.most_rows * (per_row - shared * (1 - 1 / options.count)))
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=max(num_blocks, per_row + 1),
            max_requests_per_batch=options.most_rows,
            max_batch_tokens=count_prefill_tokens(options.most_rows),
            max_memory_percent=1.0,
            max_blocks_per_request=per_row if reads_pages else 0,
            use_cuda_graph=None if has_graphs() else False,
            auto_switch_to_flash=False,
            seed=0,  # unused: no token is drawn with torch's generator
            disable_nccl_graph_mixing=False,
        )

    def _collect(
        self,
        manager: Any,
        options: SamplingOptions,
        get_number: Callable[[str], int],
        ids: list[list[int]],
        ended: list[bool],
    ) -> None:
        missing, stops = set(range(len(ids))), frozenset(options.stops)
        while missing:
            output = manager.get_result(timeout=1)
            if output is None and manager.is_running():
                continue
            if output is None or output.error is not None:
                manager.stop(block=True, hard_stop=True)
                fatal = get_thread_error(manager)
                message = "no result" if output is None else output.error
                # The frames of the error hold the keys and values.
                raise RuntimeError(message) if fatal is None else fatal.with_traceback(None)
            number = get_number(output.request_id)
            if number not in missing:
                continue
            known, tokens = len(ids[number]), output.generated_tokens
            for length in range(known + 1, len(tokens) + 1):
                if has_stop_text(self._tokenizer, tokens[:length], options.stop_texts):
                    ended[number], tokens = True, tokens[:length]
                    manager.cancel_request(output.request_id)
                    break
            ids[number] = tokens
            ended[number] |= bool(tokens) and tokens[-1] in stops
            if ended[number] or output.is_finished():
                missing.remove(number)


def has_graphs() -> bool:
    """Returns whether this torch can capture CUDA graphs."""
    try:
        torch.cuda.CUDAGraph()
    except RuntimeError:  # of a class that stands for what the build lacks
        return False
    return True


def get_paged_error(
    create: Callable[[], PagedSampler], model: Any, prompt: Sequence[int], tolerance: float
) -> str:
    """Returns why continuous batching samples wrong tokens of `model`; "" if they are right.

    The log-probabilities of completions of a long and a short prompt must match a forward pass up
    to `tolerance`, in nats on average. Call it in eval mode under `torch.no_grad`.
    """
    long = [*prompt, *prompt][:TEST_TOKENS]
    prompts = [long, long[: TEST_TOKENS // 2]]
    options = SamplingOptions(2, 1.0, 3, (), most_rows=2)
    try:
        with contextlib.closing(create()) as sampler:
            groups = sampler.sample(prompts, [0, 1], options, Noise(0, 0))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return first_line(error)
    differences = []
    for ids, group in zip(prompts, groups, strict=True):
        for completion in group:
            row = torch.tensor([ids + completion.ids], device=model.device)
            logps = model(input_ids=row).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
            expected = logps.gather(1, row[0, len(ids) :, None])[:, 0].cpu()
            differences.append((expected - torch.tensor(completion.logps)).abs().mean())
    difference = float(torch.stack(differences).mean())
    if not difference <= tolerance:
        return f"its log-probabilities differ by {difference:.2g} nats a token"
    return ""


def sample_in_memory(
    sampler: Any,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    options: SamplingOptions,
    noise: Noise,
    warn: Callable[[str], None],
) -> tuple[list[list[Completion]], int]:
    """Sample with `sampler`; out of memory halves `options.most_rows` and samples again, to 1.

    Returns the completions, which do not depend on the halving, and the rows sampled together.
    """
    while True:
        try:
            return sampler.sample(prompts, rows, options, noise), options.most_rows
        except Exception as error:
            if not is_out_of_memory(error) or options.most_rows == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        count = options.most_rows // 2
        warn(f"out of memory while sampling {options.most_rows} completions together: now {count}")
        options = replace(options, most_rows=count)
