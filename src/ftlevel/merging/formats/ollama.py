"""How an exported model is spoken to through Ollama: its Modelfile's template and stops.

The Modelfile beside a .gguf file, by which Ollama takes it: its template and where it stops.

Ollama's templates are Go's text/template. Nothing is trimmed here (no `{{-`), so that every
character between the actions is one of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.data.encoding.chat import USER, TurnLayout, find_turn_layout, turn_end
from ftlevel.data.encoding.encode import PromptFormat, read_format
from ftlevel.errors import InputError
from ftlevel.weights.gguf.vocabulary import Vocabulary

_ROLES = ("system", "user", "assistant")


def chat_template(
    around: Mapping[str, tuple[str, str]], opening: str, generation: str, start: str = ""
) -> str:
    """Return a template in Go for turns with fixed texts around them.

    Args:
        around: role → what stands before and behind its content.
        opening: what stands before a first turn that is not the system's.
        generation: what stands behind the last turn.
        start: what is put before the whole text anyway (BOS), so that the first turn must not have
            it.
    """
    cases = []
    for role in _ROLES:
        if role not in around:
            continue
        before, after = around[role]
        head = _but_first(before, start) if not opening or role == "system" else literal(before)
        tail = literal(after)
        if role == "assistant":  # an answer that is begun goes on
            tail = f"{{{{ if not $last }}}}{tail}{{{{ end }}}}"
        cases.append(f'if eq $turn.Role "{role}" }}}}{head}{{{{ $turn.Content }}}}{tail}')
    opening = literal(opening.removeprefix(start))
    if "system" in around and opening:
        opening = f'{{{{ if ne $turn.Role "system" }}}}{opening}{{{{ end }}}}'
    first = f"{{{{ if eq $index 0 }}}}{opening}{{{{ end }}}}" if opening else ""
    return (
        "{{ range $index, $turn := .Messages }}"
        "{{ $last := eq (len (slice $.Messages $index)) 1 }}"
        + first
        + "{{ " + "{{ else ".join(cases) + "{{ end }}"
        + f'{{{{ if and $last (ne $turn.Role "assistant") }}}}{literal(generation)}{{{{ end }}}}'
        + "{{ end }}"
    )  # fmt: skip


def _but_first(text: str, start: str) -> str:
    """Return `text`, without `start` in the first turn."""
    if not start or not text.startswith(start):
        return literal(text)
    rest = literal(text.removeprefix(start))
    return f"{{{{ if gt $index 0 }}}}{literal(start)}{{{{ end }}}}{rest}"


def literal(text: str) -> str:
    """Return `text` as a template gives it unchanged."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')


def write_modelfile(
    gguf: str,
    template: str | None,
    stops: Sequence[str],
    comments: Sequence[str],
    system: str = "",
) -> str:
    """Return the Modelfile of the file named `gguf`, which lies beside it.

    Args:
        gguf: name of the file.
        template: in Go; None leaves it to Ollama, which looks at the one in the file.
        stops: texts at which an answer ends.
        comments: what a reader should know, a line each.
        system: the turn that comes first where a conversation has none; empty for none.
    """
    lines = [f"# {line}" for comment in comments for line in comment.split("\n")]
    lines.append(f"FROM ./{gguf}")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    quoted = (stop.replace("\\", "\\\\").replace('"', '\\"') for stop in stops)
    lines += [f'PARAMETER stop "{stop}"' for stop in quoted]
    return "\n".join(lines) + "\n"


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
