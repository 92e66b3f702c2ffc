"""Chat encoding with published templates: the template's text, with answers supervised."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import published_chat_templates as published
from ftlevel.data.encoding.chat import (
    MARKERS,
    get_end_of_turn_id,
    render,
    render_chat,
    set_chat_template,
)
from ftlevel.data.encoding.encode import encode_causal
from ftlevel.data.encoding.prompts import PromptFormat, encode_prompt
from ftlevel.data.encoding.row import IGNORED
from ftlevel.data.formats.examples import Conversation
from ftlevel.data.formats.turns import Message
from ftlevel.errors import InputError
from tiny_tokenizers import build_tokenizer

FORMAT = PromptFormat("chat-template")
CHAT = (
    Message("system", "Be brief."),
    Message("user", "the file"),
    Message("assistant", "the path"),
    Message("user", "and the value"),
    Message("assistant", "an object"),
)


END = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "qwen-3": "<|im_end|>",
       "gemma-3": "<end_of_turn>", "mistral": "</s>"}  # fmt: skip
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
WITH_TOOL = (
    Message("user", "add one"),
    Message("assistant", "", {"tool_calls": [CALL]}),
    Message("tool", "2"),
    Message("assistant", "It is two."),
)


@pytest.fixture(scope="module", params=list(published.TEMPLATES))
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, published.build(request.param)


def encode(tokenizer: Any, *messages: Message, tools: tuple[Any, ...] = ()) -> Any:
    [row] = encode_causal(tokenizer, [Conversation(messages, 0, tools)], FORMAT)
    return row


def supervised_runs(tokenizer: Any, row: Any) -> list[str]:
    """Return the text of each run of consecutive supervised tokens."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def to_dicts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [message.to_dict() for message in messages]


BLOCKS = (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}END"
    "{% else %}{{ m['content'] }}{% endif %}"
)


def test_generation_prompt_is_prefix_of_training_row(family):
    """The generation prompt equals the unsupervised beginning of the training row."""
    _, tokenizer = family
    row = encode(tokenizer, Message("user", "the file"), Message("assistant", "the path"))
    prompt = encode_prompt(tokenizer, FORMAT, "the file")
    assert row.input_ids[: len(prompt)] == prompt
    assert set(row.labels[: len(prompt)]) == {IGNORED}
    assert row.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_template_ending_in_space(family):
    """The space belongs to the answer, in training and in generation."""
    tokenizer = build_tokenizer(family, chat=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for answer in ("configuration", "42 files"):
        row = encode(tokenizer, Message("user", "the file"), Message("assistant", answer))
        prompt = encode_prompt(tokenizer, FORMAT, "the file")
        assert row.input_ids[: len(prompt)] == prompt
        assert tokenizer.decode(prompt).endswith("assistant:")
        assert row.labels == [IGNORED] * len(prompt) + row.input_ids[len(prompt) :]


def test_end_of_turn_id(family):
    name, tokenizer = family
    assert get_end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(END[name])


def test_tool_calls_are_supervised_but_not_tool_results():
    tokenizer = published.build("qwen-3")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    row = encode(tokenizer, *WITH_TOOL, tools=(TOOL,))
    final = "<think>\n\n</think>\n\nIt is two.<|im_end|>"
    assert supervised_runs(tokenizer, row) == [call, final]
    assert '"name": "add", "parameters"' in tokenizer.decode(row.input_ids)


def test_template_without_tools_raises():
    tokenizer = published.build("chatml")
    chat = (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(InputError, match="does not show tools to the model"):
        encode(tokenizer, *chat, tools=(TOOL,))


def test_template_that_omits_a_turn_raises():
    """Mistral 7B v0.3 omits the system text unless a user turn comes last."""
    tokenizer = published.build("mistral")
    mistral = published.TEMPLATES["mistral"]
    tokenizer.chat_template = mistral.replace("message == users[-1]", "loop.last")
    with pytest.raises(InputError, match="leaves out message 1, of role 'system'"):
        encode(tokenizer, *CHAT)


def test_template_that_changes_earlier_turns_raises():
    tokenizer = published.build("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ messages[-1]['content'] }}{% endfor %}"
    )
    with pytest.raises(InputError, match="changes earlier turns when a later one is added"):
        encode(tokenizer, *CHAT)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (f"<|im_start|>{{{{ m['role'] }}}}\n{BLOCKS.replace('END', '')}<|im_end|>\n", "<|im_end|>"),
        (f"{{{{ m['role'] }}}}: {BLOCKS.replace('END', '{{ eos_token }}')}\n", "<|endoftext|>"),
    ],
)
def test_generation_blocks_include_end_of_turn(template, end):
    tokenizer = (
        published.build("chatml") if end == "<|im_end|>" else build_tokenizer("gpt2", chat=None)
    )
    tokenizer.chat_template = f"{{% for m in messages %}}{template}{{% endfor %}}"
    runs = [run.strip() for run in supervised_runs(tokenizer, encode(tokenizer, *CHAT))]
    assert runs == [f"the path{end}", f"an object{end}"]


