"""Tests of embedding losses against their formulas, written as float64 loops over rows."""

from __future__ import annotations

from math import cos, exp, log, pi, sin, sqrt

import pytest
import torch

from ftlevel.extras.retrieval.config import EMBEDDING_LOSSES, EmbeddingConfig
from ftlevel.extras.retrieval.embedding_losses import STEP_LOSSES, LossConfig
from ftlevel.extras.retrieval.objective import Embeddings
from ftlevel.extras.retrieval.rows import StepTexts
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat

ROWS, DIMS = 5, 6


def _vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIMS, generator=generator, dtype=torch.float64)


def _pairs(negatives: int) -> StepTexts:
    """Return rows of a query, a positive and `negatives` negatives, with each text once."""
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
    documents = [text for row_texts in step.texts for text in row_texts[1:]]
    total = 0.0
    for query, positive, *_ in step.texts:
        sums = sum(exp(scale * _cosine(v[query], v[d])) for d in documents)
        total += log(sums) - scale * _cosine(v[query], v[positive])
    return total / len(step)


@pytest.mark.parametrize("negatives", [0, 2])
def test_mnrl_matches_info_nce_over_all_documents(negatives: int) -> None:
    step = _pairs(negatives)
    v = _vectors(ROWS * (2 + negatives))
    actual = STEP_LOSSES["mnrl"](v, step, LossConfig(scale=20.0))
    assert float(actual) == pytest.approx(_info_nce(v, step, 20.0), rel=1e-9)


def test_symmetric_mnrl_is_mean_of_both_directions() -> None:
    step, v = _pairs(0), _vectors(2 * ROWS)
    reversed_step = StepTexts(tuple((b, a) for a, b in step.texts), step.labels)
    expected = (_info_nce(v, step, 20.0) + _info_nce(v, reversed_step, 20.0)) / 2
    actual = STEP_LOSSES["mnrl"](v, step, LossConfig(symmetric=True))
    assert float(actual) == pytest.approx(expected, rel=1e-9)


def test_mnrl_of_equal_vectors_is_log_document_count() -> None:
    v = torch.ones(ROWS * 4, DIMS)
    assert float(STEP_LOSSES["mnrl"](v, _pairs(2), LossConfig())) == pytest.approx(log(3 * ROWS))


def test_repeated_pair_adds_ln_2_unless_hidden() -> None:
    """A pair that occurs twice is its own negative."""
    v = _vectors(2 * ROWS)
    unique = _pairs(0)
    repeated = StepTexts(unique.texts * 2, unique.labels * 2, unique.teacher * 2)
    expected = _info_nce(v, unique, 20.0)
    with_repeats = STEP_LOSSES["mnrl"](v, repeated, LossConfig(hides_repeats=False))
    without_repeats = STEP_LOSSES["mnrl"](v, repeated, LossConfig(hides_repeats=True))
    assert float(with_repeats) == pytest.approx(expected + log(2), rel=1e-9)
    # Other pairs are still candidates twice.
    sums = [
        log(
            exp(20 * _cosine(v[q], v[p]))
            + 2 * sum(exp(20 * _cosine(v[q], v[d])) for _, d in unique.texts if d != p)
        )
        - 20 * _cosine(v[q], v[p])
        for q, p in unique.texts
    ]
    assert float(without_repeats) == pytest.approx(sum(sums) / ROWS, rel=1e-9)


def test_other_positives_of_query_are_no_negatives() -> None:
    v = _vectors(5)
    step = StepTexts(((0, 1), (0, 2), (3, 4)), ((1.0,), (1.0,), (1.0,)), ((), (), ()))

    def compute_term(query: int, positive: int, documents: list[int]) -> float:
        sums = sum(exp(20 * _cosine(v[query], v[d])) for d in documents)
        return log(sums) - 20 * _cosine(v[query], v[positive])

    expected = (
        compute_term(0, 1, [1, 4]) + compute_term(0, 2, [2, 4]) + compute_term(3, 4, [1, 2, 4])
    ) / 3
    assert float(STEP_LOSSES["mnrl"](v, step, LossConfig())) == pytest.approx(expected, rel=1e-9)


