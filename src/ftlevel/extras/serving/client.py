"""Query a server with OpenAI's API, and judge whether an answer is the trained model's.

Requests use no proxy, follow no redirect, and are bounded in time and size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.errors import InputError
from ftlevel.extras.serving.recorded import TOKENS, ReferenceOutput
from ftlevel.safe_io import send_request

_MAX_RESPONSE_BYTES = 4 * 2**20
"""Maximum number of bytes read of a response."""
_MAX_MESSAGE = 200


@dataclass(frozen=True)
class ServerOutput:
    """Output of a server; `ids` and `logprobs` are None if the server does not return them."""

    text: str
    ids: list[int] | None = None
    logprobs: list[float] | None = None


class RequestError(Exception):
    """The server rejected a request; the message is the reason."""


@dataclass
class Client:
    """Client of one server; `format_index` counts the request formats that the server rejected."""

    url: str
    timeout: float
    format_index: int = 0

    def models(self) -> list[str]:
        """Returns the names of the server's models; empty if it does not list them."""
        try:
            return [str(row["id"]) for row in self._request("/models", None).get("data") or []]
        except (RequestError, InputError, KeyError, TypeError, AttributeError):
            return []  # some servers fail here but still answer

    def complete(
        self, model: str, prompt: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> ServerOutput:
        """Returns the completion of `prompt`, sent as token ids or, if those are rejected, as text.

        Raises RequestError if the server accepts no format of the request.
        """
        formats = list(_request_formats(prompt))
        error = ""
        for number in range(self.format_index, len(formats)):
            body = {
                "model": model,
                "max_tokens": TOKENS,
                "temperature": 0,
                **formats[number],
                **extra,
            }
            try:
                output = _parse_response(self._request("/completions", body))
            except RequestError as refused:
                error = str(refused)
                continue
            self.format_index = number
            return output
        raise RequestError(error)

    @property
    def by_text(self) -> bool:
        """Whether prompts are sent as text, because the server rejects token ids."""
        return self.format_index >= _FIRST_TEXT

    def chat(
        self, model: str, messages: list[dict[str, str]], extra: Mapping[str, Any]
    ) -> ServerOutput:
        """Returns the output for `messages`; raises RequestError if there is no chat endpoint."""
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
            **extra,
        }
        return _parse_response(self._request("/chat/completions", body))

    def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """Returns the embedding of each text; raises RequestError if the server returns none."""
        result = self._request("/embeddings", {"model": model, "input": texts})
        try:
            rows = sorted(result["data"], key=lambda row: int(row["index"]))
            return [[float(value) for value in row["embedding"]] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"embeddings in another form ({error!r})") from None

    def rerank(self, model: str, query: str, texts: list[str]) -> list[float]:
        """Returns the score of each text for `query`; RequestError if the server returns none.

        vLLM and llama.cpp read `documents`, text-embeddings-inference `texts` and `raw_scores`.
        """
        body = {"model": model, "query": query, "documents": texts}
        result = self._request("/rerank", {**body, "texts": texts, "raw_scores": True}, version="")
        try:
            rows = result if isinstance(result, list) else result["results"]
            scores = {
                int(row["index"]): float(row.get("score", row.get("relevance_score")))
                for row in rows
            }
            return [scores[at] for at in range(len(texts))]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"scores in another form ({error!r})") from None

    def _request(self, path: str, body: Mapping[str, Any] | None, version: str = "/v1") -> Any:
        base = self.url.rstrip("/").removesuffix("/v1") + version
        data = None if body is None else json.dumps(body).encode()
        try:
            status, text = send_request(base + path, data, self.timeout, _MAX_RESPONSE_BYTES)
            if status >= 300:
                reason = " ".join(text.split())[:_MAX_MESSAGE]
                raise RequestError(f"{path} gave {status} ({reason})")
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} gave no JSON ({error})") from None
        except OSError as error:
            message = str(getattr(error, "reason", error)).strip()
            raise InputError(
                f"--url {self.url}: {message} at {path}. Start the server, with the command that "
                "export printed, and pass its address."
            ) from None


_FIRST_TEXT = 2


