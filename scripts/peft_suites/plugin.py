"""pytest plugin that adds our tuners to PEFT's test tables, or fuses its LoRA layers.

Nothing of PEFT's tests is copied, or changed on disk. A table stands in a mark `parametrize`, and
the plugin puts another mark in its place; tests without a table of configurations are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from peft import LoraConfig

from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.methods.base import VIRTUAL_TOKENS
from ftlevel.methods.bottleneck import CANNOT_MERGE
from peft_suites.models import TOKENS, Tokens, build_hub
from peft_suites.rows import IMPOSSIBLE, compile_rows, config_rows, custom_rows, task_rows

_TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
    "TestTokenClassificationModels": "TOKEN_CLS",
    "TestQuestionAnsweringModels": "QUESTION_ANS",
}
_VIRTUAL = {"prefix", "prompt", "p-tuning"}
_NOWHERE = (
    "so there is no place for a prefix",
    "no positions for bottleneck adapters are known",
    "takes no tokens, and a soft prompt stands among them",
)
_MARKS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")


def pytest_addoption(parser: Any) -> None:
    """Add what to put in, and where to write what came out."""
    parser.addoption("--suite", default="lora-plain", help="a tuner, lora-plain or lora-fused")
    parser.addoption("--outcomes", type=Path, help="where every test and how it ended is written")


def pytest_configure(config: Any) -> None:
    """Register the plugins that the options ask for."""
    suite = config.getoption("--suite")
    for mark in _MARKS:
        config.addinivalue_line("markers", f"{mark}: PEFT's")
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))
    build_hub(Path(constants.HF_HUB_CACHE))
    is_lora = suite.startswith("lora")
    config.pluginmanager.register(
        LoraSuite(is_fused=suite == "lora-fused") if is_lora else TunerSuite(suite)
    )


@dataclass
class Outcomes:
    """Writes down how each test ended, a line each: its id, the outcome and the reason.

    A later line of a test stands in the place of an earlier one: what passed may fail when it is
    torn down.
    """

    path: Path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write a report."""
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Write what could not be collected."""
        if report.outcome != "passed":
            self._write(report)

    def _write(self, report: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome, _reason(report)]) + "\n")


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr or "")


class TunerSuite:
    """One of our tuners in the tables of PEFT's tests."""

    def __init__(self, tuner: str) -> None:
        self.tuner = tuner

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Put our rows in the place of PEFT's, before pytest reads them."""
        marks = metafunc.definition.own_markers
        for place, mark in enumerate(marks):
            rows = self._rows_for(metafunc, mark) if mark.name == "parametrize" else None
            if rows is not None:
                names = mark.args[0]
                marks[place] = pytest.mark.parametrize(names, rows).mark
                metafunc.definition.is_ours = True
        prepare(metafunc.module)

    def _rows_for(self, metafunc: Any, mark: Any) -> Sequence[Any] | None:
        names = tuple(name.strip() for name in mark.args[0].split(","))
        tables = ("ALL_CONFIGS", "ALL_CONFIG_CLASSES", "ALL_PEFT_CONFIG_CLASSES")
        by_task, every, linears = (vars(metafunc.module).get(table) for table in tables)
        module, function = metafunc.module.__name__.rpartition(".")[2], metafunc.function.__name__
        if names == ("test_name", "model_id", "config_cls", "config_kwargs"):
            return custom_rows(self.tuner)
        if names == ("config_cls",) and mark.args[1] is linears:
            return config_rows(self.tuner, names, linears=True)
        if names == ("config_class", "mandatory_kwargs") and mark.args[1] is every:
            return config_rows(self.tuner, names)
        if names == ("settings",):
            return compile_rows(self.tuner)
        if names != ("config_cls", "config_kwargs"):
            return None
        is_virtual = function.startswith("test_prompt_learning") and self.tuner in _VIRTUAL
        if mark.args[1] is not by_task and not is_virtual and "token_class" not in module:
            return None
        task = _TASKS.get(module) or _TASKS.get(getattr(metafunc.cls, "__name__", ""))
        return task_rows(self.tuner, task) if task else None

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out the tests that have no row of ours, and those that none can pass."""
        ours = [item for item in items if _is_ours(item)]
        left_out = [item for item in items if not _is_ours(item)]
        for item in ours:
            reason = IMPOSSIBLE.get((self.tuner, item.originalname))
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"cannot be: {reason}"))
        config.hook.pytest_deselected(items=left_out)
        items[:] = ours

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        """Count what a tuner refuses, and says why, as PEFT's tests count it: as skipped."""
        report: Any = yield
        error = call.excinfo and call.excinfo.value
        if isinstance(error, NotImplementedError) and str(error) in (CANNOT_MERGE, VIRTUAL_TOKENS):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), None, "refuses to merge")
        if isinstance(error, ValueError) and any(why in str(error) for why in _NOWHERE):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), None, f"refuses: {error}")
        return report


