"""Completions of transformers' continuous batching, as on a GPU, here with SDPA on a CPU."""

from __future__ import annotations

import gc
import types
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.nn.attention import varlen
from transformers.generation.continuous_batching import PagedAttentionCache

import tiny_models
from ftlevel.extras.rl import paged_sampling
from ftlevel.extras.rl.paged_sampling import (
    FLASH,
    PagedSampler,
    get_paged_error,
    sample_in_memory,
    select_paged_attention,
)
from ftlevel.extras.rl.rollouts import select_sampler
from ftlevel.extras.rl.sampling import (
    Completion,
    GenerateSampler,
    GroupSampler,
    Noise,
    SamplingOptions,
)
from ftlevel.fast import packed_attention as packed
from ftlevel.fast.packing import UnsupportedModelError
from ftlevel.fast.plan import set_packed_attention
from ftlevel.models.hardware import evaluating
from ftlevel.models.upstream.architectures import attention_of

PROMPTS = [[5 + (i * 7 + k * k) % 400 for k in range(3 + (i * 17) % 53)] for i in range(5)]
ROWS = [4, 0, 7, 2, 9]
OPTIONS = SamplingOptions(count=3, temperature=0.8, max_new_tokens=10, stops=(703,))


class IdTokenizer:
    """A tokenizer that writes each id as a word."""

    pad_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{id_}>" for id_ in ids)


def sample(
    sampler: Any, options: SamplingOptions = OPTIONS, prompts: Sequence[list[int]] = PROMPTS
) -> list[list[Completion]]:
    with closing(sampler), torch.no_grad():
        groups: list[list[Completion]] = sampler.sample(
            prompts, ROWS[: len(prompts)], options, Noise(1, 3)
        )
        return groups


def get_ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


def paged(model: Any, dtype: str = "float32") -> PagedSampler:
    return PagedSampler(model, IdTokenizer(), "sdpa", dtype)


def stack(groups: list[list[Completion]], name: str) -> torch.Tensor:
    return torch.tensor([v for group in groups for c in group for v in getattr(c, name)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_completions_are_those_of_the_decoder(family: str) -> None:
    model = tiny_models.build(family, "causal")
    expected = sample(GroupSampler(model, IdTokenizer()))
    assert set_packed_attention(model)
    state = torch.get_rng_state()
    for most_rows in (15, 4, 1):  # with 1, the cache has no room for a group
        groups = sample(paged(model), replace(OPTIONS, most_rows=most_rows))
        assert get_ids(groups) == get_ids(expected), most_rows
        for name in ("logps", "entropies"):
            torch.testing.assert_close(
                stack(groups, name), stack(expected, name), atol=1e-4, rtol=0
            )
    assert attention_of(model) == packed.NAME
    assert torch.equal(torch.get_rng_state(), state)  # transformers seeds all generators


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("mistral", {"sliding_window": 8}), ("gemma3_text", {"sliding_window": 8})],
)
def test_windows(family: str, overrides: dict[str, Any]) -> None:
    model = tiny_models.build(family, "causal", **overrides)
    expected = get_ids(sample(GenerateSampler(model, IdTokenizer())))
    for most_rows in (15, 2):
        assert get_ids(sample(paged(model), replace(OPTIONS, most_rows=most_rows))) == expected


def with_adapter(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_lowest_temperature_with_an_adapter_is_greedy() -> None:
    model = with_adapter(tiny_models.build("llama", "causal"))
    model.train()
    options = SamplingOptions(2, 1e-4, 10, (), most_rows=4)
    with evaluating(model, "cpu", "float32"):
        greedy = [
            model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0, len(ids) :].tolist()
            for ids in PROMPTS
        ]  # fmt: skip
        groups = sample(paged(model), options)
    assert get_ids(groups) == [[ids, ids] for ids in greedy]
    with model.disable_adapter():
        assert get_ids(sample(paged(model.eval()), options)) != get_ids(groups)
    assert model.training is False


