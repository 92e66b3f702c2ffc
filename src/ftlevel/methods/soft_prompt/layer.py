"""Config, layer and tuner of soft prompts.

    inputs ← [prompt; embed(tokens)],  outputs ← those at the tokens  Lester et al., 2021, § 2
    MLP:  W₃ relu(W₂ relu(W₁ E)),     LSTM:  W₂ relu(W₁ BiLSTM(E))    Liu et al., 2021, § 3.2
    [pad … pad] text₀ … textₖ₋₁ [prompt] textₖ … [pad … pad]

Hooks on the layer stack insert the prompt and remove its outputs, so heads, labels and pooling are
those of the base model. The prompt follows left padding, so a row does not depend on its batch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftlevel.methods.soft_prompt import get_layer_stacks, get_prompt_modules
from ftlevel.methods.tuners import TargetConfig, VirtualTokenLayer, VirtualTokenTuner
from ftlevel.methods.upstream import add_peft_type, register_tuner


@dataclass(frozen=True)
class PromptPosition:
    """Position of a prompt: `length` tokens from index `start` `(batch,)` of each row."""

    start: Tensor
    length: int

    @classmethod
    def compute(
        cls, attention_mask: Tensor | None, rows: Tensor, length: int, tokens_before: int
    ) -> PromptPosition:
        """Returns the position of a prompt after left padding and `tokens_before` text tokens.

        `attention_mask` is `(batch, seq)`, or None without padding; `rows` is any tensor of the
        batch, for batch size and device.
        """
        if attention_mask is None:
            start = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
            return cls(start + tokens_before, length)
        first = (attention_mask != 0).long().argmax(dim=1)  # the first of equal values
        return cls((first + tokens_before).clamp(max=attention_mask.shape[1]), length)

    def insert(self, states: Tensor, prompt: Tensor) -> Tensor:
        """Returns `states` `(batch, seq, ...)` with `prompt` `(batch, P, ...)` inserted."""
        seq = states.shape[1]
        index = torch.arange(seq + self.length, device=states.device)
        offset = index - self.start[:, None]
        source = torch.where(offset < 0, index, index - self.length)
        source = torch.where((offset >= 0) & (offset < self.length), seq + offset, source)
        return _gather(torch.cat([states, prompt], dim=1), source)

    def remove(self, states: Tensor) -> Tensor:
        """Returns `states` `(batch, seq + P, ...)` without the prompt, `(batch, seq, ...)`."""
        index = torch.arange(states.shape[1] - self.length, device=states.device)
        return _gather(states, index + self.length * (index >= self.start[:, None]))

    def extend_mask(self, attention_mask: Tensor) -> Tensor:
        """Returns the mask with ones inserted for the prompt, `(batch, seq + P)`."""
        return self.insert(attention_mask, attention_mask.new_ones(len(self.start), self.length))

    def extend_types(self, token_type_ids: Tensor) -> Tensor:
        """Returns the token types with type 0 inserted for the prompt, `(batch, seq + P)`."""
        return self.insert(token_type_ids, token_type_ids.new_zeros(len(self.start), self.length))

    def extend_positions(self, position_ids: Tensor) -> Tensor:
        """Returns `position_ids` with the prompt's positions inserted and later ones shifted."""
        position_ids = position_ids.expand(len(self.start), -1)
        index = torch.arange(position_ids.shape[1], device=position_ids.device)
        at = self.start.clamp(max=position_ids.shape[1] - 1)[:, None]
        steps = torch.arange(self.length, device=position_ids.device)
        prompt = position_ids.gather(1, at) + (self.start[:, None] - at) + steps
        return self.insert(position_ids + self.length * (index >= self.start[:, None]), prompt)


def _gather(states: Tensor, index: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device)[:, None], index]


SOFT_PROMPT = add_peft_type("SOFT_PROMPT")


@dataclass
class SoftPromptConfig(TargetConfig):
    """Configuration of `SoftPromptModel`.

    Attributes:
        num_virtual_tokens: prompt length.
        tokens_before: number of text tokens before the prompt; 1 keeps [CLS] first.
        init_token_ids: tokens, repeated as needed, whose embeddings initialize the prompt; None
            samples the vocabulary.
        random_init: initialize with small random vectors instead.
        encoder: "none"; "MLP" or "LSTM" compute the prompt, until `SoftPromptModel.fold`.
        encoder_hidden_size: hidden size of the encoder; None uses the embedding size.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout between those layers.
    """

    num_virtual_tokens: int = field(default=20)
    tokens_before: int = field(default=0)
    init_token_ids: list[int] | None = field(default=None)
    random_init: bool = field(default=False)
    encoder: str = field(default="none")
    encoder_hidden_size: int | None = field(default=None)
    encoder_num_layers: int = field(default=2)
    encoder_dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SOFT_PROMPT
        if self.encoder not in ("none", "MLP", "LSTM"):
            raise ValueError(f"encoder {self.encoder!r} is not one of none, MLP and LSTM.")


