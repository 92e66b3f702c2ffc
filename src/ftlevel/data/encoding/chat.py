"""Render conversations with the chat template and locate the assistant turns in the text.

A template with `{% generation %}` marks these turns. With other templates, a turn is located by
rendering the conversation up to it, with and without it, and comparing the texts. If the template
rewrites previous turns (Qwen3 removes their reasoning, Mistral moves the system text), a marker is
inserted into the turn's content instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import read_plain
from ftlevel.config.section import Choice
from ftlevel.data.formats.labels import common_prefix_length
from ftlevel.errors import InputError, did_you_mean, join_names
from ftlevel.models.upstream.libraries import apply_template, check_template

Turn = dict[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PYTHON_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
_MARK = "\u2042mark\u2042"


@dataclass(frozen=True)
class RenderedChat:
    """Rendered text of a conversation; `spans` are the (start, end) characters to train on."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def is_target(self, start: int, end: int) -> bool:
        """Returns whether the token at characters `start` to `end` is trained on."""
        return any(
            begin < end <= stop and not self.text[start:begin].strip() for begin, stop in self.spans
        )


def render(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[dict[str, Any]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    """Render `turns` with the chat template; raises `InputError` if it fails or is too slow."""
    return _render(tokenizer, turns, tools, generation_prompt=generation_prompt)[0]


def render_chat(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()
) -> RenderedChat:
    """Returns the rendered `turns` with the span of each assistant turn and its end-of-turn token.

    Raises `InputError` if the template fails or omits a turn or the tools.
    """
    end_tokens = list_special_tokens(tokenizer)
    marked = bool(_GENERATION.search(tokenizer.get_chat_template(None, list(tools) or None)))
    text, spans = _render(tokenizer, turns, tools, marks=marked)
    chat = _Chat(tokenizer, turns, tools)
    if not marked:
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = [chat.get_turn(index, text) for index in answers]
    chat.check_complete(text)
    return RenderedChat(text, tuple(_with_end(text, span, end_tokens) for span in spans))


def list_special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Returns the special tokens as strings, without BOS unless it is also EOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {token.content for token in added.values() if token.special}
    excluded = {tokenizer.bos_token} - {tokenizer.eos_token}
    return tuple((texts | set(tokenizer.all_special_tokens)) - excluded)


def get_end_of_turn_id(tokenizer: Any) -> int | None:
    """Returns the id of the token that ends an assistant turn, or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = render_chat(tokenizer, turns)
    except InputError:  # the template rejects these turns
        return None
    answer = rendered.text[slice(*rendered.spans[-1])] if rendered.spans else ""
    end = next((t for t in list_special_tokens(tokenizer) if answer.endswith(t)), None)
    return tokenizer.convert_tokens_to_ids(end) if end else None


def _render(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[dict[str, Any]],
    *,
    generation_prompt: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError

    tool_list = list(tools) or None
    try:
        return apply_template(
            turns,
            tokenizer.get_chat_template(None, tool_list),
            tools=tool_list,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TimeoutError, MemoryError, RecursionError, *_PYTHON_ERRORS) as error:
        message = str(error) or type(error).__name__
        raise InputError(f"the chat template refuses these messages: {message}.") from None


@dataclass(frozen=True)
class _Chat:
    tokenizer: Any
    turns: Sequence[Turn]
    tools: Sequence[dict[str, Any]]

    def get_turn(self, index: int, text: str) -> tuple[int, int]:
        """Returns the span (start, end) of turn `index` in `text`, with the end-of-turn token."""
        tokenizer, turns, tools = self.tokenizer, self.turns, self.tools
        before = render(tokenizer, turns[:index], tools, generation_prompt=True) if index else ""
        before = before.removesuffix(" ")
        upto = render(tokenizer, turns[: index + 1], tools)
        follows = bool(before) and text.startswith(before)
        if follows and text.startswith(upto) and len(before) < len(upto):
            return len(before), len(upto.rstrip())
        if turns[index].get("tool_calls") and follows:
            special = list_special_tokens(tokenizer)
            closing = next((t for t in special if upto.rstrip().endswith(t)), "")
            end = text.find(closing, len(before))
            if closing and end >= 0:
                return len(before), end + len(closing)
        for content in (str(turns[index]["content"]), str(turns[index]["content"]).strip()):
            start = self._get_marker(index, _MARK + content, text)
            end = self._get_marker(index, content + _MARK, text)
            if content and 0 <= start < end:
                return (len(before) if follows and len(before) <= start else start), end
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} changes earlier turns when a later one "
            f"is added (message {index + 1}), so the answers cannot be located. Choose another "
            "with --chat-template."
        )

    def _get_marker(self, index: int, content: str, text: str) -> int:
        turn = {**self.turns[index], "content": content}
        turns = [*self.turns[:index], turn, *self.turns[index + 1 :]]
        before, mark, after = render(self.tokenizer, turns, self.tools).partition(_MARK)
        return len(before) if mark and before + after == text else -1

    def check_complete(self, text: str) -> None:
        name = self.tokenizer.name_or_path
        for number, turn in enumerate(self.turns, 1):
            content = str(turn["content"]).strip()
            if turn["role"] == "assistant" or content in text:
                continue
            if json.dumps(content)[1:-1] not in text:
                raise InputError(
                    f"the chat template of {name} leaves out message {number}, of role "
                    f"{turn['role']!r}. Choose another with --chat-template."
                )
        if self.tools and render(self.tokenizer, self.turns) == text:
            raise InputError(
                f"the chat template of {name} does not show tools to the model. Use one that "
                "does: --chat-template qwen."
            )


def _with_end(text: str, span: tuple[int, int], end_tokens: Sequence[str]) -> tuple[int, int]:
    start, end = span
    stripped = start + len(text[start:end].rstrip())
    if text[start:stripped].endswith(tuple(end_tokens)):
        return start, stripped
    for after in (end, end + (text[end : end + 1] == " ")):  # the answer may end in white space
        closing = next((token for token in end_tokens if text.startswith(token, after)), None)
        if closing:
            return start, after + len(closing)
    return span


MARKERS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
"""Template → the special tokens that delimit its turns, besides BOS and EOS."""

_FOLDER = Path(__file__).parent / "templates"


def set_chat_template(tokenizer: Any, name: str | None) -> Choice | None:
    """Set the chat template of `tokenizer` (modified) to a built-in template or a Jinja file.

    Returns the log line; None, changing nothing, if `name` is None. Raises `InputError` if the
    template does not exist or compile, or needs tokens that are not in the vocabulary.
    """
    if name is None:
        return None
    has_template = bool(getattr(tokenizer, "chat_template", None))
    template = _read_builtin(tokenizer, name) if name in MARKERS else _read_file(name)
    tokenizer.chat_template = template
    reason = "in place of the model's own" if has_template else "the model has none"
    return Choice("chat template", name, reason)


def list_usable_templates(tokenizer: Any) -> list[str]:
    """Returns the names of the built-in templates whose special tokens `tokenizer` has."""
    vocabulary = tokenizer.get_vocab()
    return [name for name, markers in MARKERS.items() if vocabulary.keys() >= set(markers)]


def _read_builtin(tokenizer: Any, name: str) -> str:
    vocabulary = tokenizer.get_vocab()
    if missing := [marker for marker in MARKERS[name] if marker not in vocabulary]:
        raise InputError(
            f"--chat-template {name}: the tokenizer of {tokenizer.name_or_path} has no token for "
            f"{join_names(missing)}, so the model could not learn to stop. Templates that "
            f"fit its tokens: {join_names(list_usable_templates(tokenizer))}."
        )
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _read_file(name: str) -> str:
    from jinja2 import TemplateSyntaxError

    path = Path(name).expanduser()
    try:
        template = read_plain(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--chat-template {name}: neither a name nor a readable file."
            f"{did_you_mean(name, MARKERS)} Names: {join_names(MARKERS)}."
        ) from error
    try:
        check_template(template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"{path}:{error.lineno}: not a Jinja template ({error.message})."
        ) from None
    except TimeoutError as error:
        raise InputError(f"{path}: the template cannot be compiled ({error}).") from None
    return template


SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_MARKS = {SYSTEM: "\u2042S\u2042", USER: "\u2042U\u2042", ASSISTANT: "\u2042A\u2042"}
_TRIALS = (
    ((USER, "Name three colours."),),
    ((USER, "a"), (ASSISTANT, "b\n\n    c"), (USER, "12 + 3?")),
    (
        (SYSTEM, "Be brief."),
        (USER, "é\n- ü"),
        (ASSISTANT, "x"),
        (USER, "y"),
        (ASSISTANT, "z"),
        (USER, "{ }"),
    ),
    ((SYSTEM, "Be brief."), (USER, "x")),
)


@dataclass(frozen=True)
class ChatLayout:
    """Prefixes and suffixes of turns, which replace a chat template in programs without Jinja.

    Attributes:
        around: role → text before and after the content; has no "system" if the template has none.
        opening: text before a conversation without a system turn, such as a default system prompt.
        generation: generation prompt.
        after_system: text before the user's content after a system turn; None if as in `around`.
    """

    around: dict[str, tuple[str, str]]
    opening: str
    generation: str
    after_system: str | None = None

    def render(self, turns: Sequence[Turn]) -> str:
        """Returns the text of `turns`, followed by the generation prompt."""
        has_system = turns[0]["role"] == SYSTEM
        parts = ["" if has_system else self.opening]
        for index, turn in enumerate(turns):
            before, after = self.around[turn["role"]]
            if has_system and index == 1 and self.after_system is not None:
                before = self.after_system
            parts += [before, turn["content"], after]
        return "".join([*parts, self.generation])


def get_chat_layout(tokenizer: Any) -> ChatLayout | None:
    """Returns the layout of the chat template, inferred by rendering placeholder contents.

    None unless the layout reproduces the template exactly on other conversations.
    """
    try:
        layout = _infer_layout(tokenizer)
        if layout is None or _renders_trials(tokenizer, layout):
            return layout
        if layout.after_system is None:
            return None
        # Mistral puts the system text into the last user turn.
        around = {role: texts for role, texts in layout.around.items() if role != SYSTEM}
        layout = ChatLayout(around, layout.opening, layout.generation)
        return layout if _renders_trials(tokenizer, layout) else None
    except InputError:  # the template rejects a plain conversation
        return None


def _renders_trials(tokenizer: Any, layout: ChatLayout) -> bool:
    for trial in _TRIALS:
        turns = [{"role": role, "content": content} for role, content in trial]
        if SYSTEM not in layout.around and turns[0]["role"] == SYSTEM:
            continue
        if layout.render(turns) != render(tokenizer, turns, generation_prompt=True):
            return False
    return True


def _infer_layout(tokenizer: Any) -> ChatLayout | None:
    single = _split_at_contents(tokenizer, USER)
    several = _split_at_contents(tokenizer, USER, ASSISTANT, USER)
    if single is None or several is None:
        return None
    first, tail = single
    _, to_assistant, to_user, _ = several
    after_user = render(tokenizer, _placeholder_turns(USER)).rpartition(_MARKS[USER])[2]
    shared = after_user[: common_prefix_length(after_user, to_assistant)]
    # without the beginning of a special token
    user_end = re.sub(r"(<\|?|\[/?)$", "", shared)
    assistant_begin = to_assistant.removeprefix(user_end)
    if not tail.startswith(user_end):
        return None
    if to_user.startswith(user_end) and first.endswith(to_user.removeprefix(user_end)):
        user_begin, assistant_end = to_user.removeprefix(user_end), user_end
    else:
        shared = first[len(first) - common_prefix_length(first[::-1], to_user[::-1]) :]
        user_begin = re.sub(r"^[^<\[]*[>\]]", "", shared)  # drop the tail of a special token
        assistant_end = to_user.removesuffix(user_begin)
    around = {USER: (user_begin, user_end), ASSISTANT: (assistant_begin, assistant_end)}
    try:
        system = _split_at_contents(tokenizer, SYSTEM, USER)
    except InputError:  # the template rejects system turns
        system = None
    after_system = None
    if system is not None:
        is_turn = system[1].endswith(user_begin)
        around[SYSTEM] = system[0], system[1].removesuffix(user_begin) if is_turn else system[1]
        after_system = None if is_turn else ""  # Gemma has the system text in the user turn
    opening, generation = first.removesuffix(user_begin), tail.removeprefix(user_end)
    return ChatLayout(around, opening, generation, after_system)


def _placeholder_turns(*roles: str) -> list[Turn]:
    return [{"role": role, "content": _MARKS[role]} for role in roles]


def _split_at_contents(tokenizer: Any, *roles: str) -> list[str] | None:
    text = render(tokenizer, _placeholder_turns(*roles), generation_prompt=True)
    texts = re.split(f"({'|'.join(map(re.escape, _MARKS.values()))})", text)
    return texts[::2] if texts[1::2] == [_MARKS[role] for role in roles] else None
