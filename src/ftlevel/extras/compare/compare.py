"""`compare`: train several methods with equal settings and seeds, score and rank them."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import check_new_output, read_json, write_json, write_text
from ftlevel.artifacts.paths import make_paths_absolute
from ftlevel.artifacts.run_directory import CONFIG, SUMMARY, check_links, check_lock
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.plan import PlanOptions, plan
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, Layer, TrainConfig, build_config, build_section
from ftlevel.config.methods import SPECS
from ftlevel.config.reading import METHOD_ALIASES, resolve_aliases
from ftlevel.errors import (
    ConfigError,
    InputError,
    Interrupted,
    RunError,
    did_you_mean,
    excludes,
    join_names,
    needs,
)
from ftlevel.events import Listener, NullListener
from ftlevel.extras.compare.comparison import (
    SCORES,
    Comparison,
    ComparisonOptions,
    draw_pictures,
    ranking_metric,
    summarize,
    write_comparison_report,
)
from ftlevel.extras.compare.search import (
    StopWithParent,
    check_search,
    plan_study,
    run_in_subprocess,
    search,
    with_values,
)
from ftlevel.safe_io import mask_passwords

RESAMPLES = 1000
"""Number of bootstrap resamples, which are equal for runs scored on equally many rows."""


def train_and_score(config: TrainConfig, scores_path: Path) -> None:
    """Train or resume `config`, then write scores to the JSON file `scores_path`.

    Predictions are written to the same path with the suffix `.jsonl`. Raises the errors of `train`
    and `evaluate`.
    """
    result = train(config, callbacks=[StopWithParent()], listener=NullListener())
    predictions = scores_path.with_suffix(".jsonl")
    predictions.unlink(missing_ok=True)
    values = {
        "name": str(result.path),
        "base": False,
        "resamples": RESAMPLES,
        "predictions": predictions,
    }
    found = evaluate(build_section(EvaluateConfig, values), listener=NullListener())
    metric = ranking_metric(config.train, found.summary["task"], found.summary["headline"])
    if metric not in found.metrics:
        raise ConfigError(f"it cannot be ranked by {metric}; available: {', '.join(found.metrics)}")
    resampled = found.draws.get(metric)
    write_json(
        scores_path,
        {
            "name": metric,
            "metric": found.metrics[metric],
            "metrics": found.metrics,
            "rows": found.summary["data"],
            "draws": [] if resampled is None else resampled.tolist(),
        },
    )


def seconds_per_step(config: TrainConfig) -> float:
    """Returns the measured seconds of a training step on this machine."""
    result = plan(config, PlanOptions(probe=True, alternatives=False))
    if result.time is None:
        raise ConfigError("its steps could not be timed")
    return result.time.seconds_per_epoch / result.run.schedule.steps_per_epoch


def get_run_info(config: TrainConfig) -> dict[str, Any]:
    """Returns the summary of a dry run; raises as `train` does if the run could not start."""
    return dict(train(config, dry_run=True, listener=NullListener()).summary)


RESULT = "compare.json"
_TRIALS = 10
_CTRL_C = 130
_METRIC = "train.metric_for_best_model"
_ROWS = ("fingerprint", "validation_fingerprint")


def compare(
    config: TrainConfig,
    args: ComparisonOptions,
    *,
    listener: Listener,
    prepare: Callable[[], Any] = int,
) -> dict[str, Any]:
    """Train each method of `args` with the configuration `config`; return the output of `--json`.

    Method settings in `config` apply to every method that has them. Each run has its own process,
    in which `prepare` is called first.

    Raises:
        ConfigError: no method can be trained, or the directory exists.
        RunError: no run finished.
        Interrupted: a signal arrived; finished runs are kept.
    """
    _check(config, args)
    path = config.output.dir or _first_free()
    args, state = _start_or_resume(config, args, path)
    found = Comparison(path, args)
    listener.stage("checking methods and reading data")
    _check_methods(config, found, listener)
    (path / SCORES).mkdir(parents=True, exist_ok=True)
    write_json(path / RESULT, state)
    write_text(path / CONFIG, _to_yaml(config))
    try:
        _set_budget(found, state, listener, prepare)
        _search_all(found, state, listener, prepare)
        _train_all(found, listener, prepare)
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            "interrupted; finished runs are kept. Resume with: ftlevel compare --output-dir "
            f"{shlex.quote(str(path))} --resume",
            getattr(error, "exit_code", _CTRL_C),
        ) from None
    result = summarize(found, state)
    write_json(path / RESULT, result)
    write_comparison_report(found)
    result["pictures"] = draw_pictures(found, result)
    write_json(path / RESULT, result)
    return result


def _check(config: TrainConfig, args: ComparisonOptions) -> None:
    steps, minutes, max_steps = args.steps, args.minutes, config.train.max_steps
    one_process, drop = "it trains each run in one process", "Drop it."
    conflicts = (
        (steps is not None and minutes is not None, "--budget-steps", "--budget-minutes"),
        (steps is not None and max_steps not in (None, steps), "--budget-steps", "--max-steps"),
        (minutes is not None and max_steps is not None, "--budget-minutes", "--max-steps"),
        (config.model.adapter is not None, "--adapter", "compare",
         "one continues one method, and the other trains several", drop),
        ("-" in (config.data.dataset, *config.data.also), "--dataset -", "compare",
         "every run reads the rows again", "Save them to a file."),
        ((config.train.num_processes or 1) > 1, "--num-processes", "compare", one_process, drop),
        (config.train.shard != "none", "--shard", "compare", one_process, drop),
    )  # fmt: skip
    problems = [excludes(*texts) for is_conflict, *texts in conflicts if is_conflict]
    limits = {"budget-minutes": minutes, "max-memory": args.max_memory}
    for name, value in {**limits, "max-minutes": args.max_minutes}.items():
        if value is not None and not 0 < value < math.inf:
            problems.append(f"--{name} {value:g}: expected a number above 0.")
    problems += check_search(args.search, args.study)
    if problems:
        raise ConfigError(problems)


def _first_free() -> Path:
    paths = (Path("runs") / f"compared-{number}" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def _to_yaml(config: TrainConfig) -> str:
    import yaml

    header = "# Shared settings. Resume with: ftlevel compare --resume --output-dir"
    return f"{header} THIS_DIRECTORY\n{yaml.safe_dump(_to_dict(config), sort_keys=False)}"


def _to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns section → fields set in `config`, as plain values; without output paths."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"output"})
    if "method" in values:
        values["method"]["kind"] = config.method.kind
    if config.output.report_to:
        values["output"] = {
            "report_to": list(config.output.report_to),
            "tracker_project": config.output.tracker_project,
        }
    return make_paths_absolute(values)


def _start_or_resume(
    config: TrainConfig, args: ComparisonOptions, path: Path
) -> tuple[ComparisonOptions, dict[str, Any]]:
    """Returns options and state for compare.json; on `--resume`, merged with the saved ones."""
    budget = {"steps": args.steps, "minutes": args.minutes}
    current = _to_dict(config)
    state: dict[str, Any] = {
        "config": current,
        "budget": budget,
        "planned_steps": {},
        "methods": list(dict.fromkeys(args.methods)),
        "seeds": args.seeds,
        "search": list(dict.fromkeys(args.search)),
        "trials": args.trials or _TRIALS,
        "study": args.study and mask_passwords(args.study),
        "searched": {},
        "max_memory": args.max_memory,
        "max_minutes": args.max_minutes,
    }
    before = path / RESULT
    if not config.output.resume or not before.is_file():
        check_new_output("--output-dir", path)
        if not args.methods:
            raise ConfigError("--methods is missing. Name some: --methods lora,ia3,full")
        for flag, value in (("--trials", args.trials), ("--study", state["study"])):
            if value is not None and not args.search:
                raise ConfigError(needs(f"{flag} {value}", "--search lr"))
        return args, {"asked": state}
    try:
        old = read_json(before)["asked"]
        was, old_budget = old["config"], old["budget"]
        methods, seeds, steps = old["methods"], old["seeds"], old["planned_steps"]
        search_results = {name: old[name] for name in ("search", "trials", "study", "searched")}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"--resume: {before} cannot be read ({error!r}).") from None
    if budget not in (old_budget, {"steps": None, "minutes": None}):
        raise ConfigError(
            f"--resume {path}: the budget was {old_budget} and is {budget}. Drop it, or start a "
            "new run in another --output-dir."
        )
    if _without_metric(current) != _without_metric(was):
        differ_in = [key for key in {**was, **current} if was.get(key) != current.get(key)]
        raise ConfigError(
            f"--resume {path}: not the same comparison: {join_names(differ_in)} was given "
            "otherwise. Give --resume and --output-dir alone, or start a new run in another "
            "directory."
        )
    if args.trials is not None and not search_results["searched"]:
        search_results["trials"] = args.trials
    given = {"search": state["search"], "trials": args.trials, "study": state["study"]}
    for name, value in given.items():
        saved = search_results[name] if search_results["search"] else None
        if value and value != saved:
            shown = join_names(saved) if isinstance(saved, list) else saved or "not given"
            raise ConfigError(
                f"--resume {path}: --{name} was {shown}. Drop it, or start a new run in another "
                "--output-dir."
            )
    _check_password(search_results["study"], args)
    check_links(path, [entry.name for entry in path.iterdir()])
    for run in path.glob("*-seed*"):
        check_lock(run)
    limits = {name: state[name] or old.get(name) for name in ("max_memory", "max_minutes")}
    state |= {
        **search_results,
        **limits,
        "budget": old_budget,
        "planned_steps": steps,
        "seeds": max(args.seeds, seeds),
        "methods": list(dict.fromkeys([*methods, *args.methods])),
    }
    args = replace(
        args,
        **limits,
        methods=tuple(state["methods"]),
        steps=old_budget["steps"],
        minutes=old_budget["minutes"],
        seeds=state["seeds"],
        search=tuple(state["search"]),
        trials=state["trials"],
        study=args.study or state["study"],
    )
    return args, {"asked": state}


def _check_password(saved: str | None, args: ComparisonOptions) -> None:
    if saved and "***" in saved and not args.study:
        raise ConfigError(f"--resume: the password of {saved} is not saved. Pass --study again.")


def _without_metric(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config` without `metric_for_best_model`, which may change on `--resume`."""
    section = {k: v for k, v in config.get("train", {}).items() if k != "metric_for_best_model"}
    return {**config, "train": section}


