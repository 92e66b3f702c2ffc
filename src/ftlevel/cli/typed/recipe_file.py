"""The file that stands for a recipe on a command line: a recipe, or the run that is meant."""

from __future__ import annotations

from pathlib import Path

from ftlevel.errors import ConfigError, did_you_mean


def check_recipe(path: Path, command: str) -> Path:
    """Return the file of a recipe, or of the run that is meant.

    Raises:
        ConfigError: it is a file of examples, a directory that is no run, or a run that is not
            there.
    """
    if path.suffix in (".yaml", ".yml"):
        return path
    own = path / "config.yaml"
    if own.is_file():
        return own
    from ftlevel.data.sources.readers.files import is_data_file_name  # imports numpy

    if path.is_dir():
        hint = ""
        if any(is_data_file_name(entry.name) for entry in path.iterdir()):
            hint = f" Are these examples? ftlevel {command} --dataset {path}"
        raise ConfigError(f"{path} is a directory without config.yaml, so it is no run.{hint}")
    if is_data_file_name(path.name):
        raise ConfigError(
            f"{path} is a file of examples, and a recipe is a .yaml file. "
            f"Use: ftlevel {command} --dataset {path}"
        )
    if not path.exists():
        near = [str(p) for pattern in ("*.yaml", "*.yml", "*/config.yaml")
                for p in sorted(path.parent.glob(pattern))]  # fmt: skip
        runs = [str(Path(p).parent) if p.endswith("config.yaml") else p for p in near]
        raise ConfigError(
            f"{path} is neither a recipe nor the directory of a run.{did_you_mean(str(path), runs)}"
        )
    return path
