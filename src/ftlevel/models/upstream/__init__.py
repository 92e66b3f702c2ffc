"""What ftlevel uses of other libraries that they do not promise to keep, and where it was read.

Every private or undocumented name of transformers, torch, accelerate, bitsandbytes, datasets and
torchao is used here and nowhere else; PEFT's stand in `methods/upstream.py`. `FACTS` has a line for
each, and tests/unit/models/test_upstream.py a canary, which fails when the name moves, takes other
arguments or means something else. A test also looks for such names in all other modules.

Importing this table imports none of the libraries; the modules beside it import what they need.
"""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """A name that its library may change without a word.

    Attributes:
        name: what is used; with a class where it belongs to one.
        version: of the library, in which it was read.
        file: where it was read, below site-packages.
        why: what it is used for, there being no documented way.
    """

    name: str
    version: str
    file: str
    why: str

    @property
    def library(self) -> str:
        """The distribution's import name."""
        return self.file.partition("/")[0]


_TORCH, _TRANSFORMERS, _BNB, _TORCHAO = "2.13.0", "5.24.0", "0.50.2", "0.18.0"

FACTS = (
    # tensors.py
    Fact("aten._softmax_backward_data", _TORCH, "torch/_decomp/decompositions.py",
         "softmax's backward pass where the probabilities are at hand: one kernel, no graph"),
    Fact("aten.silu_backward", _TORCH, "torch/_decomp/decompositions.py",
         "an activation's backward pass from its input alone"),
    Fact("aten.gelu_backward", _TORCH, "torch/_decomp/decompositions.py", "likewise"),
    Fact("aten._unsafe_view", _TORCH, "torch/_decomp/decompositions.py",
         "another shape that autograd takes for a new tensor, which may be written to"),
    Fact("Tensor._version", _TORCH, "torch/_C/__init__.pyi",
         "whether a tensor was written to since"),
    Fact("Tensor.__tensor_flatten__", _TORCH, "torch/utils/_python_dispatch.py",
         "the plain tensors that torchao's consist of"),
    Fact("Module._parameters", _TORCH, "torch/nn/modules/module.py",
         "a module's own tensors, None for one that it could have had; writing replaces them"),
    Fact("Module._buffers", _TORCH, "torch/nn/modules/module.py", "likewise"),
    Fact("Module._modules", _TORCH, "torch/nn/modules/module.py",
         "a shallow copy whose children can be replaced"),
    Fact("Module._forward_hooks", _TORCH, "torch/nn/modules/module.py",
         "whether somebody waits for a module to be called"),
    Fact("Module._forward_pre_hooks", _TORCH, "torch/nn/modules/module.py", "likewise"),
    Fact("Module._backward_hooks", _TORCH, "torch/nn/modules/module.py", "likewise"),
    Fact("Module._backward_pre_hooks", _TORCH, "torch/nn/modules/module.py", "likewise"),
    Fact("Module._hf_hook", "1.15.0", "accelerate/hooks.py",
         "likewise: accelerate's, of offloading"),
    Fact("cpu._is_amx_tile_supported", _TORCH, "torch/cpu/__init__.py",
         "whether the processor computes in bfloat16"),
    Fact("cpu._is_avx512_bf16_supported", _TORCH, "torch/cpu/__init__.py", "likewise"),
    # architectures.py
    Fact("AutoModel._model_mapping", _TRANSFORMERS, "transformers/models/auto/auto_factory.py",
         "which class an auto class makes of a config"),
    Fact("MODEL_FOR_MASKED_LM_MAPPING_NAMES", _TRANSFORMERS,
         "transformers/models/auto/modeling_auto.py", "which model types have a masked-LM head"),
    Fact("PreTrainedModel._keep_in_fp32_modules", _TRANSFORMERS, "transformers/modeling_utils.py",
         "modules that stay in float32 when a model is loaded in float16"),
    Fact("PreTrainedModel._keep_in_fp32_modules_strict", _TRANSFORMERS,
         "transformers/modeling_utils.py", "modules that stay in float32 in bfloat16 too"),
    Fact("PreTrainedModel._keys_to_ignore_on_save", _TRANSFORMERS, "transformers/modeling_utils.py",
         "tensors that save_pretrained leaves out"),
    Fact("PreTrainedModel.all_tied_weights_keys", _TRANSFORMERS, "transformers/modeling_utils.py",
         "which tensors are another's"),
    Fact("PreTrainedModel._is_stateful", _TRANSFORMERS, "transformers/modeling_utils.py",
         "whether a recurrent state goes from token to token"),
    Fact("PreTrainedModel._supports_sdpa", _TRANSFORMERS, "transformers/modeling_utils.py",
         "whether scaled_dot_product_attention computes a model's attention"),
    Fact("ALL_ATTENTION_FUNCTIONS", _TRANSFORMERS, "transformers/modeling_utils.py",
         "a modeling module that imports it asks AttentionInterface for its attention"),
    Fact("PreTrainedConfig._attn_implementation", _TRANSFORMERS,
         "transformers/configuration_utils.py", "the attention that set_attn_implementation chose"),
    Fact("PreTrainedModel.hf_quantizer", _TRANSFORMERS, "transformers/modeling_utils.py",
         "left on a model read from .gguf, which save_pretrained then refuses"),
    Fact("ROPE_INIT_FUNCTIONS", _TRANSFORMERS, "transformers/modeling_rope_utils.py",
         "the stretched rotary frequencies that a .gguf file holds"),
    Fact("render_jinja_template", _TRANSFORMERS, "transformers/utils/chat_template_utils.py",
         "a chat's text with the places of its answers, without tokenizing it"),
    # conversions.py
    Fact("get_model_conversion_mapping", _TRANSFORMERS, "transformers/conversion_mapping.py",
         "how a checkpoint's tensors become a model's, one at a time"),
    Fact("rename_source_key", _TRANSFORMERS, "transformers/core_model_loading.py", "likewise"),
    Fact("WeightRenaming", _TRANSFORMERS, "transformers/core_model_loading.py", "likewise"),
    Fact("WeightConverter", _TRANSFORMERS, "transformers/core_model_loading.py", "likewise"),
    Fact("dot_natural_key", _TRANSFORMERS, "transformers/core_model_loading.py",
         "the order in which a converter takes them"),
    Fact("revert_weight_conversion", _TRANSFORMERS, "transformers/core_model_loading.py",
         "how a model's tensors are saved, one at a time"),
    Fact("PreTrainedModel._weight_conversions", _TRANSFORMERS, "transformers/core_model_loading.py",
         "the translation that saving undoes"),
    # quantizers.py
    Fact("AutoHfQuantizer", _TRANSFORMERS, "transformers/quantizers/auto.py",
         "which linears a quantization replaces, and whether it can be loaded here"),
    Fact("Linear4bit.source_cls", _TRANSFORMERS, "transformers/integrations/bitsandbytes.py",
         "whether a replaced linear was a Conv1D, whose weight is transposed"),
    Fact("Linear4bit.support_avx512bf16_for_cpu", _BNB, "bitsandbytes/nn/modules.py",
         "stops a layer from repacking its weight into a form without gradients"),
    Fact("Linear4bit.compute_type_is_set", _BNB, "bitsandbytes/nn/modules.py",
         "whether compute_dtype is final"),
    Fact("QuantState.packing_format_for_cpu", _BNB, "bitsandbytes/functional.py",
         "whether a weight was repacked"),
    Fact("QuantState.state2", _BNB, "bitsandbytes/functional.py", "the scales of a 4-bit weight"),
    Fact("Int8Params.SCB", _BNB, "bitsandbytes/nn/modules.py", "the scales of an 8-bit weight"),
    Fact("Linear8bitLt.init_8bit_state", _BNB, "bitsandbytes/nn/modules.py",
         "moves codes and scales to where the forward pass reads them"),
    Fact("functional.get_4bit_type", _BNB, "bitsandbytes/functional.py",
         "the 16 values of a 4-bit type"),
    Fact("flatten_tensor_state_dict", _TORCHAO,
         "torchao/prototype/safetensors/safetensors_support.py",
         "what save_pretrained stores of a packed weight"),
    Fact("TorchAoConfig.get_apply_tensor_subclass", _TRANSFORMERS,
         "transformers/utils/quantization_config.py", "what torchao packs a weight by"),
    # data.py
    Fact("SeedableRandomSampler", "1.15.0", "accelerate/data_loader.py",
         "the order in which Trainer takes rows, for several processes that share it"),
    Fact("config.HF_HUB_OFFLINE", "5.2.0", "datasets/config.py",
         "keeps load_dataset from retrying what is known to be out of reach"),
    # overridden in training/trainer.py
    Fact("Trainer._get_train_sampler", _TRANSFORMERS, "transformers/trainer.py",
         "the order of rows, when it is not Trainer's"),
    Fact("Trainer._get_num_items_in_batch", _TRANSFORMERS, "transformers/trainer.py",
         "the number of targets that a step's loss is divided by"),
    Fact("Trainer.model_accepts_loss_kwargs", _TRANSFORMERS, "transformers/trainer.py",
         "tells Trainer that our loss divides by that number"),
    Fact("Trainer.current_gradient_accumulation_steps", _TRANSFORMERS, "transformers/trainer.py",
         "the number of parts that a step's loss comes in"),
)  # fmt: skip
