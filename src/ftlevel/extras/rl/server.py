"""Sample completions with a vLLM server that loads the current adapter before each rollout.

The server reads the adapter from a directory of this machine. Each version gets a new name and is
checked: the log-probabilities of a completion must be those of the current weights.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlevel.artifacts.files import Workspace
from ftlevel.config import MethodConfig
from ftlevel.errors import ConfigError, RunError
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.rows import TokenLogps, create_completion_row
from ftlevel.extras.rl.sampling import Completion, Noise, SamplingOptions
from ftlevel.safe_io import send_request
from ftlevel.trained.adapt import save_adapter

BOUND = 0.15
"""Largest mean |Δ log-probability| that rounding explains, in nats; measured: 0.091 in bfloat16."""

NUM_TEST_TOKENS = 32
_MAX_REQUESTS = 64  # requests
_TIMEOUT = 600.0
_MAX_BYTES = 64 * 2**20  # bytes of a response
_SEEDS = 2**31

START = (
    "Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora "
    "--max-lora-rank R --logprobs-mode processed_logprobs"
)


class _RefusedError(Exception):
    """The server returned an error; `code` is its HTTP status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def check_server(config: RlConfig) -> None:
    """Raise ConfigError if the server of `--rollouts` cannot be used; loads no weights."""
    url = config.rollouts
    if url is None:
        return
    try:
        _request(url, "/v1/models", None, 10.0)
        _request(url, "/v1/unload_lora_adapter", {"lora_name": "ftlevel-none"}, 10.0)
    except OSError as error:
        message = getattr(error, "reason", error)
        raise ConfigError(f"--rollouts {url}: no server answers ({message}). {START}.") from None
    except _RefusedError as error:
        if error.code == 404 and "ftlevel-none" in str(error):
            return
        raise ConfigError(
            f"--rollouts {url}: the server cannot load adapters at run time ({error}). {START}."
        ) from None


@contextlib.contextmanager
def using_weights(
    parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Set `parameters` to `values` inside the `with` block."""
    current = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, current, strict=True):
            parameter.data = value


class ServerSampler:
    """Sampler that uses the vLLM server of `--rollouts` in place of `GroupSampler`.

    `token_logps` computes log-probabilities with the current weights of `model`. The server draws
    the random numbers, from a seed per prompt.
    """

    def __init__(
        self,
        url: str,
        model: Any,
        method: MethodConfig,
        start: dict[str, Any],
        token_logps: TokenLogps,
    ) -> None:
        self._url, self._model, self._method, self._start = url, model, method, start
        self._token_logps = token_logps
        self._workspace = Workspace("rollouts")
        self._version = 0
        self._loaded: list[torch.Tensor] = []

    def sample(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        noise: Noise,
    ) -> list[list[Completion]]:
        """Returns completions per prompt; RunError if the server fails or has other weights."""
        try:
            self._update(prompts[0], options)
            keys = noise(rows, [0] * len(rows), [0] * len(rows)).tolist()
            request = partial(self._complete, options=options)
            with ThreadPoolExecutor(min(_MAX_REQUESTS, len(prompts))) as pool:
                return list(pool.map(request, prompts, [key % _SEEDS for key in keys]))
        except (OSError, _RefusedError) as error:
            raise RunError(
                f"--rollouts {self._url} failed: {getattr(error, 'reason', error)}. Correct it and "
                "resume with --resume."
            ) from None

    @property
    def _name(self) -> str:
        return f"{Path(self._workspace.name).parent.name}-{self._version}"

    def _update(self, prompt: list[int], options: SamplingOptions) -> None:
        """Load the adapter into the server if its weights changed, and check it on `prompt`."""
        trained = [p.detach() for p in self._model.parameters() if p.requires_grad]
        if self._loaded and all(map(torch.equal, trained, self._loaded)):
            return
        before, former = self._loaded, self._name
        self._version += 1
        adapter_dir = Path(self._workspace.name) / self._name
        save_adapter(self._model, self._method, adapter_dir, self._start)
        body = {"lora_name": self._name, "lora_path": str(adapter_dir)}
        _request(self._url, "/v1/load_lora_adapter", body, _TIMEOUT)
        if before:
            _request(self._url, "/v1/unload_lora_adapter", {"lora_name": former}, _TIMEOUT)
            shutil.rmtree(adapter_dir.with_name(former))
        self._check_weights(prompt, options, before)
        self._loaded = [tensor.clone() for tensor in trained]

    def _check_weights(
        self, prompt: list[int], options: SamplingOptions, before: Sequence[torch.Tensor]
    ) -> None:
        """Raise RunError unless the server has the current weights of the model.

        The server's log-probabilities must be close to the model's, and not much closer to those
        that the model has with `before`, the weights of the previous version.
        """
        output = self._complete(prompt, self._version, options, NUM_TEST_TOKENS)
        row = create_completion_row(prompt, output.ids, 0, 0, [])
        has_tokens = max(output.ids) < len(self._model.get_input_embeddings().weight)
        difference = former = float("inf")
        if has_tokens:
            difference = _difference(output, self._token_logps([row])[0])
        if before and has_tokens:
            with using_weights([p for p in self._model.parameters() if p.requires_grad], before):
                former = _difference(output, self._token_logps([row])[0])
        if difference <= BOUND and former >= difference / 2:
            return
        suffix = f", and by {former:.2g} from those of the former adapter" if before else ""
        raise RunError(
            f"--rollouts {self._url}: the server answers with other weights. Its log-probabilities "
            f"differ by {difference:.2g} nats a token from those of the trained model{suffix}; "
            f"rounding explains {BOUND:g}. The server needs the same base model in the same "
            f"precision, and must load each adapter anew. {START}."
        )

    def _complete(
        self, prompt: list[int], seed: int, options: SamplingOptions, num_test_tokens: int = 0
    ) -> Any:
        """Returns a prompt's completions; with `num_test_tokens`, one completion of that length."""
        body = {
            "model": self._name,
            "prompt": prompt,
            "n": 1 if num_test_tokens else options.count,
            "max_tokens": num_test_tokens or options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": bool(num_test_tokens),
            "stop_token_ids": [] if num_test_tokens else list(options.stops),
            "stop": [] if num_test_tokens else list(options.stop_texts),
        }
        response = _request(self._url, "/v1/completions", body, _TIMEOUT)
        try:
            outputs = [_parse_choice(choice) for choice in response["choices"]]
        except (KeyError, TypeError):
            raise _RefusedError(
                200, "its answer has no token ids with log-probabilities; vLLM 0.10 or later does"
            ) from None
        if response["model"] != self._name:
            raise _RefusedError(200, f"{response['model']} answered in place of {self._name}")
        return outputs[0] if num_test_tokens else outputs


def _parse_choice(choice: Mapping[str, Any]) -> Completion:
    logps = [float(logp) for logp in choice["logprobs"]["token_logprobs"]]
    return Completion(list(choice["token_ids"]), logps, [], choice["finish_reason"] == "stop")


def _difference(output: Completion, logps: Sequence[float]) -> float:
    return float(np.abs(np.subtract(output.logps, logps)).mean())


def _request(url: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
    """Returns parsed JSON or text; OSError without a response, _RefusedError for an HTTP error."""
    data = None if body is None else json.dumps(body).encode()
    status, text = send_request(url.rstrip("/") + path, data, timeout, _MAX_BYTES)
    if status >= 300:
        raise _RefusedError(status, f"{path}: {status} {' '.join(text.split())[:300]}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
