"""Internals of other libraries that ftlevel uses, and the source files where they are defined.

Private names of transformers, torch, accelerate, bitsandbytes and datasets are used only
in this package; those of PEFT are in `methods/upstream.py`. Each has an entry in `FACTS` and a test
in tests/unit/models/test_upstream.py. This module imports none of the libraries.
"""

from __future__ import annotations

VERSIONS = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "gguf": "0.19.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.24.0",
}
"""Library -> version on which `FACTS` is based."""

FACTS = {
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
