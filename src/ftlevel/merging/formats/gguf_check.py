"""Read an exported file back, as transformers does, and compare it with the model it was made of.

Its tensors must be the model's, rounded as the file's type rounds them: the model with weights that
torch rounded gives the logits that the file must give. How far rounding itself moves the model is
measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import RunError
from ftlevel.evaluation.two_models.compare import Agreement, compare_rows
from ftlevel.evaluation.two_models.float32 import in_float32
from ftlevel.evaluation.two_models.on_rows import Probe, Scores
from ftlevel.evaluation.two_models.on_text import cut_windows, read_eval_text
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import load_config, load_model, load_tokenizer
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import TASKS
from ftlevel.weights.gguf.blocks import GRIDS
from ftlevel.weights.gguf.file import Tensor, weights_as_written
from ftlevel.weights.gguf.vocabulary import READ_BY_TRANSFORMERS, Vocabulary

BOUND = 1e-4
"""How far logits may be apart, in multiples of the largest one: sums in float32 have no order."""
_CLASS = "AutoModelForCausalLM"
_WINDOW = 128
_NATIVE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PROBES = (
    "The quick brown fox jumps over the lazy dog. It's here, they'll see; DON'T!",
    "In 2024, 1,234 of 56789 rows   7 8.90% and 0x1F",
    "def f(x):\n    if x > 10:\n\treturn [i**2 for i in range(x)]\n\n\n# done",
    "naïve café — Ελληνικά, русский, 日本語テキスト, 한국어, العربية 🙂👩‍🚀",
    "  two spaces before, and behind  ",
    "\n\nlines\r\n\r\nand\ttabs\t\t.",
)
_INERT = {
    "architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", "model_type",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "id2label",
    "label2id", "problem_type", "task_specific_params", "pretraining_tp", "is_decoder",
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx",
    "reorder_and_upcast_attn", "max_window_layers", "_sliding_window_pattern", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "gradient_checkpointing",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What reading the file back showed.

    Attributes:
        file: the file beside the model with weights rounded by torch; it is right.
        model: the file beside the model as it is: what rounding costs.
        run: the file beside the run as trained, on the run's rows; None where it was not asked.
        own_settings: settings that transformers' reader leaves out; they were taken from the model.
        texts: how many texts gave the same tokens.
        splitting: whether transformers splits text as the file says; else the model's own
            splitting was used to compare the rest.
    """

    file: Agreement
    model: Agreement
    run: Agreement | None
    own_settings: list[str]
    texts: int
    splitting: bool


