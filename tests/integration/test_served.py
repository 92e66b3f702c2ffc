"""Exported adapters served by llama.cpp, checked over HTTP with check-served."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from command_line import Cli
from completions_server import server_without_http
from export_cases import exportable_model
from ftlevel.cli.app import run
from ftlevel.errors import InputError, RunError
from ftlevel.extras.serving import check as commands
from ftlevel.extras.serving.check import check_served, run_library
from ftlevel.extras.serving.client import ServerOutput, match_output, widen_tolerance
from ftlevel.extras.serving.config import CheckServedConfig, ExportConfig
from ftlevel.extras.serving.exporting import export
from ftlevel.extras.serving.recorded import ReferenceOutput
from ftlevel.trained.resolve import resolve_model
from run_files import read_json
from served_cases import CASES, write_adapter
from tiny_models import save_tiny

NAMES = ("rslora", "patterns", "pissa", "adalora", "vera")


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that generates only complete characters, five adapters on it, and their export."""
    directory = tmp_path_factory.mktemp("served")
    tiny = functools.partial(save_tiny, directory / "tiny")
    base = exportable_model(tiny, directory, "llama")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][:270] = 0  # special tokens and bytes
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for name in NAMES:
        case = CASES[name]
        write_adapter(base, directory / "adapters" / name, case.settings, scale=case.scale)
    out = directory / "out"
    export(ExportConfig(model=str(directory / "adapters"), out=out, server="llama.cpp"))
    export(ExportConfig(model=str(base), out=directory / "base.gguf", outtype="f32", verify=False))
    return directory


@contextlib.contextmanager
def llama_server(
    base: Path, adapters: list[Path], *, scale: float = 1.0, apply: bool = False, ram: int = 0
) -> Iterator[str]:
    """Start llama.cpp's server and yield its URL."""
    params = xllamacpp.CommonParams()
    params.model.path, params.port = str(base), 0
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    rows = []
    for path in adapters:
        row = xllamacpp.CommonAdapterLoraInfo()
        row.path, row.scale = str(path), scale
        rows.append(row)
    params.lora_adapters, params.lora_init_without_apply = rows, not apply
    params.cache_ram_mib = ram
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def adapter_files(out: Path) -> list[Path]:
    served = read_json(out / "served.json")
    return [out / adapter["place"] for adapter in served["adapters"]]


def test_llama_cpp_serves_every_adapter_as_trained(export_dir: Path) -> None:
    out = export_dir / "out"
    with llama_server(export_dir / "base.gguf", adapter_files(out)) as url:
        summary = check_served(CheckServedConfig(out=out, url=url)).summary
    assert [adapter["name"] for adapter in summary["adapters"]] == sorted(NAMES)
    for adapter in summary["adapters"]:
        assert set(adapter["weights"]["answers"]) <= {
            "as trained", "as trained, and as the base"
        }, adapter  # fmt: skip
        assert "as trained" in adapter["weights"]["answers"]
        assert adapter["weights"]["difference"] < 0.005
        assert adapter["by"] == "token ids"


