"""Tests of hard negatives: no positives, none above the margin, within the range of ranks."""

import numpy as np
import pytest
import torch

from ftlevel.config import build_section
from ftlevel.errors import ConfigError
from ftlevel.extras.retrieval.config import MineConfig
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.mining import Corpus, find_negatives


def mining(negatives, relative_margin, ranks=None, **options):
    values = {"negatives": negatives, "relative_margin": relative_margin, "ranks": ranks}
    return MineConfig.model_construct(**values, **options)


def row(query, *positives):
    return EmbeddingRow(query, 0, positives, (1.0,) * len(positives))


def create_unit_vectors(*angles):
    """Return unit vectors at angles in degrees, whose scores are cosines."""
    radians = torch.tensor(angles, dtype=torch.float32).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


ROWS = [row("q", "a"), row("q", "b"), row("r", "c")]
ANGLES = {"a": 30.0, "b": 40.0, "c": 20.0, "d": 31.0, "e": 50.0, "f": 70.0, "q": 0.0}


def mine_texts(options, rows=ROWS, **mine_options):
    corpus = Corpus(rows, ["d", "e", "f", "q"])
    documents = create_unit_vectors(*(ANGLES[text] for text in corpus.texts))
    queries = create_unit_vectors(*([0.0] * len(rows)))
    results = list(find_negatives(rows, corpus, queries, documents, options, **mine_options))
    return [[corpus.texts[index] for index in result.negatives] for result in results], results


def test_other_positives_and_query_are_not_mined():
    texts, _ = mine_texts(mining(9, 0.0))
    assert texts[0] == ["d", "e", "f"]  # c scores above the positive a; b is another positive


def test_documents_above_the_margin_are_skipped():
    """cos 30 = .866: with a margin of 5 % the limit is .823, and d at cos 31 = .857 is above."""
    texts, results = mine_texts(mining(9, 0.05))
    assert texts[0] == ["e", "f"]
    assert results[0].skipped == 2  # c and d
    assert results[0].positive_scores == pytest.approx([np.cos(np.deg2rad(30))])
    assert results[0].negative_scores == pytest.approx(np.cos(np.deg2rad([50, 70])))


def test_lowest_positive_sets_the_margin():
    texts, _ = mine_texts(mining(9, 0.0), [row("q", "c", "e")])
    assert texts == [["f"]]


def test_rank_range_counts_unskipped_documents():
    assert mine_texts(mining(1, 0.0, (2, 3)))[0][0] == ["e"]
    assert mine_texts(mining(5, 0.0, (2, 9)))[0][0] == ["e", "f"]
    assert mine_texts(mining(5, 0.0, (7, 9)))[0][0] == []


def test_random_selection_is_reproducible_by_seed():
    angles = {f"x{n}": 40.0 + n for n in range(40)}
    ANGLES.update(angles)
    rows = [row("q", "a")] * 3
    corpus = Corpus(rows, list(angles))
    documents = create_unit_vectors(*(ANGLES[text] for text in corpus.texts))
    options = mining(4, 0.0, (11, 30), sampling="random", seed=3)
    first, second = (
        [
            result.negatives
            for result in find_negatives(
                rows, corpus, create_unit_vectors(0, 0, 0), documents, options
            )
        ]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3
    assert all(
        set(negatives) <= {corpus.positions[f"x{n}"] for n in range(10, 30)} for negatives in first
    )


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_block_size_has_no_effect(block_bytes):
    assert mine_texts(mining(9, 0.0), block_bytes=block_bytes)[0] == mine_texts(mining(9, 0.0))[0]


def create_config(**values):
    return build_section(
        MineConfig, {"name": "m", "dataset": "d", "output": "o.jsonl", **values}, {}
    )


def test_ranks_are_parsed_and_validated():
    assert create_config(ranks="10-210").ranks == (10, 210)
    with pytest.raises(ConfigError, match="not a range of ranks"):
        create_config(ranks="10")
    with pytest.raises(ConfigError, match="has 3 ranks, and --negatives is 5"):
        create_config(ranks="10-12")
