"""Meters of similarities: values and memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ftlevel.evaluation.embeddings import create_meters
from ftlevel.objectives import StepTexts
from ftlevel.tasks.embedding.objective import Embeddings


def test_classes_are_compared_in_pairs_without_an_object_per_pair() -> None:
    """500 texts have 124,750 pairs; a Python float for each takes more than 3 MB."""
    count = 500
    vectors = torch.nn.functional.normalize(torch.randn(count, 8))
    classes = np.arange(count) % 3
    labels = tuple((float(label),) for label in classes)
    step = StepTexts(tuple((at,) for at in range(count)), labels, ((),) * count, None)
    tracemalloc.start()
    meters = create_meters(Embeddings("ap", kind="class"), vectors, step, (None, 4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 124_750 * 16
    first, second = np.triu_indices(count, 1)
    for suffix, dims in (("", 8), ("_dim_4", 4)):
        own = torch.nn.functional.normalize(vectors[:, :dims], dim=-1).numpy()
        similarities = (own @ own.T)[first, second]
        expected = average_precision_score(classes[first] == classes[second], similarities)
        found = meters[0].pool(meters).compute(0.0)[f"ap{suffix}"]
        assert found == pytest.approx(expected, abs=1e-6)