def test_q4_0_export_is_served_as_trained(
    export_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance is larger because llama.cpp may also round activations."""
    out, tolerances = tmp_path / "x.gguf", set()
    export(ExportConfig(model=str(export_dir / "adapters" / NAMES[0]), out=out, server="llama.cpp",
                        format="gguf", outtype="q4_0"))  # fmt: skip

    def match_with_small_tolerance(output: Any, trained: Any, base: Any, tolerance: float) -> Any:
        tolerances.add(tolerance)
        return match_output(output, trained, base, 0.02)  # outputs of tiny models differ little

    monkeypatch.setattr(commands, "match_output", match_with_small_tolerance)
    summary = check_served(CheckServedConfig(out=out, inside="llama.cpp")).summary
    assert (summary["verdict"], tolerances) == ("as trained", {0.5})


@pytest.fixture(scope="module")
def quantized_base_export(
    smollm2: Path, first_blocks: Path, first_blocks_gguf: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """An adapter of real weights in Q4_1, written for llama.cpp."""
    export_dir = tmp_path_factory.mktemp("blocks")
    settings = CASES["lora"].settings | {"lora_alpha": 128}  # changes logits by more than rounding
    write_adapter(first_blocks, export_dir / "lora", settings)
    path = export_dir / "lora" / "adapter_config.json"
    config = read_json(path) | {"base_model_name_or_path": str(first_blocks_gguf)}
    path.write_text(json.dumps(config))
    export(ExportConfig(model=str(export_dir / "lora"), out=export_dir / "out", format="gguf-lora"))
    return export_dir / "out"


def test_tolerance_on_quantized_base_covers_rounding(quantized_base_export: Path) -> None:
    summary = check_served(CheckServedConfig(out=quantized_base_export, inside="llama.cpp")).summary
    assert summary["verdict"] == "as trained"
    [adapter] = summary["adapters"]
    assert 0.02 < adapter["weights"]["difference"] <= adapter["tolerance"] < 1


def shuffle_rows(b: Any) -> Any:
    return np.random.default_rng(0).permutation(b, axis=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: 2 * b, "answers neither as trained nor as the base"),
        (
            lambda b: 0 * b,
            "returns the base model's outputs: the adapter is not applied. Select the adapter "
            "with --model, and start the server as export printed:",
        ),
        pytest.param(
            shuffle_rows,
            r"answers neither as trained nor as the base|returns the base model",
            marks=pytest.mark.sweep,
        ),
    ],
    ids=["scaled by 2", "not applied", "shuffled"],
)
def test_wrong_adapter_on_quantized_base_raises(
    quantized_base_export: Path, tmp_path: Path, change: Any, message: str
) -> None:
    out = shutil.copytree(quantized_base_export, tmp_path / "out")
    reader = GGUFReader(str(out / "adapter.gguf"), "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(".lora_b"):
            tensor.data[...] = change(tensor.data)
    reader.data.flush()
    with pytest.raises(RunError, match=message):
        check_served(CheckServedConfig(out=out, inside="llama.cpp"))


def test_tolerance_is_not_widened_for_other_base() -> None:
    reference = ReferenceOutput([1, 2], [-1.0, -2.0], [3.0, 3.0], "a b")
    near = ServerOutput("a b", [1, 2], [-1.1, -2.0])
    far = ServerOutput("a b", [1, 2], [-1.0, -2.7])
    unrelated = ServerOutput("c", [7], [-1.0])
    assert widen_tolerance(0.02, [near], [reference]) == pytest.approx(0.2)
    assert widen_tolerance(0.02, [far], [reference]) == 0.02
    assert widen_tolerance(0.02, [near, unrelated], [reference, reference]) == 0.02
    assert widen_tolerance(0.1, [near], [replace(reference, logprobs=[-1.11, -2.0])]) == 0.1


@pytest.mark.parametrize(
    ("ids", "logprobs", "word"),
    [
        ([1, 2, 3, 4, 5], [-1.0, -1.0, -1.0, -1.0, -1.0], "as trained"),  # lists every token
        ([1, 3, 5], [-1.0, -1.0, -1.0], "as trained"),  # 2 and 4 end inside a character
        ([1, 3, 6], [-1.0, -1.0, -1.01], "as trained"),  # the last two tokens are equally likely
        ([1, 3, 6], [-1.0, -1.0, -3.0], "something else"),
        ([1, 6, 5], [-1.0, -1.0, -1.0], "something else"),
        ([1, 5], [-1.0, -1.0], "something else"),
    ],
)
def test_tokens_inside_a_character_may_be_missing(
    ids: list[int], logprobs: list[float], word: str
) -> None:
    reference = ReferenceOutput(
        [1, 2, 3, 4, 5], [-1.0] * 5, [3.0, 3.0, 3.0, 3.0, 0.001], "a \u65e5b", [1, 3]
    )
    assert match_output(ServerOutput("", ids, logprobs), reference, None, 0.02).word == word


def test_llama_server_prompt_cache_mixes_adapters(export_dir: Path) -> None:
    """Canary of `--cache-ram 0`: if this test fails, the start command may drop the flag."""
    out = export_dir / "out"
    with (
        llama_server(export_dir / "base.gguf", adapter_files(out), ram=512) as url,
        pytest.raises(RunError, match=r"neither as trained nor as the base|the base model"),
    ):
        check_served(CheckServedConfig(out=out, url=url))


def test_unapplied_or_rescaled_adapter_raises(export_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ExportConfig(model=str(export_dir / "adapters" / "rslora"), out=out, server="llama.cpp"))
    with (
        llama_server(export_dir / "base.gguf", []) as url,
        pytest.raises(
            RunError,
            match=(
                r"returns the base model's outputs: the adapter is not applied\. Select the "
                r"adapter with --model, and start the server as export printed:"
            ),
        ),
    ):
        check_served(CheckServedConfig(out=out, url=url))
    # 2 / 5.66 is the ratio of alpha / r to rsLoRA's alpha / √r.
    with (
        llama_server(
            export_dir / "base.gguf", [out / "adapter.gguf"], scale=0.354, apply=True
        ) as url,
        pytest.raises(RunError, match="answers neither as trained nor as the base"),
    ):
        check_served(CheckServedConfig(out=out, url=url))
    with llama_server(export_dir / "base.gguf", [out / "adapter.gguf"], apply=True) as url:
        assert check_served(CheckServedConfig(out=out, url=url)).summary["verdict"] == "as trained"


def test_stop_text_of_training_is_exported_and_sent(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = read_json(export_dir / "out" / "served.json")
    row = next(adapter for adapter in served["adapters"] if adapter["name"] == "rslora")
    texts = [prompt["trained"]["text"] for prompt in row["prompts"]]
    stop = texts[0][6:9]
    adapter, out, file = tmp_path / "rslora", tmp_path / "out", tmp_path / "x.gguf"
    shutil.copytree(export_dir / "adapters" / "rslora", adapter)
    card = resolve_model(str(adapter), device="cpu").card
    replace(card, task="rl", options={"rl": {"stop": [stop]}}).write(adapter)
    assert run(["export", str(adapter), "--out", str(file), "--no-verify"]) == 0
    assert f'PARAMETER stop "{stop}"' in file.with_suffix(".Modelfile").read_text().splitlines()
    assert run(["export", str(adapter), "--for", "llama.cpp", "--out", str(out)]) == 0
    message = f'which llama.cpp does not read from a model. Send "stop": {json.dumps([stop])} with'
    assert message in " ".join(capsys.readouterr().err.split())
    served = read_json(out / "served.json")
    answers = [prompt["trained"]["text"] for prompt in served["adapters"][0]["prompts"]]
    assert answers == [text.split(stop)[0] for text in texts]
    with llama_server(export_dir / "base.gguf", adapter_files(out), apply=True) as url:
        result = check_served(CheckServedConfig(out=out, url=url))
    assert result.summary["verdict"] == "as trained"
    assert f'requests had "stop": {json.dumps([stop])}' in result.lines[-1]


def test_gguf_lora_interleaves_query_rows(export_dir: Path) -> None:
    """Rows of B are interleaved for Llama's queries but not for values; A is unchanged."""
    reader = GGUFReader(str(export_dir / "out" / "rslora" / "adapter.gguf"))
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    peft_file = load_file(export_dir / "adapters" / "rslora" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn"
    scale = 16 / 8**0.5
    values = peft_file[f"{prefix}.v_proj.lora_B.weight"] * scale
    torch.testing.assert_close(tensors["blk.0.attn_v.weight.lora_b"], values)
    queries = peft_file[f"{prefix}.q_proj.lora_B.weight"] * scale
    heads = queries.reshape(
        4, 2, 8, -1
    )  # 4 heads of 16: row 2i of a head is i, row 2i + 1 is 8 + i
    rows = [heads[h, half, i] for h in range(4) for i in range(8) for half in range(2)]
    torch.testing.assert_close(tensors["blk.0.attn_q.weight.lora_b"], torch.stack(rows))
    torch.testing.assert_close(
        tensors["blk.0.attn_q.weight.lora_a"], peft_file[f"{prefix}.q_proj.lora_A.weight"]
    )
    assert reader.get_field("adapter.lora.alpha").contents() == 8.0
    assert reader.get_field("general.type").contents() == "adapter"


class ScriptedHandler(BaseHTTPRequestHandler):
    """Returns a fixed answer and records requests."""

    answer: dict[str, Any] = {}  # noqa: RUF012 - one per subclass
    status = 200
    requests: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "only"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        self._send(self.status, self.answer)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode() if answer else b""
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextlib.contextmanager
def scripted_server(
    status: int, answer: dict[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    handler = type(
        "Handler", (ScriptedHandler,), {"status": status, "answer": answer, "requests": []}
    )
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler.requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (404, {"error": "no such model"}, "gave 404 .*no such model.*It lists only"),
        (302, {}, "gave 302"),  # redirects are not followed
        (500, {}, r"gave 500 \(Internal Server Error\)"),
        (200, {"choices": []}, "an answer in another form"),
    ],
)
def test_server_error_raises(
    export_dir: Path, status: int, answer: dict[str, Any], error: str
) -> None:
    with scripted_server(status, answer) as (url, _), pytest.raises(InputError, match=error):
        check_served(CheckServedConfig(out=export_dir / "out", url=url))


def test_unreachable_server_raises(export_dir: Path) -> None:
    with pytest.raises(InputError, match=r"refused.* Start the server"):
        check_served(CheckServedConfig(out=export_dir / "out", url="http://127.0.0.1:9"))


def test_server_without_http_raises(export_dir: Path) -> None:
    with (
        server_without_http() as url,
        pytest.raises(InputError, match=r"-ERR unknown command at /completions. Start the server"),
    ):
        check_served(CheckServedConfig(out=export_dir / "out", url=url))


def test_texts_are_compared_without_logprobs(export_dir: Path, tmp_path: Path) -> None:
    """The server returns no logprobs or tokens; requests use the only model name that it lists."""
    out = tmp_path / "out"
    shutil.copytree(export_dir / "out" / "rslora", out)
    served = read_json(export_dir / "out" / "served.json")
    row = next(adapter for adapter in served["adapters"] if adapter["name"] == "rslora")
    row |= {"place": "adapter.gguf", "prompts": row["prompts"][:1]}
    (out / "served.json").write_text(json.dumps({**served, "adapters": [row]}))
    for source, verdict in (("trained", "as trained"), ("base", "returns the base model")):
        answer = {"choices": [{"text": row["prompts"][0][source]["text"]}]}
        with scripted_server(200, answer) as (url, requests):
            if source == "trained":
                summary = check_served(CheckServedConfig(out=out, url=url)).summary
                assert (summary["verdict"], summary["adapters"][0]["weights"]["difference"]) == (
                    verdict, None
                )  # fmt: skip
            else:
                with pytest.raises(RunError, match=verdict):
                    check_served(CheckServedConfig(out=out, url=url))
        assert {body["model"] for body in requests} == {"only"}
        assert requests[0]["prompt"] == row["prompts"][0]["ids"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["out"], "--url or --in: give exactly one of them"),
        (["out", "--url", "ftp://x"], "is not an address"),
        (["nothing", "--url", "http://127.0.0.1:9"], "nothing has no nothing.served.json"),
        (["out", "--url", "http://127.0.0.1:9", "--python", "x"], "--python applies to --in"),
        (["out", "--in", "vllm"], "is written as gguf-lora, and vllm loads peft or merged"),
        (["out", "--in", "llama.cpp", "--python", "/no/python"], "/no/python cannot be run"),
    ],
)
def test_invalid_check_served_options_are_rejected(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(export_dir)
    assert error in cli.fails("check-served", *arguments)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ModuleNotFoundError: No module named 'openvino_genai'",
         "cannot import openvino_genai. Install openvino-genai and optimum-intel[openvino]"),
        ("ModuleNotFoundError: No module named 'optimum.exporters'",
         "cannot import optimum. Install"),
        ("RuntimeError: Exception from core.cpp:117:\nNot Implemented: no such option",
         "ended with code 1: RuntimeError: Exception from core.cpp:117: Not Implemented: no such"),
        ("", "ended with code 1: no output"),
    ],
)  # fmt: skip
def test_library_error_names_missing_package(tmp_path: Path, stderr: str, message: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat <<'END' >&2\n{stderr}\nEND\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match=re.escape(message)):
        run_library("openvino", python, "base", [], 20)