def _is_ours(item: Any) -> bool:
    ids = getattr(getattr(item, "callspec", None), "_idlist", ())
    return any("ours:" in name for name in ids)


def prepare(module: Any) -> None:
    """Tell helpers of a test module of what is new to them (mutated).

    `set_init_weights_false` has a list of configurations without that field, which ours are not
    on; sets of data are on the Hub.
    """
    if getattr(module, "is_prepared", False):
        return
    module.is_prepared = True
    plain = getattr(module, "set_init_weights_false", None)
    if plain:

        def set_init_weights_false(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
            has_field = "init_weights" in getattr(config_cls, "__dataclass_fields__", {})
            is_peft = config_cls.__module__.startswith("peft.")
            return plain(config_cls, kwargs) if has_field or is_peft else kwargs.copy()

        module.set_init_weights_false = set_init_weights_false
    if hasattr(module, "load_dataset_english_quotes"):
        module.load_dataset_english_quotes = _quotes
    helpers: Any = sys.modules[f"{module.__package__}.testing_utils"]
    helpers._HUB_MODEL_ACCESSES = Fetched()
    plain_models = getattr(module, "MockTransformerWrapper", None)
    for tests in vars(module).values():
        if plain_models and getattr(tests, "transformers_class", None) is plain_models:
            tests.transformers_class = _with_tokens(plain_models)


class Fetched(dict[str, int]):
    """PEFT's record of what was read from the Hub: everything, so that nothing is asked for."""

    def __contains__(self, _name: object) -> bool:
        return True

    def __missing__(self, _name: str) -> int:
        return 1


def _with_tokens(models: Any) -> Any:
    """Return PEFT's maker of models with one more, which takes tokens."""

    class Models(models):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, model_id: str, dtype: Any = None) -> Any:
            if model_id != TOKENS:
                return super().from_pretrained(model_id, dtype)
            return Tokens.seeded().to(dtype)

    return Models


def _quotes() -> Any:
    quote = "A stone that rolls gathers no moss, and many stones make a wall."
    quotes = [quote[i % 7 :] for i in range(40)]
    columns = {"quote": quotes, "author": ["nobody"] * 40, "tags": [["stone"]] * 40}
    return DatasetDict({"train": Dataset.from_dict(columns)})


class LoraSuite:
    """PEFT's tests of LoRA, on its own layers or on the fused ones."""

    def __init__(self, *, is_fused: bool) -> None:
        self.is_fused = is_fused

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Give the tests their data."""
        prepare(metafunc.module)

    @pytest.fixture(autouse=True)
    def _fused_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every `LoraConfig` that a test makes build fused layers."""
        if not self.is_fused:
            return
        plain = LoraConfig.__post_init__

        def fused(config: Any) -> None:
            plain(config)
            if type(config) is LoraConfig:
                register_fused_layers(config)

        monkeypatch.setattr(LoraConfig, "__post_init__", fused)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out other methods' rows."""
        kept: list[Any] = []
        left_out: list[Any] = []
        for item in items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            config_cls = params.get("config_cls", params.get("config_class", LoraConfig))
            (kept if config_cls is LoraConfig else left_out).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
