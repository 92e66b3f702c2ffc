"""llama.cpp computes and tokenizes an exported file like transformers.

Skipped where its Python binding is not installed: pip install llama-cpp-python builds it.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from export_cases import (
    CASES,
    NAMES,
    ModelDir,
    compute_logits,
    create_ids,
    export_to,
    exportable_model,
    load_model,
)
from ftlevel.extras.serving.gguf import TEST_INPUTS

pytestmark = pytest.mark.usefixtures("work_dir")

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama_cpp cannot be imported: pip install llama-cpp-python builds it",
)


@pytest.fixture
def model_dir(tiny_model_dir: ModelDir, tmp_path: Path) -> ModelDir:
    """Return a factory of tiny models whose tokenizers llama.cpp supports."""
    return functools.partial(exportable_model, tiny_model_dir, tmp_path)


def load_in_llama_cpp(path: str, context: int = 256) -> Any:
    """Load the file in llama.cpp, with a float32 cache."""
    from llama_cpp import Llama

    return Llama(path, n_ctx=context, logits_all=True, verbose=False, n_threads=1,
                 type_k=0, type_v=0)  # fmt: skip


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(("family", "overrides", "missing_settings"), CASES, ids=NAMES)
def test_llama_cpp_logits_and_tokens_match_transformers(
    model_dir: ModelDir, family: str, overrides: dict[str, Any], missing_settings: list[str]
) -> None:
    model = model_dir(family, **overrides)
    export_to("x.gguf", model, outtype="f32")
    ids = create_ids(96)
    expected = compute_logits(load_model(model), ids)
    llama = load_in_llama_cpp("x.gguf")
    llama.eval(ids[0].tolist())
    actual = torch.tensor(llama.scores[: ids.shape[1]])
    # ggml computes GELU from a float16 table.
    bound = 2e-3 if family in ("gpt2", "gemma3_text") else 1e-5
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [text for text in TEST_INPUTS if family == "gemma3_text" or not text.startswith(" ")]
    for text in [*texts, *(f"a{token}" for token in tokenizer.all_special_tokens)]:
        ours = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert ours == tokenizer(text)["input_ids"], text
    llama.close()


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_generation_matches_transformers_on_real_weights(smollm2: Path) -> None:
    export_to("x.gguf", smollm2, outtype="f32", verify=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model, llama = load_model(smollm2), load_in_llama_cpp("x.gguf", 512)
    for text in TEST_INPUTS:
        assert (
            llama.tokenize(text.encode(), add_bos=True, special=True)
            == (tokenizer(text)["input_ids"])
        )
    messages = [{"role": "user", "content": "Name 3 colours, and say what 12 + 30 is."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    llama.eval(ids)
    tokens = list(ids)
    for _ in range(24):
        expected = compute_logits(model, torch.tensor([tokens]))[-1]
        actual = torch.tensor(llama.scores[len(tokens) - 1])
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.05)
        best, second = expected.topk(2).values.tolist()
        if best - second > 0.1:  # where the margin allows, both choose the same
            assert int(actual.argmax()) == int(expected.argmax())
        tokens.append(int(expected.argmax()))
        llama.eval(tokens[-1:])
    llama.close()
