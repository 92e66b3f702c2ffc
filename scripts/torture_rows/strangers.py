"""Recipes, runs, adapters, models and data files of strangers: they are data, never code.

An exploit builds what somebody might have downloaded, with random names and places, uses it as a
user would, and returns what went wrong; "" if nothing did.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import string
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torture_rows.lab import BAD, GOOD, Case, Lab, ProcessResult


@dataclass
class Scene:
    """Places of one exploit: `stranger` is what was downloaded, `home` belongs to the user.

    Code of the stranger creates `witness`; a command must not.
    """

    lab: Lab
    folder: Path
    random: random.Random

    def __post_init__(self) -> None:
        self.stranger, self.home = (self.folder / self.name() for _ in range(2))
        self.witness = self.home / self.name()
        for path in (self.stranger, self.home):
            path.mkdir(parents=True)

    def name(self) -> str:
        """Return a random name, which is a valid identifier."""
        return "".join(self.random.choices(string.ascii_lowercase, k=8))

    def write(self, path: Path, content: Any) -> Path:
        """Write text, or a value as JSON (lines, for a list)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def code(self) -> str:
        """Return a Python statement that creates the witness."""
        return f"import pathlib; pathlib.Path({str(self.witness)!r}).write_text('run')\n"

    def run(self, *arguments: object, **kwargs: Any) -> ProcessResult:
        """Run a command to its end."""
        return self.lab.run([str(argument) for argument in arguments], **kwargs)

    def fresh(self, folder: Path, *arguments: object) -> ProcessResult:
        """Run a command with a new interpreter in `folder`, as an installed ftlevel does."""
        return self.lab.fresh([str(argument) for argument in arguments], folder).wait(
            self.lab.patience
        )

    def rl(self, run: Path, *flags: object) -> list[object]:
        """Return a short `train --task rl`."""
        return ["train", "--task", "rl", "--model", self.lab.base, "--dataset", self.questions(),
                "--max-completion-length", 4, "--num-generations", 2, "--check-groups", 0,
                "--max-steps", 1, "--batch-size", 2, "--quiet", "--output-dir", run,
                "--validation-split", 0.25, *flags]  # fmt: skip

    def questions(self) -> Path:
        """Return a file of prompts with answers."""
        path = self.stranger / "questions.jsonl"
        rows = [{"prompt": f"red {number}", "answer": str(number)} for number in range(8)]
        return path if path.exists() else self.write(path, rows)

    def problem(
        self, result: ProcessResult, expected: Sequence[int] = (0, 2), says: str = ""
    ) -> str:
        """Return what is wrong: code was run, a raw end, or another exit code or text."""
        if self.witness.exists():
            return f"code of the stranger was run: {result.err[-300:]}"
        if result.hung:
            return f"it did not end: {result.err[-300:]}"
        if result.is_raw or result.is_unforeseen or result.code not in expected:
            return f"exit {result.code}: {result.err[-600:]}"
        if says not in result.err + result.out:
            return f"{says!r} is not in: {result.err[-600:]}"
        return ""


Exploit = Callable[[Scene], str]
EXPLOITS: dict[str, Exploit] = {}


def exploit(function: Exploit) -> Exploit:
    """Add a function to `EXPLOITS`."""
    EXPLOITS[function.__name__] = function
    return function