def _check_methods(config: TrainConfig, result: Comparison, listener: Listener) -> None:
    """Dry-run each method and add it to `result`; excluded ones are reported to `listener`."""
    values = set(_to_dict(config).get("method", {})) - {"kind"}
    for word in dict.fromkeys(result.args.methods):
        fields = _method_fields(word)
        values -= set(SPECS[str(fields["kind"])].model_fields)
        try:
            ready = _with_method(config, fields, result.args)
            dry_run = get_run_info(ready)
            _check_rows(result.path / f"{word}-seed{ready.train.seed}", dry_run)
        except InputError:
            raise
        except ConfigError as error:
            result.left_out[word] = " ".join(error.problems)
            listener.warn(f"{word} cannot be compared: {result.left_out[word]}")
            continue
        result.configs[word], result.dry_runs[word] = ready, dry_run
    if not result.configs:
        raise ConfigError([f"{name}: {message}" for name, message in result.left_out.items()])
    if values:
        raise ConfigError(
            f"method.{sorted(values)[0]} belongs to none of the compared methods. Drop it."
        )
    if not next(iter(result.dry_runs.values()))["data"].get("validation_rows"):
        raise ConfigError(
            "compare scores every method on held-out rows, and there are none. Add "
            "--validation-file FILE, or --validation-split 0.1."
        )


