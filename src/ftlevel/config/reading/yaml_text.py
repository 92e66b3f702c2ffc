"""YAML that somebody else may have written: plain values of a bounded size.

A date stays the text that it is.
"""

from __future__ import annotations

from typing import Any

_MOST_VALUES = 100_000


class YamlError(ValueError):
    """A text is no YAML, or not of plain values.

    Attributes:
        line: from 1; None where it is not known.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def load_yaml(text: str) -> tuple[Any, Any]:
    """Return the value of `text`, and its node with the lines; None and None of an empty text.

    Raises:
        YamlError: it has none.
    """
    import yaml  # here, because --help needs no YAML

    class Loader(yaml.SafeLoader):
        """YAML's own, but for dates."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            return None, None
        _count(node, {}, set())
        loader = Loader("")
        try:
            return loader.construct_document(node), node
        finally:
            loader.dispose()
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:  # a tag such as !!python/object, or a key that is a list
        mark = error.problem_mark or error.context_mark
        raise YamlError(str(error.problem), mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as error:  # a byte that no text has
        raise YamlError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise YamlError("its values lie too deep in one another") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise YamlError(f"a value does not fit its tag ({error})") from None


def _count(node: Any, counted: dict[int, int], inside: set[int]) -> int:
    """Return how many values `node` stands for, those behind an alias as often as they are named.

    Raises:
        YamlError: too many, or one is within itself.
    """
    if id(node) in counted:
        return counted[id(node)]
    line = node.start_mark.line + 1
    if id(node) in inside:
        raise YamlError("an alias names what it is in", line)
    if isinstance(node.value, str) and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise YamlError("half of a character (\\ud800 to \\udfff) is none", line)
    inside.add(id(node))
    parts = node.value if isinstance(node.value, list) else []
    total = 1 + sum(
        _count(inner, counted, inside)
        for part in parts
        for inner in (part if isinstance(part, tuple) else (part,))
    )
    inside.discard(id(node))
    if total > _MOST_VALUES:
        raise YamlError(f"its aliases stand for more than {_MOST_VALUES:,} values", line)
    counted[id(node)] = total
    return total