def _reward(scene: Scene) -> Path:
    function = (
        "def score(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    return scene.write(scene.stranger / f"{scene.name()}.py", scene.code() + function)


def _as_other_user(scene: Scene) -> None:
    os.environ["XDG_CACHE_HOME"] = str(scene.folder / "cache-of-the-stranger")


def _stranger_rl_run(scene: Scene) -> Path:
    """Train a run with a reward file, as somebody else; delete the witness of it."""
    run = scene.stranger / scene.name()
    command = scene.rl(run, "--reward", f"{_reward(scene)}:score")
    result = scene.run(*command, before=lambda: _as_other_user(scene))
    if result.code:
        raise RuntimeError(result.err)
    scene.witness.unlink()
    return run


@exploit
def reward_file_of_a_run(scene: Scene) -> str:
    """`evaluate RUN` and `--resume` run no reward file that only the run names."""
    run = _stranger_rl_run(scene)
    if why := scene.problem(scene.run("evaluate", run, "--resamples", 0), [2], "--reward"):
        return why
    shutil.rmtree(run / "adapter")
    result = scene.run("train", "--resume", "--output-dir", run, "--max-steps", 2, "--quiet")
    if why := scene.problem(result, [2], "--reward"):
        return why
    return scene.problem(scene.run("preview", run), [2], "--reward")


@exploit
def reward_file_of_an_adapter(scene: Scene) -> str:
    """`evaluate ADAPTER` runs no reward file that ftlevel.json names."""
    run = _stranger_rl_run(scene)
    adapter = shutil.move(run / "adapter", scene.stranger / scene.name())
    shutil.rmtree(run)
    result = scene.run("evaluate", adapter, "--dataset", scene.questions(), "--resamples", 0)
    return scene.problem(result, [2], "--reward")


@exploit
def reward_file_that_was_typed(scene: Scene) -> str:
    """A reward file is run if it is named on the command line, and afterwards until it changes."""
    reward, run = _reward(scene), scene.home / "run"
    result = scene.run(*scene.rl(run, "--reward", f"{reward}:score"))
    if result.code or not scene.witness.exists():
        return f"it was not run: {result.err}"
    scene.witness.unlink()
    evaluate = ("evaluate", run, "--resamples", 0, "--no-base")
    result = scene.run(*evaluate)
    if result.code or not scene.witness.exists():
        return f"the same file was not run: {result.err}"
    if "runs this Python file" not in result.out + result.err:
        return f"the file is not printed: {result.out}{result.err}"
    scene.witness.unlink()
    scene.write(reward, reward.read_text() + "# changed\n")
    if why := scene.problem(scene.run(*evaluate), [2], "--reward"):
        return why
    result = scene.run(*evaluate, "--reward", f"{reward}:score")
    return "" if not result.code and scene.witness.exists() else f"refused: {result.err}"


@exploit
def reward_file_of_a_recipe(scene: Scene) -> str:
    """A recipe runs no reward file, in any spelling, with train, preview or plan."""
    value = f"{_reward(scene)}:score"
    spellings = (f"rl: {{reward: ['{value}']}}", f"rl: '{value}'", f"rl:\n  reward: '{value}'",
                 f"rl: {{<<: {{reward: '{value}'}}}}")  # fmt: skip
    return next(filter(None, (_use_recipe(scene, text) for text in spellings)), "")


def _use_recipe(scene: Scene, spelled: str) -> str:
    recipe = scene.write(scene.stranger / "recipe.yaml", f"task: rl\n{spelled}\n")
    says = "" if "<<" in spelled else "not run before"
    flags = ["--model", scene.lab.base, "--dataset", scene.questions()]
    for command in (
        [*scene.rl(scene.home / "x"), "--recipe", recipe],
        ["preview", recipe, *flags],
        ["plan", recipe, *flags],
    ):
        if why := scene.problem(scene.run(*command), [2], says):
            return f"{spelled}: {why}"
    return ""


@exploit
def settings_of_a_recipe(scene: Scene) -> str:
    """A recipe cannot trust code, replace a run, upload or send prompts without a flag."""
    old = scene.home / "run"
    if (result := scene.run(*scene.lab.training(old))).code:
        return result.err
    settings = {
        "model: {trust_remote_code: yes}": "--trust-remote-code",
        "output: {overwrite: true}": "--overwrite",
        f"output: {{push_to_hub: {scene.name()}/{scene.name()}}}": "--push-to-hub",
        "task: rl\nrl: {reward: exact, rollouts: 'http://127.0.0.1:9'}": "--rollouts",
    }
    before = (old / "config.yaml").read_bytes()
    for text, flag in settings.items():
        recipe = scene.write(scene.stranger / f"{scene.name()}.yaml", text + "\n")
        command = ["train", recipe, "--output-dir", old, "--model", scene.lab.base,
                   "--dataset", scene.lab.rows, "--max-steps", 1]  # fmt: skip
        if why := scene.problem(scene.run(*command), [2], flag):
            return f"{text}: {why}"
    return "" if (old / "config.yaml").read_bytes() == before else "the run was replaced"


@exploit
def trust_of_a_run(scene: Scene) -> str:
    """`--resume` of a run whose config.yaml trusts code needs the flag."""
    run = scene.stranger / scene.name()
    if (result := scene.run(*scene.lab.training(run))).code:
        return result.err
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("trust_remote_code: false",
                                                  "trust_remote_code: true"))  # fmt: skip
    result = scene.run("train", "--resume", "--output-dir", run, "--max-steps", 9, "--quiet")
    return scene.problem(result, [2], "--trust-remote-code")


@exploit
def git_settings_beside_a_recipe(scene: Scene) -> str:
    """A repository whose settings name programs runs none; a tree is missing, as in a clone."""
    folder = scene.stranger
    recipe = scene.write(folder / "recipe.yaml", "train: {max_steps: 1}\n")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "recipe.yaml")
    git("commit", "-qm", scene.name())
    tree = git("rev-parse", "HEAD^{tree}")
    (folder / ".git/objects" / tree[:2] / tree[2:]).unlink()
    command = f"touch {scene.witness}; false"
    for name, value in (("extensions.partialClone", "origin"), ("remote.origin.promisor", "true"),
                        ("remote.origin.url", f"ssh://{scene.name()}/x"),
                        ("core.sshCommand", command), ("core.fsmonitor", command),
                        ("core.repositoryformatversion", "1")):  # fmt: skip
        git("config", name, value)
    flags = ("--model", scene.lab.base, "--dataset", scene.lab.rows, "--quiet")
    run = scene.home / "run"
    if why := scene.problem(scene.run("train", recipe, "--dry-run", *flags), [0]):
        return why
    return scene.problem(scene.run("train", recipe, *flags, "--output-dir", run), [0])