@dataclass(frozen=True)
class Original:
    """The model that was exported.

    Attributes:
        source: where it is.
        config: its config.
        tokenizer: its tokenizer.
        device: torch device type to compare on.
        tokens: how many tokens of text are compared.
    """

    source: ModelSource
    config: Any
    tokenizer: Any
    device: str
    tokens: int

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it is stored in."""
        return getattr(self.config, "dtype", None) or torch.float32


def check_file(
    path: Path,
    outtype: str,
    tensors: Sequence[Tensor],
    vocabulary: Vocabulary,
    original: Original,
    beside_run: Callable[[Any], Agreement] | None = None,
) -> Checked:
    """Compare the file at `path` with its original, and with the run, by `beside_run`.

    Raises:
        RunError: it is not the same model, rounded, or not the same tokenizer.
    """
    source = ModelSource(str(path), "gguf", str(path.parent), path.name, local_files_only=True)
    texts = check_tokens(load_tokenizer(source), original.tokenizer, vocabulary)
    config, own_settings = readable_config(load_config(source), original.config)
    probe = _probe(original)
    reference, expected = _ask_original(probe, outtype, tensors, original)
    # Vectors are wider in the file than its matrices; they are narrow only in a model that is.
    same = _NATIVE.get(outtype) == original.dtype
    dtype = original.dtype if same else torch.float32
    model, missing = load_model(source, config, _CLASS, dtype=dtype, device=original.device)
    if missing:
        raise RunError(f"the file lacks {missing[0]} and {len(missing) - 1} more. Nothing is kept.")
    with in_float32(model):
        found = probe.score(model, "float32")
    file = compare_rows(expected, found)
    if not file.max_difference <= BOUND * file.scale:
        raise RunError(
            f"the file is not the model: read back by transformers, its logits differ by up to "
            f"{file.max_difference:.3g} from those of the model in {outtype} (KL {file.kl:.3g}, "
            f"top-1 {file.top1:.1%}). Nothing is kept. Please report this with the command."
        )
    splitting = vocabulary.pre in READ_BY_TRANSFORMERS
    run = beside_run(model) if beside_run else None
    return Checked(file, compare_rows(reference, found), run, own_settings, texts, splitting)


def _probe(original: Original) -> Probe:
    """Return windows of text to ask both models about."""
    text = read_eval_text(None, original.tokens)
    length = min(_WINDOW, max_positions(original.config) or _WINDOW)
    rows = [
        Encoded(ids, list(ids), index)
        for index, ids in enumerate(
            cut_windows(original.tokenizer, text.content, original.tokens, length)
        )
    ]
    objective = TASKS["text-generation"].build_objective("decoder", {})
    return Probe(rows, objective, original.tokenizer.pad_token_id or 0, original.device)


def _ask_original(
    probe: Probe, outtype: str, tensors: Sequence[Tensor], original: Original
) -> tuple[Scores, Scores]:
    """Return what the original says, and what it says with weights as the file rounds them."""
    # A block's scale is not a number of 16 bits: what is rounded so needs float32 to be held.
    dtype = torch.float32 if outtype in GRIDS else original.dtype
    model, _ = load_model(
        original.source, original.config, _CLASS, dtype=dtype, device=original.device
    )
    with in_float32(model):
        reference = probe.score(model, "float32")
        with torch.no_grad():
            changed = False
            for name, rounded in weights_as_written(tensors, model):
                weight = model.get_parameter(name)
                changed = changed or not torch.equal(weight.float(), rounded)
                weight.copy_(rounded)
        expected = probe.score(model, "float32") if changed else reference
    return reference, expected


def readable_config(found: Any, own: Any) -> tuple[Any, list[str]]:
    """Return the config to read the file with, and which settings it has from the model.

    transformers' reader of .gguf leaves some out that llama.cpp reads (stretched rotary positions,
    the width of Qwen3's heads, …).

    Args:
        found: as transformers reads it from the file.
        own: the model's.
    """
    have, want = found.to_dict(), own.to_dict()
    differing = {
        key: value
        for key, value in want.items()
        if key in have and key not in _INERT and not _same(have[key], value)
    }
    if not differing:
        return found, []
    values = {key: value for key, value in have.items() if key not in ("model_type",)}
    return type(found)(**{**values, **differing}), sorted(differing)


def _same(first: Any, second: Any) -> bool:
    """Whether two settings are the same; numbers pass through float32 in the file."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = set(first) | set(second)
        return all(_same(first.get(key), second.get(key)) for key in keys)
    if isinstance(first, float) and isinstance(second, (int, float)):
        return abs(first - second) <= 1e-6 * abs(second)
    return bool(first == second)


def check_tokens(found: Any, own: Any, vocabulary: Vocabulary) -> int:
    """Compare what both tokenizers give for `PROBES` and for special tokens; return how many texts.

    Where transformers does not split text as the file's name says, `found` is given the splitting
    of `own` first (mutated), so that vocabulary, merges and special tokens are compared.

    Raises:
        RunError: a text gives other tokens.
    """
    backend, reference = found.backend_tokenizer, own.backend_tokenizer
    if vocabulary.pre not in READ_BY_TRANSFORMERS:
        backend.pre_tokenizer = reference.pre_tokenizer
    if reference.normalizer is not None or backend.normalizer is not None:
        backend.normalizer = reference.normalizer
    special = [token.content for token in own.added_tokens_decoder.values()]
    texts = [*PROBES, *(f"a{token}b{token}" for token in special)]
    for text in texts:
        wanted, got = own(text)["input_ids"], found(text)["input_ids"]
        if wanted != got:
            raise RunError(
                f"the file's tokenizer is not the model's: {text!r} gives {got}, and should give "
                f"{wanted}. Nothing is kept. Please report this with the command."
            )
    return len(texts)
