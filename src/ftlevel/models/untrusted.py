"""Safe handling of third-party files: sizes, paths, time and memory limits.

Model directories must not reference files outside, fetch code, or have absurd sizes. Chat templates
and regular expressions run with limits.
"""

from __future__ import annotations

import functools
import io
import math
import multiprocessing
import os
import re
import signal
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, TypeVar, cast

from ftlevel.artifacts.files import check_regular, read_json
from ftlevel.config.reading import flatten
from ftlevel.errors import InputError

_Result = TypeVar("_Result")
_INDEX = "*.safetensors.index.json"

_MAX_SIZES = {
    name: most
    for names, most in (
        (
            "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
            "num_decoder_layers",
            10_000,
        ),
        ("num_attention_heads num_key_value_heads n_head num_heads", 100_000),
        ("hidden_size n_embd d_model head_dim d_kv", 1_000_000),
        (
            "intermediate_size d_ff n_inner num_experts num_local_experts n_routed_experts "
            "vocab_size type_vocab_size",
            100_000_000,
        ),
        ("max_position_embeddings n_positions", 1_000_000_000),
    )
    for name in names.split()
}
"""Config field -> limit, orders of magnitude above any real model."""

_IMPLEMENTATIONS = tuple(
    f"{front}{part}_implementation{end}"
    for front in ("", "_")
    for part in ("attn", "experts")
    for end in ("", "_internal")
)

_POSITIVE_SIZES = tuple(
    """
    num_hidden_layers n_layer num_attention_heads n_head hidden_size n_embd d_model vocab_size
    """.split()
)


def check_directory(path: Path, label: str) -> None:
    """Raise `InputError` if a directory has special or oversized files, or refers outside it."""
    check_regular(path.iterdir(), label)
    for index in path.glob(_INDEX):
        _check_index(index, label)
    problem = f"{label}: it cannot be read ("
    check_config(read_json(path / "config.json", problem=f"{problem}config.json: "), label)
    if (generation := path / "generation_config.json").is_file():
        read_json(generation, problem=f"{problem}{generation.name}: ")


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Raise `InputError` if a model config has implausible sizes or fetches code from the Hub."""
    check_sizes(config, label)
    _check_kernels(config, label)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{label}: architectures in its config.json is {str(names)[:80]}. Expected a list of "
            "names."
        )


def _check_kernels(config: Mapping[str, Any], label: str) -> None:
    for name, value in config.items():
        if name in _IMPLEMENTATIONS:
            for kernel in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(kernel, str) and "/" in kernel:
                    raise InputError(
                        f"{label}: {name} in its config.json is {kernel!r}, code that would be "
                        "fetched from a hub. Remove the line if you trust the rest."
                    )
        elif isinstance(value, Mapping):
            _check_kernels(value, label)


def check_sizes(config: Mapping[str, Any], label: str) -> None:
    """Raise `InputError` if a size in `config`, such as the number of layers, is implausible."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, label)
        elif isinstance(value, (int, float)) and value > _MAX_SIZES.get(name, value):
            raise InputError(
                f"{label}: {name} in its config is {value:,}; no model has more than "
                f"{_MAX_SIZES[name]:,}. The file is damaged or malicious."
            )
        elif name in _POSITIVE_SIZES and isinstance(value, (int, float)) and value < 1:
            raise InputError(f"{label}: {name} in its config is {value:,}; the least is 1.")


def _check_index(index: Path, label: str) -> None:
    problem = f"{label}: its weights cannot be read ({index.name}: "
    weight_map = read_json(index, problem=problem).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise InputError(f"{label}: {index.name} has no weight_map. Is the copy incomplete?")
    for name in weight_map.values():
        file = PurePosixPath(str(name))
        if (
            not isinstance(name, str)
            or file.is_absolute()
            or ".." in file.parts
            or any(sign in name for sign in "\\\0")
        ):
            raise InputError(
                f"{label}: {index.name} names {name!r}, which is not a file in the model's "
                "directory. Files outside it are not read."
            )


try:
    import resource
except ImportError:  # Windows has no limits
    resource = None  # type: ignore[assignment]

_SIZES = Path("/proc/self/statm")  # in pages; the sixth field is data and stack


@functools.lru_cache(maxsize=1)
def _sizes_of(_process: int) -> io.FileIO | None:
    """Returns /proc/self/statm, opened once per process id (for forks); None if there is none."""
    return io.FileIO(_SIZES) if _SIZES.exists() else None