def _link(scene: Scene, path: Path) -> Path:
    """Replace `path` by a link to a file of the user; return that file."""
    target = scene.write(scene.home / scene.name(), "mine\n")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return target


@exploit
def links_in_a_run(scene: Scene) -> str:
    """Names of a run that are links change no file of the user on report, --resume, --overwrite."""
    run = scene.stranger / scene.name()
    if (result := scene.run(*scene.lab.training(run))).code:
        return result.err
    names = ("report.html", "summary.json", "README.md", "config.yaml", "validation.jsonl",
             "metrics.jsonl", ".ftlevel.json", "places.json")  # fmt: skip
    names = (*names, "checkpoints/notes.jsonl", "checkpoints/changes.jsonl")
    for path in (run / name for name in names):
        for link in (path.with_name(f".{path.name}.partial"), path):
            kept = link.read_bytes() if link.exists() else None
            target = _link(scene, link)
            if kept is not None and link.suffix != ".partial":
                target.write_bytes(kept)
            before = target.read_bytes()
            steps = str(scene.random.randint(6, 9))
            command = scene.random.choice([
                ["report", run], ["train", "--resume", "--output-dir", run, "--max-steps", steps],
                scene.lab.training(run, "--overwrite"),
            ])  # fmt: skip
            result = scene.run(*command)
            if not target.exists() or target.read_bytes() != before:
                return f"{command[0]} changed a file through {link.name}"
            if why := scene.problem(result):
                return f"{command}: {link.name}: {why}"
            if link.is_symlink():
                link.unlink()
                if kept is not None:
                    link.write_bytes(kept)
    return ""


@exploit
def directories_that_are_links(scene: Scene) -> str:
    """`checkpoints` that links to a directory of the user: nothing is written or deleted there."""
    run, target = scene.stranger / scene.name(), scene.home / scene.name()
    if (result := scene.run(*scene.lab.training(run))).code:
        return result.err
    (run / "checkpoints").rename(target)
    (run / "checkpoints").symlink_to(target)
    before = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    result = scene.run("train", "--resume", "--output-dir", run, "--max-steps", 9, "--quiet")
    if {p: p.stat().st_mtime_ns for p in target.rglob("*")} != before:
        return "files behind the link have changed"
    return scene.problem(result, [2], "is a link")


@exploit
def links_beside_an_output(scene: Scene) -> str:
    """Partial files of `predict` that are links change no file of the user."""
    for suffix in ("jsonl", "csv", "parquet"):
        output = scene.stranger / f"{scene.name()}.{suffix}"
        for name in (f".{output.name}.partial", f".{output.name}.made",
                     f"..{output.name}.partial.new"):  # fmt: skip
            target = _link(scene, output.with_name(name))
            command = ["predict", scene.lab.base, "--dataset", scene.lab.rows, "--limit", "2",
                       "--task", "text-generation", "--max-new-tokens", "2", "--quiet",
                       "--output", output]  # fmt: skip
            for flags in ([], ["--overwrite"]):
                result = scene.run(*command, *flags)
                if target.read_text() != "mine\n":
                    return f"predict changed a file through {name}"
                if why := scene.problem(result):
                    return f"{name}: {why}"
            output.with_name(name).unlink(missing_ok=True)
            output.unlink(missing_ok=True)
    return ""


@exploit
def modules_in_the_current_directory(scene: Scene) -> str:
    """Processes that a command starts import no module from the directory with the data."""
    for name in ("selectors", "random", "hashlib", "tempfile", "socket", "numpy", "peft", "mlx"):
        scene.write(scene.stranger / f"{name}.py", scene.code())
    home, options = scene.home, ["--model", scene.lab.base, "--dataset", scene.lab.rows, "--quiet"]
    commands = {
        "rewards": scene.rl(home / "rl", "--reward", "exact"),
        "processes": ["train", *options, "--max-steps", "1", "--num-processes", "2",
                      "--output-dir", home / "two"],
        "compare": ["compare", *options, "--methods", "ia3", "--budget-steps", "1",
                    "--validation-split", "0.2",
                    "--output-dir", home / "compare"],
    }  # fmt: skip
    for name, command in commands.items():
        if why := scene.problem(scene.fresh(scene.stranger, *command), [0, 1]):
            return f"{name}: {why}"
    return ""


