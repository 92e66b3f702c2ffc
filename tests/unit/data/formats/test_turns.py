"""OpenAI and ShareGPT turns are converted to one form; invalid turns are reported."""

from __future__ import annotations

import pytest

from ftlevel.data.formats.turns import Message, UnusableRowError, parse_tool_list, parse_turns

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALL_AS_JSON = {"id": "x", "function": {"name": "add", "arguments": '{"a": 1}'}}
CONTENT = "'content' of turn 1 of 'messages'"
END = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "observation", "value": "2"}, Message("tool", "2")),
        (
            {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add", "other": 1},
            Message("tool", "2", {"tool_call_id": "x", "name": "add"}),
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", "", {"tool_calls": [CALL]}),
        ),
        (
            {"role": "assistant", "content": "I add.", "tool_calls": [CALL_AS_JSON]},
            Message("assistant", "I add.", {"tool_calls": [{"id": "x", **CALL}]}),
        ),
        (
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            Message("assistant", "", {"tool_calls": [CALL]}),
        ),
    ],
)
def test_parse_turn(turn, message):
    assert parse_turns([turn, END], "messages")[0] == message


@pytest.mark.parametrize(
    ("turn", "reason", "finding"),
    [
        (
            {"role": "userr", "content": "q"},
            "turn 1 of 'messages' has the unknown role 'userr' (did you mean 'user'?; or map it: "
            "--map user=userr, or assistant=…)",
            "unknown_role",
        ),
        ({"role": "user", "content": None}, f"{CONTENT} is null", "null_content"),
        ({"role": "user", "content": " "}, f"{CONTENT} is empty", "empty_text"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "'arguments' of turn 1 of 'messages' is not valid JSON (Expecting property name "
            "enclosed in double quotes: line 1 column 2 (char 1))",
            "",
        ),
    ],
)
def test_invalid_turn_raises(turn, reason, finding):
    with pytest.raises(UnusableRowError) as error:
        parse_turns([turn, END], "messages")
    assert (str(error.value), error.value.finding) == (reason, finding)


def test_tools_as_list_or_json():
    assert parse_tool_list([CALL], "tools") == (CALL,)
    assert parse_tool_list('[{"name": "add"}]', "tools") == ({"name": "add"},)
    assert parse_tool_list(None, "tools") == parse_tool_list("", "tools") == ()
    with pytest.raises(
        UnusableRowError, match="'tools' is a number, where a list of tools is expected"
    ):
        parse_tool_list(3, "tools")
