"""One stack of layers, given a prompt of learned embeddings that its surroundings never see.

    inputs ← [prompt; embed(tokens)],   outputs ← those at the tokens

(Lester et al., 2021, section 2.) The stack works on a sequence that is longer by the prompt; what
comes out has the length of what went in, so heads, labels, spans and pooling are those of the base
model. Both are done by hooks on the stack, which keeps its place and the names inside it. With
P-tuning the prompt is the output of an encoder (Liu et al., 2021, section 3.2):

    MLP:   W₃ relu(W₂ relu(W₁ E)),      LSTM:  W₂ relu(W₁ BiLSTM(E))
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from ftlevel.methods.soft_prompt.config import SoftPromptConfig
from ftlevel.methods.soft_prompt.layout import Layout
from ftlevel.methods.virtual_tokens import VirtualTokenLayer

INIT_STD = 0.02

Role = Literal["whole", "encoder", "decoder"]
"""`whole` hides the prompt. An `encoder` shows it to the `decoder`, whose mask must know of it."""


@dataclass(frozen=True)
class Settings:
    """What one prompt is beside its vectors."""

    length: int
    tokens_before: int


class SoftPromptLayer(VirtualTokenLayer):
    """The prompts of a stack, which it is a part of; those of active adapters follow one another.

    Args:
        stack: what takes the tokens (given hooks).
    """

    adapter_layer_names = (
        "soft_prompt_embedding",
        "soft_prompt_lstm",
        "soft_prompt_in",
        "soft_prompt_mid",
        "soft_prompt_out",
    )
    other_param_names = ("settings",)

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.soft_prompt_embedding = nn.ParameterDict()
        self.soft_prompt_lstm = nn.ModuleDict()
        self.soft_prompt_in = nn.ModuleDict()
        self.soft_prompt_mid = nn.ModuleDict()
        self.soft_prompt_out = nn.ModuleDict()
        self.settings: dict[str, Settings] = {}
        self.role: Role = "whole"
        self.in_features = self.out_features = stack.get_input_embeddings().weight.shape[1]
        self.arguments = list(inspect.signature(stack.forward).parameters)
        self._layout: Layout | None = None
        self._stack = [stack]  # in a list it is no child: it is the parent
        self._hooks = [
            stack.register_forward_pre_hook(functools.partial(_before, self), with_kwargs=True),
            stack.register_forward_hook(functools.partial(_after, self)),
        ]

    def get_base_layer(self) -> Any:
        """Return what the prompt stands beside: the embedding of tokens."""
        return self._stack[0].get_input_embeddings()

    def leave(self) -> None:
        """Take the hooks off the stack again."""
        for hook in self._hooks:
            hook.remove()

    def add_prompt(
        self, adapter_name: str, config: SoftPromptConfig, stack: Any, role: Role
    ) -> None:
        """Add a prompt; a decoder gets none, and is only told of its encoder's."""
        self.role = role
        self.settings[adapter_name] = Settings(config.num_virtual_tokens, config.tokens_before)
        if role == "decoder":
            return
        embedding = stack.get_input_embeddings()
        begin = _initial_prompt(embedding, config).to(torch.float32)
        self.soft_prompt_embedding[adapter_name] = nn.Parameter(begin)
        if config.encoder != "none":
            self._add_encoder(adapter_name, config, begin.shape[1])

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

    def compute(self, name: str) -> torch.Tensor:
        """Return the prompt of one adapter, (P, embedding)."""
        states: torch.Tensor = self.soft_prompt_embedding[name]
        if name in self.soft_prompt_lstm:
            states = self.soft_prompt_lstm[name](states[None])[0][0]
        for linears in (self.soft_prompt_in, self.soft_prompt_mid):
            if name in linears:
                states = functional.relu(linears[name](states))
        return self.soft_prompt_out[name](states) if name in self.soft_prompt_out else states

    def fold(self, name: str) -> None:
        """Replace the encoder of one adapter by what it computes."""
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

    def running(self) -> list[str]:
        """Return the names of the adapters that a forward pass goes through."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.settings]

    def before(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the stack is called with: the longer sequence.

        Raises:
            ValueError: a mask of four dimensions, into which the prompt cannot be put.
        """
        self._layout = None
        names = self.running()
        if not names:
            return None
        call = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache = call.get("cache")
        if self.role == "decoder":
            self._extend_encoder_mask(names, call)
        elif cache is not None and int(cache.get_seq_length()) > 0:
            self._continue(names, call)
        else:
            layout = self._put_in(names, stack, call)
            self._layout = None if self.role == "encoder" else layout
        return (), call

    def after(self, output: Any) -> Any:
        """Return the output of the stack without what stands at the prompt."""
        layout, self._layout = self._layout, None
        return output if layout is None else _take_out(layout, output)

    def _find_layout(
        self, names: list[str], mask: torch.Tensor | None, rows: torch.Tensor
    ) -> Layout:
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"a soft prompt cannot be put into an attention mask of {mask.dim()} dimensions, "
                "as static caches and packed rows have; give one of (batch, seq)."
            )
        length = sum(self.settings[name].length for name in names)
        return Layout.find(mask, rows, length, self.settings[names[0]].tokens_before)

    def _put_in(self, names: list[str], stack: Any, call: dict[str, Any]) -> Layout:
        """Turn the arguments of a call into those of the longer sequence (mutated)."""
        embedded = call.get("inputs_embeds")
        if embedded is None:
            embedded = stack.get_input_embeddings()(call["input_ids"])
        call["input_ids"] = None
        layout = self._find_layout(names, call.get("attention_mask"), embedded)
        prompt = torch.cat([self.compute(name) for name in names]).to(embedded.dtype)
        call["inputs_embeds"] = layout.insert(embedded, prompt.expand(len(embedded), -1, -1))
        for name, extend in (
            ("attention_mask", layout.extend_mask),
            ("token_type_ids", layout.extend_types),
            ("position_ids", layout.extend_positions),
        ):
            if call.get(name) is not None:
                call[name] = extend(call[name])
        return layout

    def _continue(self, names: list[str], call: dict[str, Any]) -> None:
        """Tell a call that follows a cache of the prompt in it (mutated)."""
        mask = call.get("attention_mask")
        if mask is not None:
            call["attention_mask"] = self._find_layout(names, mask, mask).extend_mask(mask)
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + sum(
                self.settings[name].length for name in names
            )

    def _extend_encoder_mask(self, names: list[str], call: dict[str, Any]) -> None:
        """Let a decoder see the prompt among the states of its encoder (mutated)."""
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            call["encoder_attention_mask"] = self._find_layout(names, mask, mask).extend_mask(mask)


