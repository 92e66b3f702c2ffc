"""How an exported model is spoken to through Ollama: its Modelfile's template and stops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.modelfile import chat_template, literal, write_modelfile
from ftlevel.data.encoding.chat import turn_end
from ftlevel.data.encoding.prompts import PromptFormat, read_format
from ftlevel.data.encoding.turn_layout import USER, TurnLayout, find_turn_layout
from ftlevel.errors import InputError
from ftlevel.weights.gguf.vocabulary import Vocabulary

_MARK = "\u2042prompt\u2042"


@dataclass(frozen=True)
class Prompting:
    """What a Modelfile says.

    Attributes:
        kind: where the template is from.
        reason: more about it.
        template: in Go; None leaves it to Ollama.
        stops: texts at which an answer ends.
        comments: for a reader of the Modelfile.
    """

    kind: Literal["chat template", "prompt of training", "plain", "left to Ollama"]
    reason: str
    template: str | None
    stops: list[str]
    comments: list[str] = field(default_factory=list)
    system: str = ""


def find_prompting(tokenizer: Any, card: AdapterCard, vocabulary: Vocabulary) -> Prompting:
    """Return how a model with `tokenizer`, trained as `card` says, is spoken to."""
    stops = list(dict.fromkeys(_stops(tokenizer)))
    prompt = read_format(card) or PromptFormat("plain")
    if prompt.kind == "chat-template":
        return replace(_of_chat(tokenizer, prompt, vocabulary, stops), system=prompt.system)
    if card.method == "none":  # not trained here: nothing is known of its prompts
        return Prompting("plain", "no chat template", "{{ .Prompt }}", stops)
    before, after = prompt.plain_prompt(_MARK).split(_MARK)
    template = f"{literal(before)}{{{{ .Prompt }}}}{literal(after)}"
    return Prompting("prompt of training", "", template, stops)


def modelfile(gguf: str, prompting: Prompting) -> str:
    """Return the Modelfile of the file named `gguf`."""
    name = gguf.removesuffix(".gguf")
    use = f"ollama create {name} -f {name}.Modelfile"
    comments = [use, *prompting.comments]
    template, stops = prompting.template, prompting.stops
    return write_modelfile(gguf, template, stops, comments, prompting.system)


def _of_chat(
    tokenizer: Any, prompt: PromptFormat, vocabulary: Vocabulary, stops: list[str]
) -> Prompting:
    layout = find_turn_layout(tokenizer)
    if layout is None:
        return Prompting(
            "left to Ollama",
            "the chat template is not fixed texts around turns",
            None,
            stops,
            ["The model's chat template is not fixed texts around turns, so no TEMPLATE is given:",
             "Ollama looks at the one in the file, and where it does not know it, at none."],
        )  # fmt: skip
    if prompt.instruction:
        layout = _instructed(layout, prompt.instruction)
    start = tokenizer.bos_token if vocabulary.flags["add_bos_token"] else ""
    generation = layout.generation.removesuffix(" ")  # a space begins the answer, as in training
    template = chat_template(layout.around, layout.opening, generation, start)
    comments = []
    if "system" not in layout.around:
        comments = ["The model's chat template has no turn for a system text: SYSTEM is left out."]
    reason = "its turns, checked against Jinja"
    return Prompting("chat template", reason, template, stops, comments)


def _instructed(layout: TurnLayout, instruction: str) -> TurnLayout:
    """Return the layout in which users say `instruction` first, as in training."""
    before, after = layout.around[USER]
    around = {**layout.around, USER: (f"{before}{instruction}\n\n", after)}
    return TurnLayout(around, layout.opening, layout.generation)


def _stops(tokenizer: Any) -> Iterator[str]:
    """Yield the texts of the tokens that end an answer."""
    if tokenizer.eos_token is not None:
        yield str(tokenizer.eos_token)
    if getattr(tokenizer, "chat_template", None):
        try:
            end = turn_end(tokenizer)
        except InputError:  # it refuses a question and an answer
            return
        if end is not None:
            yield str(tokenizer.convert_ids_to_tokens(end))