def _answer_yes() -> None:
    """Answer y to each question on stdin."""
    read, write = os.pipe()
    os.write(write, b"y\n" * 100)
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = os.fdopen(0, closefd=False)


@exploit
def code_of_a_model(scene: Scene) -> str:
    """A model's Python file is not run without the flag, whatever is typed, and nobody is asked."""
    for auto in ("AutoModelForCausalLM", "AutoConfig", "AutoTokenizer"):
        model, module = scene.stranger / scene.name(), scene.name()
        shutil.copytree(scene.lab.base, model)
        scene.write(model / f"{module}.py", scene.code())
        path = model / "config.json"
        config = json.loads(path.read_text())
        if auto == "AutoModelForCausalLM":  # a type that transformers has for other tasks only
            config["model_type"] = "distilbert"
        config["auto_map"] = {auto: f"{module}.{module.title()}"}
        if auto == "AutoConfig":
            config["model_type"] = module
        path.write_text(json.dumps(config))
        if auto == "AutoTokenizer":
            path = model / "tokenizer_config.json"
            tokenizer = json.loads(path.read_text())
            tokenizer["auto_map"] = {auto: [f"{module}.{module.title()}", None]}
            path.write_text(json.dumps(tokenizer))
        data = ["--dataset", scene.lab.rows]
        for command in (["train", *data, "--model", model, "--task", "text-generation",
                         "--max-steps", 1, "--output-dir", scene.home / scene.name()],
                        ["preview", *data, "--model", model],
                        ["evaluate", model, *data, "--task", "text-generation"],
                        ["list-targets", model]):  # fmt: skip
            result = scene.run(*command, before=_answer_yes)
            if "[y/N]" in result.out + result.err:
                return f"{auto}: {command[0]} asks on stdin"
            if why := scene.problem(result):
                return f"{auto}: {why}"
    return ""


@exploit
def references_of_json_schemas(scene: Scene) -> str:
    """`--reward json:COLUMN` fetches no `$ref`, and a bad schema ends no run."""
    from ftlevel.rewards import create_reward

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        secret = scene.write(scene.home / "schema.json", {"type": "string"})
        references = (f"http://127.0.0.1:{server.getsockname()[1]}/x", secret.as_uri(), "#/none",
                      f"urn:{scene.name()}")  # fmt: skip
        schemas: list[Any] = [{"$ref": reference} for reference in references]
        schemas += [{"$ref": "#"}, {"type": "string", "pattern": "(a+)+$"}]
        rows = [{"prompt": f"red {at}", "schema": json.dumps(schemas[at % len(schemas)])}
                for at in range(12)]  # fmt: skip
        data = scene.write(scene.stranger / "schemas.jsonl", rows)
        command = scene.rl(scene.home / "run", "--reward", "json:schema", "--reward", "length:1-3")
        command[command.index("--dataset") + 1] = data
        result = scene.run(*command)
        score = create_reward(SimpleNamespace(name="json", argument="schema"))
        scores = [score('"x"', [], row) for row in rows[:4]]
        with contextlib.suppress(BlockingIOError):
            server.accept()
            return "a schema was fetched"
        if any(scores):
            return f"a schema was read: {scores}"
    return scene.problem(result, [0, 1])


@exploit
def cards_of_base_models(scene: Scene) -> str:
    """A base model's README.md that is a bomb, deep or of other types ends no run."""
    aliases = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))
    headers = {
        "bomb": f"a0: &a0 [x]\n{aliases}\nlicense: *a39",
        "deep": f"license: {'[' * 20_000}",
        "keys": "? [a]\n: b\nlicense: {a: [1]}",
        "tag": "license: !!python/object/apply:os.system [id]",
    }
    for name, header in headers.items():
        model, run = scene.stranger / scene.name(), scene.home / scene.name()
        shutil.copytree(scene.lab.base, model)
        scene.write(model / "README.md", f"---\n{header}\n---\n")
        command = scene.lab.training(run)
        command[command.index("--model") + 1] = str(model)
        if why := scene.problem(scene.run(*command, seconds=60), [0]):
            return f"{name}: {why}"
        if not (run / "summary.json").is_file():
            return f"{name}: no summary.json"
    return ""


def strangers(lab: Lab, count: int) -> Iterator[Case]:
    """All exploits, each with other names and places; further rounds draw new ones."""
    names = list(EXPLOITS)
    for index in range(count):
        name = names[index % len(names)]
        scene = Scene(lab, lab.folder(), lab.random)
        try:
            why = EXPLOITS[name](scene)
        except Exception:  # noqa: BLE001 - the other exploits are run, too
            why = traceback.format_exc()[-2000:]
        yield Case(BAD if why else GOOD, name, why, "data stayed data")
        shutil.rmtree(scene.folder, ignore_errors=True)
