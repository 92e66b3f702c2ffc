"""Compare bottleneck adapters with AdapterHub's `adapters`, both ways, on tiny models.

`adapters` needs another transformers than ftlevel, so two processes exchange files:

    python3 -m venv /tmp/hub && /tmp/hub/bin/pip install adapters==1.3.0 torch
    python scripts/against_adapterhub.py --python /tmp/hub/bin/python

There bases and adapters are filled with made-up weights, and saved with their logits; ftlevel reads
them. Then ftlevel writes adapters of its own, and the package reads those.
Prints the largest difference of the logits, of the largest logit where that is over 1, and how far
the adapter moves them from the base's.
`--record tests/unit/trained/adapterhub_figures.json` writes what tests are held against.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUND = 1e-5
NAME = "tried"
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
_LLAMA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
       "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
_BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": 1,
         "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForPreTraining", SIZES),
    "roberta": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 1}),
    "gpt2": ("AutoModelForCausalLM", _GPT),
    "llama": ("AutoModelForCausalLM", _LLAMA),
    "t5": ("AutoModelForSeq2SeqLM", _T5),
    "bart": ("AutoModelForSeq2SeqLM", _BART),
    "distilbert": ("AutoModelForMaskedLM", {"vocab_size": 99, "dim": 32, "hidden_dim": 48,
                   "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}),
    "electra": ("AutoModelForMaskedLM", {**SIZES, "embedding_size": 16}),
    "albert": ("AutoModelForPreTraining", {**SIZES, "embedding_size": 16}),
    "deberta-v2": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 0,
                   "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
                   "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
    "xlm-roberta": ("AutoModelForMaskedLM", {**SIZES, "type_vocab_size": 1}),
    "mistral": ("AutoModelForCausalLM", {**_LLAMA, "sliding_window": None}),
    "gptj": ("AutoModelForCausalLM", {**_GPT, "rotary_dim": 4}),
    "mt5": ("AutoModelForSeq2SeqLM", _T5),
    "mbart": ("AutoModelForSeq2SeqLM", _BART),
}  # fmt: skip
SEQ2SEQ = ("t5", "mt5", "bart", "mbart")
LANGUAGE = {"bert": "AutoModelForMaskedLM", "albert": "AutoModelForMaskedLM"}

_BN = {"reduction_factor": 4}
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "double_seq_bn": ("DoubleSeqBnConfig", {**_BN, "cross_adapter": True}),
    "double_seq_bn, no cross": ("DoubleSeqBnConfig", _BN),
    "after the attention only": ("DoubleSeqBnConfig", {**_BN, "output_adapter": False}),
    "after the feed-forward only": ("DoubleSeqBnConfig", {**_BN, "mh_adapter": False}),
    "seq_bn": ("SeqBnConfig", _BN),
    "seq_bn, leave_out [1]": ("SeqBnConfig", {**_BN, "leave_out": [1]}),
    "par_bn": ("ParBnConfig", _BN),
    "scaled_par_bn": ("ParBnConfig", {**_BN, "scaling": "learned"}),
    "AdapterPlusConfig": ("AdapterPlusConfig", {**_BN, "stochastic_depth": 0.0}),
}
RECORDED = ("double_seq_bn", "seq_bn", "par_bn", "AdapterPlusConfig")
PLACEMENTS = ("houlsby", "pfeiffer", "seq_bn", "par_bn", "parallel", "adapter_plus")
_CLASSIFIER, _TAGGER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
_READER = "AutoModelForQuestionAnswering"
HEADS: list[tuple[str, str, dict[str, Any] | None]] = [
    *[(family, _CLASSIFIER, None) for family in ("bert", "roberta", "distilbert", "llama", "bart")],
    ("roberta", _TAGGER, None),
    ("bert", _READER, None),
    ("bert", _CLASSIFIER, {"layers": 2}),
    ("bert", _CLASSIFIER, {"layers": 1, "use_pooler": True}),
    ("albert", _CLASSIFIER, {"layers": 1, "use_pooler": True}),
    ("roberta", _CLASSIFIER, {"layers": 2}),
    ("xlm-roberta", _CLASSIFIER, {"layers": 2}),
    ("electra", _CLASSIFIER, {"layers": 2, "activation_function": "gelu"}),
    ("deberta-v2", _CLASSIFIER, {"layers": 2, "activation_function": "gelu"}),
    ("distilbert", _CLASSIFIER, {"layers": 2, "activation_function": "relu"}),
    ("bart", _CLASSIFIER, {"layers": 2}),
    ("gpt2", _CLASSIFIER, {"layers": 1, "bias": False}),
    ("llama", _CLASSIFIER, {"layers": 1, "bias": False}),
    ("bert", _TAGGER, {"layers": 1}),
    ("llama", _TAGGER, {"layers": 1}),
    ("roberta", _READER, {"layers": 1}),
]
# GPT-J has no residual of the feed-forward alone; AdapterHub's adapter after ALBERT's attention
# reads the residual, which looks like a slip: two arguments are exchanged.
REFUSED = {"gptj": ("seq_bn", "par_bn", "scaled", "AdapterPlus"),
           "albert": ("double", "after the attention", "seq_bn, leave")}  # fmt: skip
HEAD_CLASS = {_CLASSIFIER: "ClassificationHead", _TAGGER: "TaggingHead",
              _READER: "QuestionAnsweringHead"}  # fmt: skip
LABELS = ["no", "maybe", "yes"]


@dataclass
class Case:
    """One adapter on one base, in a directory of its own.

    Attributes:
        number: names the directory.
        family: model type of the base.
        style: what is printed of it.
        auto_class: of transformers, for both.
        config: class and fields of AdapterHub's configuration; None where ftlevel makes it.
        head: settings of a flex head; None for that of the class.
    """

    number: int
    family: str
    style: str
    auto_class: str
    config: tuple[str, dict[str, Any]] | None = None
    head: dict[str, Any] | None = None


def cases(small: bool) -> Iterator[Case]:
    """Yield what `adapters` makes and ftlevel reads."""
    number = 0
    for family in list(FAMILIES)[: 6 if small else None]:
        for style, config in STYLES.items():
            if any(style.startswith(start) for start in REFUSED.get(family, ())):
                continue
            yield Case(number, family, style, _language_class(family), config)
            number += 1
    for family, auto_class, head in HEADS:
        style = "its own head" if head is None else f"flex {json.dumps(head)}"
        yield Case(number, family, style, auto_class, STYLES["seq_bn"], head)
        number += 1


def own_cases(small: bool) -> Iterator[Case]:
    """Yield what ftlevel writes and `adapters` reads."""
    number = 1000
    for family in list(FAMILIES)[: 6 if small else None]:
        for placement in PLACEMENTS:
            yield Case(number, family, placement, _language_class(family))
            number += 1
    for family, auto_class, head in HEADS:
        if head is None:
            yield Case(number, family, "seq_bn", auto_class)
            number += 1


def _language_class(family: str) -> str:
    return LANGUAGE.get(family, FAMILIES[family][0])


def fill(name: str, tensor: Any, scale: float = 0.3) -> None:
    """Fill `tensor` (mutated) with numbers that its name and their places decide, on any machine.

    They lie within ±`scale`; those of a norm or a factor, around 1.
    """
    import torch

    mask = 0xFFFFFFFF
    hashed = (torch.arange(tensor.numel()) + zlib.crc32(name.encode())) * 2654435761 & mask
    hashed = (hashed ^ hashed >> 15) * 2246822519 & mask
    hashed = (hashed ^ hashed >> 13) * 3266489917 & mask
    middle = float(tensor.dim() == 1 and name.endswith(("weight", "scaling", "_scale.default")))
    values = middle + scale * (2 * (hashed ^ hashed >> 16).double() / mask - 1)
    with torch.no_grad():
        tensor.copy_(values.view(tensor.shape))


def inputs(family: str) -> dict[str, Any]:
    """Return two rows of tokens, the same in both processes."""
    import torch

    ids = (torch.arange(22).view(2, 11) * 37 + 11) % 90 + 5
    ids[:, -1] = 2  # where BART's classifier reads
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = ids
    return batch


def logits_of(model: Any, case: Case) -> Any:
    """Return the model's logits, (2, …), in evaluation."""
    import torch

    batch = inputs(case.family)
    if case.auto_class in HEAD_CLASS:
        batch.pop("decoder_input_ids", None)
    with torch.no_grad():
        made = model.eval()(**batch)
    logits = made.start_logits if case.auto_class == _READER else made.logits
    return logits.contiguous()