def test_thread_computes_in_the_precision_of_training() -> None:
    """An adapter in float32 on a base in bfloat16, where only autocast rounds its products."""
    model = with_adapter(tiny_models.build("llama", "causal").bfloat16())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    seen = []
    module = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with evaluating(model, "cpu", "bfloat16"):
        groups = sample(paged(model, "bfloat16"))
    assert set(seen) == {torch.bfloat16}
    with evaluating(model, "cpu", "bfloat16"):
        for ids, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                row = torch.tensor([ids + completion.ids])
                logps = (model(row).logits[0, len(ids) - 1 : -1].float() / 0.8).log_softmax(-1)
                logps = logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
                assert (logps - torch.tensor(completion.logps)).abs().max() < 0.1


def test_completions_end_at_stop_ids_and_stop_texts() -> None:
    model = tiny_models.build("llama", "causal")
    first = sample(paged(model))[0][0].ids
    by_id = replace(OPTIONS, stops=(first[4],))
    by_text = replace(OPTIONS, stops=(), stop_texts=(f"<{first[3]}><{first[4]}>",))
    for options in (by_id, by_text):
        completion = sample(paged(model), options)[0][0]
        assert completion.ids == first[:5]
        assert completion.ended
        assert len(completion.logps) == len(completion.entropies) == 5
        expected = sample(GroupSampler(model, IdTokenizer()), options)
        assert get_ids(sample(paged(model), options)) == get_ids(expected)


def test_frequencies_match_softmax() -> None:
    model = tiny_models.build("llama", "causal", vocab_size=24)
    prompt, count = [3, 5, 7, 11], 1_000
    options = SamplingOptions(count, 1.5, 1, (), most_rows=100)
    (group,) = sample(paged(model), options, [prompt])
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 1.5).softmax(-1).numpy()
    counts = np.bincount([completion.ids[0] for completion in group], minlength=24)
    chi_squared = ((counts - count * expected) ** 2 / (count * expected)).sum()
    assert chi_squared < 49.73  # the 99.9 % quantile with 23 degrees of freedom


def test_prompts_of_one_token() -> None:
    model = tiny_models.build("llama", "causal")
    prompts = [[7], [9, 4]]
    expected = sample(GroupSampler(model, IdTokenizer()), prompts=prompts)
    assert get_ids(sample(paged(model), prompts=prompts)) == get_ids(expected)


