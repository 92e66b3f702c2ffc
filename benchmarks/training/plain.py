"""Plain LoRA fine-tuning with `transformers.Trainer` and PEFT, as in their documentation.

    python plain.py SPEC.json

The reference of `benchmarks/train.py`. SPEC has the fields of `workloads.Work`, and `sorted`:
whether rows of similar length are batched together.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def encode_chat(tokenizer, messages):
    """Return ids and labels of a conversation; all assistant turns are supervised."""
    ids, labels = [], []
    for end, message in enumerate(messages, start=1):
        conversation = tokenizer.apply_chat_template(
            messages[:end], tokenize=True, return_dict=False
        )
        new, supervised = conversation[len(ids) :], 0
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                messages[: end - 1], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            last = len(conversation) - conversation[::-1].index(tokenizer.eos_token_id)
            supervised = last - len(prompt)
            labels += [-100] * (len(prompt) - len(ids)) + conversation[len(prompt) : last]
            labels += [-100] * (len(conversation) - last)
        else:
            labels += [-100] * len(new)
        ids = list(conversation)
        if supervised < 0:
            raise ValueError("the chat template is not incremental")
    return {"input_ids": ids, "labels": labels}


def load(spec, tokenizer, rows):
    """Return the base model with LoRA on every linear layer of its blocks."""
    dtype = torch.bfloat16 if spec["dtype"] == "bfloat16" else torch.float32
    options = {}
    if spec["quant"] == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if spec["task"] == "text-classification":
        labels = len({row["label"] for row in rows})
        model = AutoModelForSequenceClassification.from_pretrained(
            spec["model"], dtype=dtype, num_labels=labels, **options
        )
        targets, kind = r".*encoder\.layer\..*\.(query|key|value|dense)", "SEQ_CLS"
    else:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, **options)
        targets, kind = "all-linear", "CAUSAL_LM"
    if options:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    config = LoraConfig(
        task_type=kind, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets
    )
    return get_peft_model(model, config)


def main(path):
    """Train according to the spec."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    set_seed(spec["seed"])
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load(spec, tokenizer, rows)
    if spec["task"] == "text-classification":
        names = sorted({row["label"] for row in rows})
        encoded = [{**tokenizer(row["text"]), "labels": names.index(row["label"])} for row in rows]
        collator = DataCollatorWithPadding(tokenizer)
    else:
        encoded = [encode_chat(tokenizer, row["messages"]) for row in rows]
        for row in encoded:
            row["attention_mask"] = [1] * len(row["input_ids"])
        collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model=model,
        train_dataset=Dataset.from_list(encoded),
        data_collator=collator,
        args=TrainingArguments(
            output_dir=str(Path(path).parent / "plain"),
            num_train_epochs=1,
            per_device_train_batch_size=spec["batch"],
            gradient_accumulation_steps=spec["accumulate"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            train_sampling_strategy="group_by_length" if spec["sorted"] else "random",
            bf16=spec["dtype"] == "bfloat16",
            use_cpu=spec["device"] == "cpu",
            seed=spec["seed"],
            data_seed=spec["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    trainer.save_model(str(Path(path).parent / "plain"))


if __name__ == "__main__":
    main(sys.argv[1])