@contextmanager
def limit_memory(size: int) -> Iterator[None]:
    """Raise `MemoryError` if the `with` block allocates over `size` more bytes; Linux only."""
    sizes = _sizes_of(os.getpid())
    if resource is None or sizes is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    pages = os.pread(sizes.fileno(), 256, 0).split()[5]
    limit = int(pages) * resource.getpagesize() + size
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the `with` block after `seconds`; main thread and POSIX only."""
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, before)


def call_in_fork(function: Callable[[], _Result], seconds: float) -> _Result:
    """Returns `function()`, computed in a forked process that is killed after `seconds`.

    `limit_time` cannot end one long operation, such as a power of integers. Raises TimeoutError, or
    the exception of `function`, which is called in this process on systems without fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return function()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(function, sender), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads; it uses none
        process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"it took more than {seconds:g} s")
        result, problem = receiver.recv()
    except EOFError:
        raise MemoryError from None
    finally:
        process.kill()
        process.join()
    if problem is not None:
        raise problem
    return cast("_Result", result)


def _send_result(function: Callable[[], Any], sender: Any) -> None:
    outcome: tuple[Any, Exception | None]
    try:
        outcome = function(), None
    except Exception as error:  # noqa: BLE001 - raised by `call_in_fork`
        outcome = None, error
    sender.send(outcome)


_TIMEOUT = 10.0
# A string is a regular expression, a list has names.
_REGEX_KEYS = ("target_modules", "exclude_modules")
_PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
# PEFT puts these into regular expressions.
_NAME_KEYS = {
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
_MAX_REPEATED_LAYERS = 1000


def check_peft_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `InputError` if `config`, read from `path`, has NaN, infinity or absurd sizes."""
    problems: list[tuple[str, Any, str]] = [
        (name, value, "a finite number")
        for name, value in flatten(config)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    init = config.get("init_lora_weights")
    if str(init).startswith("pissa") and not re.fullmatch(r"pissa(_niter_\d{1,2})?", str(init)):
        problems.append(("init_lora_weights", init, "pissa, or pissa_niter_N with N below 100"))
    if ranges := config.get("layer_replication"):
        try:
            count = sum(int(end) - int(begin) for begin, end in ranges)
        except (TypeError, ValueError):
            count = -1
        if not 0 <= count <= _MAX_REPEATED_LAYERS:
            expected = f"pairs of layer numbers, {_MAX_REPEATED_LAYERS:,} layers at most"
            problems.append(("layer_replication", ranges, expected))
    if config.get("megatron_config"):  # PEFT then imports the module that megatron_core names
        problems.append(("megatron_config", config["megatron_config"], "none"))
    for name, value, expected in problems:
        raise InputError(
            f"{path}: {name} is {str(value)[:80]}. Expected {expected}. The file is damaged or "
            "malicious."
        )


def check_patterns(adapter_dir: Path, peft_config: Mapping[str, Any], base: Any) -> None:
    """Raise `InputError` if patterns in `peft_config` are invalid, or slow on names in `base`."""
    path = adapter_dir / "adapter_config.json"
    names = [name for name, _ in base.named_modules()]
    for field, written, pattern in _patterns(peft_config):
        try:
            with limit_time(_TIMEOUT):
                compiled = re.compile(pattern)
                for name in names:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError, TimeoutError) as error:
            is_slow = isinstance(error, TimeoutError)
            problem = "takes too long to match" if is_slow else "is not a regular expression"
            raise InputError(
                f"{path}: {field} has {written!r}, which {problem} ({error})."
            ) from None


def _patterns(peft_config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields (config field, regular expression in it, the expression that PEFT makes of that)."""
    for field in _REGEX_KEYS:
        if isinstance(text := peft_config.get(field), str):
            yield field, text, text
    for field in _PATTERN_KEYS:
        if isinstance(patterns := peft_config.get(field), Mapping):
            yield from ((field, key, rf"(.*\.)?({key})") for key in patterns)
    for field, pattern in _NAME_KEYS.items():
        names = peft_config.get(field) or []
        for name in [names] if isinstance(names, str) else names:
            yield field, name, pattern.replace("{}", str(name))


FROM_READERS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    NotImplementedError,
    struct.error,
)
"""Exceptions that libraries raise for malformed files.

RuntimeError is excluded, as it also means out of memory.
"""