def _check_rows(run: Path, dry_run: Mapping[str, Any]) -> None:
    """Raise InputError if `run` has finished with different rows than those of `dry_run`."""
    before = read_json(run / SUMMARY)["data"] if (run / SUMMARY).is_file() else {}
    if any(before[name] != dry_run["data"][name] for name in _ROWS if name in before):
        raise InputError(
            f"--resume {run.parent}: the rows are not those of {run.name}. Start a new comparison "
            "in another --output-dir."
        )


def _method_fields(word: str) -> dict[str, Any]:
    """Returns the method section for the name or alias `word`; raises ConfigError if unknown."""
    fields: dict[str, Any] = resolve_aliases({"method": {"kind": word}})[0]["method"]
    if fields["kind"] not in SPECS:
        names = (*SPECS, *METHOD_ALIASES)
        raise ConfigError(
            f"--methods: {word!r} is not a method. Expected some of {join_names(SPECS, 30)}."
            f"{did_you_mean(word, names)}"
        )
    return fields


def _with_method(
    config: TrainConfig, fields: Mapping[str, Any], args: ComparisonOptions
) -> TrainConfig:
    """Returns `config` for the method in `fields`, with `config`'s settings that the method has."""
    values = _to_dict(config)
    settings, known = values.get("method", {}), SPECS[str(fields["kind"])].model_fields
    if (
        "none" != config.method.default_quant == config.quant.kind
    ):  # quantization implied by the recipe's method
        values.pop("quant", None)
    values["method"] = {k: v for k, v in settings.items() if k in known} | dict(fields)
    if args.steps is not None:
        values.setdefault("train", {})["max_steps"] = args.steps
    return build_config([Layer(values)])


