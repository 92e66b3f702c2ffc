"""Checks of facts about other libraries."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

if (torch_file := torch.__file__) is None:
    raise RuntimeError("torch is installed, but not in a directory")
SITE = Path(torch_file).parents[1]


class UpstreamFact(NamedTuple):
    """A name in another library that is not part of its documented API.

    Attributes:
        name: name in the library, with its class for methods.
        file: path below site-packages.
        why: what it is used for.
    """

    name: str
    file: str
    why: str


def create_facts(table: Mapping[str, Mapping[str, str]]) -> tuple[UpstreamFact, ...]:
    """Return the facts of a table: file → names, separated by commas → why."""
    return tuple(
        UpstreamFact(name, file, why)
        for file, entries in table.items()
        for names, why in entries.items()
        for name in names.split(", ")
    )


def lower_bound(library: str) -> Version:
    """Return the oldest version that pyproject.toml allows."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    requirements = re.findall(rf'^  "({library}>=[^"]+)"', pyproject.read_text(), re.MULTILINE)
    (bound,) = {next(iter(Requirement(line).specifier)).version for line in requirements}
    return Version(bound)


def check_fact(fact: UpstreamFact) -> None:
    """Check the versions, and that the name is in its file.

    The checked version is not older than the allowed ones, and the installed version is not older
    than the checked one, up to the minor release (torch's CPU builds are 2.13.0+cpu).
    """
    library = fact.file.partition("/")[0]
    installed, checked = Version(version(library)), Version(VERSIONS[library])
    bound = lower_bound(library)
    assert bound <= checked, (
        f"{fact.name}: read in {checked}, and we ask for {bound}: read it again"
    )
    assert installed.release[:2] >= checked.release[:2], f"{fact.name}: {installed} is installed"
    name = fact.name.rpartition(".")[2]
    text = (SITE / fact.file).read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", text), f"{fact.name} is not in {fact.file} any more"


def get_parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of `function`."""
    return list(inspect.signature(function).parameters)


class CanaryRegistry(dict[str, Callable[..., None]]):
    """Name of a fact → test that fails when it changes."""

    def of(self, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the decorated function for these facts."""

        def register(canary: Callable[..., None]) -> Callable[..., None]:
            for name in names:
                assert name not in self, name
                self[name] = canary
            return canary

        return register


VERSIONS = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "gguf": "0.19.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.24.0",
}
"""Library -> version on which the facts are based."""

OF_MODELS = {
    "torch/_decomp/decompositions.py": {
        "aten._softmax_backward_data": "for known probabilities: one kernel, no graph",
        "aten.silu_backward, aten.gelu_backward": "the gradient of an activation from its input",
        "aten._unsafe_view": "a shape that autograd takes for a new tensor, to be written to"},
    "torch/nn/attention/varlen.py": {
        "aten._flash_attention_forward, aten._flash_attention_backward": "what varlen_attn calls; "
            "its own gradient cannot be that of a part of the keys"},
    "torch/_inductor/fx_passes/mkldnn_fusion.py": {
        "mkldnn._reorder_linear_weight": "a weight in oneDNN's own layout",
        "mkldnn._linear_pointwise": "a linear layer with such a weight"},
    "torch/_inductor/utils.py": {
        "mkldnn._is_mkldnn_bf16_supported": "whether oneDNN computes in bfloat16 on this CPU"},
    "torch/_C/_VariableFunctions.pyi": {
        "torch._foreach_copy_": "of several tensors by one kernel on a GPU, "
            "cast where the sizes and strides of each pair are the same"},
    "torch/_C/__init__.pyi": {
        "torch._C._accelerator_setAllocatorSettings": "settings of the GPU allocator, at any time",
        "torch._C._current_graph_task_id": "-1 outside of a backward pass",
        "Node._sequence_nr": "which of two nodes of the graph was made later",
        "Tensor._version": "whether a tensor was written to since",
        "Tensor._make_wrapper_subclass": "a tensor without data that reports device cpu"},
    "torch/utils/_python_dispatch.py": {
        "Tensor.__tensor_flatten__": "the plain tensors that a tensor subclass consists of",
        "TorchDispatchMode.__torch_dispatch__": "sees every operation, to count live tensors"},
    "torch/distributed/checkpoint/api.py": {
        "CheckpointException.failures": "errors of each process that could not write"},
    "torch/_tensor.py": {
        "Tensor.__torch_dispatch__": "lets a meta tensor compute shapes"},
    "torch/utils/_pytree.py": {
        "tree_leaves, tree_map": "the tensors among an operation's arguments and results"},
    "torch/nn/modules/module.py": {
        "Module._parameters, Module._buffers": "a module's own tensors, or None; can be replaced",
        "Module._modules": "a shallow copy whose children can be replaced",
        "Module._forward_hooks, Module._forward_pre_hooks": "hooks on a module's call",
        "Module._backward_hooks, Module._backward_pre_hooks": "likewise"},
    "torch/cpu/__init__.py": {
        "cpu._is_amx_tile_supported, cpu._is_avx512_bf16_supported": "a CPU with bfloat16"},
    "accelerate/hooks.py": {"Module._hf_hook": "hooks on a module's call: offloading"},
    "accelerate/data_loader.py": {
        "SeedableRandomSampler": "Trainer's order of rows, for several processes that share it"},
    "datasets/config.py": {
        "config.HF_HUB_OFFLINE": "keeps load_dataset from retrying when offline"},
    "transformers/models/auto/auto_factory.py": {
        "AutoModel._model_mapping": "which class an auto class makes of a config"},
    "transformers/models/auto/modeling_auto.py": {
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "which model types have a masked-LM head"},
    "transformers/modeling_utils.py": {
        "PreTrainedModel._keep_in_fp32_modules": "what stays in float32 in float16",
        "PreTrainedModel._keep_in_fp32_modules_strict": "what stays in float32 in bfloat16 too",
        "PreTrainedModel._keys_to_ignore_on_save": "tensors that save_pretrained leaves out",
        "PreTrainedModel.all_tied_weights_keys": "which tensors are tied",
        "PreTrainedModel._is_stateful": "whether a recurrent state goes from token to token",
        "PreTrainedModel._supports_sdpa": "scaled_dot_product_attention computes its attention",
        "PreTrainedModel._supports_flash_attn": "flash-attn computes its attention",
        "PreTrainedModel.hf_quantizer": "left on a model from .gguf, which then is not saved",
        "ALL_ATTENTION_FUNCTIONS": "a module that imports it uses AttentionInterface"},
    "transformers/generation/continuous_batching/continuous_api.py": {
        "ContinuousBatchingManager.logit_processor": "read when the thread starts",
        "ContinuousBatchingManager.background_thread_status": "has the error of the thread",
        "ContinuousBatchProcessor.update_batch": "names copies of a request ID__child#0, …"},
    "transformers/generation/continuous_batching/cb_logits_processors.py": {
        "ContinuousBatchingLogitsProcessorList.tensors_required": "arguments of each request"},
    "transformers/generation/continuous_batching/requests.py": {
        "RequestState.position_offset": "tokens that a scheduled batch has computed"},
    "transformers/models/llama/modeling_llama.py": {
        "eager_attention_forward": "in such a module: attention that returns its weights"},
    "transformers/configuration_utils.py": {
        "PreTrainedConfig._attn_implementation": "what set_attn_implementation chose",
        "PreTrainedConfig._experts_implementation": "which forward of experts is used"},
    "gguf/gguf_reader.py": {
        "GGUFReader.data": "the memory map of the file, set once"},
    "transformers/modeling_gguf_pytorch_utils.py": {
        "load_gguf_checkpoint": "looks up gguf.GGUFReader at every call"},
    "transformers/modeling_rope_utils.py": {
        "ROPE_INIT_FUNCTIONS": "the scaled rotary frequencies stored in a .gguf file"},
    "transformers/utils/chat_template_utils.py": {
        "render_jinja_template": "a chat's text with the places of its answers, not tokenized"},
    "transformers/conversion_mapping.py": {
        "get_model_conversion_mapping": "how a checkpoint's tensors become a model's, one by one"},
    "transformers/core_model_loading.py": {
        "rename_source_key, WeightRenaming, WeightConverter": "what renames and converts them",
        "dot_natural_key": "the order in which a converter takes them",
        "_materialize_copy": "a tensor is what can be indexed, and is then cast",
        "revert_weight_conversion": "how a model's tensors are saved, one by one",
        "PreTrainedModel._weight_conversions": "the conversion that saving reverts"},
    "transformers/generation/utils.py": {
        "GenerationMixin.adjust_generation_fn": "reads by what a model generates"},
    "transformers/quantizers/quantizer_bnb_4bit.py": {  # overridden in upstream/experts
        "Bnb4BitHfQuantizer.param_needs_quantization": "packs the experts of a mixture too",
        "Bnb4BitHfQuantizer._process_model_after_weight_loading": "and multiplies with them packed",
        "Bnb4BitHfQuantizer.get_quantize_ops": "what packs a tensor as it is loaded"},
    "transformers/integrations/moe.py": {
        "ALL_EXPERTS_FUNCTIONS": "registry of forward functions of experts",
        "experts_class._apply_gate": "activation and gate of an expert",
        "has_gate, has_bias, is_transposed, has_post_expert_norm": "what a class of experts is"},
    "bitsandbytes/nn/parametrize.py": {
        "replace_parameter_4bit_prequantized": "holds a packed tensor of any shape",
        "Bnb4bitParametrization.quant_state": "by which its codes are read"},
    "transformers/quantizers/auto.py": {
        "AutoHfQuantizer": "which linears are replaced, and whether they can be loaded here"},
    "transformers/integrations/bitsandbytes.py": {
        "Linear4bit.source_cls": "whether it was a Conv1D, whose weight is transposed"},
    "bitsandbytes/nn/modules.py": {
        "Linear4bit.support_avx512bf16_for_cpu": "keeps a weight in a form that has gradients",
        "Linear4bit.compute_type_is_set": "whether compute_dtype is final",
        "Int8Params.SCB": "the scales of an 8-bit weight",
        "Linear8bitLt.init_8bit_state": "moves codes and scales to where the forward reads them"},
    "bitsandbytes/autograd/_functions.py": {
        "MatMul8bitFp": "multiplies with a dequantized 8-bit weight"},
    "bitsandbytes/functional.py": {
        "QuantState.packing_format_for_cpu": "whether a weight was repacked",
        "QuantState.state2": "the scales of a 4-bit weight",
        "functional.QuantState": "a 4-bit weight without values",
        "functional.get_4bit_type": "the 16 values of a 4-bit type"},
    "transformers/training_args.py": {
        "TrainingArguments._n_gpu": "on how many GPUs a process trains"},
    "transformers/trainer.py": {  # overridden in training/trainer.py
        "Trainer._get_train_sampler": "the order of rows, when it is not Trainer's",
        "Trainer._run_epoch": "at least one step, even after the last one",
        "Trainer._evaluate": "the scheduler sees an evaluation that the interrupted run missed",
        "Trainer._load_from_checkpoint": "loads the weights for a rollback and for --resume",
        "Trainer._get_num_items_in_batch": "the targets that a step's loss is divided by",
        "Trainer._save": "gathers a sharded model first",
        "Trainer._save_optimizer_and_scheduler, Trainer._load_optimizer_and_scheduler":
            "the same for the optimizer's state, and back",
        "Trainer._clip_grad_norm, Trainer._get_grad_norm": "the norm of a whole gradient",
        "Trainer._defer_fsdp_gradient_reduction": "reduces sharded gradients in every micro-step",
        "Trainer._sync_replicated_trainable_parameters": "averages parameters that are not sharded",
        "Trainer.is_distributed_loading_by_transformers": "no DDP around a sharded model",
        "Trainer.model_accepts_loss_kwargs": "whether our loss divides by the number of targets",
        "Trainer.current_gradient_accumulation_steps": "how many parts a step's loss comes in"},
}  # fmt: skip
"""File below site-packages -> internal name, with its class -> purpose."""

OF_METHODS = {
    "peft/utils/peft_types.py": {
        "PeftType": "a closed enumeration, and register_peft_method takes only its members"
    },
    "peft/utils/other.py": {
        "get_pattern_key": "which pattern of alpha_pattern a module matches",
        "unload_and_optionally_merge_module": "how merge_and_unload merges, one layer at a time",
    },
    "peft/tuners/adalora/layer.py": {
        "AdaLoraLayer.ranknum": "what AdaLoRA divides by, which is not saved",
        "RankAllocator.ipt, RankAllocator.exp_avg_ipt, RankAllocator.exp_avg_unc": "its scores",
    },
    "peft/tuners/lora/config.py": {
        "LoraConfig._register_custom_module": "PEFT's experimental registration of custom layers"
    },
    "peft/tuners/lora/model.py": {
        "Linear._hf_tp_plan": "marks a linear layer sharded across devices"
    },
    "peft/tuners/lora/layer.py": {  # subclassed in fast/layers/fused_lora
        "LoraLayer.lora_variant": "whether it is DoRA or another form of LoRA",
        "LoraLayer.lora_bias": "whether B has a bias",
    },
    "peft/tuners/lora/bnb.py": {"lora.Linear4bit, lora.Linear8bitLt": "LoRA of a quantized linear"},
    "peft/tuners/gralora/layer.py": {
        "GraloraLayer.get_base_layer": "its output is added to in place"
    },
    "peft/tuners/c3a/layer.py": {"C3ALayer.get_base_layer": "its output is added to in place"},
    "peft/tuners/shira/layer.py": {
        "ShiraLayer.shira_indices": "the trained positions, in a dict outside of modules"
    },
    "peft/tuners/shira/mask_functions.py": {
        "random_mask": "samples the positions, but not on the meta device"
    },
    "peft/tuners/tuners_utils.py": {  # overridden or inherited by our tuners
        "BaseTuner._prepare_adapter_config": "which modules a tuner adapts",
        "BaseTuner._create_and_replace": "replaces a module with our layer",
        "BaseTuner._pre_injection_hook": "rejects modules that cannot have a prefix",
        "BaseTuner._replace_module": "replaces a module that has no weight",
        "BaseTuner._check_merge_allowed": "refuses to merge",
        "BaseTuner._cast_adapter_dtype": "casts an adapter to float32, or leaves it",
        "BaseTunerLayer._move_adapter_to_device_of_base_layer": "after loading on the meta device",
        "BaseTunerLayer._disable_adapters": "what disable_adapters returns",
        "BaseTunerLayer._cast_input_dtype": "the input in the adapter's precision",
        "BaseTunerLayer._get_available_adapters": "the adapters on a layer",
    },
}
"""Likewise, for `methods/upstream.py`."""