INIT_STD = 0.02

StackType = Literal["whole", "encoder", "decoder"]
"""Outputs of `whole` omit the prompt; those of `encoder` keep it, for the `decoder`."""


class SoftPromptLayer(VirtualTokenLayer):
    """Prompts of all adapters, by name; hooks insert them into the inputs of `stack`."""

    adapter_layer_names = (
        "soft_prompt_embedding",
        "soft_prompt_lstm",
        "soft_prompt_in",
        "soft_prompt_mid",
        "soft_prompt_out",
    )

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.soft_prompt_embedding = nn.ParameterDict()
        self.soft_prompt_lstm = nn.ModuleDict()
        self.soft_prompt_in = nn.ModuleDict()
        self.soft_prompt_mid = nn.ModuleDict()
        self.soft_prompt_out = nn.ModuleDict()
        self.stack_type: StackType = "whole"
        self.in_features = self.out_features = stack.get_input_embeddings().weight.shape[1]
        self.parameter_names = list(inspect.signature(stack.forward).parameters)
        self._position: PromptPosition | None = None
        self._stack = [stack]  # in a list, so that the parent is not a submodule
        self._hooks = [
            stack.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            stack.register_forward_hook(self.after_forward),
        ]

    def get_base_layer(self) -> Any:
        """Returns the token embedding of `stack`."""
        return self._stack[0].get_input_embeddings()

    def remove_hooks(self) -> None:
        """Remove the hooks from the stack."""
        for hook in self._hooks:
            hook.remove()

    def add_prompt(
        self, adapter_name: str, config: SoftPromptConfig, stack: Any, stack_type: StackType
    ) -> None:
        """Add a prompt for `stack`; for the decoder of an encoder-decoder, only its config."""
        self.stack_type = stack_type
        self.configs[adapter_name] = config
        if stack_type == "decoder":
            return
        initial = _initial_prompt(stack.get_input_embeddings(), config).to(torch.float32)
        self.soft_prompt_embedding[adapter_name] = nn.Parameter(initial)
        if config.encoder != "none":
            self._add_encoder(adapter_name, config, initial.shape[1])

    def _add_encoder(self, name: str, config: SoftPromptConfig, width: int) -> None:
        device, hidden = (
            self.soft_prompt_embedding[name].device,
            config.encoder_hidden_size or width,
        )
        if config.encoder == "LSTM":
            self.soft_prompt_lstm[name] = nn.LSTM(
                width,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
                device=device,
            )
            self.soft_prompt_in[name] = nn.Linear(2 * hidden, 2 * hidden, device=device)
            self.soft_prompt_out[name] = nn.Linear(2 * hidden, width, device=device)
        else:
            self.soft_prompt_in[name] = nn.Linear(width, hidden, device=device)
            self.soft_prompt_mid[name] = nn.Linear(hidden, hidden, device=device)
            self.soft_prompt_out[name] = nn.Linear(hidden, width, device=device)

    def compute(self, name: str) -> Tensor:
        """Returns the prompt of the adapter `name`, `(P, embedding)`."""
        states: Tensor = self.soft_prompt_embedding[name]
        if name in self.soft_prompt_lstm:
            states = self.soft_prompt_lstm[name](states[None])[0][0]
        for linears in (self.soft_prompt_in, self.soft_prompt_mid):
            if name in linears:
                states = functional.relu(linears[name](states))
        return self.soft_prompt_out[name](states) if name in self.soft_prompt_out else states

    def fold(self, name: str) -> None:
        """Replace the prompt encoder of the adapter `name` by its output."""
        if name not in self.soft_prompt_out:
            return
        self.soft_prompt_embedding[name] = nn.Parameter(self.compute(name).detach().float())
        for modules in (
            self.soft_prompt_lstm,
            self.soft_prompt_in,
            self.soft_prompt_mid,
            self.soft_prompt_out,
        ):
            if name in modules:
                del modules[name]

    def before_forward(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: returns the arguments with the active prompts inserted, or None.

        Raises `ValueError` if the attention mask is not `(batch, seq)`.
        """
        self._position = None
        names = self.running()
        if not names:
            return None
        call = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        cache = call.get("cache")
        if self.stack_type == "decoder":
            self._extend_encoder_mask(names, call)
        elif cache is not None and int(cache.get_seq_length()) > 0:
            self._extend_cached(names, call)
        else:
            position = self._insert_prompts(names, stack, call)
            self._position = None if self.stack_type == "encoder" else position
        return (), call

    def after_forward(self, _stack: Any, _args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: returns the output of the stack without the prompts."""
        position, self._position = self._position, None
        return output if position is None else _remove_prompt(position, output)

    def _compute_position(
        self, names: list[str], mask: Tensor | None, rows: Tensor
    ) -> PromptPosition:
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"a soft prompt cannot be put into an attention mask of {mask.dim()} dimensions, "
                "as static caches and packed rows have; give one of (batch, seq)."
            )
        tokens_before = self.configs[names[0]].tokens_before
        return PromptPosition.compute(mask, rows, self._length(names), tokens_before)

    def _length(self, names: list[str]) -> int:
        return sum(self.configs[name].num_virtual_tokens for name in names)

    def _insert_prompts(self, names: list[str], stack: Any, call: dict[str, Any]) -> PromptPosition:
        """Insert prompts of adapters `names` into `call`, the stack's arguments; returns where."""
        embedded = call.get("inputs_embeds")
        if embedded is None:
            embedded = stack.get_input_embeddings()(call["input_ids"])
        call["input_ids"] = None
        position = self._compute_position(names, call.get("attention_mask"), embedded)
        prompt = torch.cat([self.compute(name) for name in names]).to(embedded.dtype)
        call["inputs_embeds"] = position.insert(embedded, prompt.expand(len(embedded), -1, -1))
        for name, extend in (
            ("attention_mask", position.extend_mask),
            ("token_type_ids", position.extend_types),
            ("position_ids", position.extend_positions),
        ):
            if call.get(name) is not None:
                call[name] = extend(call[name])
        return position

    def _extend_cached(self, names: list[str], call: dict[str, Any]) -> None:
        """Extend mask and positions in `call` (modified) by prompts that are in the KV cache."""
        mask = call.get("attention_mask")
        if mask is not None:
            call["attention_mask"] = self._compute_position(names, mask, mask).extend_mask(mask)
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + self._length(names)

    def _extend_encoder_mask(self, names: list[str], call: dict[str, Any]) -> None:
        """Extend the encoder's mask in the decoder's arguments `call` (modified) by the prompts."""
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            call["encoder_attention_mask"] = self._compute_position(names, mask, mask).extend_mask(
                mask
            )