def _class_settings(case: Case) -> dict[str, Any]:
    if case.auto_class not in (_CLASSIFIER, _TAGGER):
        return {}
    return {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}


# In the environment of `adapters`.


def make(work: Path, small: bool) -> None:
    """Make bases, adapters and logits."""
    import torch
    import transformers

    for family, (auto_class, sizes) in FAMILIES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes)
        model = getattr(transformers, auto_class).from_config(config)
        for name, parameter in model.named_parameters():
            fill(name, parameter)
        model.save_pretrained(work / "bases" / family)
    for case in cases(small):
        _make_case(case, work)


def _make_case(case: Case, work: Path) -> None:
    import adapters
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(case.number + 1)
    base, folder = work / "bases" / case.family, work / str(case.number)
    name, fields = case.config or ("", {})
    if case.head is None:
        loader = getattr(transformers, case.auto_class)
        model = loader.from_pretrained(base, **_class_settings(case))
        adapters.init(model)
    else:
        model = adapters.AutoAdapterModel.from_pretrained(base)
        labels = {} if case.auto_class == _READER else {
            "num_labels": len(LABELS), "id2label": dict(enumerate(LABELS))}  # fmt: skip
        head = getattr(adapters, HEAD_CLASS[case.auto_class])
        model.add_prediction_head(head(model, NAME, **labels, **case.head))
    before = logits_of(model, case)
    model.add_adapter(NAME, config=getattr(adapters, name)(**fields))
    model.set_active_adapters(NAME)
    for key, parameter in model.named_parameters():
        in_head = case.auto_class in HEAD_CLASS and not key.startswith(model.base_model_prefix)
        if f".adapters.{NAME}." in key or in_head:
            fill(key, parameter)
    model.save_adapter(str(folder), NAME, with_head=case.auto_class in HEAD_CLASS)
    save_file({"logits": logits_of(model, case), "before": before}, folder / "logits")