def _set_budget(
    result: Comparison, state: dict[str, Any], listener: Listener, prepare: Callable[[], Any]
) -> None:
    """Time a step of each method; store in `state` (modified) how many fit into the time limit."""
    minutes, steps = result.args.minutes, state["asked"]["planned_steps"]
    if minutes is None:
        return
    for method, config in list(result.configs.items()):
        if method not in steps:
            listener.stage(f"timing a step of {method}")
            try:
                step_time = run_in_subprocess(prepare, seconds_per_step, config)
            except RunError as error:
                result.left_out[method] = str(error)
                del result.configs[method]
                continue
            steps[method] = max(1, int(60 * minutes / step_time))
            write_json(result.path / RESULT, state)
        config = with_values(config, {"train.max_steps": steps[method]})
        result.configs[method] = config
        if result.args.search:  # around the learning rate for these steps
            result.dry_runs[method] = get_run_info(config)


def _search_all(
    result: Comparison, state: dict[str, Any], listener: Listener, prepare: Callable[[], Any]
) -> None:
    """Search each method's hyperparameters if requested; set the best ones in `result.configs`."""
    done = state["asked"]["searched"]
    for method, config in list(result.configs.items()):
        if method not in done:
            asked = {**state["asked"], "study": result.args.study}  # with its password
            study = plan_study(method, config, asked, result.dry_runs[method], result.path)
            if study is None:
                continue
            listener.stage(
                f"searching {join_names(study.fields)} of {method}: {study.trials} trials"
            )
            try:
                done[method] = search(study, config, result.path, prepare)
            except RunError as error:
                result.left_out[method] = str(error)
                del result.configs[method]
                continue
            write_json(result.path / RESULT, state)
        result.search_results[method] = done[method]
        result.configs[method] = with_values(config, done[method]["values"])


def _train_all(result: Comparison, listener: Listener, prepare: Callable[[], Any]) -> None:
    """Train and score the runs that are not finished, seed by seed; RunError if all runs fail."""
    first = next(iter(result.configs.values()), None)
    if first is None:
        raise RunError("\n".join(f"{name}: {message}" for name, message in result.left_out.items()))
    seeds = range(first.train.seed, first.train.seed + result.args.seeds)
    runs = [(method, seed) for seed in seeds for method in result.configs]
    for number, (method, seed) in enumerate(runs, 1):
        if method in result.left_out:
            continue
        name = f"{method}-seed{seed}"
        run, scores_path = result.path / name, result.path / SCORES / f"{name}.json"
        if not ((run / SUMMARY).is_file() and _is_scored(result.configs[method], scores_path)):
            listener.stage(f"{method}, seed {seed} ({number} of {len(runs)})")
            try:
                run_config = _get_run_config(result.configs[method], run, seed)
                run_in_subprocess(prepare, train_and_score, run_config, scores_path)
            except RunError as error:
                result.left_out[method] = f"seed {seed}: {error}"
                listener.warn(f"{method} is skipped: {error}")
                result.scored.pop(method, None)
                continue
        summary, scores = read_json(run / SUMMARY), read_json(scores_path)
        result.scored.setdefault(method, []).append(
            {"run": run, "seed": seed, "summary": summary, **scores}
        )
    if not result.scored:
        raise RunError("\n".join(f"{name}: {message}" for name, message in result.left_out.items()))


def _is_scored(config: TrainConfig, scores_path: Path) -> bool:
    if not scores_path.is_file():
        return False
    name = config.train.metric_for_best_model
    scored = read_json(scores_path)["name"]
    return name is None or name.removeprefix("eval_") == scored


def _get_run_config(config: TrainConfig, run: Path, seed: int) -> TrainConfig:
    """Returns the configuration of the run with `seed`, resumed if directory `run` is not empty."""
    exists = run.is_dir() and any(run.iterdir())
    output = config.output.model_copy(
        update={"dir": run, "resume": exists, "allow_change": (_METRIC,) * exists}
    )
    return config.with_sections(output=output, train=config.train.model_copy(update={"seed": seed}))
