"""Losses of embedding models against their formulas, written as loops over rows in float64."""

from __future__ import annotations

from math import cos, exp, log, pi, sin, sqrt

import pytest
import torch

from ftlevel.config.embedding import LOSSES, EmbeddingConfig
from ftlevel.objectives import StepTexts
from ftlevel.tasks.embedding.losses import STEP_LOSSES, LossConfig
from ftlevel.tasks.embedding.objective import Embeddings

ROWS, DIMS = 5, 6


def _vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIMS, generator=generator, dtype=torch.float64)


def _pairs(negatives: int) -> StepTexts:
    """Rows of a query, a positive and `negatives` negatives, each text once."""
    width = 2 + negatives
    texts = tuple(tuple(range(row * width, (row + 1) * width)) for row in range(ROWS))
    labels = ((1.0, *(0.0,) * negatives),) * ROWS
    return StepTexts(texts, labels, ((),) * ROWS)


def _scored(labels: tuple[float, ...]) -> StepTexts:
    texts = tuple((2 * row, 2 * row + 1) for row in range(ROWS))
    return StepTexts(texts, tuple((label,) for label in labels), ((),) * ROWS)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / sqrt(float(a @ a) * float(b @ b)))


def _info_nce(v: torch.Tensor, step: StepTexts, scale: float) -> float:
    documents = [text for own in step.texts for text in own[1:]]
    total = 0.0
    for query, positive, *_ in step.texts:
        sums = sum(exp(scale * _cosine(v[query], v[d])) for d in documents)
        total += log(sums) - scale * _cosine(v[query], v[positive])
    return total / len(step)


@pytest.mark.parametrize("negatives", [0, 2])
def test_mnrl_contrasts_with_all_documents_of_the_step(negatives: int) -> None:
    step = _pairs(negatives)
    v = _vectors(ROWS * (2 + negatives))
    found = STEP_LOSSES["mnrl"](v, step, LossConfig(scale=20.0))
    assert float(found) == pytest.approx(_info_nce(v, step, 20.0), rel=1e-9)


def test_symmetric_mnrl_is_the_mean_of_both_directions() -> None:
    step, v = _pairs(0), _vectors(2 * ROWS)
    turned = StepTexts(tuple((b, a) for a, b in step.texts), step.labels)
    expected = (_info_nce(v, step, 20.0) + _info_nce(v, turned, 20.0)) / 2
    found = STEP_LOSSES["mnrl"](v, step, LossConfig(symmetric=True))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_equal_vectors_give_the_logarithm_of_the_number_of_documents() -> None:
    v = torch.ones(ROWS * 4, DIMS)
    assert float(STEP_LOSSES["mnrl"](v, _pairs(2), LossConfig())) == pytest.approx(log(3 * ROWS))


def test_a_repeated_pair_costs_ln_2_unless_repeats_are_hidden() -> None:
    """A pair that is there twice is its own negative."""
    v = _vectors(2 * ROWS)
    once = _pairs(0)
    twice = StepTexts(once.texts * 2, once.labels * 2, once.teacher * 2)
    expected = _info_nce(v, once, 20.0)
    shown = STEP_LOSSES["mnrl"](v, twice, LossConfig(hides_repeats=False))
    hidden = STEP_LOSSES["mnrl"](v, twice, LossConfig(hides_repeats=True))
    assert float(shown) == pytest.approx(expected + log(2), rel=1e-9)
    # Other pairs are still there twice as candidates.
    sums = [
        log(
            exp(20 * _cosine(v[q], v[p]))
            + 2 * sum(exp(20 * _cosine(v[q], v[d])) for _, d in once.texts if d != p)
        )
        - 20 * _cosine(v[q], v[p])
        for q, p in once.texts
    ]
    assert float(hidden) == pytest.approx(sum(sums) / ROWS, rel=1e-9)


def test_another_positive_of_a_query_is_no_negative() -> None:
    v = _vectors(5)
    step = StepTexts(((0, 1), (0, 2), (3, 4)), ((1.0,), (1.0,), (1.0,)), ((), (), ()))

    def term(query: int, positive: int, documents: list[int]) -> float:
        sums = sum(exp(20 * _cosine(v[query], v[d])) for d in documents)
        return log(sums) - 20 * _cosine(v[query], v[positive])

    expected = (term(0, 1, [1, 4]) + term(0, 2, [2, 4]) + term(3, 4, [1, 2, 4])) / 3
    assert float(STEP_LOSSES["mnrl"](v, step, LossConfig())) == pytest.approx(expected, rel=1e-9)


def test_gist_leaves_out_what_the_guide_finds_nearer() -> None:
    step, v = _pairs(1), _vectors(3 * ROWS)
    guide = _vectors(3 * ROWS, seed=1).float()
    guide[1::3] = guide[0::3] + 1.5 * guide[1::3]  # positives are near their queries
    step = StepTexts(step.texts, step.labels, step.teacher, list(guide))
    positives = [own[1] for own in step.texts]
    total, left_out = 0.0, 0
    for query, positive, _ in step.texts:
        limit = _cosine(guide[query], guide[positive])
        pairs = [(query, other) for _, other, _ in step.texts]
        pairs += [(query, other) for other, _, _ in step.texts]
        pairs += [(positive, other) for other in positives]
        pairs += [(query, other) for _, _, other in step.texts]
        kept = [
            (a, b)
            for a, b in pairs
            if (a, b) == (query, positive) or _cosine(guide[a], guide[b]) <= limit
        ]
        left_out += len(pairs) - len(kept) - 2  # the query and the positive themselves
        sums = sum(exp(100 * _cosine(v[a], v[b])) for a, b in kept)
        total += log(sums) - 100 * _cosine(v[query], v[positive])
    assert 0 < left_out < 10 * ROWS
    found = STEP_LOSSES["gist"](v, step, LossConfig(scale=100.0))
    assert float(found) == pytest.approx(total / ROWS, rel=1e-6)


