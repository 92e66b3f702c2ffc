"""Column detection, and the error messages if no format fits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ftlevel.config import DataConfig
from ftlevel.data.formats import examples
from ftlevel.data.formats.columns import format_map_flags
from ftlevel.data.formats.detect import Format
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

GENERATION = "messages, conversations, prompt + completion, instruction + output, text"
BUILDERS = {
    "conversation": examples.create_conversation,
    "text": examples.create_plain_text,
    "pair": examples.create_pair,
    "labelled": examples.create_labeled_text,
    "tagged": examples.create_tagged_tokens,
    "question": examples.create_question,
}


def detect(
    columns: Sequence[str],
    task: str,
    mapping: dict[str, str] | None = None,
    name: str | None = None,
) -> Format:
    """Return the format that the task detects, as in every command."""
    return TASKS[task].get_format(columns, DataConfig(columns=mapping or {}, format=name))


@pytest.mark.parametrize(
    ("task", "columns", "produces", "description"),
    [
        (
            "text-generation",
            "messages topic",
            "conversation",
            "messages: 'messages'; not used: 'topic'",
        ),
        ("text-generation", "text", "text", "text: 'text'"),
        ("text-generation", "ref text", "text", "text: 'text'; not used: 'ref'"),
        (
            "text-generation",
            "conversations system",
            "conversation",
            "conversations: 'conversations', 'system'",
        ),
        (
            "text-generation",
            "instruction input output text",
            "conversation",
            "instruction + output: 'instruction', 'output', 'input'; not used: 'text'",
        ),
        (
            "text-generation",
            "instruction context response category",
            "conversation",
            "instruction + output: 'instruction', output from 'response', input from 'context'; "
            "not used: 'category'",
        ),
        (
            "text-generation",
            "question answer",
            "conversation",
            "prompt + completion: prompt from 'question', completion from 'answer'",
        ),
        ("masked-lm", "text label", "text", "text: 'text'; not used: 'label'"),
        (
            "summarization",
            "id dialogue summary",
            "pair",
            "document + summary: document from 'dialogue', 'summary'; not used: 'id'",
        ),
        (
            "summarization",
            "article highlights",
            "pair",
            "document + summary: document from 'article', summary from 'highlights'",
        ),
        (
            "summarization",
            "text summary",
            "pair",
            "document + summary: document from 'text', 'summary'",
        ),
        (
            "summarization",
            "prompt completion",
            "pair",
            "prompt + completion: 'prompt', 'completion'",
        ),
        ("text-classification", "text label", "labelled", "text + label: 'text', 'label'"),
        (
            "text-classification",
            "Sentence Label",
            "labelled",
            "text + label: text from 'Sentence', label from 'Label'",
        ),
        (
            "text-classification",
            "premise hypothesis label",
            "labelled",
            "text + text_pair + label: text from 'premise', text_pair from 'hypothesis', 'label'",
        ),
        (
            "text-classification",
            "sentence1 sentence2 label idx",
            "labelled",
            "text + text_pair + label: text from 'sentence1', text_pair from 'sentence2', 'label'; "
            "not used: 'idx'",
        ),
        (
            "token-classification",
            "tokens ner_tags title",
            "tagged",
            "tokens + tags: 'tokens', tags from 'ner_tags'; not used: 'title'",
        ),
        (
            "question-answering",
            "id title context question answers",
            "question",
            "context + question + answers: 'context', 'question', 'answers', 'id'; "
            "not used: 'title'",
        ),
    ],
)
def test_known_columns(task: str, columns: str, produces: str, description: str) -> None:
    detected = detect(columns.split(), task)
    assert (detected.build, detected.description) == (BUILDERS[produces], description)
    assert detected.task == task


def test_mapping_overrides_known_names() -> None:
    detected = detect(
        ["text", "body", "gist"], "summarization", {"document": "body", "summary": "gist"}
    )
    assert detected.columns == {"document": "body", "summary": "gist"}
    assert detected.unused == ("text",)
    nested = {"source": "translation.en", "target": "translation.de"}
    detected = detect(["translation"], "translation", nested)
    assert detected.columns == nested
    assert detected.unused == ()
    # Another tool's name for a column is accepted if the task has no column of that name.
    detected = detect(["body", "gist"], "summarization", {"text": "body", "summary": "gist"})
    assert detected.columns == {"document": "body", "summary": "gist"}
    detected = detect(
        ["words", "kinds"], "token-classification", {"text": "words", "label": "kinds"}
    )
    assert detected.columns == {"tokens": "words", "tags": "kinds"}
    # One mapped column is enough if the other has a known name; a column is used once.
    detected = detect(
        ["text", "summary"], "text-generation", {"completion": "summary", "prompt": "text"}
    )
    assert detected.name == "prompt + completion"


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
            "text-classification",
            "idx txt labl",
            {},
            "--task text-classification: no format matches the columns. Columns: 'idx', "
            "'txt', 'labl'. Expected one of: text + text_pair + label, text + label. "
            "Map the columns: --map text=txt --map label=labl.",
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
def test_unknown_columns_raise(
    task: str, columns: str, mapping: dict[str, str], message: str
) -> None:
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
def test_format_by_name(task: str, columns: str, name: str, shape: str) -> None:
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
def test_format_that_does_not_fit_raises(columns: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        detect(columns.split(), "text-generation", {}, name)
    assert str(error.value) == message


def test_requested_format_error_suggests_mapping() -> None:
    with pytest.raises(InputError) as error:
        detect(["messages"], "text-generation", None, "sharegpt")
    assert str(error.value) == (
        "--task text-generation: no format matches the columns. Columns: 'messages'. "
        "Expected one of: conversations. Map the columns: --map conversations=messages."
    )
    detected = detect(["messages"], "text-generation", {"conversations": "messages"}, "sharegpt")
    assert detected.columns == {"conversations": "messages"}


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
def test_suggested_mapping_uses_row_contents(
    task: str, rows: list[dict[str, object]], flags: str
) -> None:
    with pytest.raises(InputError) as error:
        TASKS[task].get_format(list(rows[0]), DataConfig(), rows)
    assert flags in str(error.value)
    assert "ID" not in str(error.value).partition("Say which is which")[2]


def test_known_names_are_preferred() -> None:
    detected = detect(["Ticket ID", "Subject", "Body", "Category"], "text-classification")
    assert detected.columns == {"text": "Body", "label": "Category"}
    assert detected.unused == ("Ticket ID", "Subject")


@pytest.mark.parametrize(
    ("mapping", "column"),
    [("2", "Subject"), ("body", "Body"), ("subject + BODY", "Subject+Body"),
     ("3+2", "Body+Subject")],
)  # fmt: skip
def test_mapping_by_number_case_or_joined_columns(mapping: str, column: str) -> None:
    columns = ["id", "Subject", "Body", "label"]
    detected = detect(columns, "text-classification", {"text": mapping})
    assert detected.columns == {"text": column, "label": "label"}
    assert set(detected.unused) == set(columns) - {"label", *column.split("+")}


def test_exact_name_is_preferred_over_number_and_join() -> None:
    columns = ["1", "text", "a+b", "label"]
    assert detect(columns, "text-classification", {"text": "1"}).columns["text"] == "1"
    assert detect(columns, "text-classification", {"text": "a+b"}).columns["text"] == "a+b"


def test_invalid_joined_columns_raise() -> None:
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
def test_translation_languages_select_columns(
    rows: list[dict[str, object]], settings: dict[str, object], columns: tuple[str, str]
) -> None:
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
def test_missing_languages_raise(
    columns: list[str], settings: dict[str, object], message: str
) -> None:
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
def test_preference_rows_suggest_training_on_chosen(row: dict[str, object], flags: str) -> None:
    with pytest.raises(InputError) as error:
        TASKS["text-generation"].get_format(list(row), DataConfig(), [row])
    assert str(error.value).endswith(f"or train on the chosen answers only: {flags}")


def test_long_column_names_are_shortened_in_messages() -> None:
    columns = [
        "I ordered it a week ago and it is still not there",
        "billing and everything else " * 9,
    ]
    with pytest.raises(InputError) as error:
        TASKS["text-classification"].get_format(columns, DataConfig())
    message = str(error.value)
    assert (
        "Columns: 'I ordered it a week ago and it is st…', 'billing and everything else billing …'."
        in message
    )
    assert "--map text=1 --map label=2" in message or "--map text=2 --map label=1" in message
    with pytest.raises(InputError, match=r"Columns: 'I ordered it a week ago and it is st…', "):
        TASKS["text-classification"].get_format(columns, DataConfig(columns={"text": "none"}))
    known = TASKS["text-classification"].get_format(
        columns, DataConfig(columns={"text": "1", "label": "2"})
    )
    assert "text from 'I ordered it a week ago and it is st…'" in known.description
    assert format_map_flags({"text": columns[1]}) not in message
