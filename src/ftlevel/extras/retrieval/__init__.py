"""Retrieval: embedding models, rerankers, and `ftlevel mine`, the search for hard negatives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, Extension

if TYPE_CHECKING:
    from ftlevel.cli.flags import CommandInput
    from ftlevel.config.flag import Flag, FlagAliases


def mine(inputs: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Add hard negatives to queries with positives.

    An embedding model searches the documents of all rows, and of --corpus, for those nearest to
    each query. The output has columns query, pos and neg, for --task embedding and --task
    reranking.
    """
    import json

    import typer

    from ftlevel.cli.screen import open_screen
    from ftlevel.cli.startup import heavy_imports
    from ftlevel.extras.retrieval.config import MineConfig

    config = inputs.section(MineConfig)

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.extras.retrieval.mining import mine as run

        summary = run(config, listener=screen)
    if as_json:
        typer.echo(json.dumps(summary, default=str))
        return
    mean = summary["negatives"] / summary["rows"]
    typer.echo(f"  {summary['rows']:,} rows with {mean:.1f} negatives each")
    if summary["left_out"]:
        typer.echo(f"  {summary['left_out']:,} rows without a negative are skipped")
    typer.echo(f"  saved {summary['output']}, with columns query, pos and neg (lists of texts)")


def _flags() -> list[Flag]:
    from ftlevel.config.flag import DATA, GENERAL, HOW, INFERENCE, MODEL, WRITE, Flag, FlagAliases

    range_alias = FlagAliases(("--range-for-sampling",))
    rows, mine = ("train", "preview"), partial(Flag, on=("mine",))
    return [
        Flag("data.qrels", "", DATA, rows, metavar="FILE"),
        Flag("data.corpus", "", DATA, rows, metavar="FILE"),
        Flag("qrels", "", DATA, ("evaluate",), metavar="FILE"),
        *[Flag(f"{task}.loss", "", HOW) for task in ("embedding", "reranking")],
        Flag("reranking.pos_weight", "", HOW),
        *[Flag(f"embedding.{name}", "", HOW) for name in ("scale", "symmetric", "margin", "guide")],
        Flag("embedding.pooling", "", HOW, rows),
        Flag("embedding.normalize", "--normalize/--no-normalize", HOW),
        Flag("embedding.similarity", "", HOW),
        *[Flag(f"embedding.{name}_prompt", "", HOW, rows) for name in ("query", "document")],
        Flag("embedding.matryoshka_dims", "", HOW, metavar="N,…"),
        Flag("embedding.batch_sampler", "", HOW),
        mine("name", "RUN|ADAPTER|MODEL", required=True),
        mine("dataset", "--dataset", DATA, metavar="FILE", required=True),
        mine("corpus", "", DATA, metavar="FILE"),
        *[mine(name, "", DATA) for name in ("input_format", "format")],
        mine("columns", "--map", DATA, metavar="NAME=COLUMN"),
        mine("ignore_columns", "", DATA, multiple=True, metavar="COLUMN"),
        mine("output", "--out -o", WRITE, metavar="FILE", required=True),
        mine("overwrite", "--overwrite", WRITE),
        mine("negatives", "", WRITE, aliases=FlagAliases(("--num-negatives", "--negative-number"))),
        mine("relative_margin", "", WRITE),
        mine("ranks", "", WRITE, aliases=range_alias, metavar="FIRST-LAST"),
        mine("sampling", "", WRITE, aliases=FlagAliases(("--sampling-strategy",))),
        mine("scores", "--scores", WRITE, aliases=FlagAliases(("--output-scores",))),
        mine("base_model", "--model", MODEL, dest="base_model", aliases=FlagAliases(("--base",))),
        mine("dtype", "", MODEL),
        *[mine(name, "", INFERENCE) for name in ("seed", "batch_size")],
        mine("device", "", GENERAL),
    ]


def _aliases() -> Mapping[str, FlagAliases]:
    from ftlevel.config.flag import FlagAliases

    return {"train.temperature": FlagAliases(by_task={"embedding": "embedding.temperature"})}


EXTENSION = Extension(
    commands={
        "mine": Command(
            "ftlevel.extras.retrieval:mine",
            "Add hard negatives to queries with positives.",
            config="ftlevel.extras.retrieval.config:MineConfig",
            is_quiet=True,
        )
    },
    flags=_flags,
    aliases=_aliases,
    tasks={
        "embedding": "ftlevel.extras.retrieval.embedding",
        "reranking": "ftlevel.extras.retrieval.reranking",
    },
    task_aliases={
        name: ("reranking", {}) for name in ("rerank", "reranker", "cross-encoder", "crossencoder")
    },
    sections={
        "embedding": "ftlevel.extras.retrieval.config:EmbeddingConfig",
        "reranking": "ftlevel.extras.retrieval.config:RerankingConfig",
    },
    evaluate_options=("ftlevel.extras.retrieval.config:RetrievalOptions",),
)
