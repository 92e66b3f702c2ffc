"""LoRA fine-tuning by Unsloth's Python API: `python unsloth_api.py SPEC.json`.

SPEC has the fields of `workloads.Work`, `sorted` (whether rows of similar length are batched
together) and `template` (path of a chat template that marks the supervised text).
"""

import json
import sys
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  # first: it patches later imports
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def main(path):
    """Train according to the spec, written by `workloads.Work.write`."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["model"],
        max_seq_length=spec["max_length"],
        dtype=getattr(torch, spec["dtype"]),
        load_in_4bit=spec["quant"] == "4bit",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False,
        random_state=spec["seed"],
        target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ],
    )  # fmt: skip
    rows = load_dataset("json", data_files=spec["rows"], split="train")
    tokenizer.chat_template = Path(spec["template"]).read_text(encoding="utf-8")
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(Path(path).parent / "run"),
            max_length=spec["max_length"],
            num_train_epochs=1,
            per_device_train_batch_size=spec["batch"],
            gradient_accumulation_steps=spec["accumulate"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            seed=spec["seed"],
            train_sampling_strategy="group_by_length" if spec["sorted"] else "random",
            assistant_only_loss=True,
            gradient_checkpointing=False,
            bf16=spec["dtype"] == "bfloat16",
            use_cpu=spec["device"] == "cpu",
            dataset_num_proc=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
