"""Generate docs/which-method.md from results of `ftlevel compare` and published results.

A file of docs/compared is the `compare.json` of a comparison, with `title`, `about` and `command`
beside what compare put there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).resolve().parents[1] / "docs/compared"
ORDER = ("senses", "entities", "definitions")

_HEAD = """\
# Which method

Written by `python scripts/write_docs.py which-method` from what `ftlevel compare` gave (`docs/compared`), and from what others
published. The short answer: **LoRA**, at ftlevel's default learning rate. The others by need:

| you have, or want | take |
|---|---|
| no reason for anything else | [lora](guide/lora.md); it merges, every server loads it, its step is the fastest here |
| weights that do not fit beside the step (`ftlevel plan`) | [qlora](guide/qlora.md) |
| a small model, and memory for three copies of it | [full](guide/full.md): the best on small encoders here |
| thousands of adapters, or some ten kilobytes each | [ia3](guide/ia3.md), [vera](guide/vera.md) |
| several tasks on one base in one batch, never merged | [adapter](guide/adapter.md), [prefix](guide/prefix.md) |
| a baseline that costs nothing | [ln-tuning](guide/ln-tuning.md), or the head alone: `--method full --set method.freeze_base=true` |

Then compare the methods on your own rows: results on other data do not predict yours.

<!-- not run: names stand for files of yours; docs/transcript.md runs the like -->
```sh
ftlevel compare --methods lora,full,adapter,ia3 --model MODEL --dataset ROWS --budget-minutes 5 --seeds 3 --output-dir compared
```

## Measured here
"""

_HOW = """
Each line of a table is one method with its default settings and its own default rate, the same model, rows, seeds and steps. "95 % over rows" is a
bootstrap interval over other held-out rows; "± seeds" the spread over seeds, unknown with one; "more than noise" a paired test of
the difference to the best ([compare.md](compare.md)). These are few steps and few seeds, one thread on a shared CPU: a hint which
methods are near one another, and no measure of speed. The two sets of MiniLM
have three seeds; the texts have one, and four of the seven methods that were begun, which is what an hour of a shared core gave. [results.md](results.md) has every method on longer runs, with one seed: there VeRA (0.930),
full (0.925), LoRA and parallel adapters (0.920) are the best on the first of these sets, and seven
methods on SmolLM2's docstrings.
"""

_FIELD = """
## Measured elsewhere

PEFT's own comparison trains Llama-3.2-3B on MetaMathQA for 5,000 steps of 4 rows and scores GSM8K's test set (1,319 questions, so a standard
error of 1.4 points). From `method_comparison/MetaMathQA/results` of huggingface/peft at commit 5d602fd (2026-08-21; runs of
July and August 2026, PEFT 0.19.2 and 0.20.1, development versions); of a method the best of its listed settings where a line says so.

| method | settings | GSM8K accuracy | trained | peak GiB | minutes |
|---|---|--:|--:|--:|--:|
| rsLoRA | rank 64 | 0.513 | 18,350,080 | 21.0 | 16 |
| OFT | rank 32 | 0.491 | 8,171,520 | 20.8 | 20 |
| LoRA | rank 32 | 0.478 | 9,175,040 | 20.8 | 16 |
| full | rate 1e-5 | 0.472 | 3,212,749,824 | 36.2 | 36 |
| DoRA | rank 32 | 0.469 | 9,289,728 | 22.8 | 20 |
| LoKr | rank 32, factor 4, rate 3e-3 | 0.466 | 2,294,656 | 22.0 | 22 |
| IA³ | all of attention, rate 5e-3 | 0.455 | 630,784 | 24.3 | 18 |
| prefix | 50 tokens, begun by a text, rate 5e-3 | 0.416 | 2,867,200 | 19.2 | 15 |
| LoHa | rank 32 | 0.393 | 18,350,080 | 22.3 | 23 |
| AdaLoRA | rank 32 | 0.373 | 18,353,664 | 21.2 | 19 |
| VeRA | default | 0.354 | 129,024 | 20.1 | 17 |
| P-tuning | default | 0.350 | 28,382,208 | 19.5 | 15 |
| BOFT | default | 0.343 | 802,816 | 23.0 | 115 |
| prompt | begun by words, rate 1e-3 (default: 0.057) | 0.343 | 614,400 | 22.7 | 24 |

What it says, and what not:

- The low-rank methods and full fine-tuning lie within three standard errors of one another; what they cost differs more.
- A rate makes more of a difference than a method: prompt tuning has 0.343 or 0.057, IA³ 0.455 or 0.311 (its defaults there), LayerNorm tuning
  0.000 at its default there. ftlevel takes another rate for each method, model and length of run ([defaults.md](defaults.md)).
- One task, one model, one seed.

Papers, as their authors report them: LoRA is level with full fine-tuning on GLUE and E2E (Hu et al., 2021, arXiv:2106.09685, tables 2 and 3);
LoRA on all linears of a 4-bit base is level with 16 bits (Dettmers et al., 2023, arXiv:2305.14314, section 4); on code and mathematics with
many rows full fine-tuning stays ahead of LoRA, and forgets more (Biderman et al., 2024, arXiv:2405.09673); prompt tuning reaches full
fine-tuning on T5 only at its largest, 11 billion parameters (Lester et al., 2021, arXiv:2104.08691, figure 1). Their claims; none was repeated here.
"""


def which_method_page() -> str:
    """Return docs/which-method.md."""
    found = [MEASURED / f"{name}.json" for name in ORDER]
    tables = [_table(json.loads(path.read_text("utf-8"))) for path in found if path.is_file()]
    return _HEAD + _HOW + "".join(tables) + _FIELD


def _table(found: dict[str, Any]) -> str:
    name = found["headline"]
    lines = [
        "", f"### {found['title']}", "", found["about"], "",
        "<!-- not run: minutes; its output is docs/compared -->",
        "```sh", found["asked_by"], "```", "",
        f"| method | {name} | 95 % over rows | ± seeds | to the best | more than noise | trained | adapter "
        "| peak MiB |",
        "|---|--:|---|--:|--:|---|--:|--:|--:|",
        *map(_line, found["rows"]),
    ]  # fmt: skip
    for left in found["left_out"]:
        lines.append(f"| {left['method']} | – | {left['reason']} | | | | | | |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    spread = "?" if len(row["seeds"]) < 2 else f"{row['spread']:.3f}"
    told = {None: "", True: "no", False: "yes"}[row["is_noise"]]
    return (
        f"| [{row['method']}](guide/{row['method']}.md) | {row['metric']:.3f} | {low:.3f} – {high:.3f} "
        f"| {spread} | {row['difference']:+.3f} | {told} | {row['trained']:,} "
        f"| {row['adapter_bytes'] / 2**20:.1f} MiB | {row['peak_bytes'] / 2**20:,.0f} |"
    )
