"""Losses of embedding models over all rows of an optimizer step, in float32.

q, d   vectors of queries and documents; s = cosine or dot product; τ = 1 / scale

mnrl         mean over i of −s(qᵢ,dᵢ)/τ + log Σⱼ exp s(qᵢ,dⱼ)/τ   (arXiv:1807.03748, 1705.00652)
gist         mnrl with queries and positives as candidates, without those that a guide model
             scores above dᵢ (arXiv:2402.16829) and other positives of the query
cosent       log(1 + Σ over yᵢ > yⱼ of exp(scale · (sⱼ − sᵢ)))  (Su, 2022)
angle        cosent of the similarity of angles (arXiv:2309.12871)
cosine       mean of (s − y)²
contrastive  mean of ½ (y D² + (1 − y) max(0, m − D)²), D = 1 − s (Hadsell et al., 2006)
triplet      mean of max(0, ‖q − d⁺‖ − ‖q − d⁻‖ + m) (arXiv:1503.03832)
margin-mse   mean of (q·d⁺ − q·d⁻ − teacher's)² (arXiv:2010.02666)
kl           T² · KL(softmax(teacher's / T) ‖ softmax(q·d / T)) over a row's own documents

Means are over terms, each of which belongs to one row; cosent and angle have no such terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch.nn import functional

from ftlevel.extras.retrieval.rows import StepTexts
from ftlevel.models.hardware import send


@dataclass(frozen=True)
class LossConfig:
    """Settings of the losses, resolved from `EmbeddingConfig`.

    `hides_repeats` excludes candidates that are a positive of the query in another row.
    """

    scale: float = 20.0
    margin: float = 0.0
    temperature: float = 1.0
    symmetric: bool = False
    is_cosine: bool = True
    hides_repeats: bool = True


def similarity(one: torch.Tensor, other: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Returns the cosine or dot products `(n, m)` of vectors `(n, dims)` and `(m, dims)`."""
    if config.is_cosine:
        one, other = functional.normalize(one, dim=-1), functional.normalize(other, dim=-1)
    return one @ other.T


def _paired(one: torch.Tensor, other: torch.Tensor, config: LossConfig) -> torch.Tensor:
    if config.is_cosine:
        one, other = functional.normalize(one, dim=-1), functional.normalize(other, dim=-1)
    return (one * other).sum(-1)


@dataclass(frozen=True)
class Candidates:
    """Queries of an optimizer step, and all its documents, which each query is compared with.

    Attributes:
        queries: `(n,)` text indices; a query occurs once for each of its positives.
        documents: `(m,)` text indices: the positives of `queries`, then all negatives.
        hidden: `(n, m)` mask of documents that are another positive of the query.
        rows: index of each query's row.
    """

    queries: torch.Tensor
    documents: torch.Tensor
    hidden: torch.Tensor
    rows: list[int]

    @classmethod
    def of(cls, step: StepTexts, device: torch.device) -> Candidates:
        queries: list[int] = []
        rows: list[int] = []
        positive: list[int] = []
        negative: list[int] = []
        for row, ((query, *documents), labels) in enumerate(
            zip(step.texts, step.labels, strict=True)
        ):
            for document, label in zip(documents, labels, strict=True):
                if label > 0:
                    queries.append(query)
                    rows.append(row)
                    positive.append(document)
                else:
                    negative.append(document)
        q = send(torch.tensor(queries), device)
        d = send(torch.tensor(positive + negative), device)
        hidden = d[: len(q), None] == d[None]
        if len(set(queries)) < len(queries):  # else the product would be `hidden`
            same_query = q[:, None] == q[None]
            hidden = (same_query.float() @ hidden.float()) > 0
        hidden[:, : len(q)].fill_diagonal_(False)
        return cls(q, d, hidden, rows)


Terms = tuple[torch.Tensor, Sequence[int]]
"""Terms of a loss, `(n,)`, and the row of each."""


