"""Words replaced in docs/glossary.md do not occur in the project."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from ftlevel.config import TrainConfig

ROOT = Path(__file__).parents[2]
EVERYWHERE = ("src", "tests", "benchmarks", "scripts", "docs", "recipes", "README.md",
              "CONTRIBUTING.md")  # fmt: skip
FAST_STEP = ("src/ftlevel/fast", "src/ftlevel/config/sections.py", "src/ftlevel/training/model.py",
             "src/ftlevel/training/trainer.py", "src/ftlevel/training/verify", "tests/unit/fast",
             "docs/performance.md")  # fmt: skip
PACKAGES = tuple(f"src/ftlevel/{room}" for room in ("fast", "merging", "trained", "evaluation"))
EXCLUDED = {
    "docs/glossary.md",
    "tests/unit/test_glossary.py",
    "src/ftlevel/data/builtin/LICENSE.txt",
}
# Each old word: where it must not occur, and its pattern.
WORDS = {
    "parallel workers": (
        EVERYWHERE,
        r"\b(?:\w*_)?(?:[Ll]anes?|LANES?)(?:_\w*)?\b|\bLane[A-Z]\w*|passes_at_once",
    ),
    "micro-batches": (
        FAST_STEP,
        r"(?<!forward )(?<!backward )\b[Pp]ass(?:es)?\b(?! them to)"
        r"|(?:\w*_)?(?<!forward_)(?<!backward_)pass(?:es)?_\w*|\w*_(?<!forward_)(?<!backward_)pass"
        r"(?:es)?\b|\bPasses\b",
    ),
    "in parallel": (FAST_STEP, r"\bside[ _]by[ _]side\b"),
    "shared prefix": (EVERYWHERE, r"(?i)trunk"),
    "last-layer token pruning": (
        EVERYWHERE,
        r"(?i:unread[ _]?tokens)|\b(?:find|skip)_unread\b|\bAtTargets\b|\bAtEnds\b|\bReadCheck\b"
        r"|\bplan\.reads\b|\blayout\.read\b|\bfind_token_wise\b|\bis_read\b",
    ),
    "packed layout": ((*FAST_STEP, "tests/integration"), r"\bLayout\b|\blaid_out\b"),
    "sequences": (FAST_STEP, r"(?i)(?<![a-z])documents?(?![a-z])"),
    "blocked attention": (FAST_STEP, r"(?<![a-z])[Tt]iled?s?(?![a-z])|TILED?"),
    "recompute": (
        FAST_STEP,
        r"\bremake\b|\bmade? again\b|\brecipe_of\b|\bwith_recipe\b|\bRecipe\b",
    ),
    "fused autograd function": (
        (*FAST_STEP, "src/ftlevel/trained", "README.md"),
        r"(?<!per-)\bnodes?\b",
    ),
    "fused norm and GLU": (
        EVERYWHERE,
        r"FusedElementwise|FusedGate\b|[.\"]elementwise\b|\belementwise\s*[:=]",
    ),
    "fused LoRA": (EVERYWHERE, r"LowRankLinear|low_rank"),
    "chunked cross-entropy": (
        EVERYWHERE,
        r"TargetHead|target_head|target_loss|head_on_targets|\bon_targets\b"
        r"|head on targets",
    ),
    "per-worker generator": (EVERYWHERE, r"OwnDraws|PassDropout|\bdraw_kept\b|\bdrawing_from\b"),
    "overhead tokens": (EVERYWHERE, r"\bA_PASS\b"),
    "schedule, partition": (EVERYWHERE, r"\b_Way\b|\b_Cut\b"),
    "merge input": (("src",), r"\b(?:\w+_)?[Ss]ubject\b"),
    "plain PEFT": (("src", "docs"), r"\b[Ff]oreign\b"),
    "resolve": (("src", "tests"), r"\bsettled?\b|settle_"),
    "EncodingContext": (EVERYWHERE, r"\bAsked\(|: Asked\b"),
    "warnings": (EVERYWHERE, r"\bdoubts?\b"),
    "callbacks": (EVERYWHERE, r"\bCertify\(|\bKeepStream\b|\bFollowEpoch\b"),
}  # fmt: skip


@cache
def files_in(location: str) -> list[Path]:
    path = ROOT / location
    paths = path.rglob("*") if path.is_dir() else [path]
    return [p for p in paths if p.suffix in (".py", ".md", ".yaml", ".txt", ".sh")]


@cache
def read_text(path: Path) -> str:
    return re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))  # matches may span lines


@pytest.mark.parametrize("name", WORDS)
def test_old_word_does_not_occur(name):
    locations, pattern = WORDS[name]
    paths, uses = [path for location in locations for path in files_in(location)], []
    assert paths
    for path in paths:
        file = path.relative_to(ROOT).as_posix()
        if file in EXCLUDED:
            continue
        text = read_text(path)
        for match in re.finditer(pattern, text):
            uses.append(f"{file}: …{text[max(0, match.start() - 30) : match.end() + 20]}…")
    assert uses == [], f"docs/glossary.md says {name!r}"


def test_glossary_lists_every_word():
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    missing = [
        part
        for name in WORDS
        for part in name.split(", ")
        if part not in ("in parallel", "resolve") and part.removesuffix("s") not in page
    ]
    assert missing == []  # fmt: skip
    keys = set(re.findall(r"`speed\.(\w+)`", page))
    assert keys <= set(TrainConfig.model_fields["speed"].annotation.model_fields)