def check(work: Path, small: bool) -> None:
    """Read what ftlevel wrote, and print the differences as JSON."""
    import adapters
    import transformers
    from safetensors.torch import load_file

    found = []
    for case in own_cases(small):
        folder = work / str(case.number)
        if not (folder / "logits").is_file():
            continue
        expected = load_file(folder / "logits")
        loader = getattr(transformers, case.auto_class)
        model = loader.from_pretrained(work / "bases" / case.family, **_class_settings(case))
        adapters.init(model)
        model.load_adapter(str(folder / "hub"), set_active=True)
        found.append(_row(case, logits_of(model, case), expected))
    sys.stdout.write(json.dumps(found))


def _row(case: Case, logits: Any, expected: dict[str, Any]) -> list[Any]:
    scale = expected["logits"].abs().max().clamp(min=1)
    difference = ((logits - expected["logits"]).abs().max() / scale).item()
    moved = (expected["logits"] - expected["before"]).abs().max().item()
    return [case.family, case.auto_class, case.style, difference, moved]


# In the environment of ftlevel.


def _load_base(case: Case, work: Path) -> Any:
    import transformers

    loader = getattr(transformers, case.auto_class)
    return loader.from_pretrained(work / "bases" / case.family, **_class_settings(case))


def read(case: Case, work: Path) -> list[Any]:
    """Read an adapter of AdapterHub's, and compare."""
    from ftlevel.trained.adapt import load_adapter
    from safetensors.torch import load_file

    expected = load_file(work / str(case.number) / "logits")
    model = load_adapter(_load_base(case, work), work / str(case.number))
    return _row(case, logits_of(model, case), expected)


