"""Flags from other tools' own examples, and what ftlevel does with each.

docs/coming-from.md is generated from this table; `test_spellings.py` checks it against the CLI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRANSFORMERS = "transformers"
PEFT = "PEFT"
TRL = "TRL"
AXOLOTL = "Axolotl"
LLAMA_FACTORY = "LLaMA-Factory"
MS_SWIFT = "ms-swift"
UNSLOTH = "Unsloth"


@dataclass(frozen=True)
class ForeignFlag:
    """One flag as typed for another tool.

    Attributes:
        tool: the other tool.
        example: the tool's example or option from which it comes.
        typed: flag and value.
        sets: expected field values, which differ from the defaults.
        agrees: part of the docs line that says why nothing has to be set.
        answer: part of the error message if the flag is rejected.
        beside: further arguments that the flag needs.
    """

    tool: str
    example: str
    typed: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    agrees: str = ""
    answer: str = ""
    extra: str = ""

    @property
    def is_accepted(self) -> bool:
        """Whether the command line is accepted."""
        return not self.answer


def _sets(tool: str, example: str, *rows: tuple[Any, ...]) -> list[ForeignFlag]:
    """Return rows of (typed, field, value, …) from one example."""
    return [
        ForeignFlag(tool, example, typed, dict(zip(rest[::2], rest[1::2], strict=True)))
        for typed, *rest in rows
    ]


def _agrees(tool: str, example: str, *rows: tuple[str, str]) -> list[ForeignFlag]:
    return [ForeignFlag(tool, example, typed, agrees=reason) for typed, reason in rows]


def _answers(tool: str, example: str, *rows: tuple[str, str]) -> list[ForeignFlag]:
    return [ForeignFlag(tool, example, typed, answer=answer) for typed, answer in rows]


MODEL, DATA = "model.name_or_path", "data.dataset"
_QV = ["q_proj", "v_proj"]

SPELLINGS: list[ForeignFlag] = [
    *_sets(
        TRANSFORMERS, "run_glue.py",
        ("--model_name_or_path bert-base-cased", MODEL, "bert-base-cased"),
        ("--task_name mrpc", DATA, "nyu-mll/glue", "data.subset", "mrpc",
         "task", "text-classification"),
        ("--max_seq_length 128", "data.max_length", 128),
        ("--per_device_train_batch_size 32", "train.per_device_train_batch_size", 32),
        ("--learning_rate 2e-5", "train.learning_rate", 2e-5),
        ("--num_train_epochs 2", "train.num_train_epochs", 2),
        ("--output_dir out/mrpc/", "output.dir", "out/mrpc"),
    ),
    *_agrees(
        TRANSFORMERS, "run_glue.py",
        ("--do_train", "ftlevel train trains"),
        ("--do_eval", "validation rows are evaluated at the end of each epoch"),
    ),
    *_answers(TRANSFORMERS, "run_glue.py", ("--do_predict", "ftlevel evaluate RUN --dataset TEST")),
    *_sets(
        TRANSFORMERS, "run_classification.py",
        ("--train_file train.csv", DATA, "train.csv"),
        ("--validation_file val.csv", "data.validation_file", "val.csv"),
        ("--text_column_names sentence", "data.columns", {"text": "sentence"}),
        ("--label_column_name rating", "data.columns", {"label": "rating"}),
        ("--max_train_samples 50", "data.max_samples", 50),
        ("--max_eval_samples 50", "data.max_eval_samples", 50),
        ("--model_revision v2", "model.revision", "v2"),
        ("--train_split_name train[:90%]", "data.split", "train[:90%]"),
    ),
    ForeignFlag(TRANSFORMERS, "run_classification.py", "--do_regression true",
                {"data.problem_type": "regression"}, extra="--task text-classification"),
    *_agrees(
        TRANSFORMERS, "run_classification.py",
        ("--ignore_mismatched_sizes", "a head that does not fit is newly initialized"),
        ("--use_fast_tokenizer true", "the fast tokenizer is used"),
        ("--pad_to_max_length false", "rows are not padded to the longest length"),
    ),
    *_answers(
        TRANSFORMERS, "run_classification.py",
        ("--test_file test.csv", "ftlevel evaluate RUN --dataset TEST"),
        ("--metric_name accuracy", "all metrics of the task are shown"),
        ("--cache_dir cache", "HF_HOME"),
        ("--token hf_x", "hf auth login"),
        ("--tokenizer_name bert-base-cased", "the model's tokenizer is used unchanged"),
        ("--validation_split_name dev", "--validation-file names others"),
    ),
    *_sets(
        TRANSFORMERS, "run_ner.py",
        ("--dataset_name tomaarsen/conll2003", DATA, "tomaarsen/conll2003"),
        ("--text_column_name words", "data.columns", {"text": "words"}),
        ("--preprocessing_num_workers 4", "data.num_proc", 4),
    ),
    *_answers(TRANSFORMERS, "run_ner_no_trainer.py", ("--task_name ner", "--task ner")),
    *_sets(TRANSFORMERS, "run_qa.py", ("--doc_stride 64", "data.doc_stride", 64)),
    *_agrees(TRANSFORMERS, "run_qa.py",
             ("--version_2_with_negative", "unanswerable questions are supported")),
    *_sets(
        TRANSFORMERS, "run_seq2seq_qa.py",
        ("--context_column passage", "data.columns", {"context": "passage"}),
        ("--question_column query", "data.columns", {"question": "query"}),
        ("--answer_column replies", "data.columns", {"answers": "replies"}),
    ),
    *_sets(
        TRANSFORMERS, "run_clm.py",
        ("--dataset_config_name wikitext-2-raw-v1", "data.subset", "wikitext-2-raw-v1"),
        ("--per_device_eval_batch_size 4", "train.per_device_eval_batch_size", 4),
        ("--block_size 512", "data.max_length", 512),
        ("--validation_split_percentage 5", "data.validation_split", 0.05),
        ("--torch_dtype bfloat16", "model.dtype", "bfloat16"),
        ("--overwrite_cache", "data.cache", False),
        ("--trust_remote_code true", "model.trust_remote_code", True),
    ),
    *_answers(
        TRANSFORMERS, "run_clm.py",
        ("--streaming", "rows are memory-mapped"),
        ("--config_overrides n_embd=1024", "read from the model's config.json. Edit it, "
                                           "and drop the flag."),
        ("--model_type gpt2", "read from the model's config. Drop it."),
    ),
    ForeignFlag(TRANSFORMERS, "run_mlm.py", "--mlm_probability 0.2", {"data.mlm_probability": 0.2}),
    *_agrees(TRANSFORMERS, "run_mlm.py", ("--line_by_line", "each row is a text of its own")),
    *_sets(
        TRANSFORMERS, "run_summarization.py",
        ("--summary_column highlights", "data.columns", {"summary": "highlights"}),
        ("--text_column article", "data.columns", {"text": "article"}),
        ("--max_source_length 512", "data.max_length", 512),
        ("--max_target_length 64", "data.max_target_length", 64),
        ("--predict_with_generate", "train.predict_with_generate", True),
        ("--overwrite_output_dir", "output.overwrite", True),
    ),
    *_answers(
        TRANSFORMERS, "run_summarization.py",
        ('--source_prefix "summarize: "', "each task has its own instruction, also used by "
                                          "generate. Drop it; add text for every source to the "
                                          "data."),
    ),
    *(ForeignFlag(TRANSFORMERS, "run_translation.py", typed, sets, extra="--task translation")
      for typed, sets in (("--source_lang en", {"data.source_language": "en"}),
                          ("--target_lang ro", {"data.target_language": "ro"}))),
    *_sets(
        TRANSFORMERS, "TrainingArguments",
        ("--bf16", "model.dtype", "bfloat16"),
        ("--fp16 true", "model.dtype", "float16"),
        ("--use_cpu", "model.device", "cpu"),
        ("--gradient_checkpointing True", "train.gradient_checkpointing", True),
        ("--gradient_accumulation_steps 4", "train.gradient_accumulation_steps", 4),
        ("--lr_scheduler_type cosine", "train.lr_scheduler_type", "cosine"),
        ("--warmup_ratio 0.1", "train.warmup_steps", 0.1),
        ("--warmup_steps 50", "train.warmup_steps", 50),
        ("--weight_decay 0.01", "train.weight_decay", 0.01),
        ("--max_grad_norm 0.3", "train.max_grad_norm", 0.3),
        ("--adam_beta1 0.95", "train.adam_beta1", 0.95),
        ("--adam_beta2 0.95", "train.adam_beta2", 0.95),
        ("--adam_epsilon 1e-6", "train.adam_epsilon", 1e-6),
        ("--optim adamw_torch", "train.optim", "adamw_torch"),
        ("--label_smoothing_factor 0.1", "train.label_smoothing_factor", 0.1),
        ("--neftune_noise_alpha 5", "train.neftune_noise_alpha", 5.0),
        ("--group_by_length", "train.train_sampling_strategy", "group_by_length"),
        ("--max_steps 100", "train.max_steps", 100),
        ("--seed 7", "train.seed", 7),
        ("--logging_steps 10", "train.logging_steps", 10),
        ("--eval_strategy steps", "train.eval_strategy", "steps"),
        ("--evaluation_strategy no", "train.eval_strategy", "no"),
        ("--eval_steps 0.2", "train.eval_steps", 0.2),
        ("--eval_on_start", "train.eval_on_start", True),
        ("--save_strategy epoch", "train.save_strategy", "epoch"),
        ("--save_steps 500", "train.save_steps", 500),
        ("--save_total_limit 1", "train.save_total_limit", 1),
        ("--save_strategy best", "train.save_strategy", "best"),
        ("--load_best_model_at_end", "train.load_best_model_at_end", True),
        ("--load_best_model_at_end false", "train.load_best_model_at_end", False),
        ("--metric_for_best_model eval_f1", "train.metric_for_best_model", "eval_f1"),
        ("--greater_is_better true", "train.greater_is_better", True),
        ("--run_name first-try", "output.run_name", "first-try"),
        ("--report_to tensorboard", "output.report_to", ("tensorboard",)),
        ("--use_liger_kernel false", "speed.liger_kernel", False),
    ),
    ForeignFlag(TRANSFORMERS, "TrainingArguments", "--resume_from_checkpoint true",
                {"output.resume": True}, extra="--output_dir out --dataset builtin:docstrings"),
    *_agrees(
        TRANSFORMERS, "TrainingArguments",
        ("--remove_unused_columns false", "unused columns are only reported"),
        ("--ddp_find_unused_parameters false", "every trained weight gets a gradient"),
        ("--save_safetensors true", "weights are written as safetensors"),
        ("--logging_first_step", "the first step is logged"),
        ("--max_steps -1", "there is no limit besides the epochs"),
        ("--fp16 false", "model.dtype is auto"),
    ),
    *_answers(
        TRANSFORMERS, "TrainingArguments",
        ("--push_to_hub", "Name the repository: --push-to-hub NAME"),
        ("--hub_strategy every_save", "once, at the end of the run"),
        ("--deepspeed ds.json", "--num-processes N"),
        ("--fsdp full_shard", "--num-processes N"),
        ("--torch_compile", "torch.compile is not supported"),
        ("--auto_find_batch_size", "micro-batches are halved if they do not fit"),
    ),
    *_sets(
        PEFT, "sft/run_peft.sh",
        ("--dataset_text_field content", "data.columns", {"text": "content"}),
        ("--chat_template_format chatml", "data.chat_template", "chatml"),
        ("--lora_r 16", "method.r", 16),
        ("--lora_alpha 32", "method.lora_alpha", 32.0),
        ("--lora_dropout 0.1", "method.lora_dropout", 0.1),
        ('--lora_target_modules "q_proj,v_proj"', "method.target_modules", _QV),
        ("--use_4bit_quantization True", "quant.kind", "4bit"),
        ("--bnb_4bit_compute_dtype bfloat16", "model.dtype", "bfloat16"),
        ("--use_flash_attn True", "model.attn_implementation", "flash_attention_2"),
        ("--eval_strategy epoch", "train.eval_strategy", "epoch"),
        ("--bf16 True", "model.dtype", "bfloat16"),
    ),
    ForeignFlag(PEFT, "sft/run_peft.sh", "--use_nested_quant True", {"quant.double_quant": True},
                extra="--use_4bit_quantization True"),
    *_agrees(
        PEFT, "sft/run_peft.sh",
        ("--use_peft_lora True", "an adapter is trained"),
        ("--packing True", "each attending to itself only"),
        ("--add_special_tokens False", "no token is added"),
        ("--append_concat_token False", "no token is added"),
        ('--logging_strategy "steps"', "the loss is logged every --logging-steps"),
    ),
    *_answers(
        PEFT, "sft/run_peft.sh",
        ("--use_reentrant True", "without reentrant autograd"),
        ("--hub_private_repo True", "Add --push-to-hub NAME, or drop --hub-private"),
        ("--bnb_4bit_quant_storage_dtype bfloat16", "always stored as bytes"),
    ),
    *_sets(
        PEFT, "dora_finetuning.py",
        ("--base_model meta-llama/Meta-Llama-3-8B", MODEL, "meta-llama/Meta-Llama-3-8B"),
        ("--data_path yahma/alpaca-cleaned", DATA, "yahma/alpaca-cleaned"),
        ("--batch_size 1", "train.per_device_train_batch_size", 1),
        ("--num_epochs 5", "train.num_train_epochs", 5),
        ("--cutoff_len 512", "data.max_length", 512),
        ("--use_dora", "method.use_dora", True),
        ("--quantize", "quant.kind", "4bit"),
        ("--eval_step 10", "train.eval_steps", 10),
        ("--save_step 100", "train.save_steps", 100),
    ),
    *_answers(PEFT, "dora_finetuning.py", ("--val_set_size 500", "expected a fraction below 1")),
    *_sets(
        PEFT, "loftq_finetuning",
        ("--bits 4", "quant.kind", "4bit"),
        ("--rank 16", "method.r", 16),
        ("--num_warmup_steps 100", "train.warmup_steps", 100),
        ("--dataset_config main", "data.subset", "main"),
    ),
    *_sets(
        PEFT, "pissa_finetuning, olora_finetuning",
        ("--init_lora_weights pissa", "method.init_lora_weights", "pissa"),
        ("--init_lora_weights gaussian", "method.init_lora_weights", "gaussian"),
        ("--bits nf4", "quant.kind", "4bit"),
        ("--base_model_name_or_path gpt2", MODEL, "gpt2"),
        ("--device_map cpu", "model.device", "cpu"),
    ),
    *_answers(PEFT, "pissa_finetuning", ("--convert_pissa_to_lora", "the untouched base")),
    *_sets(
        TRL, "sft.py before 0.8",
        ("--seq_length 512", "data.max_length", 512),
    ),
    *_sets(
        TRL, "trl sft",
        ("--dtype bfloat16", "model.dtype", "bfloat16"),
        ("--load_in_4bit", "quant.kind", "4bit"),
        ("--load_in_8bit true", "quant.kind", "8bit"),
        ("--lora_target_modules q_proj v_proj", "method.target_modules", _QV),
        ("--lora_task_type SEQ_CLS", "task", "text-classification"),
        ("--use_rslora", "method.use_rslora", True),
        ("--attn_implementation eager", "model.attn_implementation", "eager"),
        ("--dataset_num_proc 12", "data.num_proc", 12),
        ("--dataset_train_split train[:5%]", "data.split", "train[:5%]"),
        ("--max_length 1536", "data.max_length", 1536),
        ("--optim paged_adamw_8bit", "train.optim", "paged_adamw_8bit"),
        ("--lora_target_parameters experts", "method.target_parameters", "experts"),
    ),
    ForeignFlag(TRL, "trl sft", "--use_bnb_nested_quant", {"quant.double_quant": True},
                extra="--load_in_4bit"),
    *_answers(TRL, "trl sft", ("--dataset_streaming", "rows are memory-mapped")),
    *_agrees(
        TRL, "trl sft",
        ("--use_peft", "an adapter is trained"),
        ("--packing", "each attending to itself only"),
        ("--no_remove_unused_columns", "unused columns are only reported"),
        ("--assistant_only_loss true", "the loss covers answers only, if a row has a prompt"),
        ("--completion_only_loss true", "the loss covers answers only, if a row has a prompt"),
        ("--padding_free", "each attending to itself only"),
    ),
    *_answers(
        TRL, "trl sft",
        ("--eos_token '<|im_end|>'", "the model's tokenizer is used unchanged"),
        ("--config sft_config.yaml", "ftlevel recipes convert"),
        ("--dataset_test_split test", "--validation-file names others"),
        ("--reward_weights 1.0 0.2", "Write --reward NAME=WEIGHT"),
        ("--top_k 50", "another distribution than the one that is trained"),
    ),
    *(
        ForeignFlag(TRL, "trl grpo", typed, sets, extra="--task rl --reward exact")
        for typed, sets in (
            ("--num_generations 4", {"rl.num_generations": 4}),
            ("--max_completion_length 64", {"rl.max_completion_length": 64}),
            ("--temperature 0.7", {"rl.temperature": 0.7}),
            ("--beta 0.04", {"rl.beta": 0.04}),
            ("--scale_rewards false", {"rl.scale_rewards": "none"}),
            ("--epsilon_high 0.28", {"rl.epsilon_high": 0.28}),
            ("--num_iterations 2", {"rl.num_iterations": 2}),
            ("--mask_truncated_completions true", {"rl.mask_truncated_completions": True}),
            (
                "--loss_type cispo",
                {"rl.loss": "cispo", "rl.epsilon_high": 0.2},
            ),
            ("--loss_type dr_grpo", {"rl.loss": "dr_grpo", "rl.scale_rewards": "group"}),
            (
                "--loss_type grpo --importance_sampling_level sequence",
                {"rl.loss": "gspo", "rl.epsilon": 0.2},
            ),
            (
                "--loss_type grpo --beta 0.04",
                {"rl.loss": "grpo", "rl.use_bias_correction_kl": True},
            ),
            (
                "--loss_type bnpo --per_device_train_batch_size 16",
                {"rl.loss": "bnpo", "train.per_device_train_batch_size": 2},
            ),
        )
    ),
    ForeignFlag(
        TRL,
        "trl grpo",
        "--reward_funcs accuracy_reward think_format_reward --task rl",
        {"rl.reward": ("math", "format:think")},
    ),
    *_sets(
        AXOLOTL, "llama-3/qlora.yml",
        ("--base-model NousResearch/Llama-3.2-1B", MODEL, "NousResearch/Llama-3.2-1B"),
        ("--adapter qlora", "method.kind", "qlora", "quant.kind", "4bit"),
        ("--lora-model-dir out", "model.adapter", "out"),
        ("--early-stopping-patience 3", "train.early_stopping_patience", 3),
        ("--micro-batch-size 2", "train.per_device_train_batch_size", 2),
        ("--sequence-len 2048", "data.max_length", 2048),
        ("--lr-scheduler cosine", "train.lr_scheduler_type", "cosine"),
        ("--optimizer adamw_8bit", "train.optim", "adamw_8bit"),
        ("--val-set-size 0.1", "data.validation_split", 0.1),
        ("--bf16 true", "model.dtype", "bfloat16"),
        ("--saves-per-epoch 1", "train.save_strategy", "epoch"),
        ("--evals-per-epoch 1", "train.eval_strategy", "epoch"),
        ("--wandb-name run1", "output.run_name", "run1"),
        ("--flash-attention true", "model.attn_implementation", "flash_attention_2"),
    ),
    *_agrees(
        AXOLOTL, "llama-3/lora-1b.yml",
        ("--sample-packing true", "each attending to itself only"),
        ("--load-in-8bit false", "quant.kind is none"),
        ("--pad-to-sequence-len false", "rows are not padded to the longest length"),
    ),
    *_answers(
        AXOLOTL, "llama-3/lora-1b.yml",
        ("--evals-per-epoch 4", "1/(4 × E)"),
    ),
    *_sets(
        LLAMA_FACTORY, "train_lora/qwen3_lora_sft.sh",
        ("--trust_remote_code", "model.trust_remote_code", True),
        ("--lora_rank 16", "method.r", 16),
        ("--adapter_name_or_path saves/lora", "model.adapter", "saves/lora"),
        ("--early_stopping_steps 3", "train.early_stopping_patience", 3),
        ("--dataset identity,alpaca_en_demo", DATA, "identity", "data.also", ("alpaca_en_demo",)),
        ("--template llama3", "data.chat_template", "llama-3"),
        ("--cutoff_len 2048", "data.max_length", 2048),
        ("--max_samples 1000", "data.max_samples", 1000),
        ("--preprocessing_num_workers 16", "data.num_proc", 16),
        ("--num_train_epochs 5.0", "train.num_train_epochs", 5),
        ("--bf16", "model.dtype", "bfloat16"),
        ("--lora_target q_proj,v_proj", "method.target_modules", _QV),
        ("--val_size 0.1", "data.validation_split", 0.1),
        ("--eval_dataset alpaca_val.json", "data.validation_file", "alpaca_val.json"),
    ),
    *_agrees(
        LLAMA_FACTORY, "train_lora/qwen3_lora_sft.sh",
        ("--stage sft", "that is what ftlevel train does"),
        ("--do_train", "ftlevel train trains"),
        ("--save_only_model false", "checkpoints contain everything needed to resume"),
        ("--plot_loss", "metrics.jsonl"),
    ),
    *_sets(
        LLAMA_FACTORY, "train_qlora, train_full and extras",
        ("--finetuning_type full", "method.kind", "full"),
        ("--finetuning_type oft", "method.kind", "oft"),
        ("--quantization_bit 4", "quant.kind", "4bit"),
        ("--loraplus_lr_ratio 16.0", "method.lora_plus_ratio", 16.0),
        ("--pissa_init true", "method.init_lora_weights", "pissa"),
        ("--flash_attn fa2", "model.attn_implementation", "flash_attention_2"),
        ("--packing false", "speed.pack", False),
    ),
    ForeignFlag(LLAMA_FACTORY, "data arguments", "--interleave_probs 0.7,0.3",
                {"data.mix": (0.7, 0.3)}, extra="--dataset a,b"),
    *_answers(LLAMA_FACTORY, "data arguments", ("--buffer_size 500", "rows are memory-mapped")),
    *_agrees(
        LLAMA_FACTORY, "train_qlora and extras",
        ("--quantization_method bnb", "weights are quantized by bitsandbytes"),
        ("--neat_packing true", "each attending to itself only"),
    ),
    *_answers(
        LLAMA_FACTORY, "train_lora",
        ("--template qwen3_nothink", "the model's chat template is used. Drop it, or use "
                                     "--chat-template with"),
        ("--stage ppo", "use --task preference, reward or rl. Drop it."),
        ("--ddp_timeout 180000000", "--num-processes N"),
        ("--use_galore", "ftlevel list-methods"),
        ("--dataset_dir data", "--dataset FILE"),
    ),
    *_sets(
        MS_SWIFT, "README, tuners/lora/train.sh",
        ("--model Qwen/Qwen2.5-7B-Instruct", MODEL, "Qwen/Qwen2.5-7B-Instruct"),
        ("--tuner_type full", "method.kind", "full"),
        ("--adapters output/checkpoint-1", "model.adapter", "output/checkpoint-1"),
        ("--early_stop_interval 3", "train.early_stopping_patience", 3),
        ("--split_dataset_ratio 0.01", "data.validation_split", 0.01),
        ("--target_modules q_proj v_proj", "method.target_modules", _QV),
        ("--eval_steps 50", "train.eval_steps", 50),
        ("--max_length 2048", "data.max_length", 2048),
        ("--warmup_ratio 0.05", "train.warmup_steps", 0.05),
    ),
    *_sets(
        MS_SWIFT, "tuners, qlora and seq_cls",
        ("--use_dora true", "method.use_dora", True),
        ("--tuner_type adalora", "method.kind", "adalora"),
        ("--init_weights olora", "method.init_lora_weights", "olora"),
        ("--neftune_noise_alpha 15", "train.neftune_noise_alpha", 15.0),
        ("--quant_bits 4", "quant.kind", "4bit"),
        ("--task_type seq_cls", "task", "text-classification"),
        ("--attn_impl flash_attn", "model.attn_implementation", "flash_attention_2"),
        ("--truncation_strategy delete", "data.overlong", "drop"),
        ("--save_strategy steps", "train.save_strategy", "steps"),
    ),
    ForeignFlag(MS_SWIFT, "seq_cls/regression/sft.sh", "--problem_type regression",
                {"data.problem_type": "regression"}, extra="--task_type seq_cls"),
    *_agrees(
        MS_SWIFT, "packing, qlora and seq_cls",
        ("--packing true", "each attending to itself only"),
        ("--quant_method bnb", "weights are quantized by bitsandbytes"),
    ),
    *_answers(
        MS_SWIFT, "README, tuners and seq_cls",
        ("--model_author swift", "not supported. Drop it."),
        ("--num_labels 2", "the classes are counted in the data"),
        ("--init_weights lora-ga", "'lora-ga' is not known"),
    ),
    ForeignFlag(
        MS_SWIFT,
        "examples/train/grpo",
        "--rlhf_type grpo --reward_funcs accuracy --max_completion_length 128",
        {
            "task": "rl",
            "rl.loss": "grpo",
            "rl.beta": 0.04,
            "rl.temperature": 0.9,
            "train.per_device_train_batch_size": 2,
        },
    ),
    *_sets(
        TRL, "trl sft",
        ("--lora_modules_to_save lm_head", "method.modules_to_save", ["lm_head"]),
        ("--report_to trackio", "output.report_to", ("trackio",)),
        ("--report_to wandb tensorboard", "output.report_to", ("wandb", "tensorboard")),
    ),
    *_sets(
        TRANSFORMERS, "TrainingArguments",
        ("--push_to_hub --hub_model_id me/mine", "output.push_to_hub", "me/mine"),
        ("--push_to_hub me/mine", "output.push_to_hub", "me/mine"),
    ),
    ForeignFlag(TRANSFORMERS, "TrainingArguments", "--hub_private_repo true",
                {"output.hub_private": True}, extra="--push_to_hub me/mine"),
    *_sets(TRANSFORMERS, "TrainingArguments", ("--data_seed 3", "train.data_seed", 3)),
    *_agrees(
        TRANSFORMERS, "TrainingArguments",
        ("--dataloader_num_workers 4", "rows are encoded before the run"),
        ("--dataloader_pin_memory false", "rows are encoded before the run"),
        ("--dataloader_drop_last false", "the last incomplete batch is used too"),
        ("--disable_tqdm true", "in terminals only"),
        ("--log_level info", "progress and warnings are shown"),
        ("--include_num_input_tokens_seen", "summary.json counts"),
        ("""--gradient_checkpointing_kwargs '{"use_reentrant": false}'""", "without reentrant"),
        ("--do_sample false", "decoding is greedy"),
    ),
    *_answers(
        TRANSFORMERS, "TrainingArguments",
        ("--dataloader_drop_last", "the last incomplete batch is used too"),
        ("--do_sample", "Add --temperature 1"),
    ),
    *_sets(
        MS_SWIFT, "README",
        ('--system "You are kind."', "data.system", "You are kind."),
    ),
    *_sets(
        TRL, "trl sft",
        ("--completion_only_loss false", "data.train_on_inputs", True),
    ),
    *_sets(
        AXOLOTL, "llama-3/lora-1b.yml",
        ("--train-on-inputs true", "data.train_on_inputs", True),
    ),
    *_sets(
        LLAMA_FACTORY, "finetuning arguments",
        ("--train_on_prompt true", "data.train_on_inputs", True),
        ("--additional_target embed_tokens,lm_head", "method.modules_to_save",
         ["embed_tokens", "lm_head"]),
    ),
    *_sets(
        TRANSFORMERS, "TrainingArguments",
        ("--optim lion_8bit", "train.optim", "lion_8bit"),
        ("--optim adamw_bnb_8bit", "train.optim", "adamw_8bit"),
    ),
    ForeignFlag(TRANSFORMERS, "TrainingArguments", """--lr_scheduler_kwargs '{"num_cycles": 3}'""",
                {"train.lr_scheduler_kwargs": {"num_cycles": 3}},
                extra="--lr_scheduler_type cosine_with_restarts"),
    *_sets(
        TRANSFORMERS, "run_summarization.py",
        ("--num_beams 4", "train.num_beams", 4),
        ("--generation_num_beams 4", "train.num_beams", 4),
    ),
    ForeignFlag(TRANSFORMERS, "TrainingArguments", "--optim_args momentum=0.9,nesterov=true",
                {"train.optim_args": {"momentum": 0.9, "nesterov": True}}, extra="--optim sgd"),
    *_answers(
        TRANSFORMERS, "TrainingArguments",
        ("--optim galore_adamw", "projects gradients of full weights to a low rank"),
    ),
    ForeignFlag(AXOLOTL, "llama-3/lora-1b.yml", "--wandb-project mine",
                {"output.tracker_project": "mine"}, extra="--report-to wandb"),
    *_answers(
        AXOLOTL, "config reference",
        ("--wandb-entity me", "environment variable"),
        ("--report-to all", "all would use every installed tracker"),
    ),
    *_sets(
        AXOLOTL, "config reference",
        ("--cosine-min-lr-ratio 0.1", "train.lr_scheduler_type", "cosine_with_min_lr",
         "train.lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
    ),
    *_sets(
        UNSLOTH, "unsloth-cli.py",
        ('--model_name "unsloth/llama-3-8b"', MODEL, "unsloth/llama-3-8b"),
        ("--max_seq_length 8192", "data.max_length", 8192),
        ("--r 64", "method.r", 64),
        ('--bias "all"', "method.bias", "all"),
        ('--use_gradient_checkpointing "unsloth"', "train.gradient_checkpointing", True),
        ("--random_state 3407", "train.seed", 3407),
        ('--optim "adamw_8bit"', "train.optim", "adamw_8bit"),
        ("--weight_decay 0.005", "train.weight_decay", 0.005),
        ("--raw_text_file book.txt", DATA, "book.txt"),
        ("--use_rslora", "method.use_rslora", True),
    ),
    *_sets(
        UNSLOTH, "unsloth train",
        ("--local-dataset faq.jsonl", DATA, "faq.jsonl"),
        ("--format-type alpaca", "data.format", "alpaca"),
        ("--training-type full", "method.kind", "full"),
        ("--random-seed 3407", "train.seed", 3407),
        ("--enable-wandb", "output.report_to", ("wandb",)),
        ("--gradient-checkpointing unsloth", "train.gradient_checkpointing", True),
    ),
    ForeignFlag(UNSLOTH, "unsloth train", "--use-loftq", {"method.init_lora_weights": "loftq"},
                extra="--load-in-4bit"),
    *_agrees(
        UNSLOTH, "unsloth-cli.py",
        ("--save_model", "the adapter is saved"),
        ("--train-on-completions", "the loss covers answers only, if a row has a prompt"),
    ),
    *_answers(
        UNSLOTH, "unsloth-cli.py",
        ("--loftq_config '{}'", "--init loftq --quant 4bit"),
        ("--save_gguf", "ftlevel export RUN"),
        ('--save_method "merged_16bit"', "ftlevel merge RUN"),
        ("--push_model", "Name the repository: --push-to-hub NAME"),
        ('--hub_token "x"', "hf auth login"),
        ("--stride 512", "--overlong split"),
    ),
]  # fmt: skip
