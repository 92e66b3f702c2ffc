"""Generate docs/which-method.md from results of `ftlevel compare` and published results.

A file of docs/compared is the `compare.json` of a comparison with added `title`, `about` and
`command`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).resolve().parents[1] / "docs/compared"
ORDER = ("senses", "entities", "definitions")

_HEAD = """\
# Which method

This page is for users who choose a PEFT method. Start with **LoRA** at ftlevel's default learning rate, unless a line of the table fits better:

| you have, or want | method |
|---|---|
| no special need | [lora](guide/lora.md): it can be merged, and every server loads it |
| a base that does not fit into memory (`ftlevel plan`) | [qlora](guide/qlora.md) |
| a small model, and memory for three more copies (gradients, optimizer) | [full](guide/full.md): best on small encoders |
| thousands of adapters, or adapters of some kilobytes | [ia3](guide/ia3.md), [vera](guide/vera.md) |
| adapters that are never merged | [adapter](guide/adapter.md), [prefix](guide/prefix.md) |
| a cheap baseline | [ln-tuning](guide/ln-tuning.md), or the head alone: `--method full --set method.freeze_base=true` |

Then compare the methods on your own rows: results on other data do not predict yours.

<!-- not run: example names; see docs/transcript.md -->
```sh
ftlevel compare --methods lora,full,adapter,ia3 --model MODEL --dataset ROWS --budget-minutes 5 --seeds 3 --output-dir compared
```

## Measured here
"""

_HOW = """
Every method has its default settings and learning rate, and the same model, rows, seeds and steps. "95 % over rows" is a bootstrap interval over held-out rows.
"± seeds" is the spread over seeds. "more than noise" shows whether the difference to the best is significant in a paired test ([compare](compare.md)). These are few steps: small differences may not persist.
"""

_FIELD = """
## Measured elsewhere

PEFT's comparison trains Llama-3.2-3B on MetaMathQA for 5,000 steps of 4 rows and reports accuracy on GSM8K's 1,319 test questions (standard error 1.4 points).
Source: `method_comparison/MetaMathQA/results` of huggingface/peft at commit 5d602fd (2026-08-21).

| method | settings | GSM8K accuracy | trained | peak GiB | minutes |
|---|---|--:|--:|--:|--:|
| rsLoRA | rank 64 | 0.513 | 18,350,080 | 21.0 | 16 |
| OFT | rank 32 | 0.491 | 8,171,520 | 20.8 | 20 |
| LoRA | rank 32 | 0.478 | 9,175,040 | 20.8 | 16 |
| full | rate 1e-5 | 0.472 | 3,212,749,824 | 36.2 | 36 |
| DoRA | rank 32 | 0.469 | 9,289,728 | 22.8 | 20 |
| LoKr | rank 32, factor 4, rate 3e-3 | 0.466 | 2,294,656 | 22.0 | 22 |
| IA³ | all attention layers, rate 5e-3 | 0.455 | 630,784 | 24.3 | 18 |
| prefix | 50 tokens, initialized from text, rate 5e-3 | 0.416 | 2,867,200 | 19.2 | 15 |
| LoHa | rank 32 | 0.393 | 18,350,080 | 22.3 | 23 |
| AdaLoRA | rank 32 | 0.373 | 18,353,664 | 21.2 | 19 |
| VeRA | default | 0.354 | 129,024 | 20.1 | 17 |
| P-tuning | default | 0.350 | 28,382,208 | 19.5 | 15 |
| BOFT | default | 0.343 | 802,816 | 23.0 | 115 |
| prompt | initialized from words, rate 1e-3 (default: 0.057) | 0.343 | 614,400 | 22.7 | 24 |

- Low-rank methods and full fine-tuning are within three standard errors of each other; their cost differs more.
- The learning rate matters more than the method: prompt tuning reaches 0.343 or 0.057, IA³ 0.455 or 0.311. ftlevel chooses a rate for each method, model and number of steps ([defaults](defaults.md)).
- This is one task, one model and one seed.

Published claims, none of which was repeated here: LoRA equals full fine-tuning on GLUE and E2E (Hu et al., 2021, arXiv:2106.09685). LoRA on all linear layers of a 4-bit base equals 16-bit fine-tuning (Dettmers et al., 2023, arXiv:2305.14314).
On many rows of code and mathematics, full fine-tuning is better than LoRA but forgets more (Biderman et al., 2024, arXiv:2405.09673).
"""


def which_method_page() -> str:
    """Return docs/which-method.md."""
    paths = [MEASURED / f"{name}.json" for name in ORDER]
    tables = [_table(json.loads(path.read_text("utf-8"))) for path in paths if path.is_file()]
    return _HEAD + _HOW + "".join(tables) + _FIELD


def _table(comparison: dict[str, Any]) -> str:
    name = comparison["headline"]
    lines = [
        "", f"### {comparison['title']}", "", comparison["about"], "",
        "<!-- not run: takes minutes; output in docs/compared -->",
        "```sh", comparison["asked_by"], "```", "",
        f"| method | {name} | 95 % over rows | ± seeds | to the best | more than noise | trained | adapter "
        "| peak MiB |",
        "|---|--:|---|--:|--:|---|--:|--:|--:|",
        *map(_line, comparison["rows"]),
    ]  # fmt: skip
    for skipped in comparison["left_out"]:
        lines.append(f"| {skipped['method']} | – | {skipped['reason']} | | | | | | |")
    return "\n".join([*lines, ""])


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    spread = "?" if len(row["seeds"]) < 2 else f"{row['spread']:.3f}"
    significance = {None: "", True: "no", False: "yes"}[row["is_noise"]]
    return (
        f"| [{row['method']}](guide/{row['method']}.md) | {row['metric']:.3f} | {low:.3f} – {high:.3f} "
        f"| {spread} | {row['difference']:+.3f} | {significance} | {row['trained']:,} "
        f"| {row['adapter_bytes'] / 2**20:.1f} MiB | {row['peak_bytes'] / 2**20:,.0f} |"
    )
