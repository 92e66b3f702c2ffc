"""Write the Modelfile of an exported model for Ollama, with prompt template and stop texts.

Ollama's templates use Go's text/template. Nothing is trimmed (no `{{-`): every character between
actions is part of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftlevel.artifacts.cards import one_line
from ftlevel.data.encoding.chat import SYSTEM, USER, ChatLayout, get_chat_layout, get_end_of_turn_id
from ftlevel.data.encoding.prompts import PromptFormat, load_prompt_format
from ftlevel.extras.serving.gguf_vocabulary import Vocabulary
from ftlevel.trained.model_ref import ModelRef

_ROLES = ("system", "user", "assistant")
_AFTER_SYSTEM = '{{ if and (eq $index 1) (eq (index $.Messages 0).Role "system") }}'


def chat_template(
    turns: Mapping[str, tuple[str, str]],
    opening: str,
    generation: str,
    start: str = "",
    after_system: str | None = None,
) -> str:
    """Returns a Go template for turns that are wrapped in fixed texts.

    `turns` maps roles to the texts before and after their content; `opening` precedes a first turn
    that is not the system's; `generation` follows the last turn. `start` is text that the tokenizer
    prepends (BOS), so the template omits it from the first turn. `after_system` is the text before
    the user's content after a system turn, if it is another one.
    """
    branches = []
    for role in _ROLES:
        if role not in turns:
            continue
        before, after = turns[role]
        head = (
            _except_first_turn(before, start)
            if not opening or role == "system"
            else escape_template(before)
        )
        if role == "user" and after_system is not None:
            after_system = escape_template(after_system)
            head = f"{_AFTER_SYSTEM}{after_system}{{{{ else }}}}{head}{{{{ end }}}}"
        tail = escape_template(after)
        if role == "assistant":  # a last answer is continued
            tail = f"{{{{ if not $last }}}}{tail}{{{{ end }}}}"
        branches.append(f'if eq $turn.Role "{role}" }}}}{head}{{{{ $turn.Content }}}}{tail}')
    opening = escape_template(opening.removeprefix(start))
    generation = escape_template(generation)
    if "system" in turns and opening:
        opening = f'{{{{ if ne $turn.Role "system" }}}}{opening}{{{{ end }}}}'
    first = f"{{{{ if eq $index 0 }}}}{opening}{{{{ end }}}}" if opening else ""
    return (
        "{{ range $index, $turn := .Messages }}{{ $last := eq (len (slice $.Messages $index)) 1 }}"
        + first
        + "{{ "
        + "{{ else ".join(branches)
        + '{{ end }}{{ if and $last (ne $turn.Role "assistant") }}'
        + f"{generation}{{{{ end }}}}{{{{ end }}}}"
    )


def _except_first_turn(text: str, start: str) -> str:
    """Returns a template for `text` that leaves out its prefix `start` in the first turn."""
    if not start or not text.startswith(start):
        return escape_template(text)
    remainder = escape_template(text.removeprefix(start))
    return f"{{{{ if gt $index 0 }}}}{escape_template(start)}{{{{ end }}}}{remainder}"


def escape_template(text: str) -> str:
    """Returns `text` escaped for a Go template inside a Modelfile."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')


_INNER_END = re.compile(r'"""\s*[\r\n]')
"""End of a text between triple quotes: quotes at the end of a line."""


def format_modelfile(
    gguf: str,
    template: str | None,
    stop_strings: Sequence[str],
    comments: Sequence[str],
    system: str = "",
) -> str:
    """Returns the Modelfile of the file `gguf` in the same directory, with `comments` on top.

    If `template` is None, Ollama uses that of the .gguf file. `system` is the default system turn.
    """
    comments = [
        *comments,
        *(f"Left out, as no Modelfile can hold it: {text!r}" for text in (system, *stop_strings)
          if _INNER_END.search(text)),
    ]  # fmt: skip
    lines = [f"# {one_line(line)}" for comment in comments for line in comment.split("\n")]
    lines.append(f"FROM ./{one_line(gguf)}")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if system and not _INNER_END.search(system):
        lines.append(f'SYSTEM """{system}"""')
    for stop in stop_strings:  # Ollama reads no escapes
        if _INNER_END.search(stop):
            continue
        quote = '"""' if '"' in stop else '"'
        lines.append(f"PARAMETER stop {quote}{stop}{quote}")
    return "\n".join(lines) + "\n"


