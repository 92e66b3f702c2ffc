"""Sampled completions: their distribution, log-probabilities, and what they do not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from ftlevel.evaluation.attention import SharedPrompts
from ftlevel.evaluation.sampling import (
    Completion,
    GenerateSampler,
    GroupSampler,
    Noise,
    SamplingOptions,
    draw,
    exponentials,
)

PROMPTS = [[5 + (i * 7 + k * k) % 400 for k in range(3 + (i * 11) % 29)] for i in range(5)]
ROWS = [4, 0, 7, 2, 9]
OPTIONS = SamplingOptions(count=3, temperature=0.8, max_new_tokens=10, stops=(703,))


class Words:
    """A tokenizer that writes each id as a word."""

    pad_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{id_}>" for id_ in ids)


def sample(
    model: Any, options: SamplingOptions = OPTIONS, order: list[int] | None = None, step: int = 3
) -> dict[int, list[Completion]]:
    """Return the completions by row, sampled in `order`."""
    order = order or list(range(len(PROMPTS)))
    sampler = GroupSampler(model, Words())
    try:
        with torch.no_grad():
            groups = sampler.sample(
                [PROMPTS[i] for i in order], [ROWS[i] for i in order], options, Noise(1, step)
            )
    finally:
        sampler.close()
    return {ROWS[i]: group for i, group in zip(order, groups, strict=True)}


def ids(groups: dict[int, list[Completion]]) -> dict[int, list[list[int]]]:
    return {row: [completion.ids for completion in group] for row, group in groups.items()}


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    torch.manual_seed(0)
    scores, count = 2 * torch.randn(1, 40), 20_000
    keys = Noise(3, 1)([7] * count, [0] * count, list(range(count)))
    tokens, logps, entropies = draw(scores.expand(count, 40), 1.3, keys)
    expected = (scores[0].double() / 1.3).softmax(-1).numpy()
    found = np.bincount(tokens, minlength=40)
    chi_squared = ((found - count * expected) ** 2 / (count * expected)).sum()
    assert chi_squared < 72.05  # the 99.9 % quantile with 39 degrees of freedom is 72.05
    assert logps[0] == pytest.approx(float(np.log(expected[tokens[0]])), abs=1e-5)
    assert entropies[0] == pytest.approx(-(expected * np.log(expected)).sum(), abs=1e-5)


def test_impossible_tokens_are_never_drawn() -> None:
    scores = torch.full((1, 5), -torch.inf)
    scores[0, 2], scores[0, 4] = 0.0, 0.0
    keys = Noise(0, 0)(list(range(400)), [0] * 400, [0] * 400)
    tokens, _, entropies = draw(scores.expand(400, 5), 1.0, keys)
    assert set(tokens) == {2, 4}
    assert 150 < tokens.count(2) < 250
    assert entropies[0] == pytest.approx(np.log(2), abs=1e-6)


def test_noise_differs_in_each_of_its_keys() -> None:
    def one(seed: int, step: int, row: int, completion: int, position: int) -> int:
        return int(Noise(seed, step)([row], [completion], [position])[0])

    keys = [
        (1, 2, 3, 4, 5),
        (9, 2, 3, 4, 5),
        (1, 9, 3, 4, 5),
        (1, 2, 9, 4, 5),
        (1, 2, 3, 9, 5),
        (1, 2, 3, 4, 9),
        (2, 1, 3, 4, 5),
        (1, 2, 4, 3, 5),
    ]
    assert len({one(*key) for key in keys}) == len(keys)
    many = exponentials(Noise(0, 0)(list(range(400)), [0] * 400, [1] * 400), 50)
    assert abs(float(many.mean()) - 1) < 0.03  # standard error 0.007
    assert abs(float(many.var()) - 1) < 0.1
    assert float(many.min()) > 0
    assert len(many.unique()) > 0.99 * many.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_log_probabilities_are_those_of_a_forward_pass(family: str) -> None:
    model = tiny_models.build(family, "causal").eval()
    found = sample(model)
    lengths = set()
    for prompt, row in zip(PROMPTS, ROWS, strict=True):
        for completion in found[row]:
            lengths.add(len(completion.ids))
            with torch.no_grad():
                scores = model(torch.tensor([prompt + completion.ids])).logits[0].double() / 0.8
            logps = scores.log_softmax(-1)[len(prompt) - 1 : -1]
            own = logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert torch.tensor(completion.logps) == pytest.approx(own.float(), abs=1e-4)
            entropy = -(logps.exp() * logps).sum(-1)
            assert torch.tensor(completion.entropies) == pytest.approx(entropy.float(), abs=1e-3)
    assert max(lengths) <= 10


def test_batching_order_and_generate_change_nothing() -> None:
    model = tiny_models.build("llama", "causal").eval()
    found = ids(sample(model))
    assert ids(sample(model, order=[3, 1, 4, 0, 2])) == found
    few = SamplingOptions(3, 0.8, 10, (703,), most_rows=3)
    assert ids(sample(model, few)) == found
    with torch.no_grad():
        written = GenerateSampler(model, Words()).sample(PROMPTS, ROWS, OPTIONS, Noise(1, 3))
    assert dict(zip(ROWS, [[c.ids for c in group] for group in written], strict=True)) == found
    assert ids(sample(model, step=4)) != found


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_rows_that_end_leave_their_group(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(family, "causal").eval()
    free = [completion for group in sample(model).values() for completion in group]
    stops = tuple(dict.fromkeys(completion.ids[3] for completion in free[::2]))
    options = SamplingOptions(3, 0.8, 10, stops, most_rows=9)
    ragged = []
    attend = SharedPrompts.attention_forward

    def watch(self: SharedPrompts, query: torch.Tensor, layer: int) -> Any:
        ragged.append(self.slots is not None)
        return attend(self, query, layer)

    monkeypatch.setattr(SharedPrompts, "attention_forward", watch)
    found = sample(model, options)
    assert any(ragged)
    assert any(len({len(completion.ids) for completion in own}) > 1 for own in found.values())
    with torch.no_grad():
        written = GenerateSampler(model, Words()).sample(PROMPTS, ROWS, options, Noise(1, 3))
    assert dict(zip(ROWS, [[c.ids for c in group] for group in written], strict=True)) == ids(found)


def test_the_keys_of_a_prompt_are_there_once_for_its_group() -> None:
    model = tiny_models.build("llama", "causal").eval()
    sampler = GroupSampler(model, Words())
    with torch.no_grad():
        rows = sampler.begin([0, 1], PROMPTS[:2]).fork(5)
        rows.last = [7] * 10
        sampler.step(rows)
    sampler.close()
    (prompts,) = rows.prompts
    assert prompts.states[0][0].shape[0] == 2
    assert rows.layers[0].keys.shape[::2] == (10, 1)


def test_rounding_of_logits_changes_no_token() -> None:
    torch.manual_seed(1)
    scores = 2 * torch.randn(200, 8192)
    keys = Noise(5, 0)(list(range(200)), [0] * 200, [0] * 200)
    tokens = draw(scores, 1.0, keys)[0]
    for seed in range(3):
        torch.manual_seed(seed)
        rounded = scores + 1e-6 * torch.randn_like(scores)
        assert draw(rounded, 1.0, keys)[0] == tokens


def test_completions_end_at_stop_ids_and_stop_texts() -> None:
    model = tiny_models.build("llama", "causal").eval()
    free = sample(model)
    first = free[ROWS[0]][0].ids
    by_id = SamplingOptions(3, 0.8, 10, (first[4],))
    by_text = SamplingOptions(3, 0.8, 10, (), (f"<{first[3]}><{first[4]}>",))
    for options in (by_id, by_text):
        ended = sample(model, options)[ROWS[0]][0]
        assert ended.ids == first[:5]
        assert ended.ended
        assert len(ended.logps) == len(ended.entropies) == 5
    assert not free[ROWS[0]][0].ended


def test_each_prompt_is_computed_once_for_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", "causal").eval()
    fed = []
    forward = model.forward

    def count(**inputs: Any) -> Any:
        fed.append(inputs["input_ids"].numel())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", count)
    sample(model)
    longest = max(map(len, PROMPTS))
    assert fed[0] <= longest * len(PROMPTS)
    assert all(number == 3 * len(PROMPTS) for number in fed[1:3])
