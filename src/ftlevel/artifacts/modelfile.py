"""The Modelfile beside a .gguf file, by which Ollama takes it: its template and where it stops.

Ollama's templates are Go's text/template. Nothing is trimmed here (no `{{-`), so that every
character between the actions is one of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