def test_gist_skips_negatives_closer_by_guide() -> None:
    step, v = _pairs(1), _vectors(3 * ROWS)
    guide = _vectors(3 * ROWS, seed=1).float()
    guide[1::3] = guide[0::3] + 1.5 * guide[1::3]  # positives are close to their queries
    step = StepTexts(step.texts, step.labels, step.teacher, list(guide))
    positives = [row_texts[1] for row_texts in step.texts]
    total, skipped = 0.0, 0
    for query, positive, _ in step.texts:
        limit = _cosine(guide[query], guide[positive])
        pairs = [(query, candidate) for _, candidate, _ in step.texts]
        pairs += [(query, candidate) for candidate, _, _ in step.texts]
        pairs += [(positive, candidate) for candidate in positives]
        pairs += [(query, candidate) for _, _, candidate in step.texts]
        remaining = [
            (a, b)
            for a, b in pairs
            if (a, b) == (query, positive) or _cosine(guide[a], guide[b]) <= limit
        ]
        skipped += len(pairs) - len(remaining) - 2  # the query and the positive
        sums = sum(exp(100 * _cosine(v[a], v[b])) for a, b in remaining)
        total += log(sums) - 100 * _cosine(v[query], v[positive])
    assert 0 < skipped < 10 * ROWS
    actual = STEP_LOSSES["gist"](v, step, LossConfig(scale=100.0))
    assert float(actual) == pytest.approx(total / ROWS, rel=1e-6)


def test_gist_skips_other_positives_of_query() -> None:
    """The guide scores text 2 below text 1, so 2 would be a negative of the pair (0, 1)."""
    v, guide = _vectors(5), _vectors(5, seed=1).float()
    guide[1], guide[2] = guide[0] + 0.1 * guide[1], guide[0] + 0.5 * guide[2]
    texts, labels = ((0, 1), (0, 2), (3, 4)), ((1.0,),) * 3
    step = StepTexts(texts, labels, ((),) * 3, list(guide))
    total = 0.0
    for query, positive in texts:
        limit = _cosine(guide[query], guide[positive])
        others = [each for q, each in texts if q == query and each != positive]
        pairs = [(query, d) for _, d in texts] + [(query, q) for q, _ in texts]
        pairs += [(positive, d) for _, d in texts]
        sums = sum(
            exp(_cosine(v[a], v[b]))
            for a, b in pairs
            if (a, b) == (query, positive)
            or (b not in others and a != b and _cosine(guide[a], guide[b]) <= limit)
        )
        total += log(sums) - _cosine(v[query], v[positive])
    actual = STEP_LOSSES["gist"](v, step, LossConfig(scale=1.0))
    assert float(actual) == pytest.approx(total / 3, rel=1e-6)


@pytest.mark.parametrize(("loss", "scale"), [("angle", 20.0), ("cosent", 1.0)])
def test_scale_of_dot_products_is_not_that_of_angles(loss: str, scale: float) -> None:
    config = EmbeddingConfig(loss=loss)
    objective = Embeddings("spearman", config=config, format=EmbeddingFormat(similarity="dot"))
    v, step = _vectors(2 * ROWS), _scored(LABELS)
    expected = STEP_LOSSES[loss](v.float(), step, LossConfig(scale=scale, is_cosine=False))
    assert float(objective.step_loss(v, step)) == pytest.approx(float(expected))


LABELS = (0.1, 0.9, 0.4, 0.4, 0.7)


def test_cosent_compares_all_pairs_of_step() -> None:
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
    actual = STEP_LOSSES["cosent"](v, _scored(LABELS), LossConfig())
    assert float(actual) == pytest.approx(expected, rel=1e-9)


def test_angle_loss_matches_formula() -> None:
    """|Re + Im| of z · conj(w) is √2 |cos(angle − π/4)| for unit complex numbers."""
    angles = [(0.3, 1.1), (2.0, 0.4), (1.0, 1.2), (0.0, 3.0), (2.5, 2.4)]
    v = torch.tensor([[cos(t), sin(t)] for pair in angles for t in pair], dtype=torch.float64)
    scores = [abs(sqrt(2) * cos(a - b - pi / 4)) for a, b in angles]
    expected = log(
        1
        + sum(
            exp(20 * (scores[j] - scores[i]))
            for i in range(ROWS)
            for j in range(ROWS)
            if LABELS[i] > LABELS[j]
        )
    )
    actual = STEP_LOSSES["angle"](v, _scored(LABELS), LossConfig())
    assert float(actual) == pytest.approx(expected, rel=1e-9)