def mnrl(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> Terms:
    """Returns the InfoNCE loss of `vectors` `(texts, dims)`: queries against all documents."""
    found = Candidates.of(step, vectors.device)
    scores = similarity(vectors[found.queries], vectors[found.documents], config) * config.scale
    if config.hides_repeats:
        scores = scores.masked_fill(found.hidden, -torch.inf)
    right = torch.arange(len(scores), device=scores.device)
    loss = functional.cross_entropy(scores, right, reduction="none")
    if config.symmetric:
        back = scores[:, : len(scores)].T
        loss = (loss + functional.cross_entropy(back, right, reduction="none")) / 2
    return loss, found.rows


def gist(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> Terms:
    """Returns the InfoNCE loss without candidates that a guide model scores above the positive."""
    found = Candidates.of(step, vectors.device)
    guide = torch.stack([torch.as_tensor(own) for own in step.guide or ()]).to(vectors.device)
    count = len(found.queries)
    queries, positives, negatives = (
        found.queries,
        found.documents[:count],
        found.documents[count:],
    )
    known = found.hidden & config.hides_repeats
    blocks = (
        (queries, positives, known[:, :count]),
        (queries, queries, torch.zeros_like(known[:, :1])),
        (positives, positives, known[:, :count]),
        (queries, negatives, known[:, count:]),
    )
    limit = _paired(guide[queries], guide[positives], LossConfig())[:, None] - config.margin
    right = torch.arange(count, device=vectors.device)
    parts = []
    for number, (rows, columns, repeated) in enumerate(blocks):
        scores = similarity(vectors[rows], vectors[columns], config)
        hidden = (similarity(guide[rows], guide[columns], LossConfig()) > limit) | repeated
        if number == 0:
            hidden[right, right] = False
        parts.append(scores.masked_fill(hidden, -torch.inf))
    scores = torch.cat(parts, dim=1) * config.scale
    return functional.cross_entropy(scores, right, reduction="none"), found.rows


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts, as indices `first` and `second` `(n,)`, with their labels `(n,)`.

    `rows` has the row of each pair, the first if it is of two.
    """

    first: torch.Tensor
    second: torch.Tensor
    labels: torch.Tensor
    rows: Sequence[int]

    @classmethod
    def of(cls, step: StepTexts, device: torch.device) -> Pairs:
        """Returns pairs of each query with each of its documents, and the documents' labels.

        For texts with classes, these are all pairs of texts; label 1 for equal classes, else 0.
        """
        rows = list(zip(step.texts, step.labels, strict=True))
        if any(len(texts) == 1 for texts, _ in rows):
            named = [(row, texts[0], labels[0]) for row, (texts, labels) in enumerate(rows)]
            pairs = [
                (row, a, b, float(one == two))
                for (row, a, one), (_, b, two) in combinations(named, 2)
            ]
        else:
            pairs = [
                (row, texts[0], document, label)
                for row, (texts, labels) in enumerate(rows)
                for document, label in zip(texts[1:], labels, strict=True)
            ]
        of_pair, first, second, labels = zip(*pairs, strict=True) if pairs else ((), (), (), ())
        return cls(
            send(torch.tensor(first, dtype=torch.long), device),
            send(torch.tensor(second, dtype=torch.long), device),
            send(torch.tensor(labels, dtype=torch.float32), device),
            of_pair,
        )


def _rank(scores: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns CoSENT's loss of the similarities `scores` `(n,)` and their labels `(n,)`."""
    apart = scale * (scores[None, :] - scores[:, None])  # sⱼ − sᵢ
    apart = apart.masked_fill(labels[:, None] <= labels[None, :], -torch.inf).flatten()
    return torch.cat([apart.new_zeros(1), apart]).logsumexp(0)


def cosent(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> torch.Tensor:
    """Returns CoSENT's loss, which penalizes pairs ranked against the order of their labels."""
    pairs = Pairs.of(step, vectors.device)
    scores = _paired(vectors[pairs.first], vectors[pairs.second], config)
    return _rank(scores, pairs.labels, config.scale)


def angle(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> torch.Tensor:
    """Returns CoSENT's loss of the similarities |Re(z w*) + Im(z w*)|.

    Each normalized vector is split in halves: the real and imaginary parts of z or w.
    """
    pairs = Pairs.of(step, vectors.device)
    width = vectors.shape[1] + vectors.shape[1] % 2
    padded = functional.pad(functional.normalize(vectors, dim=-1), (0, width - vectors.shape[1]))
    half = torch.complex(padded[:, : width // 2].contiguous(), padded[:, width // 2 :].contiguous())
    products = (half[pairs.first] * half[pairs.second].conj()).sum(-1)
    return _rank((products.real + products.imag).abs(), pairs.labels, config.scale)


def cosine(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> Terms:
    """Returns the squared differences of the pairs' similarities and labels."""
    pairs = Pairs.of(step, vectors.device)
    scores = _paired(vectors[pairs.first], vectors[pairs.second], config)
    return (scores - pairs.labels).square(), pairs.rows


def contrastive(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> Terms:
    """Returns the contrastive loss: distances should be 0 for label 1, ≥ margin for label 0."""
    pairs = Pairs.of(step, vectors.device)
    apart = 1 - _paired(vectors[pairs.first], vectors[pairs.second], config)
    near, far = apart.square(), (config.margin - apart).clamp(min=0).square()
    return 0.5 * (pairs.labels * near + (1 - pairs.labels) * far), pairs.rows


def triplet(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> Terms:
    """Returns the triplet loss of all pairs of a positive and a negative in each row."""
    triplets = [
        (row, texts[0], texts[1 + good], texts[1 + bad])
        for row, (texts, labels) in enumerate(zip(step.texts, step.labels, strict=True))
        for good, g in enumerate(labels)
        for bad, b in enumerate(labels)
        if g > 0 >= b
    ]
    rows, *indices = zip(*triplets, strict=True)
    query, good, bad = (vectors[send(torch.tensor(i), vectors.device)] for i in indices)
    apart = functional.pairwise_distance(query, good) - functional.pairwise_distance(query, bad)
    return (apart + config.margin).clamp(min=0), rows


def _own_scores(vectors: torch.Tensor, step: StepTexts) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (dot products of query and documents, teacher's scores) of each row of `step`."""
    found = []
    for texts, teacher in zip(step.texts, step.teacher, strict=True):
        indices = send(torch.tensor(texts), vectors.device)
        scores = vectors[indices[1:]] @ vectors[indices[0]]
        found.append((scores, send(torch.tensor(teacher, dtype=scores.dtype), vectors.device)))
    return found


def margin_mse(vectors: torch.Tensor, step: StepTexts, _: LossConfig) -> Terms:
    """Returns the squared differences of student and teacher margins (first score - another)."""
    errors = [
        (scores[0] - scores[1:]) - (teacher[0] - teacher[1:])
        for scores, teacher in _own_scores(vectors, step)
    ]
    rows = [row for row, error in enumerate(errors) for _ in range(len(error))]
    return torch.cat(errors).square(), rows


def kl(vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> Terms:
    """Returns T² · KL(teacher ‖ student) over each row's documents."""
    heat = config.temperature
    losses = [
        functional.kl_div(
            (scores / heat).log_softmax(0), (teacher / heat).softmax(0), reduction="sum"
        )
        for scores, teacher in _own_scores(vectors, step)
    ]
    return torch.stack(losses) * heat**2, range(len(losses))


StepLoss = Callable[[torch.Tensor, StepTexts, LossConfig], torch.Tensor]
LOSS_TERMS: dict[str, Callable[[torch.Tensor, StepTexts, LossConfig], Terms]] = {
    "mnrl": mnrl,
    "gist": gist,
    "cosine": cosine,
    "contrastive": contrastive,
    "triplet": triplet,
    "margin-mse": margin_mse,
    "kl": kl,
}


def _mean(loss: str, vectors: torch.Tensor, step: StepTexts, config: LossConfig) -> torch.Tensor:
    terms, _ = LOSS_TERMS[loss](vectors, step, config)
    return terms.mean() if len(terms) else terms.sum()


STEP_LOSSES: dict[str, StepLoss] = {
    **{name: partial(_mean, name) for name in LOSS_TERMS},
    "cosent": cosent,
    "angle": angle,
}