@pytest.mark.parametrize(
    ("name", "published_name"),
    [("chatml", "chatml"), ("qwen", "qwen-3"), ("llama-3", "llama-3"), ("gemma", "gemma-3"),
     ("mistral", "mistral")],
)  # fmt: skip
def test_named_templates_match_published_templates(name, published_name):
    tokenizer = published.build(published_name)
    chat = to_dicts(CHAT)
    published_text = render(tokenizer, chat[1:])
    set_chat_template(tokenizer, name)
    if name == "mistral":  # v0.3 has no space after the instruction
        published_text = published_text.replace("[/INST]", " [/INST]")
    named = render_chat(tokenizer, chat[1:])
    assert named.text == published_text.replace("<think>\n\n</think>\n\n", "")
    assert len(named.spans) == 2
    assert all(named.text[:end].endswith(END[published_name]) for _, end in named.spans)
    assert "Be brief." in render(tokenizer, chat)
    runs = [run.strip() for run in supervised_runs(tokenizer, encode(tokenizer, *CHAT))]
    assert runs == [f"the path{END[published_name]}", f"an object{END[published_name]}"]


def test_qwen_template_with_tools():
    tokenizer = published.build("qwen-3")
    set_chat_template(tokenizer, "qwen")
    row = encode(tokenizer, Message("system", "s"), *WITH_TOOL, tools=(TOOL,))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert supervised_runs(tokenizer, row) == [call, "It is two.<|im_end|>"]


def test_template_with_unknown_tokens_raises():
    tokenizer = published.build("mistral")
    with pytest.raises(InputError) as error:
        set_chat_template(tokenizer, "chatml")
    assert "has no token for <|im_start|>, <|im_end|>, so the" in str(error.value)
    assert str(error.value).endswith(
        "so the model could not learn to stop. Templates that fit its tokens: mistral."
    )


@pytest.mark.parametrize(
    ("published_name", "name"), [("gemma-3", "gemma"), ("llama-3", "llama-3"), ("qwen-3", "chatml")]
)
def test_advised_template_fits_the_tokens(published_name, name):
    tokenizer = published.build(published_name)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=f"Add --chat-template {name}, or use a model"):
        encode_causal(tokenizer, [Conversation(CHAT, 0)], PromptFormat("plain"))
    set_chat_template(tokenizer, name)


def test_template_from_file(tmp_path):
    tokenizer = published.build("mistral")
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    choice = set_chat_template(tokenizer, str(tmp_path / "own.jinja"))
    assert choice.reason == "in place of the model's own"
    assert render(tokenizer, [{"role": "user", "content": "x"}]) == "x"
    (tmp_path / "bad.jinja").write_text("x\n{% for %}", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.jinja:2: not a Jinja template"):
        set_chat_template(tokenizer, str(tmp_path / "bad.jinja"))
    with pytest.raises(InputError, match="Did you mean 'chatml'"):
        set_chat_template(tokenizer, "chatlm")


def test_every_named_template_is_packaged():
    from ftlevel.data.encoding import chat

    assert {path.stem for path in chat._FOLDER.glob("*.jinja")} == set(MARKERS)


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Co", "Cn")), min_size=1
).filter(lambda text: text.strip() and "⁂" not in text and "<" not in text)
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.mark.parametrize("name", list(published.TEMPLATES))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.none() | TEXT, pairs=PAIRS)
@example(system=None, pairs=[("a", "b\xa0"), ("c", "d ")])
def test_rendered_text_and_spans_of_random_conversations(name, system, pairs):
    """The text equals the template's; the spans are the assistant texts with end tokens."""
    tokenizer = _TOKENIZERS.setdefault(name, published.build(name))
    messages = [Message("system", system)] if system else []
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    chat = to_dicts(tuple(messages))
    rendered = render_chat(tokenizer, chat)
    assert rendered.text == tokenizer.apply_chat_template(chat, tokenize=False)
    trims = name in ("llama-3", "gemma-3")
    answers = [(answer.strip() if trims else answer) + END[name] for _, answer in pairs]
    spans = [rendered.text[start:end] for start, end in rendered.spans]
    answers_in_text = [span.removeprefix("<think>\n\n</think>\n\n").lstrip() for span in spans]
    assert answers_in_text == [answer.lstrip() for answer in answers]
    row = encode(tokenizer, *messages)
    ids = tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert row.input_ids == ids
    supervised = [label for label in row.labels if label != IGNORED]
    assert supervised.count(tokenizer.convert_tokens_to_ids(END[name])) == len(pairs)


_TOKENIZERS: dict[str, Any] = {}