_PLACEHOLDER = "\u2042prompt\u2042"


@dataclass(frozen=True)
class PromptTemplate:
    """Prompt template and stop texts for a Modelfile; `template` None leaves it to Ollama."""

    kind: Literal["chat template", "prompt of training", "plain", "left to Ollama"]
    reason: str
    template: str | None
    stop_strings: list[str]
    comments: list[str] = field(default_factory=list)
    system: str = ""


def get_prompt_template(tokenizer: Any, ref: ModelRef, vocab: Vocabulary) -> PromptTemplate:
    """Returns the prompt template and stop texts for the model `ref`."""
    stop_strings = list(dict.fromkeys([*_stop_strings(tokenizer), *ref.configured_task.stop_texts]))
    prompt = load_prompt_format(ref.card) or PromptFormat("plain")
    if prompt.kind == "chat-template":
        return replace(_of_chat(tokenizer, prompt, vocab, stop_strings), system=prompt.system)
    if ref.card.method == "none":  # not trained by ftlevel: prompts are unknown
        return PromptTemplate("plain", "no chat template", "{{ .Prompt }}", stop_strings)
    before, after = prompt.plain_prompt(_PLACEHOLDER).split(_PLACEHOLDER)
    template = f"{escape_template(before)}{{{{ .Prompt }}}}{escape_template(after)}"
    return PromptTemplate("prompt of training", "", template, stop_strings)


def modelfile(gguf: str, prompt_template: PromptTemplate) -> str:
    """Returns the Modelfile of the .gguf file named `gguf`."""
    name = gguf.removesuffix(".gguf")
    comments = [f"ollama create {name} -f {name}.Modelfile", *prompt_template.comments]
    template, stop_strings = prompt_template.template, prompt_template.stop_strings
    return format_modelfile(gguf, template, stop_strings, comments, prompt_template.system)


def _of_chat(
    tokenizer: Any, prompt: PromptFormat, vocab: Vocabulary, stop_strings: list[str]
) -> PromptTemplate:
    layout = get_chat_layout(tokenizer)
    if layout is None or (prompt.system and SYSTEM not in layout.around):
        return PromptTemplate(
            "left to Ollama",
            "the chat template is not fixed texts around turns",
            None,
            stop_strings,
            [
                "The model's chat template cannot be written as a TEMPLATE:",
                "Ollama looks at the one in the file, and where it does not know it, at none.",
            ],
        )
    if prompt.instruction:
        layout = _prepend_to_user_turns(layout, prompt.instruction)
    start = tokenizer.bos_token if vocab.flags["add_bos_token"] else ""
    # The answer starts with the space, as in training.
    generation = layout.generation.removesuffix(" ")
    template = chat_template(layout.around, layout.opening, generation, start, layout.after_system)
    comments = []
    if SYSTEM not in layout.around:
        comments = ["A TEMPLATE has no system turns like the chat template's: SYSTEM is omitted."]
    note = "its turns, checked against Jinja"
    return PromptTemplate("chat template", note, template, stop_strings, comments)


def _prepend_to_user_turns(layout: ChatLayout, instruction: str) -> ChatLayout:
    before, end = layout.around[USER]
    around = {**layout.around, USER: (f"{before}{instruction}\n\n", end)}
    after = None if layout.after_system is None else f"{layout.after_system}{instruction}\n\n"
    return replace(layout, around=around, after_system=after)


def _stop_strings(tokenizer: Any) -> Iterator[str]:
    if tokenizer.eos_token is not None:
        yield str(tokenizer.eos_token)
    if (end := get_end_of_turn_id(tokenizer)) is not None:
        yield str(tokenizer.convert_ids_to_tokens(end))
