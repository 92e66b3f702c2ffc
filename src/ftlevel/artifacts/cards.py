"""Card of an adapter (ftlevel.json), and model cards for the Hub (README.md)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ftlevel._version import __version__
from ftlevel.artifacts.files import check_regular, read_json, write_json
from ftlevel.config import QuantConfig
from ftlevel.config.reading import load_yaml
from ftlevel.config.train import SECTIONS
from ftlevel.errors import InputError
from ftlevel.safe_io import escape_controls

CARD = "ftlevel.json"
_SHOWN_LABELS = 20


@dataclass(frozen=True)
class AdapterCard:
    """Training settings that are needed to use an adapter, saved as ftlevel.json.

    Attributes:
        base: `name`, `kind`, `revision` and weight `fingerprint` of the base model; for a local one
            also its `path` relative to the card.
        prompt: fields of `PromptFormat`; empty for classification.
        options: settings of the task, such as `problem_type`, `doc_stride` and `unanswerable`.
        heads: modules that were trained in full and are saved with the adapter.
        needs_import: module to import before PEFT alone can load the adapter.
        adapter: name and fingerprint of the adapter that training continued; empty for none.
        merge: summary of the merge of a merged model; empty for others.
        quantized: source of a quantized model; `merge` then describes the source.
    """

    method: str
    task: str
    base: Mapping[str, Any]
    quantization: Mapping[str, Any]
    dtype: str
    max_length: int
    prompt: Mapping[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    padding_side: str = "right"
    data: Mapping[str, Any] = field(default_factory=dict)
    needs_import: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    quantized: Mapping[str, Any] = field(default_factory=dict)

    def write(self, model_dir: Path) -> None:
        """Save ftlevel.json in `model_dir`."""
        write_json(model_dir / CARD, {"format": 1, **asdict(self)})


def load_card(model_dir: Path) -> AdapterCard:
    """Load ftlevel.json from `model_dir`; raise InputError if it is missing, invalid or too new."""
    path = model_dir / CARD
    if model_dir.is_dir():
        check_regular(model_dir.iterdir(), str(model_dir))
    if not path.exists():
        raise InputError(f"{model_dir} has no {CARD}, so it is not an adapter of ftlevel.")
    data = read_json(path)
    if data.pop("format", None) != 1:
        raise InputError(f"{path} was written by a later ftlevel. Install that version.")
    try:
        card = AdapterCard(**data)
        if not isinstance(card.prompt, dict):
            raise TypeError("its prompt is not an object")
    except TypeError as error:  # an unknown or a missing field
        raise InputError(f"{path} is not the card of an adapter ({error}).") from None
    return card


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that affect the results of a run."""
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    versions = {"python": platform.python_version(), "ftlevel": __version__}
    return versions | {name: installed for name in names if (installed := _installed_version(name))}


@cache
def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


_PIPELINE_TAGS = {
    "masked-lm": "fill-mask",
    **{task: tag for own in SECTIONS.values() for task, tag in own.pipeline_tags.items()},
}
_PROMPTS = {
    "question-answering": '--prompt "…?" --context "…"',
    "masked-lm": '--prompt "… [MASK] …"',
    **{
        task: ""
        for own in SECTIONS.values()
        for task, tag in own.pipeline_tags.items()
        if tag != "text-generation"
    },
}


def pipeline_tag(task: str) -> str:
    """Returns the Hub's pipeline tag for `task`."""
    return _PIPELINE_TAGS.get(task, task)


def _format_metadata(
    base: Mapping[str, Any],
    relation: str,
    task: str | None,
    library: str,
    tags: list[str],
    **more: Any,
) -> list[str]:
    """Returns a model card's YAML header, with fields `more`; only a base on the Hub is named."""
    import yaml  # lazy: list-methods needs none

    metadata = {
        **({"base_model": base["name"]} if base.get("kind") == "hub" else {}),
        **({"base_model_relation": relation} if base.get("kind") == "hub" else {}),
        "library_name": library,
        **({"pipeline_tag": pipeline_tag(task)} if task else {}),
        **base_license(base),
        "tags": ["ftlevel", *tags],
        **{key: value for key, value in more.items() if value},
    }
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return ["---", *text.splitlines(), "---", ""]