def _remove_prompt(position: PromptPosition, output: Any) -> Any:
    if isinstance(output, tuple):
        return (position.remove(output[0]), *output[1:])
    output.last_hidden_state = position.remove(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(position.remove(states) for states in output.hidden_states)
    return output


def _initial_prompt(embedding: Any, config: SoftPromptConfig) -> Tensor:
    num_tokens, weight = config.num_virtual_tokens, embedding.weight
    if config.encoder != "none":
        return torch.randn(num_tokens, weight.shape[1], device=weight.device)
    if config.random_init:
        return torch.randn(num_tokens, weight.shape[1], device=weight.device) * INIT_STD
    if config.init_token_ids:
        repeats = -(-num_tokens // len(config.init_token_ids))
        ids = torch.tensor((config.init_token_ids * repeats)[:num_tokens])
    else:
        ids = torch.randint(weight.shape[0], (num_tokens,))
    with torch.no_grad():  # by calling the module, which may scale embeddings
        embeddings: Tensor = embedding(ids.to(weight.device)).clone()
    return embeddings


NAME = "soft_prompt"
"""Attribute of a stack that has its `SoftPromptLayer`."""


class SoftPromptModel(VirtualTokenTuner):
    """Tuner for prompt tuning and P-tuning.

    In an encoder-decoder model, the prompt is in the encoder input (Lester et al., 2021, § 2).
    """

    prefix: str = "soft_prompt_"
    tuner_layer_cls = SoftPromptLayer

    def default_target_modules(self) -> list[str]:
        """Returns the names of modules: the model without its head, or its encoder and decoder."""
        return get_prompt_modules(self.model)

    def inject_adapter(self, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Add an adapter; `state_dict` is ignored, as the config determines the targets."""
        super().inject_adapter(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: SoftPromptConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Add a prompt to `target` (modified); raises `ValueError` without input embeddings."""
        if isinstance(target, nn.ModuleList):
            target = self.model
        if not hasattr(target, "get_input_embeddings"):
            raise ValueError(
                f"{current_key} takes no tokens, so a soft prompt cannot be added. Drop "
                f"target_modules, or choose the stack of layers with the embedding."
            )
        if not hasattr(target, NAME):
            target.add_module(NAME, SoftPromptLayer(target))
        layer = getattr(target, NAME)
        stacks = get_layer_stacks(self.model)
        stack_type: StackType = "whole"
        if len(stacks) == 2:
            stack_type = "decoder" if current_key == stacks[1] else "encoder"
        layer.add_prompt(adapter_name, peft_config, target, stack_type)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def unload(self) -> nn.Module:
        """Returns the base model without prompts."""
        for stack in [module for module in self.model.modules() if hasattr(module, NAME)]:
            getattr(stack, NAME).remove_hooks()
            delattr(stack, NAME)
        return super().unload()

    @torch.no_grad()
    def fold(self, adapter_name: str = "default") -> None:
        """Replace the prompt encoder of an adapter by its output, in place."""
        for layer in self.layers():
            training = layer.training
            layer.eval()  # no dropout between the layers of an LSTM
            layer.fold(adapter_name)
            layer.train(training)
        self.peft_config[adapter_name].encoder = "none"


register_tuner(SOFT_PROMPT, SoftPromptConfig, SoftPromptModel)