def test_prompt_is_computed_once_per_group() -> None:
    model, tokens = tiny_models.build("llama", "causal"), []

    def count(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        tokens.append(inputs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    sample(paged(model))
    assert tokens[0] == sum(map(len, PROMPTS)) - len(PROMPTS)
    assert max(tokens[1:]) <= 15


def test_out_of_memory_halves_the_rows() -> None:
    model, warnings = tiny_models.build("llama", "causal"), list[str]()
    expected = get_ids(sample(paged(model)))
    sizes = []

    def limit(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Hold as much memory as three rows of logits need."""
        sizes.append(len(inputs["logits_to_keep"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = model.register_forward_pre_hook(limit, with_kwargs=True)
    arguments = (PROMPTS, ROWS, replace(OPTIONS, most_rows=15), Noise(1, 3), warnings.append)
    with closing(paged(model)) as sampler, torch.no_grad():
        groups, most_rows = sample_in_memory(sampler, *arguments)
    assert get_ids(groups) == expected
    assert most_rows == 3
    assert len(warnings) == 2  # 15, 7, 3
    assert warnings[-1].endswith("sampling 7 completions together: now 3")
    hook.remove()

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse)
    with (
        closing(paged(model)) as sampler,
        torch.no_grad(),
        pytest.raises(torch.OutOfMemoryError),
    ):
        sample_in_memory(sampler, *arguments)
    assert warnings[-1].endswith("now 1")
    assert attention_of(model) == "sdpa"


def test_generate_halves_the_rows_to_one() -> None:
    model, sizes = tiny_models.build("llama", "causal"), []
    expected = get_ids(sample(GroupSampler(model, IdTokenizer())))

    def limit(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(limit, with_kwargs=True)
    options = replace(OPTIONS, most_rows=15)
    sampler = GenerateSampler(model, IdTokenizer())
    with torch.no_grad():
        groups, most_rows = sample_in_memory(
            sampler, PROMPTS, ROWS, options, Noise(1, 3), lambda _: None
        )
    assert (get_ids(groups), most_rows) == (expected, 1)


def test_keys_and_values_are_freed() -> None:
    model = tiny_models.build("llama", "causal")
    sample(paged(model))
    gc.collect()
    assert not [part for part in gc.get_objects() if type(part) is PagedAttentionCache]


@pytest.mark.parametrize(
    ("family", "attention", "sampler", "reason"),
    [
        ("llama", None, GroupSampler, ""),
        ("llama", "sdpa", PagedSampler, "continuous batching"),
        ("llama", "", GenerateSampler, "needs flash attention"),
        ("opt", "sdpa", GenerateSampler, "cannot serve this model: "),
        ("gpt_neox", "sdpa", GenerateSampler, "cannot serve this model: "),
    ],
)
def test_choice_of_the_sampler(
    family: str, attention: str | None, sampler: type, reason: str
) -> None:
    model = tiny_models.build(family, "causal")
    before = attention_of(model)
    with torch.no_grad():
        create, choice = select_sampler(
            model, IdTokenizer(), "decoder", "lora", "float32", PROMPTS[1], attention
        )
        with closing(create()) as opened:
            assert type(opened) is sampler
    assert (choice is None) == (not reason)
    assert choice is None or reason in str(choice)
    assert attention_of(model) == before


def test_wrong_log_probabilities_are_found() -> None:
    model = tiny_models.build("llama", "causal")

    def create() -> PagedSampler:
        sampler = paged(model)
        layer = model.model.layers[0].self_attn.o_proj

        def halve(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output / 2

        sampler._hooks.append(layer.register_forward_hook(halve))
        return sampler

    with torch.no_grad():
        assert get_paged_error(lambda: paged(model), model, PROMPTS[1], 1e-3) == ""
        assert "nats a token" in get_paged_error(create, model, PROMPTS[1], 1e-3)


def test_attention_of_a_cpu_and_of_float32_is_not_paged() -> None:
    model = tiny_models.build("llama", "causal")
    assert select_paged_attention(model, "float32") == ""
    assert select_paged_attention(model, "bfloat16") == ""


def varlen_attn_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, scale: float | None,
    window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """torch's `varlen_attn` on a CPU, one sequence after the other."""
    assert window_size[1] == 0, "causal"
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        at = slice(cu_seq_q[i], cu_seq_q[i + 1])
        of = slice(cu_seq_k[i], cu_seq_k[i + 1])
        states = [part[span].transpose(0, 1) for part, span in
                  ((query, at), (key, of), (value, of))]  # fmt: skip
        distance = torch.arange(states[0].shape[1])[:, None] - torch.arange(states[1].shape[1])
        distance = distance + states[1].shape[1] - states[0].shape[1]
        furthest = window_size[0] if window_size[0] >= 0 else len(key)
        output = functional.scaled_dot_product_attention(
            *states,
            (distance >= 0) & (distance <= furthest),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 8})]
)
def test_attention_without_a_mask(
    family: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build(family, "causal", **overrides)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_on_cpu)
    expected = get_ids(sample(GenerateSampler(model, IdTokenizer())))
    for most_rows in (15, 2):
        sampler = PagedSampler(model, IdTokenizer(), FLASH, "float32")
        assert get_ids(sample(sampler, replace(OPTIONS, most_rows=most_rows))) == expected
    assert attention_of(model) == "sdpa"
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UnsupportedModelError):
        paged_sampling.paged_attention(torch.nn.Identity(), query, query, query, None, softcap=50.0)


def test_padding_and_ended_completions_write_to_no_other() -> None:
    """CUDA graphs pad the batch, and the scheduler runs a step ahead of the end of a request."""
    options = SamplingOptions(2, 1.0, 4, (), most_rows=4)
    drawing = paged_sampling._Draw([[1, 2]], [0], options, Noise(0, 0), torch.device("cpu"))

    def request(name: str, tokens: int) -> Any:
        state = types.SimpleNamespace(request_id=name, position_offset=tokens)
        return types.SimpleNamespace(state=state)

    slots = drawing.prepare_tensor_args([request("0", 2 + 4), request("0__child#0", 2)])
    assert slots.tolist() == [8, 4, 8, 8]
    scores = torch.randn(4, 9)
    drawn = drawing(scores, slots).argmax(-1).tolist()
    (group,) = drawing.complete([[], [drawn[1]]], [True, False])
    assert group[0] == Completion([], [], [], True)
    assert group[1].logps == pytest.approx([float(scores[1].log_softmax(-1)[drawn[1]])], abs=1e-6)