def base_license(base: Mapping[str, Any]) -> dict[str, str]:
    """Returns the license fields of the base model's card; empty if it is not available locally."""
    from huggingface_hub import try_to_load_from_cache

    name = str(base.get("name"))
    if base.get("kind") == "hub":
        path = try_to_load_from_cache(name, "README.md", revision=base.get("revision"))
    elif base.get("kind") == "builtin":
        path = str(Path(__file__).parents[1] / "models/builtin" / name.partition(":")[2])
        path = f"{path}/README.md"
    else:
        path = str(Path(name) / "README.md")
    if not isinstance(path, str) or not Path(path).is_file():
        return {}
    with contextlib.suppress(OSError, ValueError):  # not a model card
        with Path(path).open(encoding="utf-8") as file:
            header = _HEADER.match(file.read(_MAX_HEADER))
        metadata = load_yaml(header[1])[0] if header else None
        if isinstance(metadata, dict):
            values = {key: metadata.get(key) for key in _LICENSE_KEYS}
            return {key: value for key, value in values.items() if isinstance(value, str)}
    return {}


_HEADER = re.compile(r"\s*---[^\S\n]*\n(.*?)\n---", re.DOTALL)
_MAX_HEADER = 100_000  # characters
_LICENSE_KEYS = ("license", "license_name", "license_link")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _result_metadata(summary: Mapping[str, Any]) -> dict[str, Any]:
    name, metrics = summary["data"]["name"], summary.get("metrics", {})
    is_hub = bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()
    result = {
        "task": {"type": pipeline_tag(summary["task"])},
        "dataset": {"name": name, "type": name if is_hub else "other", "split": "validation"},
        "metrics": [{"type": key, "value": value} for key, value in metrics.items()],
    }
    index = [{"name": Path(summary["run"]).name, "results": [result]}] if metrics else []
    return {"datasets": [name] * is_hub, "metrics": list(metrics), "model-index": index}


_SPECIAL = re.compile(r"[\\`*\[\]<>|&~]")


def one_line(text: object) -> str:
    """Returns `text` on one line, without control characters."""
    return escape_controls(str(text)).replace("\n", "\\n").replace("\t", " ")


def plain(text: object) -> str:
    """Returns `text` on one line, with escapes where Markdown or HTML would begin."""
    return _SPECIAL.sub(r"\\\g<0>", one_line(text))


