"""Run PEFT's own test suite on our tuners and on the fused LoRA layers, and print what failed.

    python scripts/peft_suite.py                     every tuner, then LoRA
    python scripts/peft_suite.py bottleneck prefix   some; there are prompt and p-tuning as well
    python scripts/peft_suite.py lora -- -k merge    more arguments for pytest

The tests come from the source package of the PEFT that is installed, which pip fetches from PyPI
into --cache once; nothing of them is in this repository. `peft_suites.plugin` puts our
configurations into their tables, and `peft_suites.models` makes tiny models under the names that
they ask the Hub for, so that no Hub is needed. Of LoRA, what fails on the fused layers runs again
on PEFT's own: only what these pass counts. Exit code 1 where something counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUNERS = ("bottleneck", "prefix", "prompt", "p-tuning")
OUR_FILES = (
    "custom_models", "config", "decoder_models", "encoder_decoder_models",
    "feature_extraction_models", "seq_classifier", "token_classification_qa", "torch_compile",
)  # fmt: skip
LORA_FILES = (
    *OUR_FILES[:-1], "lora_variants", "lora_conversion", "loraplus", "lorafa", "low_level_api",
    "mixed", "target_parameters", "trainable_tokens", "tuners_utils",
)  # fmt: skip
# What the tests import beside what `.[dev]` installs; pillow is what diffusers imports.
PACKAGES = ("diffusers", "pillow", "importlib_metadata", "zipp", "parameterized")

Outcomes = dict[str, tuple[str, str]]
"""A test's id → passed, failed or skipped, and the reason."""


def main() -> int:
    """Run the suites that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suites", nargs="*", help=f"of {', '.join((*TUNERS, 'lora'))}")
    parser.add_argument("--cache", type=Path, default=ROOT / ".peft-suite")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    wish = parser.parse_args(own)
    suites = wish.suites or [*TUNERS, "lora"]
    if unknown := set(suites) - {*TUNERS, "lora"}:
        parser.error(f"no suite {', '.join(sorted(unknown))}; {', '.join(TUNERS)} and lora are")
    tests = fetch(wish.cache.resolve())
    every: dict[str, Outcomes] = {}
    for suite in suites:
        every[suite] = run_lora(tests, more) if suite == "lora" else run(tests, suite, more)
        print_outcomes(suite, every[suite])
    if wish.json:
        wish.json.write_text(json.dumps(every, indent=1), encoding="utf-8")
    return int(any(how == "failed" for ended in every.values() for how, _ in ended.values()))


def fetch(cache: Path) -> Path:
    """Return the folder of PEFT's tests in `cache`, fetched where it is not there yet."""
    release = version("peft")
    source = cache / f"peft-{release}"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (source / "tests").is_dir():
        wanted = ["--no-deps", "--no-binary", "peft", "--dest", str(cache), f"peft=={release}"]
        subprocess.run([*pip, "download", *wanted], check=True)
        with tarfile.open(source.with_name(f"{source.name}.tar.gz")) as package:
            inside = [m for m in package.getmembers() if m.name.startswith(f"{source.name}/tests/")]
            package.extractall(cache, members=inside, filter="data")
        if not (source / "tests").is_dir():
            sys.exit(f"the source package of PEFT {release} has no tests")
        (source / "tests/__init__.py").touch()  # they import one another, and it is left out
    installed, wish = cache / "packages.txt", "\n".join(PACKAGES)
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wish:
        subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target",
                        str(cache / "packages"), *PACKAGES], check=True)  # fmt: skip
        installed.write_text(wish, encoding="utf-8")
    return source


def run(source: Path, suite: str, more: list[str], files: tuple[str, ...] = OUR_FILES) -> Outcomes:
    """Run PEFT's tests as `suite`, and return how each ended.

    Args:
        source: the folder with `tests`.
        suite: what the plugin puts in.
        more: arguments for pytest; ids of tests stand in the place of all files.
        files: the modules of tests, without `test_` and `.py`.
    """
    cache = source.parent
    outcomes = cache / f"{suite}.jsonl"
    outcomes.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            map(str, (ROOT / "src", ROOT / "scripts", cache / "packages"))
        ),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # PEFT's switch for its tests of torch.compile
    }
    wanted = [] if any("::" in word for word in more) else [f"tests/test_{f}.py" for f in files]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-q",
               "--tb=short", "-p", "no:cacheprovider", "-W", "ignore", "-p", "peft_suites.plugin",
               "--suite", suite, "--outcomes", str(outcomes), *wanted, *more]  # fmt: skip
    with (cache / f"{suite}.log").open("w", encoding="utf-8") as log:
        print(f"{suite}: pytest writes to {log.name}", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=source, env=environment, stdout=log, stderr=subprocess.STDOUT,
                       check=False)  # fmt: skip
    if not outcomes.exists():
        sys.exit(f"{suite}: pytest did not come to its end; see {log.name}")
    lines = map(json.loads, outcomes.read_text(encoding="utf-8").splitlines())
    return {name: (how, why) for name, how, why in lines}


def run_lora(source: Path, more: list[str]) -> Outcomes:
    """Return how PEFT's tests of LoRA end on fused layers; what PEFT's own fail too is skipped.

    A module that cannot be imported is no test, and stays a failure.
    """
    fused = run(source, "lora-fused", more, LORA_FILES)
    failed = [name for name, (how, _) in fused.items() if how == "failed" and "::" in name]
    if not failed:
        return fused
    plain = run(source, "lora-plain", failed)
    for name in failed:
        if plain.get(name, ("failed", ""))[0] == "failed":
            fused[name] = ("skipped", f"fails on PEFT's own layers too: {fused[name][1]}")
    return fused


def print_outcomes(suite: str, ended: Outcomes) -> None:
    """Print a line of figures, why tests were skipped, and every failure."""
    count = Counter(how for how, _ in ended.values())
    print(f"\n{suite}: {count['passed']:,} passed, {count['failed']:,} failed, "
          f"{count['skipped']:,} skipped")  # fmt: skip
    reasons = Counter(_short(why) for how, why in ended.values() if how == "skipped")
    for reason, times in reasons.most_common():
        print(f"  skipped {times:>5,}  {reason}")
    for name, (how, why) in ended.items():
        if how == "failed":
            print(f"  FAILED {name}\n         {_short(why)}")


def _short(why: str) -> str:
    line = (why.strip().splitlines() or ["no reason"])[0].removeprefix("Skipped: ")
    return line if len(line) <= 150 else f"{line[:149]}…"


if __name__ == "__main__":
    sys.exit(main())
