"""Sampled completions: distribution, log-probabilities, independence of batching and order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from ftlevel.evaluation.attention import SharedPrompts
from ftlevel.extras.rl.sampling import (
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


class IdTokenizer:
    """A tokenizer that writes each id as a word."""

    pad_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{id_}>" for id_ in ids)


def sample(
    model: Any, options: SamplingOptions = OPTIONS, order: list[int] | None = None, step: int = 3
) -> dict[int, list[Completion]]:
    """Return the sampled completions by row, with prompts in `order`."""
    order = order or list(range(len(PROMPTS)))
    sampler = GroupSampler(model, IdTokenizer())
    try:
        with torch.no_grad():
            groups = sampler.sample(
                [PROMPTS[i] for i in order], [ROWS[i] for i in order], options, Noise(1, step)
            )
    finally:
        sampler.close()
    return {ROWS[i]: group for i, group in zip(order, groups, strict=True)}


def get_ids(groups: dict[int, list[Completion]]) -> dict[int, list[list[int]]]:
    return {row: [completion.ids for completion in group] for row, group in groups.items()}


def test_draw_frequencies_match_softmax() -> None:
    torch.manual_seed(0)
    scores, count = 2 * torch.randn(1, 40), 20_000
    keys = Noise(3, 1)([7] * count, [0] * count, list(range(count)))
    tokens, logps, entropies = (part.tolist() for part in draw(scores.expand(count, 40), 1.3, keys))
    expected = (scores[0].double() / 1.3).softmax(-1).numpy()
    counts = np.bincount(tokens, minlength=40)
    chi_squared = ((counts - count * expected) ** 2 / (count * expected)).sum()
    assert chi_squared < 72.05  # the 99.9 % quantile with 39 degrees of freedom is 72.05
    assert logps[0] == pytest.approx(float(np.log(expected[tokens[0]])), abs=1e-5)
    assert entropies[0] == pytest.approx(-(expected * np.log(expected)).sum(), abs=1e-5)


def test_impossible_tokens_are_never_drawn() -> None:
    scores = torch.full((1, 5), -torch.inf)
    scores[0, 2], scores[0, 4] = 0.0, 0.0
    keys = Noise(0, 0)(list(range(400)), [0] * 400, [0] * 400)
    tokens, _, entropies = (part.tolist() for part in draw(scores.expand(400, 5), 1.0, keys))
    assert set(tokens) == {2, 4}
    assert 150 < tokens.count(2) < 250
    assert entropies[0] == pytest.approx(np.log(2), abs=1e-6)


def test_noise_depends_on_every_key() -> None:
    def hash_key(seed: int, step: int, row: int, completion: int, position: int) -> int:
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
    assert len({hash_key(*key) for key in keys}) == len(keys)
    values = exponentials(Noise(0, 0)(list(range(400)), [0] * 400, [1] * 400), 50)
    assert abs(float(values.mean()) - 1) < 0.03  # standard error 0.007
    assert abs(float(values.var()) - 1) < 0.1
    assert float(values.min()) > 0
    assert len(values.unique()) > 0.99 * values.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_log_probabilities_match_forward_pass(family: str) -> None:
    model = tiny_models.build(family, "causal").eval()
    sampled = sample(model)
    lengths = set()
    for prompt, row in zip(PROMPTS, ROWS, strict=True):
        for completion in sampled[row]:
            lengths.add(len(completion.ids))
            with torch.no_grad():
                scores = model(torch.tensor([prompt + completion.ids])).logits[0].double() / 0.8
            logps = scores.log_softmax(-1)[len(prompt) - 1 : -1]
            expected_logps = logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert torch.tensor(completion.logps) == pytest.approx(expected_logps.float(), abs=1e-4)
            entropy = -(logps.exp() * logps).sum(-1)
            assert torch.tensor(completion.entropies) == pytest.approx(entropy.float(), abs=1e-3)
    assert max(lengths) <= 10


def test_samples_do_not_depend_on_batching_order_or_backend() -> None:
    model = tiny_models.build("llama", "causal").eval()
    sampled = get_ids(sample(model))
    assert get_ids(sample(model, order=[3, 1, 4, 0, 2])) == sampled
    small_batches = SamplingOptions(3, 0.8, 10, (703,), most_rows=3)
    assert get_ids(sample(model, small_batches)) == sampled
    with torch.no_grad():
        generated = GenerateSampler(model, IdTokenizer()).sample(
            PROMPTS, ROWS, OPTIONS, Noise(1, 3)
        )
    assert dict(zip(ROWS, [[c.ids for c in group] for group in generated], strict=True)) == sampled
    assert get_ids(sample(model, step=4)) != sampled


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_finished_rows_leave_their_group(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(family, "causal").eval()
    unstopped = [completion for group in sample(model).values() for completion in group]
    stops = tuple(dict.fromkeys(completion.ids[3] for completion in unstopped[::2]))
    options = SamplingOptions(3, 0.8, 10, stops, most_rows=9)
    ragged = []
    attend = SharedPrompts.get_scores

    def recording_attend(self: SharedPrompts, query: torch.Tensor, layer: int) -> Any:
        ragged.append(self.slots is not None)
        return attend(self, query, layer)

    monkeypatch.setattr(SharedPrompts, "get_scores", recording_attend)
    sampled = sample(model, options)
    assert any(ragged)
    assert any(
        len({len(completion.ids) for completion in row_completions}) > 1
        for row_completions in sampled.values()
    )
    with torch.no_grad():
        generated = GenerateSampler(model, IdTokenizer()).sample(
            PROMPTS, ROWS, options, Noise(1, 3)
        )
    assert dict(zip(ROWS, [[c.ids for c in group] for group in generated], strict=True)) == get_ids(
        sampled
    )


def test_prompt_kv_cache_is_stored_once_per_group() -> None:
    model = tiny_models.build("llama", "causal").eval()
    sampler = GroupSampler(model, IdTokenizer())
    with torch.no_grad():
        rows = sampler.begin([0, 1], PROMPTS[:2]).fork(5)
        rows.last = [7] * 10
        sampler.step(rows)
    sampler.close()
    (prompts,) = rows.prompts
    assert prompts.states[0][0].shape[0] == 2
    assert rows.layers[0].keys.shape[::2] == (10, 1)


def test_rounding_of_logits_does_not_change_tokens() -> None:
    torch.manual_seed(1)
    scores = 2 * torch.randn(200, 8192)
    keys = Noise(5, 0)(list(range(200)), [0] * 200, [0] * 200)
    tokens = draw(scores, 1.0, keys)[0].tolist()
    for seed in range(3):
        torch.manual_seed(seed)
        rounded = scores + 1e-6 * torch.randn_like(scores)
        assert draw(rounded, 1.0, keys)[0].tolist() == tokens


def test_completions_end_at_stop_ids_and_stop_texts() -> None:
    model = tiny_models.build("llama", "causal").eval()
    unstopped = sample(model)
    first = unstopped[ROWS[0]][0].ids
    by_id = SamplingOptions(3, 0.8, 10, (first[4],))
    by_text = SamplingOptions(3, 0.8, 10, (), (f"<{first[3]}><{first[4]}>",))
    for options in (by_id, by_text):
        completion = sample(model, options)[ROWS[0]][0]
        assert completion.ids == first[:5]
        assert completion.ended
        assert len(completion.logps) == len(completion.entropies) == 5
    assert not unstopped[ROWS[0]][0].ended


def test_prompt_is_computed_once_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", "causal").eval()
    num_tokens = []
    forward = model.forward

    def counting_forward(**inputs: Any) -> Any:
        num_tokens.append(inputs["input_ids"].numel())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counting_forward)
    sample(model)
    longest = max(map(len, PROMPTS))
    assert num_tokens[0] <= longest * len(PROMPTS)
    assert all(number == 3 * len(PROMPTS) for number in num_tokens[1:3])
