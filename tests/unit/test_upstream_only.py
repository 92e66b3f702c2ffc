"""Only `models.upstream` and `methods.upstream` use private names of other libraries.

Checked are imports from undocumented modules, names with a leading underscore on objects of other
libraries, and private names of library classes that ftlevel's classes override or inherit (these
must be listed in the facts).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import Trainer

import ftlevel
from upstream_facts import OF_METHODS, OF_MODELS, create_facts

if (found := ftlevel.__file__) is None:
    raise RuntimeError("ftlevel has no directory")
SOURCE = Path(found).parent
ALLOWED_MODULES = ("models/upstream/", "methods/upstream")

OUR_OPERATORS = "ftlevel"
"""Namespace of ftlevel in `torch.ops`, which libraries share."""
LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers")
DOCUMENTED = {
    "accelerate.utils",
    "bitsandbytes", "bitsandbytes.functional", "datasets", "peft", "peft.optimizers",
    "peft.tuners", "peft.tuners.lora", "peft.tuners.tuners_utils", "peft.utils", "torch",
    "torch.autograd.function", "torch.distributed.device_mesh", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.nn", "torch.nn.attention",
    "torch.nn.attention.varlen", "torch.utils.data",
    "torch.utils.tensorboard",
    "transformers", "transformers.activations",
    "transformers.cache_utils", "transformers.integrations.sdpa_attention",
    "transformers.masking_utils", "transformers.pytorch_utils", "transformers.utils",
}  # fmt: skip
"""Modules imported in the libraries' own documentation."""

INHERITED = {
    name
    for base in (BaseTuner, BaseTunerLayer, LoraLayer, nn.Module, Trainer)
    for name in [*dir(base), *vars(base)]
    if name.startswith("_") and not name.endswith("__")
}
LISTED = {
    fact.name.rpartition(".")[2]
    for table in (OF_METHODS, OF_MODELS)
    for fact in create_facts(table)
}
PUBLIC = {"os._exit"}
"""Names that Python documents despite the underscore."""
PROTOCOLS = {"__tensor_flatten__", "__tensor_unflatten__", "__torch_dispatch__"}


def is_private(name: str) -> bool:
    return (name.startswith("_") and not name.endswith("__")) or name in PROTOCOLS


def get_own_names(tree: ast.AST) -> set[str]:
    """Return the private names that a module defines as attributes of its own classes."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        )
    }


def find_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        modules, names = [], []
        if isinstance(node, ast.ImportFrom):
            modules, names = [node.module or ""], [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        library_modules = [module for module in modules if module.partition(".")[0] in LIBRARIES]
        yield from ((node.lineno, module) for module in library_modules if module not in DOCUMENTED)
        yield from ((node.lineno, name) for name in names if library_modules and is_private(name))


def find_uses(code: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each use of another library's private name."""
    tree = ast.parse(code)
    own_private_names = get_own_names(tree)
    yield from find_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in ("self", "cls", "super()"):
                if node.attr in INHERITED - LISTED and node.attr not in own_private_names:
                    yield node.lineno, f"{owner}.{node.attr}"
            elif (owner == "torch.ops" and node.attr != OUR_OPERATORS) or (
                is_private(node.attr)
                and node.attr not in own_private_names
                and f"{owner}.{node.attr}" not in PUBLIC
            ):
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            name = node.args[1]
            if (
                ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr")
                and isinstance(name, ast.Constant)
                and is_private(str(name.value))
            ):
                yield node.lineno, str(name.value)
        elif isinstance(node, ast.ClassDef) and node.bases:
            yield from (
                (part.lineno, f"{node.name}.{part.name}")
                for part in node.body
                if isinstance(part, ast.FunctionDef) and part.name in INHERITED - LISTED
            )


def test_private_names_are_used_only_in_upstream_modules():
    uses = [
        f"{path}:{line}: {name}"
        for file in sorted(SOURCE.rglob("*.py"))
        if not (path := file.relative_to(SOURCE).as_posix()).startswith(ALLOWED_MODULES)
        for line, name in find_uses(file.read_text(encoding="utf-8"))
    ]
    assert not uses, "use these through models/upstream or methods/upstream:\n" + "\n".join(uses)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from transformers.core_model_loading import rename_source_key", "core_model_loading"),
        ("import peft.mapping", "peft.mapping"),
        ("from torch import _C", "_C"),
        ("model.config._attn_implementation", "model.config._attn_implementation"),
        ("torch.ops.aten", "torch.ops.aten"),
        ("hasattr(module, '_hf_hook')", "_hf_hook"),
        ("tensor.__tensor_flatten__()", "__tensor_flatten__"),
        ("class A(Trainer):\n    def _inner_training_loop(self): ...", "_inner_training_loop"),
        (
            "class A(Trainer):\n    def train(self):\n        super()._save_rng_state(1)",
            "super()._save_rng_state",
        ),
    ],
)
def test_private_name_is_detected(code, name):
    assert [use for _, use in find_uses(code) if name in use]


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import AttentionInterface",
        "class A:\n    def f(self):\n        self._own = 1\n        other._own",
        "class A(Trainer):\n    def _get_train_sampler(self): ...",
        "name.__class__.__name__",
        "os._exit(1)",
    ],
)
def test_documented_and_own_names_are_allowed(code):
    assert not list(find_uses(code))