def _request_formats(prompt: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the fields of a request in each format to try: first token ids, then text."""
    yield {"prompt": prompt["ids"], "logprobs": 1, "return_token_ids": True}
    yield {"prompt": prompt["ids"], "logprobs": True}
    if prompt.get("rendered"):
        yield {"prompt": prompt["rendered"], "logprobs": True}
        yield {"prompt": prompt["rendered"]}


def _parse_response(response: Any) -> ServerOutput:
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
        return ServerOutput(str(text or ""), ids, logprobs or None)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"an answer in another form ({error!r})") from None


TRAINED = "as trained"
EITHER = "as trained, and as the base"
BASE = "the base's answer"
ELSE = "something else"
_EXACT, _ROUNDED = 0.02, 0.1
_COARSEST = 0.5
_TOLERANCES = {
    "float32": _EXACT,
    "f32": _EXACT,
    **dict.fromkeys(("q8_0", "q5_0", "q4_0"), _COARSEST),
}


@dataclass(frozen=True)
class OutputMatch:
    """Result of comparing one output of a server with the recorded ones.

    Attributes:
        word: TRAINED, BASE, EITHER (it equals both) or ELSE (neither).
        difference: largest difference of a log-probability from the trained model's, or None.
        tokens: number of compared tokens.
    """

    word: str
    difference: float | None
    tokens: int


def tolerance_of(dtype: str) -> float:
    """Returns the largest allowed difference of a log-probability for weights in `dtype`."""
    return _TOLERANCES.get(dtype, _ROUNDED)


def widen_tolerance(
    tolerance: float, outputs: Sequence[ServerOutput], base: Sequence[ReferenceOutput]
) -> float:
    """Returns the larger of `tolerance` and twice the rounding error of a quantized base.

    The rounding error is the difference of `outputs`, the server's for the base, from the recorded
    ones `base`; a server rounds equally with an adapter. If it exceeds that of the coarsest type,
    the server has another base, and `tolerance` is returned unchanged.
    """
    difference = max(
        _distance(one, reference) for one, reference in zip(outputs, base, strict=True)
    )
    return max(tolerance, 2 * difference) if difference <= _COARSEST else tolerance


def _distance(output: ServerOutput, reference: ReferenceOutput) -> float:
    """Returns the largest log-probability difference of `output` and `reference`; 0 if unknown.

    The first different token counts as half the margin between the two most likely tokens.
    """
    if output.ids is None or output.logprobs is None:
        return 0.0
    reference, common = _align(output.ids, reference)
    pairs = zip(output.logprobs[:common], reference.logprobs, strict=False)
    differences = [abs(one - other) for one, other in pairs]
    if common < min(len(output.ids), len(reference.ids)):
        differences.append(reference.margins[common] / 2)
    return max(differences, default=0.0)


def match_output(
    output: ServerOutput, trained: ReferenceOutput, base: ReferenceOutput | None, tolerance: float
) -> OutputMatch:
    """Returns whether `output` matches `trained`, `base`, both or neither, within `tolerance`."""
    is_equal, difference, tokens = _compare_answer(output, trained, tolerance)
    fits_base = base is not None and _compare_answer(output, base, tolerance)[0]
    verdict = (EITHER if fits_base else TRAINED) if is_equal else (BASE if fits_base else ELSE)
    return OutputMatch(verdict, difference, tokens)


def _compare_answer(
    output: ServerOutput, reference: ReferenceOutput, tolerance: float
) -> tuple[bool, float | None, int]:
    """Returns whether `output` matches `reference`, the largest difference, and the token count.

    Correct answers may diverge where the margin to the second token is below twice the tolerance.
    """
    if output.ids is None:
        # Without token ids, equal text means that the logprobs belong to equal tokens.
        same = _printable(output.text) == _printable(reference.text)
        rows = list(zip(output.logprobs or (), reference.logprobs, strict=False)) if same else []
        difference = max((abs(one - other) for one, other in rows), default=None)
        return same and (difference is None or difference <= tolerance), difference, len(rows)
    reference, common = _align(output.ids, reference)
    is_equal = _is_rounding(output, reference, common, tolerance)
    if output.logprobs is None or not common:
        return is_equal, None, 0
    pairs = zip(output.logprobs[:common], reference.logprobs, strict=False)
    difference = max(abs(one - other) for one, other in pairs)
    return is_equal and difference <= tolerance, difference, common


def _is_rounding(
    output: ServerOutput, reference: ReferenceOutput, common: int, tolerance: float
) -> bool:
    """Returns whether outputs with `common` equal tokens are equal or differ by rounding."""
    if common == len(reference.ids):
        return True
    if common == len(output.ids or ()):  # servers omit the end-of-sequence token
        return common == len(reference.ids) - 1
    if reference.margins[common] >= 2 * tolerance:
        return False
    if output.logprobs is None:
        return common > 0
    second = reference.logprobs[common] - reference.margins[common]
    return abs(output.logprobs[common] - second) <= tolerance


def _align(ids: list[int], reference: ReferenceOutput) -> tuple[ReferenceOutput, int]:
    """Returns `reference` without tokens the server omits, and how many of its first tokens match.

    llama.cpp leaves out tokens that end inside a character.
    """
    indices = [index for index in range(len(reference.ids)) if index not in reference.partial]
    trimmed = replace(
        reference,
        ids=[reference.ids[index] for index in indices],
        logprobs=[reference.logprobs[index] for index in indices],
        margins=[reference.margins[index] for index in indices],
    )

    def count_equal(output: ReferenceOutput) -> int:
        pairs = enumerate(zip(ids, output.ids, strict=False))
        unequal = (index for index, (one, other) in pairs if one != other)
        return next(unequal, min(len(ids), len(output.ids)))

    output = max((reference, trimmed), key=count_equal)
    return output, count_equal(output)


def _printable(text: str) -> str:
    return "".join(c for c in text if c != "\ufffd" and (c.isprintable() or c.isspace())).strip()
