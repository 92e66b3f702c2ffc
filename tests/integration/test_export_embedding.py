"""`export` of embedding models: servers return their embeddings, or the export is rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import xllamacpp
from torch.nn import functional

from export_cases import exportable_model
from ftlevel.cli.app import run
from ftlevel.errors import FtlevelError, InputError, RunError
from ftlevel.extras.retrieval.encoding import append_end
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat, save_embedding_format
from ftlevel.extras.serving.check import check_served
from ftlevel.extras.serving.config import CheckServedConfig, ExportConfig
from ftlevel.extras.serving.exporting import export

ModelDir = Callable[..., Path]


@pytest.fixture(autouse=True)
def empty_working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def embedding_model(source: Path, **embedding_format: Any) -> Path:
    """Return a copy of a tiny model as a SentenceTransformer directory."""
    copy = shutil.copytree(source, Path("model").absolute())
    save_embedding_format(copy, EmbeddingFormat(**{"normalize": True, **embedding_format}), 64)
    return copy


def train_run(model: Path) -> None:
    """Train `model` for two steps into `run`."""
    rows = [{"anchor": f"a cat {i}", "positive": f"an animal {i}"} for i in range(8)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["train", "--task", "embedding", "--model", str(model), "--dataset", "rows.jsonl"]
    options = ["--max-steps", "2", "--output-dir", "run", "--quiet", "--device", "cpu"]
    assert run([*arguments, *options]) == 0


@contextmanager
def llama_server(path: Path) -> Iterator[str]:
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.embedding = str(path), 0, True
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def reference_embeddings(model: Path, texts: list[str], pooling: str) -> torch.Tensor:
    """Return normalized embeddings by transformers alone, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            states = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return functional.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize(
    ("family", "head", "pooling"),
    [("bert", "mlm", "mean"), ("bert", "mlm", "cls"), ("llama", None, "last"),
     ("qwen3", None, "last")],
)  # fmt: skip
def test_llama_cpp_embeddings_match_model(
    family: str, head: str | None, pooling: str, tiny_model_dir: ModelDir
) -> None:
    settings = {"head_dim": 16} if family == "qwen3" else {}
    source = (
        exportable_model(tiny_model_dir, Path.cwd() / "base", family)
        if family == "llama"
        else tiny_model_dir(family, head, **settings)
    )
    model = embedding_model(source, pooling=pooling)
    if family == "qwen3":  # as ftlevel saves it; llama pools the last token of the text
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        append_end(tokenizer, tokenizer.eos_token_id)
        tokenizer.save_pretrained(model)
    result = export(ExportConfig(model=str(model), out=Path("x.gguf"), server="llama.cpp"))
    assert result.summary["check"]["min_cosine"] > 1 - 1e-6
    record = json.loads(Path("x.served.json").read_text())
    expected = reference_embeddings(model, [row["text"] for row in record["texts"]], pooling)
    recorded = torch.tensor([row["vector"] for row in record["texts"]])
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-5)
    with llama_server(Path("x.gguf")) as url:
        summary = check_served(CheckServedConfig(out=Path("x.gguf"), url=url)).summary
        assert summary["min_cosine"] > 1 - 1e-5
        record["texts"][0]["vector"] = [-value for value in record["texts"][0]["vector"]]
        Path("x.served.json").write_text(json.dumps(record))
        with pytest.raises(RunError, match="not those of training"):
            check_served(CheckServedConfig(out=Path("x.gguf"), url=url))
    in_process_config = CheckServedConfig(out=Path("x.gguf"), inside="llama.cpp")
    with pytest.raises(RunError, match="not those of training"):
        check_served(in_process_config)
    record["texts"][0]["vector"] = [-value for value in record["texts"][0]["vector"]]
    Path("x.served.json").write_text(json.dumps(record))
    assert check_served(in_process_config).summary["min_cosine"] > 1 - 1e-5
    with pytest.raises(InputError, match=r"is a \.gguf file, which vllm does not load"):
        check_served(CheckServedConfig(out=Path("x.gguf"), inside="vllm"))


REJECTED: list[tuple[dict[str, Any], str, str]] = [
    ({"pooling": "max"}, "llama.cpp", "has max pooling, and llama.cpp has mean, cls, last"),
    ({"query_prompt": "query: "}, "vllm", "was trained with prompts (query 'query: ')"),
    ({"normalize": False, "similarity": "dot"}, "tei", "by dot product"),
    ({"dims": 32}, "tei", "keeps 32 dimensions"),
    ({"lowercase": True}, "vllm", "lowercases its texts"),
    ({}, "mlx", "mlx-lm serves none"),
]  # fmt: skip


@pytest.mark.parametrize(("embedding_format", "server", "message"), REJECTED)
def test_embedding_format_unsupported_by_server_raises(
    embedding_format: dict[str, Any], server: str, message: str, tiny_model_dir: ModelDir
) -> None:
    family = "roberta" if "lowercase" in embedding_format else "bert"
    model = embedding_model(tiny_model_dir(family, "mlm"), **embedding_format)
    train_run(model)
    out = Path("x.gguf" if server == "llama.cpp" else "out")
    with pytest.raises(FtlevelError) as raised:
        export(ExportConfig(model="run", out=out, server=server))
    assert message in str(raised.value)
    assert not out.exists()


def test_run_is_exported_for_embedding_servers(
    tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    model = embedding_model(tiny_model_dir("bert", "mlm"), query_prompt="query: ")
    train_run(model)
    capsys.readouterr()
    for server, command in (
        ("tei", "text-embeddings-router --model-id tei --default-prompt-name query"),
        ("openvino", "optimum-cli export openvino --model openvino --task feature-extraction"),
    ):
        assert run(["export", "run", "--for", server, "--out", server, "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["format"] == "merged"
        assert summary["start"][0].startswith(command)
        assert (Path(server) / "1_Pooling" / "config.json").is_file()
    compile(summary["start"][1].partition(" -c ")[2], "start", "exec")
    record = json.loads(Path("tei/served.json").read_text())
    texts = [row["text"] for row in record["texts"]]
    expected = reference_embeddings(Path("tei"), texts, "mean")
    recorded = torch.tensor([row["vector"] for row in record["texts"]])
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-5)
    dry_run = ["export", "run", "--for", "llama.cpp", "--client-prompts", "--dry-run", "--json"]
    assert run(dry_run) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0] == "dry-run.gguf"
    arguments = ["export", "run", "--for", "llama.cpp", "--out", "run.gguf", "--client-prompts"]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == {"query": "query: "}
    with llama_server(Path("run.gguf")) as url:
        assert run(["check-served", "run.gguf", "--url", url]) == 0
