"""What a run would be with rows, a card or a tokenizer that are not here."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.data.prepare.context import Prepared
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import BaseTask
from ftlevel.training.plan.resolve import Imagined

LONGEST = 1024
"""Tokens of an imagined row where neither --max-length nor the model says less."""

_PAD = 0


def imagine_rows(config: TrainConfig, count: int) -> Callable[[BaseTask, str, Any], Prepared]:
    """Return what gives `count` rows as long as they may be, of words that they do not share.

    Args:
        config: the whole configuration: says how long.
        count: at least one.
    """

    def make(task: BaseTask, kind: str, model_config: Any) -> Prepared:  # noqa: ARG001
        positions = max_positions(model_config) or LONGEST
        asked = config.data.max_length
        length = asked if isinstance(asked, int) else min(LONGEST, positions)
        words, draw = model_config.get_text_config().vocab_size, random.Random(0)
        rows = [
            task.imagine_row([draw.randrange(3, words) for _ in range(length)], row)
            for row in range(count)
        ]
        tokens = count * length
        facts = {
            "name": "imagined rows", "train_rows": count, "labels": list(task.imagined_labels),
            "problem_type": None, "overlong": config.data.overlong, "fingerprint": "",
            "target_language": None, "tokens": tokens,
            "supervised": sum(row.supervised for row in rows), **task.imagined_facts,
        }  # fmt: skip
        table = Table(rows=[], lines=[], source="imagined rows", unit="row")
        reason = "no --dataset: all as long as --max-length"
        return Prepared(rows, [], None, length, table, facts,
                        [Choice("rows", f"imagined, {length:,} tokens each", reason)])  # fmt: skip

    return make


def imagine_tokenizer(source: ModelSource) -> Any:
    """Return the tokenizer of `source`, or what stands for it where there is none."""
    try:
        return load_tokenizer(source)
    except InputError:
        return SimpleNamespace(
            pad_token_id=_PAD, pad_token="", eos_token_id=_PAD, eos_token="", bos_token_id=None,
            chat_template=None, name_or_path=source.name,
        )  # fmt: skip


def imagine(
    config: TrainConfig, source: ModelSource, card: str | None, rows: int, tokenizer: Any = None
) -> Imagined:
    """Return what stands for all that is not here.

    Args:
        config: the whole configuration.
        source: the model.
        card: name of a GPU that the run is planned for; None for this machine's device.
        rows: how many rows to imagine; 0 for those of the data.
        tokenizer: of the model, if it is loaded already; None loads it.
    """
    return Imagined(
        source=source,
        device=None if card is None else Choice("device", "cuda", f"planned for {card}"),
        tokenizer=tokenizer or (imagine_tokenizer(source) if rows else None),
        rows=imagine_rows(config, rows) if rows else None,
    )