def test_cosine_and_contrastive_losses_are_means_over_pairs() -> None:
    v = _vectors(2 * ROWS)
    scores = [_cosine(v[2 * i], v[2 * i + 1]) for i in range(ROWS)]
    expected = sum((s - y) ** 2 for s, y in zip(scores, LABELS, strict=True)) / ROWS
    actual = STEP_LOSSES["cosine"](v.float(), _scored(LABELS), LossConfig())
    assert float(actual) == pytest.approx(expected, rel=1e-5)
    labels = (1.0, 0.0, 0.0, 1.0, 0.0)
    terms = [
        0.5 * (y * (1 - s) ** 2 + (1 - y) * max(0.0, 0.5 - (1 - s)) ** 2)
        for s, y in zip(scores, labels, strict=True)
    ]
    actual = STEP_LOSSES["contrastive"](v, _scored(labels), LossConfig(margin=0.5))
    assert float(actual) == pytest.approx(sum(terms) / ROWS, rel=1e-5)


@pytest.mark.parametrize("loss", ["cosent", "angle", "cosine", "contrastive"])
def test_step_with_one_text_of_a_class_has_zero_loss(loss: str) -> None:
    """The last step of an epoch may have one row."""
    v = _vectors(1).requires_grad_()
    actual = STEP_LOSSES[loss](v, StepTexts(((0,),), ((3.0,),), ((),)), LossConfig(margin=0.5))
    (gradient,) = torch.autograd.grad(actual, [v])
    assert float(actual.detach()) == 0
    assert not gradient.any()


def test_triplet_loss_is_hinge_of_distances() -> None:
    step, v = _pairs(2), _vectors(4 * ROWS)
    terms = [
        max(0.0, float((v[q] - v[p]).norm()) - float((v[q] - v[n]).norm()) + 0.5)
        for q, p, *negatives in step.texts
        for n in negatives
    ]
    actual = STEP_LOSSES["triplet"](v, step, LossConfig(margin=0.5))
    assert float(actual) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_margin_mse_and_kl_match_formulas() -> None:
    step, v = _pairs(2), _vectors(4 * ROWS)
    teacher = tuple((3.0, 1.0 + row / 10, -1.0) for row in range(ROWS))
    step = StepTexts(step.texts, step.labels, teacher)
    errors, divergences = [], []
    for (q, *documents), teacher_scores in zip(step.texts, teacher, strict=True):
        scores = [float(v[q] @ v[d]) for d in documents]
        errors += [
            ((scores[0] - s) - (teacher_scores[0] - t)) ** 2
            for s, t in zip(scores[1:], teacher_scores[1:], strict=True)
        ]
        p = [exp(t / 2) / sum(exp(u / 2) for u in teacher_scores) for t in teacher_scores]
        r = [exp(s / 2) / sum(exp(u / 2) for u in scores) for s in scores]
        divergences.append(sum(a * log(a / b) for a, b in zip(p, r, strict=True)))
    actual = STEP_LOSSES["margin-mse"](v, step, LossConfig())
    assert float(actual) == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    actual = STEP_LOSSES["kl"](v, step, LossConfig(temperature=2.0))
    assert float(actual) == pytest.approx(4 * sum(divergences) / ROWS, rel=1e-6)


def test_matryoshka_sums_weighted_losses_of_dimensions() -> None:
    step, v = _pairs(0), _vectors(2 * ROWS).float()
    settings = EmbeddingConfig(loss="mnrl", matryoshka_dims=(6, 3), matryoshka_weights=(1, 0.5))
    actual = Embeddings("ndcg@10", False, settings).step_loss(v, step)
    expected = _info_nce(v, step, 20.0) + 0.5 * _info_nce(v[:, :3], step, 20.0)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_loss_does_not_depend_on_autocast() -> None:
    step, v = _pairs(1), _vectors(3 * ROWS).float()
    objective = Embeddings("ndcg@10", False, EmbeddingConfig(loss="mnrl"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_autocast = objective.step_loss(v, step)
    assert torch.equal(with_autocast, objective.step_loss(v, step))


def test_every_loss_is_configured() -> None:
    assert set(STEP_LOSSES) == set(EMBEDDING_LOSSES)
