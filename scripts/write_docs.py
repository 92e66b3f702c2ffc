"""Generate the pages of docs/ that describe commands, flags, methods and servers.

python scripts/write_docs.py methods          write docs/methods.md
python scripts/write_docs.py cli              write docs/cli.md and docs/commands
python scripts/write_docs.py which-method     write docs/which-method.md, from results of compare
python scripts/write_docs.py guide            write docs/guide, one page per method
python scripts/write_docs.py coming-from      write docs/coming-from.md
python scripts/write_docs.py serving          write docs/serving.md, from measurements
python scripts/write_docs.py --check          exit with 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from cli_page import cli_page, command_pages
from coming_from_page import coming_from_page
from ftlevel.commands.list_methods import QUANTS, get_task_error
from ftlevel.config import SPECS
from ftlevel.methods import METHOD_INFO, METHODS, get_rule
from ftlevel.methods.support_table import Cell, MethodInfo
from ftlevel.models.families import FAMILIES, Family
from ftlevel.tasks import TASKS
from guide_pages import guide_pages
from serving_page import serving_page
from which_method_page import which_method_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
_LETTERS = {"none": "f", "4bit": "4", "8bit": "8"}


FROM_PYTHON = """\
## From Python

After `import ftlevel.adapters`, PEFT's functions (`get_peft_model`, `add_adapter`,
`from_pretrained`, `inject_adapter_in_model` and so on) accept `BottleneckConfig`, `PrefixKvConfig`
and `SoftPromptConfig` like PEFT's own configs. Import them from `ftlevel.methods`:
`bottleneck.layer`, `prefix.config` and `soft_prompt.config`. Differences from PEFT's methods:

- They cannot be merged: `merge_and_unload` raises NotImplementedError.
- A new prefix or prompt changes the model's output; a new bottleneck does not.
- `output_attentions=True` needs `attn_implementation="eager"`. With a prefix of P positions,
  attention weights are (batch, heads, queries, P + keys). A prompt adds both queries and keys.
- `torch.compile(fullgraph=True)` works, except for P-tuning with an LSTM.

PEFT 0.21.2's own tests pass with these methods and with fused LoRA layers
(`scripts/peft_suite.py` of commit c9b23cd5, CPU). Skipped tests need merging or other models:

| | passed | failed | skipped |
|---|--:|--:|--:|
| bottleneck | 1,482 | 0 | 620 |
| prefix | 683 | 0 | 287 |
| prompt | 1,053 | 0 | 388 |
| p-tuning | 711 | 0 | 259 |
| fused LoRA | 4,247 | 0 | 677 |
"""


def methods_page() -> str:
    """Return docs/methods.md."""
    rows = list(METHOD_INFO.values())
    lines = [
        "# Methods",
        "",
        "This page lists what each method trains, its defaults, and which combinations work. It is "
        "generated from the table that `ftlevel train` uses to refuse unsupported combinations; "
        "`ftlevel list-methods` shows it for a model, task or quantization. Every supported "
        "combination is trained, saved and reloaded on a tiny model by `make matrix`.",
        "",
        "## What each trains",
        "",
        "`7B Llama` is the share of trained parameters for Llama-2-7B with default settings. The "
        "page of each [method](guide/index.md) has the paper.",
        "",
        "| method | flags | trains | 7B Llama | mergeable |",
        "|---|---|---|---:|---|",
        *(_method_line(row) for row in rows),
        "",
        "## Defaults",
        "",
        "The page of each [method](guide/index.md) lists its settings and default learning rate; "
        "[defaults](defaults.md) explains the rates. Rates decay linearly to zero. Without "
        "`--target-modules`, low-rank and orthogonal methods adapt all linear layers of blocks.",
        "",
        *_pages(),
        "## Embeddings and heads",
        "",
        "`--target-modules q_proj,embed_tokens,lm_head` adds LoRA to the embedding and the output "
        "layer, too. `--modules-to-save embed_tokens,lm_head` trains them in full. "
        "`--trainable-token-indices '<tool>,17'` trains the embeddings of single tokens, given as "
        "text or id. Tied layers are trained separately unless `method.ensure_weight_tying=true`. "
        "To add a token, call `resize_token_embeddings` of transformers, save model and "
        "tokenizer, and train the saved model.",
        "",
        "Plain PEFT adapters on embeddings, heads and resized vocabularies can be used; see "
        "[merge](merge.md).",
        "",
        "## Families and quantized bases",
        "",
        "`yes`: on all bases; `f`: on float bases; `4`: with `--quant 4bit`; `8`: `--quant 8bit`.",
        "",
        *_family_table(rows),
        "",
        "## Families and tasks",
        "",
        *_task_table(),
        "",
        "The page of each [method](guide/index.md) explains each `no`, and what to use instead.",
        "",
        *FROM_PYTHON.splitlines(),
    ]
    return "\n".join(lines) + "\n"


def _method_line(row: MethodInfo) -> str:
    share = f"{row.llama_7b / METHOD_INFO['full'].llama_7b:.3%}" if row.llama_7b else "–"
    merges = row.merges or "no"
    return f"| {row.name} | `{row.flags}` | {row.trained} | {share} | {merges} |"


def _pages() -> list[str]:
    pages = {kind: METHODS[kind].page for kind in SPECS if METHODS[kind].page}
    return [line for kind, page in pages.items() for line in (f"## {kind}", "", page, "")]


def _family_table(rows: list[MethodInfo]) -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        answers = tuple(_quants(row, family) for row in rows)
        groups.setdefault(answers, []).append(family.name)
    lines = [
        "| families | " + " | ".join(row.name for row in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    return lines + [f"| {', '.join(f)} | {' | '.join(answers)} |" for answers, f in groups.items()]


def _quants(row: MethodInfo, family: Family) -> str:
    """Return the quantizations with which `row` works for some task of `family`."""
    works = [
        quant
        for quant in QUANTS
        if get_rule(
            Cell(row.name, family.name, family.kind, None, quant, bool(family.target_parameters))
        )
        is None
    ]
    return "yes" if len(works) == len(QUANTS) else "".join(_LETTERS[q] for q in works) or "no"


def _task_table() -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        answers = tuple("no" if get_task_error(family, task) else "yes" for task in TASKS)
        groups.setdefault(answers, []).append(family.name)
    lines = ["| families | " + " | ".join(TASKS) + " |", "|---|" + "---|" * len(TASKS)]
    return lines + [f"| {', '.join(f)} | {' | '.join(answers)} |" for answers, f in groups.items()]


PAGES: dict[str, Callable[[], str]] = {
    "methods": methods_page,
    "cli": cli_page,
    "coming-from": coming_from_page,
    "serving": serving_page,
    "which-method": which_method_page,
    **command_pages(),
    **guide_pages(),
}


def _select_pages(names: list[str]) -> list[str]:
    """Return the selected pages: `cli` includes commands/, and `guide` all of guide/.

    Raises:
        SystemExit: there is no such page.
    """
    folders = {"cli": "commands/", "guide": "guide/"}
    pages = [
        page
        for name in names
        for page in PAGES
        if page == name or (name in folders and page.startswith(folders[name]))
    ]
    if unknown := [name for name in names if name not in PAGES and name not in folders]:
        raise SystemExit(f"no such page: {unknown[0]}. There are {', '.join(PAGES)}")
    return pages or list(PAGES)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the selected pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="all by default; cli is all of it")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    stale = 0
    for name in _select_pages(args.pages):
        path, text = DOCS / f"{name}.md", PAGES[name]()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if args.check:
            print(f"{path} is not up to date: python scripts/write_docs.py {name}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
