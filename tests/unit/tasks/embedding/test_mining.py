"""Hard negatives: no positive of any row, none above the margin, in the range of ranks."""

import numpy as np
import pytest
import torch

from ftlevel.config import build_section
from ftlevel.config.mining import MineConfig
from ftlevel.errors import ConfigError
from ftlevel.tasks.embedding.formats import EmbeddingRow
from ftlevel.tasks.embedding.mining import Corpus, MiningConfig, mine


def row(query, *positives):
    return EmbeddingRow(query, 0, positives, (1.0,) * len(positives))


def unit(*angles):
    """Vectors at angles in degrees, so that scores are cosines."""
    turned = torch.tensor(angles, dtype=torch.float32).deg2rad()
    return torch.stack([turned.cos(), turned.sin()], dim=1)


ROWS = [row("q", "a"), row("q", "b"), row("r", "c")]
ANGLES = {"a": 30.0, "b": 40.0, "c": 20.0, "d": 31.0, "e": 50.0, "f": 70.0, "q": 0.0}


def mined(options, rows=ROWS, **others):
    corpus = Corpus(rows, ["d", "e", "f", "q"])
    documents = unit(*(ANGLES[text] for text in corpus.texts))
    queries = unit(*([0.0] * len(rows)))
    found = list(mine(rows, corpus, queries, documents, options, **others))
    return [[corpus.texts[at] for at in each.negatives] for each in found], found


def test_positives_of_other_rows_and_the_query_itself_are_no_negatives():
    texts, _ = mined(MiningConfig(9, 0.0))
    assert texts[0] == ["d", "e", "f"]  # c is above the positive a, and b is another positive


def test_documents_above_the_margin_are_skipped():
    """cos 30 = .866: with a margin of 5 % the limit is .823, and d at cos 31 = .857 is above."""
    texts, found = mined(MiningConfig(9, 0.05))
    assert texts[0] == ["e", "f"]
    assert found[0].skipped == 2  # c and d
    assert found[0].positive_scores == pytest.approx([np.cos(np.deg2rad(30))])
    assert found[0].negative_scores == pytest.approx(np.cos(np.deg2rad([50, 70])))


def test_the_lowest_positive_of_a_row_sets_the_margin():
    texts, _ = mined(MiningConfig(9, 0.0), [row("q", "c", "e")])
    assert texts == [["f"]]


def test_a_range_of_ranks_counts_what_is_not_skipped():
    assert mined(MiningConfig(1, 0.0, (2, 3)))[0][0] == ["e"]
    assert mined(MiningConfig(5, 0.0, (2, 9)))[0][0] == ["e", "f"]
    assert mined(MiningConfig(5, 0.0, (7, 9)))[0][0] == []


def test_a_random_selection_is_repeated_by_its_seed():
    many = {f"x{n}": 40.0 + n for n in range(40)}
    ANGLES.update(many)
    rows = [row("q", "a")] * 3
    corpus = Corpus(rows, list(many))
    documents = unit(*(ANGLES[text] for text in corpus.texts))
    options = MiningConfig(4, 0.0, (11, 30), at_random=True, seed=3)
    one, two = (
        [each.negatives for each in mine(rows, corpus, unit(0, 0, 0), documents, options)]
        for _ in range(2)
    )
    assert one == two
    assert len(set(one)) == 3
    assert all(set(own) <= {corpus.places[f"x{n}"] for n in range(10, 30)} for own in one)


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_block_has_no_effect(block_bytes):
    assert mined(MiningConfig(9, 0.0), block_bytes=block_bytes)[0] == mined(MiningConfig(9, 0.0))[0]


def config(**values):
    return build_section(
        MineConfig, {"name": "m", "dataset": "d", "output": "o.jsonl", **values}, {}
    )


def test_ranks_are_read_and_have_to_suffice():
    assert config(ranks="10-210").ranks == (10, 210)
    with pytest.raises(ConfigError, match="no range of ranks"):
        config(ranks="10")
    with pytest.raises(ConfigError, match="has 3 ranks, and --negatives is 5"):
        config(ranks="10-12")
