"""A server with vLLM's endpoints for run-time adapters that samples with PEFT.

Usage: python completions_server.py MODEL FAULT. The server prints its port. FAULT is none, stale
(every adapter has the weights of the first) or no-lora (adapters cannot be loaded).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socketserver
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class NoHttp(socketserver.StreamRequestHandler):
    """Answers a request as Redis does."""

    def handle(self) -> None:
        """Read the request line, and refuse it."""
        self.rfile.readline()
        self.wfile.write(b"-ERR unknown command\r\n")


@contextlib.contextmanager
def server_without_http() -> Iterator[str]:
    """Yield the address of a server that does not speak HTTP."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), NoHttp) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Server(ThreadingHTTPServer):
    """A model with its adapters."""

    def __init__(self, model: str, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.fault, self.lock = fault, Lock()
        self.first: str | None = None
        self.names: set[str] = set()

    def load(self, name: str, path: str) -> None:
        """Load the adapter in `path`."""
        if self.fault == "stale":
            if self.first is None:
                self.first = str(Path(path).parent / "first")
                shutil.copytree(path, self.first)
            path = self.first
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, name).eval()
        self.names.add(name)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the choices of a request, sampled without a cache."""
        self.model.set_adapter(body["model"])
        choices = []
        generator = torch.Generator().manual_seed(body["seed"])
        for index in range(body["n"]):
            ids, logps, reason = list(body["prompt"]), [], "length"
            for _ in range(body["max_tokens"]):
                logits = self.model(torch.tensor([ids])).logits[0, -1] / body["temperature"]
                log_probabilities = logits.log_softmax(-1)
                token = int(torch.multinomial(log_probabilities.exp(), 1, generator=generator))
                ids.append(token)
                logps.append(float(log_probabilities[token]))
                if token in body["stop_token_ids"]:
                    reason = "stop"
                    break
            choices.append(
                {
                    "index": index,
                    "token_ids": ids[len(body["prompt"]) :],
                    "logprobs": {"token_logprobs": logps},
                    "finish_reason": reason,
                }
            )
        return choices


class Handler(BaseHTTPRequestHandler):
    """The endpoints."""

    server: Server

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def reply(self, answer: Any, code: int = 200) -> None:
        """Send `answer` as JSON."""
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """List the models."""
        self.reply({"data": [{"id": "base"}, *({"id": name} for name in self.server.names)]})

    def do_POST(self) -> None:
        """Load or unload an adapter, or sample."""
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body.get("lora_name") or body.get("model")
        with server.lock:
            if "lora" in self.path and server.fault == "no-lora":
                self.reply({"detail": "Not Found"}, 404)
            elif self.path == "/v1/load_lora_adapter":
                server.load(name, body["lora_path"])
                self.reply(f"Success: LoRA adapter '{name}' added successfully.")
            elif name not in server.names:
                message = f"The lora adapter '{name}' cannot be found."
                self.reply({"error": {"message": message}}, 404)
            elif self.path == "/v1/unload_lora_adapter":
                server.names.remove(name)
                self.reply(f"Success: LoRA adapter '{name}' removed successfully.")
            else:
                self.reply({"model": name, "choices": server.complete(body)})


def serve(model: str, fault: str) -> None:
    """Serve a model; print the port."""
    server = Server(model, fault)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[1:])
