"""Ask a server with OpenAI's API, and nobody else: no proxy, no redirect, and all of it bounded."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.errors import InputError
from ftlevel.merging.serving.answers import TOKENS

_LARGEST = 4 * 2**20
"""Bytes of an answer that are read."""
_REASON = 200


@dataclass(frozen=True)
class Heard:
    """What a server answered.

    Attributes:
        text: as it shows it.
        ids: the tokens; None where it does not say them.
        logprobs: of the tokens; None where it does not say them.
    """

    text: str
    ids: list[int] | None = None
    logprobs: list[float] | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Refused(Exception):
    """The server did not take a request; the message is its reason."""


@dataclass
class Client:
    """A server.

    Attributes:
        url: its address.
        timeout: seconds that a request may take.
        how: which of the ways of asking it understood.
    """

    url: str
    timeout: float
    how: int = 0
    _opener: Any = field(
        default_factory=lambda: urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _NoRedirect
        )
    )

    def models(self) -> list[str]:
        """Return the names of its models; none where it does not list them."""
        try:
            rows = self._ask("/models", None).get("data") or []
            return [str(row["id"]) for row in rows]
        except (Refused, InputError, KeyError, TypeError, AttributeError):
            return []  # some fail at it, and are asked all the same

    def complete(self, model: str, prompt: Mapping[str, Any], more: Mapping[str, Any]) -> Heard:
        """Return how it goes on after the tokens of `prompt`, or after its text if it must be text.

        Raises:
            Refused: it understands none of the ways of asking.
        """
        ways = list(_ways(prompt))
        reason = ""
        for number in range(self.how, len(ways)):
            body = {"model": model, "max_tokens": TOKENS, "temperature": 0, **ways[number], **more}
            try:
                heard = _hear(self._ask("/completions", body))
            except Refused as refused:
                reason = str(refused)
                continue
            self.how = number
            return heard
        raise Refused(reason)

    @property
    def by_text(self) -> bool:
        """Whether it takes no token ids."""
        return self.how >= _FIRST_TEXT

    def chat(self, model: str, messages: list[dict[str, str]], more: Mapping[str, Any]) -> Heard:
        """Return its answer to `messages`.

        Raises:
            Refused: it has no chat.
        """
        body = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0,
                "logprobs": True, "return_token_ids": True, **more}  # fmt: skip
        return _hear(self._ask("/chat/completions", body))

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        base = self.url.rstrip("/")
        base = base if base.endswith("/v1") else base + "/v1"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # the config lets only http(s) through
            base + path, data, {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return json.loads(answer.read(_LARGEST))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(_LARGEST).decode(errors="replace").split())[:_REASON]
            raise Refused(f"{path} gave {error.code} ({said or error.reason})") from None
        except ValueError as error:
            raise Refused(f"{path} gave no JSON ({error})") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"--url {self.url}: {reason} at {path}. Start the server, by the command that "
                "export printed, and name its address."
            ) from None


_FIRST_TEXT = 2


def _ways(prompt: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the ways of asking: by token ids if it can be, with logprobs in either form."""
    yield {"prompt": prompt["ids"], "logprobs": 1, "return_token_ids": True}
    yield {"prompt": prompt["ids"], "logprobs": True}
    if prompt.get("rendered"):
        yield {"prompt": prompt["rendered"], "logprobs": True}
        yield {"prompt": prompt["rendered"]}


def _hear(answer: Any) -> Heard:
    """Return what stands in an answer of any of the servers.

    Raises:
        Refused: it is none.
    """
    try:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        said = choice.get("logprobs") or {}
        rows = said.get("content")
        ids: list[int] | None = None
        logprobs: list[float] | None = said.get("token_logprobs")
        if rows is not None:  # llama.cpp and mlx-lm
            ids = [row["id"] for row in rows] if all("id" in row for row in rows) else None
            logprobs = [float(row["logprob"]) for row in rows]
        ids = choice.get("token_ids") or ids
        return Heard(str(text or ""), ids, logprobs or None)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"an answer in another form ({error!r})") from None
