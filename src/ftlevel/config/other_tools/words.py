"""Other tools' words for values of our flags, and their names for our columns and shares.

What a word stands for is a piece of command line (`ftlevel.config.flag.Words`).
"""

from __future__ import annotations

from ftlevel.config.flag import Agrees, Spelling, Words
from ftlevel.config.methods import SPECS
from ftlevel.config.reading.words import METHOD_WORDS

PRECISIONS = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "torch.float32", "no"), "float32"),
    "none": "auto",
}
BF16: Words = {
    "auto": "auto",
    "false": Agrees(
        "another precision is asked for", "model.dtype", ("float32", "float16"),
        otherwise="Add --dtype float32: auto takes bfloat16 where the device has it",
    ),
}  # fmt: skip
BITS = {
    "bf16": "none --dtype bfloat16",
    "fp16": "none --dtype float16",
    "fp32": "none --dtype float32",
    "16": "none",
    "32": "none --dtype float32",
}
ATTENTION = {
    **dict.fromkeys(("fa2", "flash", "flash_attn", "flash_attention"), "flash_attention_2"),
    "disabled": "eager",
}
OVERLONG = {"delete": "drop", "raise": "error"}
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
    "lion": "lion_32bit",
}
LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo-norm",
    "dpo_norm": "dpo-norm",
    "ld_dpo": "ld-dpo",
    "slic": "hinge",
    "rm": "reward",
}
METHODS: Words = {
    spelling: f"--method {word}"
    for word in (*SPECS, *METHOD_WORDS)
    for spelling in (word, word.replace("-", "_"))
}
"""Axolotl's `adapter: lora` is the method; a path is an adapter."""
NO_LIMIT = Agrees("there is no limit but the epochs", "train.max_steps", (None,))
DO_EVAL: Words = {
    "true": Agrees(
        "validation rows are scored at the end of each epoch where there are some",
        "train.eval_strategy", (None, "epoch", "steps"),
    ),
    "false": "no",
}  # fmt: skip
TO_PUSH = Agrees("", "output.push_to_hub", unless=(None,),
                  otherwise="Name the repository: --push-to-hub NAME")  # fmt: skip
PUSH: Words = {
    "": TO_PUSH,
    "true": TO_PUSH,
    "false": Agrees("nothing is uploaded", "output.push_to_hub", (None,)),
}
SHARES = ("--val-size", "--val-set-size", "--split-dataset-ratio", "--test-split-size",
           "--eval-size")  # fmt: skip
COLUMNS = tuple(
    Spelling(name, read=f"{role}={{}}".format)
    for role, names in {
        "text": ("--text-column", "--text-column-name", "--text-column-names", "--content-column",
                 "--dataset-text-field"),
        "summary": ("--summary-column",),
        "label": ("--label-column-name", "--label-column"),
        "context": ("--context-column",),
        "question": ("--question-column",),
        "answers": ("--answer-column",),
        "prompt": ("--prompt-column", "--query-column"),
        "completion": ("--response-column", "--completion-column"),
        "messages": ("--messages-column",),
    }.items()
    for name in names
)  # fmt: skip