def _before(
    layer: SoftPromptLayer, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return layer.before(stack, args, kwargs)


def _after(layer: SoftPromptLayer, _stack: Any, _args: tuple[Any, ...], output: Any) -> Any:
    return layer.after(output)


def _take_out(layout: Layout, output: Any) -> Any:
    """Return the output of a stack without what stands at the prompt."""
    if isinstance(output, tuple):
        return (layout.take_out(output[0]), *output[1:])
    output.last_hidden_state = layout.take_out(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(layout.take_out(states) for states in output.hidden_states)
    return output


def _initial_prompt(embedding: Any, config: SoftPromptConfig) -> torch.Tensor:
    """Return (P, embedding): embeddings of tokens, or small random vectors.

    "Initializing from vocabulary" is far better than random up to a billion parameters, and equal
    beyond (Lester et al., 2021, section 3.2 and figure 3b). An encoder begins with N(0, 1), as
    `nn.Embedding` does.
    """
    count, weight = config.num_virtual_tokens, embedding.weight
    if config.encoder != "none":
        return torch.randn(count, weight.shape[1], device=weight.device)
    if config.random_init:
        return torch.randn(count, weight.shape[1], device=weight.device) * INIT_STD
    if config.init_token_ids:
        repeats = -(-count // len(config.init_token_ids))
        ids = torch.tensor((config.init_token_ids * repeats)[:count])
    else:
        ids = torch.randint(weight.shape[0], (count,))
    with torch.no_grad():  # by the module, which may scale what it looks up
        looked_up: torch.Tensor = embedding(ids.to(weight.device)).clone()
    return looked_up