LABELS = (0.1, 0.9, 0.4, 0.4, 0.7)


def test_cosent_compares_all_pairs_of_the_step() -> None:
    v = _vectors(2 * ROWS)
    scores = [_cosine(v[2 * i], v[2 * i + 1]) for i in range(ROWS)]
    expected = log(
        1
        + sum(
            exp(20 * (scores[j] - scores[i]))
            for i in range(ROWS)
            for j in range(ROWS)
            if LABELS[i] > LABELS[j]
        )
    )
    found = STEP_LOSSES["cosent"](v, _scored(LABELS), LossConfig())
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_angle_is_cosent_of_angles() -> None:
    """|Re + Im| of z · conj(w) is √2 |cos(angle − π/4)| for unit complex numbers."""
    turns = [(0.3, 1.1), (2.0, 0.4), (1.0, 1.2), (0.0, 3.0), (2.5, 2.4)]
    v = torch.tensor([[cos(t), sin(t)] for pair in turns for t in pair], dtype=torch.float64)
    scores = [abs(sqrt(2) * cos(a - b - pi / 4)) for a, b in turns]
    expected = log(
        1
        + sum(
            exp(20 * (scores[j] - scores[i]))
            for i in range(ROWS)
            for j in range(ROWS)
            if LABELS[i] > LABELS[j]
        )
    )
    found = STEP_LOSSES["angle"](v, _scored(LABELS), LossConfig())
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_cosine_and_contrastive_are_means_over_pairs() -> None:
    v = _vectors(2 * ROWS)
    scores = [_cosine(v[2 * i], v[2 * i + 1]) for i in range(ROWS)]
    expected = sum((s - y) ** 2 for s, y in zip(scores, LABELS, strict=True)) / ROWS
    found = STEP_LOSSES["cosine"](v.float(), _scored(LABELS), LossConfig())
    assert float(found) == pytest.approx(expected, rel=1e-5)
    labels = (1.0, 0.0, 0.0, 1.0, 0.0)
    terms = [
        0.5 * (y * (1 - s) ** 2 + (1 - y) * max(0.0, 0.5 - (1 - s)) ** 2)
        for s, y in zip(scores, labels, strict=True)
    ]
    found = STEP_LOSSES["contrastive"](v, _scored(labels), LossConfig(margin=0.5))
    assert float(found) == pytest.approx(sum(terms) / ROWS, rel=1e-5)


def test_triplet_is_a_hinge_of_distances() -> None:
    step, v = _pairs(2), _vectors(4 * ROWS)
    terms = [
        max(0.0, float((v[q] - v[p]).norm()) - float((v[q] - v[n]).norm()) + 0.5)
        for q, p, *negatives in step.texts
        for n in negatives
    ]
    found = STEP_LOSSES["triplet"](v, step, LossConfig(margin=0.5))
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_margin_mse_and_kl_follow_the_teacher() -> None:
    step, v = _pairs(2), _vectors(4 * ROWS)
    teacher = tuple((3.0, 1.0 + row / 10, -1.0) for row in range(ROWS))
    step = StepTexts(step.texts, step.labels, teacher)
    errors, divergences = [], []
    for (q, *own), told in zip(step.texts, teacher, strict=True):
        scores = [float(v[q] @ v[d]) for d in own]
        errors += [
            ((scores[0] - s) - (told[0] - t)) ** 2
            for s, t in zip(scores[1:], told[1:], strict=True)
        ]
        p = [exp(t / 2) / sum(exp(u / 2) for u in told) for t in told]
        r = [exp(s / 2) / sum(exp(u / 2) for u in scores) for s in scores]
        divergences.append(sum(a * log(a / b) for a, b in zip(p, r, strict=True)))
    found = STEP_LOSSES["margin-mse"](v, step, LossConfig())
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    found = STEP_LOSSES["kl"](v, step, LossConfig(temperature=2.0))
    assert float(found) == pytest.approx(4 * sum(divergences) / ROWS, rel=1e-6)


def test_matryoshka_sums_the_losses_of_its_dimensions() -> None:
    step, v = _pairs(0), _vectors(2 * ROWS).float()
    settings = EmbeddingConfig(loss="mnrl", matryoshka_dims=(6, 3), matryoshka_weights=(1, 0.5))
    found = Embeddings("ndcg@10", False, settings).step_loss(v, step)
    expected = _info_nce(v, step, 20.0) + 0.5 * _info_nce(v[:, :3], step, 20.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_loss_does_not_depend_on_autocast() -> None:
    step, v = _pairs(1), _vectors(3 * ROWS).float()
    objective = Embeddings("ndcg@10", False, EmbeddingConfig(loss="mnrl"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective.step_loss(v, step)
    assert torch.equal(inside, objective.step_loss(v, step))


def test_every_loss_has_its_facts() -> None:
    assert set(STEP_LOSSES) == set(LOSSES)