def write(case: Case, work: Path) -> str:
    """Write a random adapter of ftlevel's for AdapterHub; return why it cannot be, if so."""
    import torch
    from ftlevel.artifacts.cards import AdapterCard
    from ftlevel.config import ExportConfig
    from ftlevel.errors import InputError
    from ftlevel.events import Silence
    from ftlevel.merging.formats.adapterhub import plan_export
    from ftlevel.methods.bottleneck.config import BottleneckConfig
    from ftlevel.models.sources import resolve_source
    from ftlevel.models.targets import find_heads
    from ftlevel.trained.load import Found
    from peft import get_peft_model
    from safetensors.torch import save_file

    base, folder = work / "bases" / case.family, work / str(case.number)
    torch.manual_seed(case.number)
    model = _load_base(case, work)
    before = logits_of(model, case)
    heads = find_heads(model) if case.auto_class in HEAD_CLASS else []
    try:
        config = BottleneckConfig(placement=case.style, bottleneck_dim=5, non_linearity="gelu",
                                  modules_to_save=heads or None, init_weights=False)  # fmt: skip
        adapted = get_peft_model(model, config)
        for key, parameter in adapted.named_parameters():
            if "bottleneck_" in key or "modules_to_save" in key:
                fill(key, parameter)
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        tasks = {_CLASSIFIER: "text-classification", _TAGGER: "token-classification",
                 _READER: "question-answering", "AutoModelForMaskedLM": "masked-lm"}  # fmt: skip
        card = AdapterCard(
            method="adapter", task=tasks.get(case.auto_class, "text-generation"),
            base={"name": str(base)}, quantization={"kind": "none"}, dtype="float32",
            max_length=32, labels=LABELS if case.auto_class in (_CLASSIFIER, _TAGGER) else [],
            heads=heads,
        )  # fmt: skip
        found = Found(resolve_source(str(base)), folder / "adapter", card)
        asked = ExportConfig(model=str(folder), format="adapterhub", out=folder / "hub")
        planned = plan_export(asked, found)
        (folder / "hub").mkdir()
        planned.write(folder / "hub", "cpu", Silence(), lambda _: {})
    except (InputError, ValueError) as error:
        return str(error)
    save_file({"logits": logits_of(adapted, case), "before": before}, folder / "logits")
    return ""


def record(work: Path, file: Path) -> None:
    """Write what tests are held against without `adapters`: settings, shapes and some logits."""
    import torch
    from safetensors.torch import load_file

    kept = []
    for case in cases(small=True):
        if case.auto_class in HEAD_CLASS or case.style not in RECORDED or case.family == "roberta":
            continue
        folder = work / str(case.number)
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        logits = load_file(folder / "logits")["logits"][:, -1, :6]
        kept.append(
            {
                "family": case.family,
                "style": case.style,
                "auto_class": case.auto_class,
                "settings": {**settings, "model_name": "base"},
                "shapes": {name: list(tensor.shape) for name, tensor in weights.items()},
                "logits": [[round(number, 6) for number in row] for row in logits.tolist()],
            }
        )
    lines = ",\n".join(json.dumps(case) for case in kept)
    note = "adapters 1.3.0, by scripts/against_adapterhub.py --record; weights are what fill() gives"
    file.write_text(f'{{"made by": "{note}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def report(title: str, rows: list[list[Any]]) -> float:
    """Print a table, and return the largest difference in it."""
    print(f"\n## {title}\n\n| model | class | style | largest difference | moved |")
    print("|---|---|---|---:|---:|")
    for family, auto_class, style, difference, moved in rows:
        kind = auto_class.removeprefix("AutoModelFor")
        print(f"| {family} | {kind} | {style} | {difference:.1e} | {moved:.2f} |")
    return max(row[3] for row in rows)


def main() -> int:
    """Run one side, or both; return 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", help="of an environment with adapters 1.3.0")
    parser.add_argument("--small", action="store_true", help="six families")
    parser.add_argument("--record", type=Path, help="write cases for the tests")
    parser.add_argument("--side", choices=["make", "check"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        {"make": make, "check": check}[given.side](given.work, given.small)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)

        def theirs(side: str) -> str:
            command = [given.python, __file__, "--side", side, "--work", str(work)]
            command += ["--small"] * given.small
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        theirs("make")
        worst = report("read by ftlevel", [read(case, work) for case in cases(given.small)])
        for case in own_cases(given.small):
            if refused := write(case, work):
                print(f"{case.family} {case.style}: {refused}", file=sys.stderr)
        worst = max(worst, report("written by ftlevel", json.loads(theirs("check"))))
        if given.record:
            record(work, given.record)
    print(f"\nlargest difference {worst:.1e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