def code(text: object) -> str:
    """Returns `text` as a code span; the fence is longer than those in `text`."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def predict_command(run: str, task: str) -> str:
    """Returns `ftlevel generate` for `run` with prompt flags, or `predict` if `task` has none."""
    prompt_flags = _PROMPTS.get(task, '--prompt "…"')
    command = "generate" if prompt_flags else "predict"
    return f"ftlevel {command} {one_line(shlex.quote(run))} {prompt_flags or '--dataset FILE'}"


def describe_losses(summary: Mapping[str, Any]) -> str:
    """Returns a text on the first and last training losses, with their standard deviations."""
    first, last, window = (summary[f"loss_{key}"] for key in ("first", "last", "window"))
    if window == 1:
        return f"{first:.4f} → {last:.4f} (one logged loss each)"
    return (
        f"{first:.4f} ± {summary['loss_first_spread']:.4f} → "
        f"{last:.4f} ± {summary['loss_last_spread']:.4f} "
        f"(means of the first and last {window:,} logged losses ± standard deviation)"
    )


def format_memory(summary: Mapping[str, Any]) -> str:
    """Returns the estimated and the measured memory as text; empty without an estimate."""
    plan = summary.get("plan", {})
    if not plan.get("peak_bytes"):
        return ""
    planned, measured, scope = plan["peak_bytes"], plan["measured_bytes"], plan["measured"]
    if plan.get("process_bytes"):
        planned, measured = plan["process_bytes"], plan["measured_process_bytes"]
        scope = "whole process; evaluation is not planned"
    text = f"{planned / 2**30:,.2f} GiB planned, {measured / 2**30:,.2f} GiB measured"
    off = f"{plan['off']:+.1%}; " if plan["off"] is not None else ""
    return f"{text} ({off}{scope})"


def format_selected_model(best: Mapping[str, Any]) -> str:
    """Returns a text on the checkpoint that a run selected; `best` is its summary.json entry."""
    name, last_step = best["metric"], best["last_step"]
    order = "highest" if best["greater_is_better"] else "lowest"
    step, value = best["kept_step"], f"{name} {best['best']:.4f}"
    if best["best_step"] == last_step:
        num_evaluations = best["evaluations"]
        text = f"step {last_step:,}, the last: {value}" + (
            f", the {order} of {num_evaluations:,} evaluations" if num_evaluations > 1 else ""
        )
    elif step == best["best_step"]:
        last = f"{best['last']:.4f}" + ", too" * (best["last"] == best["best"])
        text = f"step {step:,} of {last_step:,}: {value}, the last had {last}"
    else:
        text = (
            f"step {step:,}, the last: {name} {best['last']:.4f}; step {best['best_step']:,} had "
            f"{best['best']:.4f}"
        )
    if best["stopped_early"]:
        num_evaluations = best["waited"]
        message = (
            f"{num_evaluations:,} evaluation{'s' * (num_evaluations != 1)} without a better one"
        )
        text += f"; stopped early, after {message}"
    return text


def create_readme(summary: Mapping[str, Any], needs_import: str = "") -> str:
    """Returns the README of a run; `needs_import` is a module to import before PEFT."""
    metrics = summary.get("metrics", {})
    is_full = summary["method"] == "full"
    lines = [
        *_format_metadata(
            summary["model"],
            "finetune" if is_full else "adapter",
            summary["task"],
            "transformers" if is_full else "peft",
            [summary["method"]],
            **_result_metadata(summary),
        ),
        f"# {plain(Path(summary['run']).name)}",
        "",
        f"`{summary['method']}` on {code(summary['model']['name'])} for {summary['task']}, trained "
        f"on {code(summary['data']['name'])} ({summary['data']['train_rows']:,} rows, "
        f"{summary['steps']:,} steps) by ftlevel {summary['versions'].get('ftlevel', '')}.",
        "",
    ]
    if summary.get("adapter"):
        lines += [f"Training continued from the adapter {code(summary['adapter']['name'])}.", ""]
    if reference := summary.get("reference"):
        lines += [f"Reference model: {plain(reference['is'])}.", ""]
    if expected := summary.get("distillation"):
        lines += [f"Teacher: {code(expected['teacher'])}.", ""]
    if metrics:
        lines += _format_metrics(summary)
        rows, generated = (summary["data"][key] for key in ("validation_rows", "generated_rows"))
        texts = f"; text metrics on the first {generated:,} of them" if generated else ""
        lines += ["", f"Measured on {rows:,} validation rows{texts}.", ""]
    names = summary["data"]["labels"]
    if names:
        remainder = (
            f" and {len(names) - _SHOWN_LABELS:,} more" if len(names) > _SHOWN_LABELS else ""
        )
        shown_labels = ", ".join(map(code, names[:_SHOWN_LABELS]))
        lines += [f"{len(names):,} labels: {shown_labels}{remainder}.", ""]
    if summary["loss_window"]:
        lines += [f"Training loss {describe_losses(summary)}.", ""]
    if memory := summary.get("speed", {}).get("chosen_for_bytes"):
        tokens = summary["speed"]["tokens_per_micro_batch"]
        lines += [f"Micro-batches of up to {tokens:,} tokens, for {memory / 2**30:.2f} GiB.", ""]
    if left_out := summary.get("left_out"):
        lines += [f"Skipped steps (loss not finite, or a spike): {len(left_out):,}."]
        lines += [""]
    if memory := format_memory(summary):
        lines += [f"Memory: {memory}.", ""]
    lines += ["## Use", "", "```sh", predict_command(summary["run"], summary["task"]), "```", ""]
    if names and summary["method"] != "full" and summary["model"].get("kind") != "builtin":
        lines += _format_label_code(summary, needs_import)
    elif needs_import:
        lines += _format_import_code(needs_import)
    lines += _format_stops(summary.get("stops"), in_base=not is_full)
    lines += ["`config.yaml` has all settings, `summary.json` all results.", ""]
    return "\n".join(lines)


def _format_stops(stops: Mapping[str, int] | None, *, in_base: bool) -> list[str]:
    if not stops:
        return []
    code = f"eos_token_id={list(stops.values())}"
    text = f"Answers end at {' or '.join(f'`{token}`' for token in stops)}"
    if in_base:
        text += (
            f". The base's generation_config.json does not list all of them: pass `{code}` to "
            "`generate` of transformers, or merge the adapter with `ftlevel merge`"
        )
        return [f"{text}.", ""]
    return [f"{text}, as generation_config.json says (`{code}`).", ""]


def _format_metrics(summary: Mapping[str, Any]) -> list[str]:
    metrics, best = summary["metrics"], summary.get("best")
    columns = {"before": summary.get("metrics_before", {}), "after": metrics}
    if best and best["kept_step"] != best["last_step"]:
        columns[f"after step {best['last_step']:,}, the last"] = summary["metrics_last"]
    lines = [f"| metric | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in metrics:
        cells = (f"{c[name]:.4f}" if name in c else "–" for c in columns.values())
        lines.append(f"| {plain(name)} | {' | '.join(cells)} |")
    return [*lines, "", f"Selected model: {format_selected_model(best)}."] if best else lines


_PEFT_CLASSES = {
    "text-classification": "AutoPeftModelForSequenceClassification",
    "token-classification": "AutoPeftModelForTokenClassification",
}


def _format_label_code(summary: Mapping[str, Any], needs_import: str) -> list[str]:
    loader = _PEFT_CLASSES[summary["task"]]
    return [
        "PEFT does not save label names with an adapter. Without them, the base is loaded with two "
        "labels, `LABEL_0` and `LABEL_1`. Pass the label names when you load it with PEFT alone:",
        "",
        "```python",
        *(
            [f"import {needs_import}  # registers the adapter type with PEFT"]
            if needs_import
            else []
        ),
        f"from peft import {loader}",
        "",
        f"names = {list(summary['data']['labels'])!r}",
        f"model = {loader}.from_pretrained(",
        '    "adapter", num_labels=len(names), id2label=dict(enumerate(names))',
        ")  # next to config.yaml",
        "```",
        "",
    ]


def _format_import_code(module: str) -> list[str]:
    return [
        "PEFT does not include this adapter type. `ftlevel` commands load it as usual; your own "
        "code needs one import:",
        "",
        "```python",
        f"import {module}  # registers the adapter type with PEFT",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "adapter")  # next to config.yaml',
        "```",
        "",
    ]


def create_quantized_readme(name: str, summary: Mapping[str, Any], task: str | None = None) -> str:
    """Returns the model card of a quantized model; `summary` is quantization.json."""
    source, quantization = summary["source"]["name"], summary["quantization"]["form"]
    lines = [
        *_format_metadata(
            summary["source"], "quantized", task, "transformers", ["bitsandbytes", "quantized"]
        ),
        f"# {plain(name)}",
        "",
        f"{plain(source)}, quantized to {quantization} by ftlevel "
        f"{summary['versions']['ftlevel']}: "
        f"{summary['quantized_linears']:,} linear layers are quantized; embeddings, norms and "
        f"heads are in {summary['dtype']}.",
        "",
        "| part | MB before | MB now |",
        "|---|--:|--:|",
        *(
            f"| {part} | {sizes['bytes_before'] / 1e6:,.1f} | {sizes['bytes'] / 1e6:,.1f} |"
            for part, sizes in summary["parts"].items()
        ),
        f"| total | {summary['bytes_before'] / 1e6:,.1f} | {summary['bytes'] / 1e6:,.1f} |",
        "",
    ]
    if "fidelity" in summary:
        scores = summary["fidelity"]
        lines.append(
            f"Compared with its source on {scores['positions']:,} positions in {scores['windows']} "
            f"windows of {plain(scores['text'])} ({scores['predicts']}):"
        )
        lines.append("")
        if "cosine" in scores:
            lines.append(f"- cosine of the hidden states {scores['cosine']:.4f}")
        else:
            lines.append(f"- KL {scores['kl']:.4f} ± {scores['kl_standard_error']:.4f} nats")
            lines.append(f"- top-1 agreement {scores['top1_agreement']:.1%}")
            lines.append(
                f"- perplexity {scores['perplexity_source']:.3f} → {scores['perplexity']:.3f}"
            )
    else:
        lines.append("The difference from the source model was not measured.")
    if task:
        lines += [
            "",
            "## Use",
            "",
            f"Trained for {task}:",
            "",
            "```sh",
            predict_command(name, task),
            "```",
        ]
    return "\n".join([*lines, ""])


def create_merge_readme(summary: Mapping[str, Any], task: str) -> str:
    """Returns the model card of a merged model; `summary` is that of `merge`."""
    base = summary["base"]
    lines = [
        *_format_metadata(base, "finetune", task, "transformers", ["merged", summary["method"]]),
        f"# {plain(summary['out'].rstrip('/').rpartition('/')[2])}",
        "",
        f"{code(base['name'])} with {' and '.join(map(code, summary['adapters']))} "
        f"({summary['method']}) merged into its weights by ftlevel "
        f"{summary['versions'].get('ftlevel', '')}, in {summary['written']['dtype']}.",
        "",
    ]
    if summary["onto"] == "dequantized":
        lines += [
            "The adapter was trained on a quantized base; it is merged into the dequantized "
            "weights, on which it was trained.",
            "",
        ]
    if summary.get("quantization"):
        lines += [
            *_format_low_bits(QuantConfig(**summary["quantization"]).form, summary["served"]),
            "",
        ]
    if summary["reason"]:
        lines += [f"Reason for this choice: {summary['reason']}.", ""]
    if summary["written"]["untied"]:
        lines += [
            "Embedding and output layer no longer share weights, because the adapter changes one "
            "of them.",
            "",
        ]
    lines += _format_check(summary.get("agreement"))
    lines += ["## Use", "", "```sh", predict_command(summary["out"], task), "```", ""]
    lines += _format_stops(summary["written"].get("stops"), in_base=False)
    return "\n".join(lines)


def format_difference(agreement: Mapping[str, Any]) -> str:
    """Returns mean logit difference, KL divergence and top-1 agreement (unless None) as text."""
    text = f"{agreement['mean_difference']:.2g} on average"
    return (
        text
        if agreement["kl"] is None
        else f"{text}, KL {agreement['kl']:.2g}, top-1 {agreement['top1']:.1%}"
    )


def _format_low_bits(quantization: str, served: Mapping[str, Any] | None) -> list[str]:
    lines = [
        f"Linear layers are stored in {quantization}; transformers loads them with bitsandbytes."
    ]
    if served is not None:
        lines.append(
            f"Difference from the trained model: {format_difference(served)} over "
            f"{served['targets']:,} targets, loss {served['loss']:.4f} (trained model: "
            f"{served['loss_reference']:.4f}). The table below is for the weights before "
            "quantization."
        )
    return lines


def _format_check(agreement: Mapping[str, Any] | None) -> list[str]:
    if agreement is None:
        return [
            "**Not verified**: written with `--no-verify`, without a comparison with base model "
            "and adapter.",
            "",
        ]
    return [
        "Loaded again and compared with base model and adapter on "
        f"{agreement['targets']:,} targets:",
        "",
        "| difference | max logit difference | mean | loss | loss before merging |",
        "|---|--:|--:|--:|--:|",
        f"| {format_difference(agreement)} | "
        f"{agreement['max_difference']:.3g} | {agreement['mean_difference']:.2g} | "
        f"{agreement['loss']:.4f} | {agreement['loss_reference']:.4f} |",
        "",
    ]
