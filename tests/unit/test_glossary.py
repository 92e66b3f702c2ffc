"""Words replaced in docs/glossary.md do not occur in the project."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Word:
    """An old word: where it must not occur, its pattern, and texts that must and must not match."""

    locations: tuple[str, ...]
    pattern: str
    matching: tuple[str, ...]
    not_matching: tuple[str, ...] = ()


WORDS = {
    "parallel workers": Word(
        EVERYWHERE, r"\b(?:\w*_)?(?:[Ll]anes?|LANES?)(?:_\w*)?\b|\bLane[A-Z]\w*|passes_at_once",
        ("two lanes", "Lanes(2)", "plan_lanes", "LanePlan", "test_a_free_lane_takes", "MOST_LANES",
         "speed.passes_at_once"),
        ("planes", "plane"),
    ),
    "micro-batches": Word(
        FAST_STEP, r"(?<!forward )(?<!backward )\b[Pp]ass(?:es)?\b(?! them to)"
        r"|(?:\w*_)?(?<!forward_)(?<!backward_)pass(?:es)?_\w*|\w*_(?<!forward_)(?<!backward_)pass"
        r"(?:es)?\b|\bPasses\b",
        ("cut into passes", "a pass of its own", "Passes = list", "passes: int", "tokens_per_pass",
         "test_passes_side_by_side", '"passes"'),
        ("the backward pass", "a forward pass", "in_the_forward_pass", "bypass",
         "as PEFT passes them to its own layers"),
    ),
    "in parallel": Word(FAST_STEP, r"\bside[ _]by[ _]side\b", ("side by side", '"side_by_side"')),
    "shared prefix": Word(EVERYWHERE, r"(?i)trunk", ("Trunk(7)", "find_trunk", "a trunk"),
                          ("truncate", "truncated")),
    "last-layer token pruning": Word(
        EVERYWHERE,
        r"(?i:unread[ _]?tokens)|\b(?:find|skip)_unread\b|\bAtTargets\b|\bAtEnds\b|\bReadCheck\b"
        r"|\bplan\.reads\b|\blayout\.read\b|\bfind_token_wise\b|\bis_read\b",
        ("UnreadTokens", "speed.skip_unread", "fast.find_unread(", "layout.read is None"),
        ("tokens that nobody reads", "check_unread", "is_ready", "layout.ready"),
    ),
    "packed layout": Word(
        (*FAST_STEP, "tests/integration"), r"\bLayout\b|\blaid_out\b",
        ("Layout.of_rows", "with laid_out(layout)"), ("PackedLayout", "ChatLayout"),
    ),
    "sequences": Word(
        FAST_STEP, r"(?i)(?<![a-z])documents?(?![a-z])",
        ("each document", "batch_documents", "DOCUMENTS", "ftlevel_documents"),
        ("documentation", "documented"),
    ),
    "blocked attention": Word(
        FAST_STEP, r"(?<![a-z])[Tt]iled?s?(?![a-z])|TILED?",
        ("by tiles", "Tile(0", "TileAttention", "cut_tiles", "LONGEST_TILED"),
        ("percentile", "until"),
    ),
    "recompute": Word(
        FAST_STEP, r"\bremake\b|\bmade? again\b|\brecipe_of\b|\bwith_recipe\b|\bRecipe\b",
        ("speed.remake", "is made again", "recipe_of(x)"), ("made up", "a recipe"),
    ),
    "fused autograd function": Word(
        (*FAST_STEP, "src/ftlevel/trained", "README.md"), r"(?<!per-)\bnodes?\b",
        ("in one node", "one autograd node"), ("--nproc-per-node", "--nnodes"),
    ),
    "fused norm and GLU": Word(
        EVERYWHERE, r"FusedElementwise|FusedGate\b|[.\"]elementwise\b|\belementwise\s*[:=]",
        ("FusedElementwise(model)", "speed.elementwise", 'plan["elementwise"]'),
        ("a few elementwise operations",),
    ),
    "fused LoRA": Word(
        EVERYWHERE, r"LowRankLinear|low_rank", ("speed.low_rank", "LowRankLinear.apply"),
        ("low-rank update",),
    ),
    "chunked cross-entropy": Word(
        EVERYWHERE, r"TargetHead|target_head|target_loss|head_on_targets|\bon_targets\b"
        r"|head on targets",
        ("TargetHead(base)", "has_target_head", "target_loss(", "head on targets only"),
        ("targets_only", "on targets"),
    ),
    "per-worker generator": Word(
        EVERYWHERE, r"OwnDraws|PassDropout|\bdraw_kept\b|\bdrawing_from\b",
        ("OwnDraws(model)", "PassDropout"),
    ),
    "overhead tokens": Word(EVERYWHERE, r"\bA_PASS\b", ("A_PASS = 250",)),
    "schedule, partition": Word(EVERYWHERE, r"\b_Way\b|\b_Cut\b", ("_Way(cut", "class _Cut:"),
                                ("_Cutter", "Ways")),
    "merge input": Word(("src",), r"\b(?:\w+_)?[Ss]ubject\b", ("Subject(", "resolve_subject")),
    "plain PEFT": Word(("src", "docs"), r"\b[Ff]oreign\b", ("a foreign adapter",)),
    "resolve": Word(("src", "tests"), r"\bsettled?\b|settle_", ("settle_stored", "settled")),
    "EncodingContext": Word(EVERYWHERE, r"\bAsked\(|: Asked\b", ("Asked(task", "asked: Asked"),
                            ("Asked and answered", "as asked")),
    "warnings": Word(EVERYWHERE, r"\bdoubts?\b", ("doubts(config)",)),
    "callbacks": Word(EVERYWHERE, r"\bCertify\(|\bKeepStream\b|\bFollowEpoch\b",
                      ("Certify(", "KeepStream", "FollowEpoch")),
}  # fmt: skip


@cache
def files_in(location: str) -> list[Path]:
    path = ROOT / location
    paths = path.rglob("*") if path.is_dir() else [path]
    return [p for p in paths if p.suffix in (".py", ".md", ".yaml", ".txt", ".sh")]


def find_files(word: Word) -> list[Path]:
    return [path for location in word.locations for path in files_in(location)]


@cache
def read_text(path: Path) -> str:
    return re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))  # matches may span lines


@pytest.mark.parametrize("name", WORDS)
def test_old_word_does_not_occur(name: str) -> None:
    word, uses = WORDS[name], []
    for path in find_files(word):
        file = path.relative_to(ROOT).as_posix()
        if file in EXCLUDED:
            continue
        text = read_text(path)
        for match in re.finditer(word.pattern, text):
            uses.append(f"{file}: …{text[max(0, match.start() - 30) : match.end() + 20]}…")
    assert uses == [], f"docs/glossary.md says {name!r}"


@pytest.mark.parametrize("name", WORDS)
def test_pattern_of_old_word(name: str) -> None:
    word = WORDS[name]
    assert [text for text in word.matching if not re.search(word.pattern, text)] == []
    assert [text for text in word.not_matching if re.search(word.pattern, text)] == []
    assert len(find_files(word)) > 0


def test_glossary_lists_every_word() -> None:
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
