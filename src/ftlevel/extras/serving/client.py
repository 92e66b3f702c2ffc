"""Query a server with OpenAI's API, and judge whether an answer is the trained model's.

Requests use no proxy, follow no redirect, and are bounded in time and size.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.errors import InputError
from ftlevel.extras.serving.recorded import TOKENS, Answer

_LARGEST = 4 * 2**20
"""Maximum number of bytes read of a response."""
_REASON = 200


@dataclass(frozen=True)
class ServerAnswer:
    """A server's answer; `ids` and `logprobs` are None if the server does not return them."""

    text: str
    ids: list[int] | None = None
    logprobs: list[float] | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class RequestRefusedError(Exception):
    """The server rejected a request; the message is the reason."""


@dataclass
class Client:
    """Client of one server; `how` is the index of the request form that the server accepts."""

    url: str
    timeout: float
    how: int = 0
    _opener: Any = field(
        default_factory=lambda: urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _NoRedirect
        )
    )

    def models(self) -> list[str]:
        """Returns the names of the server's models; empty if it does not list them."""
        try:
            rows = self._ask("/models", None).get("data") or []
            return [str(row["id"]) for row in rows]
        except (RequestRefusedError, InputError, KeyError, TypeError, AttributeError):
            return []  # some servers fail here but still answer

    def complete(
        self, model: str, prompt: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> ServerAnswer:
        """Returns the completion of `prompt`, sent as token ids or, if necessary, as text.

        Raises RequestRefusedError if the server accepts no form of the request.
        """
        forms = list(_ways(prompt))
        error = ""
        for number in range(self.how, len(forms)):
            body = {
                "model": model,
                "max_tokens": TOKENS,
                "temperature": 0,
                **forms[number],
                **extra,
            }
            try:
                answer = _parse_response(self._ask("/completions", body))
            except RequestRefusedError as refused:
                error = str(refused)
                continue
            self.how = number
            return answer
        raise RequestRefusedError(error)

    @property
    def by_text(self) -> bool:
        """Whether the server accepts only text, not token ids."""
        return self.how >= _FIRST_TEXT

    def chat(
        self, model: str, messages: list[dict[str, str]], extra: Mapping[str, Any]
    ) -> ServerAnswer:
        """Returns the answer to `messages`; RequestRefusedError if there is no chat endpoint."""
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
            **extra,
        }
        return _parse_response(self._ask("/chat/completions", body))

    def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """Returns the embedding of each text; RequestRefusedError if the server returns none."""
        result = self._ask("/embeddings", {"model": model, "input": texts})
        try:
            rows = sorted(result["data"], key=lambda row: int(row["index"]))
            return [[float(value) for value in row["embedding"]] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestRefusedError(f"embeddings in another form ({error!r})") from None

    def rerank(self, model: str, query: str, texts: list[str]) -> list[float]:
        """Returns the score of each text; RequestRefusedError if the server returns none.

        vLLM and llama.cpp read `documents`, text-embeddings-inference `texts` and `raw_scores`.
        """
        body = {"model": model, "query": query, "documents": texts}
        result = self._ask("/rerank", {**body, "texts": texts, "raw_scores": True}, version="")
        try:
            rows = result if isinstance(result, list) else result["results"]
            scores = {
                int(row["index"]): float(row.get("score", row.get("relevance_score")))
                for row in rows
            }
            return [scores[at] for at in range(len(texts))]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestRefusedError(f"scores in another form ({error!r})") from None

    def _ask(self, path: str, body: Mapping[str, Any] | None, version: str = "/v1") -> Any:
        base = self.url.rstrip("/").removesuffix("/v1") + version
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # the config validates http(s)
            base + path, data, {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return json.loads(answer.read(_LARGEST))
        except urllib.error.HTTPError as error:
            text = " ".join(error.read(_LARGEST).decode(errors="replace").split())[:_REASON]
            raise RequestRefusedError(
                f"{path} gave {error.code} ({text or error.reason})"
            ) from None
        except ValueError as error:
            raise RequestRefusedError(f"{path} gave no JSON ({error})") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"--url {self.url}: {reason} at {path}. Start the server, by the command that "
                "export printed, and name its address."
            ) from None


_FIRST_TEXT = 2


def _ways(prompt: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the forms of a request, token ids first, with `logprobs` as a number or as a flag."""
    yield {"prompt": prompt["ids"], "logprobs": 1, "return_token_ids": True}
    yield {"prompt": prompt["ids"], "logprobs": True}
    if prompt.get("rendered"):
        yield {"prompt": prompt["rendered"], "logprobs": True}
        yield {"prompt": prompt["rendered"]}


def _parse_response(response: Any) -> ServerAnswer:
    """Parse a response of any server; raise RequestRefusedError if its form is unknown."""
    try:
        choice = response["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        logprobs_field = choice.get("logprobs") or {}
        rows = logprobs_field.get("content")
        ids: list[int] | None = None
        logprobs: list[float] | None = logprobs_field.get("token_logprobs")
        if rows is not None:  # llama.cpp, mlx-lm
            ids = [row["id"] for row in rows] if all("id" in row for row in rows) else None
            logprobs = [float(row["logprob"]) for row in rows]
        ids = choice.get("token_ids") or ids
        return ServerAnswer(str(text or ""), ids, logprobs or None)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RequestRefusedError(f"an answer in another form ({error!r})") from None


TRAINED = "as trained"
EITHER = "as trained, and as the base"
BASE = "the base's answer"
ELSE = "something else"
_EXACT, _ROUNDED = 0.02, 0.1
_COARSEST = 0.5
_LARGEST_OF = {
    "float32": _EXACT,
    "f32": _EXACT,
    **dict.fromkeys(("q8_0", "q5_0", "q4_0"), _COARSEST),
}


@dataclass(frozen=True)
class Verdict:
    """Verdict on one answer, from its first `tokens` tokens.

    `difference` is the largest difference of a log-probability from the trained model's; None if
    the server returns no log-probabilities.
    """

    word: str
    difference: float | None
    tokens: int


def tolerance_of(dtype: str) -> float:
    """Returns the allowed difference of log-probabilities for weights served in `dtype`."""
    return _LARGEST_OF.get(dtype, _ROUNDED)


def widen_tolerance(
    tolerance: float, answers: Sequence[ServerAnswer], base: Sequence[Answer]
) -> float:
    """Returns the allowed difference of log-probabilities: at least twice the error on the base.

    A quantized base rounds activations equally with and without an adapter. The server's base
    outputs (`answers`) differ from the recorded `base` by this rounding. If they differ by more
    than with the coarsest type, the model is a different one; `tolerance` is returned unchanged.
    """
    difference = max(_distance(one, recorded) for one, recorded in zip(answers, base, strict=True))
    return max(tolerance, 2 * difference) if difference <= _COARSEST else tolerance


def _distance(answer: ServerAnswer, recorded: Answer) -> float:
    """Returns the largest difference of a log-probability between `answer` and `recorded`.

    At the first different token, the difference is half the margin of the two likeliest tokens.
    """
    if answer.ids is None or answer.logprobs is None:
        return 0.0
    recorded, common = _align(answer.ids, recorded)
    pairs = zip(answer.logprobs[:common], recorded.logprobs, strict=False)
    moved = [abs(one - other) for one, other in pairs]
    if common < min(len(answer.ids), len(recorded.ids)):
        moved.append(recorded.margins[common] / 2)
    return max(moved, default=0.0)


def judge_answer(
    answer: ServerAnswer, trained: Answer, base: Answer | None, tolerance: float
) -> Verdict:
    """Returns which recorded answer matches: the trained model's, the base's, both or neither."""
    fits, difference, tokens = _compare_answer(answer, trained, tolerance)
    fits_base = base is not None and _compare_answer(answer, base, tolerance)[0]
    verdict = (EITHER if fits_base else TRAINED) if fits else (BASE if fits_base else ELSE)
    return Verdict(verdict, difference, tokens)


def _compare_answer(
    answer: ServerAnswer, recorded: Answer, tolerance: float
) -> tuple[bool, float | None, int]:
    """Returns whether `answer` matches `recorded`, the largest difference, and the token count.

    Correct answers may diverge where the margin to the second token is below twice the tolerance.
    """
    if answer.ids is None:
        # Without token ids, equal text means that the logprobs belong to equal tokens.
        same = _plain(answer.text) == _plain(recorded.text)
        rows = list(zip(answer.logprobs or (), recorded.logprobs, strict=False)) if same else []
        difference = max((abs(one - other) for one, other in rows), default=None)
        return same and (difference is None or difference <= tolerance), difference, len(rows)
    recorded, common = _align(answer.ids, recorded)
    fits = _part_rightly(answer, recorded, common, tolerance)
    if answer.logprobs is None or not common:
        return fits, None, 0
    pairs = zip(answer.logprobs[:common], recorded.logprobs, strict=False)
    difference = max(abs(one - other) for one, other in pairs)
    return fits and difference <= tolerance, difference, common


def _part_rightly(answer: ServerAnswer, recorded: Answer, common: int, tolerance: float) -> bool:
    """Returns whether rounding can explain that the answers differ after `common` tokens."""
    if common == len(recorded.ids):
        return True
    if common == len(answer.ids or ()):  # servers omit the end-of-sequence token
        return common == len(recorded.ids) - 1
    if recorded.margins[common] >= 2 * tolerance:
        return False
    if answer.logprobs is None:
        return common > 0
    second = recorded.logprobs[common] - recorded.margins[common]
    return abs(answer.logprobs[common] - second) <= tolerance


def _align(ids: list[int], recorded: Answer) -> tuple[Answer, int]:
    """Returns `recorded` as the server lists it, and the number of equal tokens from the start.

    llama.cpp omits tokens that end inside a character from its list.
    """
    listed = [index for index in range(len(recorded.ids)) if index not in recorded.partial]
    trimmed = replace(
        recorded,
        ids=[recorded.ids[index] for index in listed],
        logprobs=[recorded.logprobs[index] for index in listed],
        margins=[recorded.margins[index] for index in listed],
    )

    def count_equal(answer: Answer) -> int:
        pairs = enumerate(zip(ids, answer.ids, strict=False))
        unequal = (index for index, (one, other) in pairs if one != other)
        return next(unequal, min(len(ids), len(answer.ids)))

    answer = max((recorded, trimmed), key=count_equal)
    return answer, count_equal(answer)


def _plain(text: str) -> str:
    return "".join(c for c in text if c != "\ufffd" and (c.isprintable() or c.isspace())).strip()
