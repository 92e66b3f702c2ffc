"""Column detection, and the error messages if no format fits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ftlevel.config import DataConfig
from ftlevel.data.formats.columns import format_map_flags
from ftlevel.data.formats.detect import Format
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

GENERATION = "messages, conversations, prompt + completion, instruction + output, text"


def detect(
    columns: Sequence[str],
    task: str,
    mapping: dict[str, str] | None = None,
    name: str | None = None,
) -> Format:
    """Return the format that the task detects, as in every command."""
    return TASKS[task].get_format(columns, DataConfig(columns=mapping or {}, format=name))


@pytest.mark.parametrize(
    ("task", "columns", "description"),
    [
        ("text-generation", "messages topic", "messages: 'messages'; not used: 'topic'"),
        ("text-generation", "ref text", "text: 'text'; not used: 'ref'"),
        (
            "text-generation",
            "conversations system",
            "conversations: 'conversations', 'system'",
        ),
        (
            "text-generation",
            "instruction input output text",
            "instruction + output: 'instruction', 'output', 'input'; not used: 'text'",
        ),
        (
            "text-generation",
            "instruction context response category",
            "instruction + output: 'instruction', output from 'response', input from 'context'; "
            "not used: 'category'",
        ),
        (
            "text-generation",
            "question answer",
            "prompt + completion: prompt from 'question', completion from 'answer'",
        ),
        ("masked-lm", "text label", "text: 'text'; not used: 'label'"),
        (
            "summarization",
            "id dialogue summary",
            "document + summary: document from 'dialogue', 'summary'; not used: 'id'",
        ),
        ("summarization", "text summary", "document + summary: document from 'text', 'summary'"),
        ("summarization", "prompt completion", "prompt + completion: 'prompt', 'completion'"),
        (
            "text-classification",
            "Sentence Label",
            "text + label: text from 'Sentence', label from 'Label'",
        ),
        (
            "text-classification",
            "premise hypothesis label",
            "text + text_pair + label: text from 'premise', text_pair from 'hypothesis', 'label'",
        ),
        (
            "token-classification",
            "tokens ner_tags title",
            "tokens + tags: 'tokens', tags from 'ner_tags'; not used: 'title'",
        ),
        (
            "question-answering",
            "id title context question answers",
            "context + question + answers: 'context', 'question', 'answers', 'id'; "
            "not used: 'title'",
        ),
    ],
)
def test_known_columns(task, columns, description):
    detected = detect(columns.split(), task)
    assert (detected.task, detected.description) == (task, description)


@pytest.mark.parametrize(
    ("task", "columns", "mapping", "expected", "unused"),
    [
        ("summarization", "text body gist", "document=body summary=gist", None, "text"),
        (
            "translation",
            "translation",
            "source=translation.en target=translation.de",
            None,
            "",
        ),
        # another tool's name for a column, if the task has no column of that name
        (
            "summarization",
            "body gist",
            "text=body summary=gist",
            "document=body summary=gist",
            "",
        ),
        (
            "token-classification",
            "words kinds",
            "text=words label=kinds",
            "tokens=words tags=kinds",
            "",
        ),
        # a column is used once
        ("text-generation", "text summary", "completion=summary prompt=text", None, ""),
    ],
)
def test_mapping_overrides_known_names(task, columns, mapping, expected, unused):
    def parse(pairs):
        return dict(pair.split("=") for pair in pairs.split())

    detected = detect(columns.split(), task, parse(mapping))
    assert detected.columns == parse(expected or mapping)
    assert detected.unused == tuple(unused.split())


@pytest.mark.parametrize(
    ("task", "columns", "mapping", "message"),
    [
        (
            "summarization",
            "body gist",
            {},
            "--task summarization: no format matches the columns. Columns: 'body', 'gist'. "
            "Expected one of: document + summary, messages, conversations, prompt + completion, "
            "instruction + output. Map the columns: --map document=body --map summary=gist.",
        ),
        (
            "text-generation",
            "document summary",
            {},
            "--task text-generation: no format matches the columns. Columns: 'document', "
            f"'summary'. Expected one of: {GENERATION}. Map the columns: --map prompt=document "
            "--map completion=summary. These columns fit --task summarization.",
        ),
        (
            "text-generation",
            "id txt",
            {},
            "--task text-generation: no format matches the columns. Columns: 'id', 'txt'. "
            f"Expected one of: {GENERATION}. Map the columns: --map text=txt.",
        ),
        (
            "summarization",
            "text",
            {},
            "--task summarization: no format matches the columns. Columns: 'text'. "
            "Expected one of: document + summary, messages, conversations, prompt + completion, "
            "instruction + output. Map the columns: --map summary=COLUMN. "
            "These columns fit --task text-generation.",
        ),
        (
            "text-generation",
            "a b",
            {"prompt": "a"},
            "--task text-generation: no format matches the columns. Columns: 'a', 'b'. "
            f"Expected one of: {GENERATION}. Map the columns: --map prompt=a --map completion=b.",
        ),
        (
            "text-generation",
            "body",
            {"txt": "bodi"},
            "--map txt=bodi: --task text-generation has no 'txt'. Did you mean 'text'? It has: "
            "messages, system, tools, conversations, prompt, completion, instruction, output, "
            "input, text.\n--map txt=bodi: no column 'bodi'. Did you mean 'body'? Columns: 'body'.",
        ),
        (
            "text-generation",
            "a b",
            {"prompt": "a", "text": "b"},
            "--map prompt=a --map text=b: no format of --task text-generation has all of these. "
            f"Formats: {GENERATION}.",
        ),
    ],
)
def test_unknown_columns_raise(task, columns, mapping, message):
    with pytest.raises(InputError) as error:
        detect(columns.split(), task, mapping)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("task", "columns", "name", "shape"),
    [
        ("text-generation", "instruction output text", "text", "text"),
        ("text-generation", "messages conversations", "sharegpt", "conversations"),
        ("text-generation", "prompt completion instruction output", "Alpaca",
         "instruction + output"),
        ("question-answering", "context question answers", "squad", "context + question + answers"),
        ("summarization", "text summary prompt completion", "prompt_completion",
         "prompt + completion"),
    ],
)  # fmt: skip
def test_format_by_name(task, columns, name, shape):
    assert detect(columns.split(), task, {}, name).name == shape


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        ("text", "mesages", "--format mesages: --task text-generation has no such format. Did you "
         "mean 'messages'? It has: messages, conversations, prompt-completion, "
         "instruction-output, text."),
        ("text", "alpaca", "--task text-generation: no format matches the columns. "
         "Columns: 'text'. Expected one of: instruction + output. Map the columns: "
         "--map instruction=text --map output=COLUMN."),
    ],
)  # fmt: skip
def test_format_that_does_not_fit_raises(columns, name, message):
    with pytest.raises(InputError) as error:
        detect(columns.split(), "text-generation", {}, name)
    assert str(error.value) == message


def test_suggested_mapping_fits_the_requested_format():
    with pytest.raises(InputError, match=r"Map the columns: --map conversations=messages\."):
        detect(["messages"], "text-generation", None, "sharegpt")
    mapping = {"conversations": "messages"}
    assert detect(["messages"], "text-generation", mapping, "sharegpt").columns == mapping


TICKETS = [
    {"Ticket ID": f"T-{i}", "Head line": "late parcel", "What happened": "It came late, alas. " * 3,
     "Queue": "abc"[i % 3], "Created": "2026-01-01"}
    for i in range(9)
]  # fmt: skip
THREADS = [{"thread": [{"who": "a", "said": "b"}], "ref": 7}]


@pytest.mark.parametrize(
    ("task", "rows", "flags"),
    [
        ("text-classification", TICKETS, "--map 'text=What happened' --map label=Queue."),
        ("summarization", TICKETS, "--map 'document=What happened' --map 'summary=Head line'."),
        ("text-generation", THREADS, "--map messages=thread."),
        ("text-classification", [{"image": "a.png", "label": 1}],
         "Columns: 'image', 'label'. 'image' contains no text."),
        ("token-classification", [{"note": "Ada", "marks": [{"start": 0}]}],
         "--map text=note --map spans=marks."),
    ],
)  # fmt: skip
def test_suggested_mapping_uses_row_contents(task, rows, flags):
    with pytest.raises(InputError) as error:
        TASKS[task].get_format(list(rows[0]), DataConfig(), rows)
    assert flags in str(error.value)
    assert "ID" not in str(error.value).partition("Say which is which")[2]


@pytest.mark.parametrize(
    ("mapping", "column"),
    [("2", "Subject"), ("body", "Body"), ("subject + BODY", "Subject+Body"),
     ("3+2", "Body+Subject")],
)  # fmt: skip
def test_mapping_by_number_case_or_joined_columns(mapping, column):
    columns = ["id", "Subject", "Body", "label"]
    detected = detect(columns, "text-classification", {"text": mapping})
    assert detected.columns == {"text": column, "label": "label"}
    assert set(detected.unused) == set(columns) - {"label", *column.split("+")}


def test_exact_name_is_preferred_over_number_and_join():
    for name in ("1", "a+b"):
        detected = detect(["1", "text", "a+b", "label"], "text-classification", {"text": name})
        assert detected.columns["text"] == name


def test_invalid_joined_columns_raise():
    columns = ["text", "a", "b"]
    with pytest.raises(InputError, match=r"--map label=a\+b: only texts can be joined"):
        detect(columns, "text-classification", {"label": "a+b"})
    with pytest.raises(InputError, match=r"--map text=a\+c: no column 'c'"):
        detect(columns, "text-classification", {"text": "a+c"})
    with pytest.raises(InputError, match=r"no column 'a,b'\. .*by a plus: --map text=a\+b\."):
        detect(columns, "text-classification", {"text": "a,b"})


LANGUAGES = [{"translation": {"en": "a", "es": "b"}}]


@pytest.mark.parametrize(
    ("rows", "settings", "columns"),
    [
        (LANGUAGES, {"source_language": "en"}, ("translation.en", "translation.es")),
        (LANGUAGES, {"target_language": "English"}, ("translation.es", "translation.en")),
        ([{"id": 1, "en": "a", "es": "b"}], {"source_language": "es"}, ("es", "en")),
        ([{"en": "a", "es": "b"}], {"columns": {"source": "es"}}, ("es", "en")),
        ([{"English": "a", "German": "b"}], {"source_language": "de"}, ("German", "English")),
        ([{"de": "a", "en": "b", "fr": "c"}], {"source_language": "fr", "target_language": "de"},
         ("fr", "de")),
    ],
)  # fmt: skip
def test_translation_languages_select_columns(rows, settings, columns):
    detected = TASKS["translation"].get_format(list(rows[0]), DataConfig(**settings), rows)
    assert (detected.columns["source"], detected.columns["target"]) == columns


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (["en", "es"], {}, "), and the source language is not given. Add --source-language en "
                           "--target-language es, or another pair."),
        (["de", "en", "fr"], {"source_language": "fr"}, "), and the source language is not given. "
                                                        "Add"),
        (["en", "es"], {"target_language": "fr"}, "--target-language fr: there is no such column"),
    ],
)  # fmt: skip
def test_missing_languages_raise(columns, settings, message):
    with pytest.raises(InputError) as error:
        TASKS["translation"].get_format(columns, DataConfig(**settings))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"},
         "--map prompt=prompt --map completion=chosen."),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}], "rejected": []},
         "--map messages=chosen."),
        ({"chosen": "a", "rejected": "b"}, "--map text=chosen."),
    ],
)  # fmt: skip
def test_preference_rows_suggest_training_on_chosen(row, flags):
    with pytest.raises(InputError) as error:
        TASKS["text-generation"].get_format(list(row), DataConfig(), [row])
    assert str(error.value).endswith(f"or train on the chosen answers only: {flags}")


def test_long_column_names_are_shortened_in_messages():
    columns = ["I ordered it a week ago and it is still there", "billing and it " * 9]
    shown = [f"'{column[:36]}…'" for column in columns]
    for mapping in ({}, {"text": "none"}):
        with pytest.raises(InputError) as error:
            detect(columns, "text-classification", mapping)
        assert f"Columns: {', '.join(shown)}" in str(error.value)
        assert format_map_flags({"text": columns[1]}) not in str(error.value)
    known = detect(columns, "text-classification", {"text": "1", "label": "2"})
    assert f"text from {shown[0]}" in known.description
