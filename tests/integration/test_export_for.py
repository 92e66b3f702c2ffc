"""`export --for`: server formats, start commands and rejected options."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from command_line import Cli
from export_cases import ModelDir, exportable_model
from ftlevel.extras.serving.config import SERVERS
from run_files import read_json
from served_cases import CASES, write_adapter
from tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("work_dir")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", tie_word_embeddings=True)


def save_adapter(base: Path, name: str) -> str:
    return str(write_adapter(base, Path(name).absolute(), CASES[name].settings))


def dry_run(cli: Cli, *arguments: str) -> dict[str, Any]:
    summary: dict[str, Any] = cli.json("export", *arguments, "--dry-run --json")
    assert not Path("out").exists()
    return summary


@pytest.mark.parametrize(
    ("server", "format_", "start"),
    [
        ("vllm", "peft", "vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules "
                         "patterns=out"),
        ("sglang", "peft", "python -m sglang.launch_server --model-path {base} --enable-lora "
                           "--max-lora-rank 12 --lora-paths patterns=out"),
        ("tgi", "peft", "text-generation-launcher --model-id {base} --lora-adapters patterns=out"),
        ("mlx", "mlx", "mlx_lm.server --model {base} --adapter-path out"),
        ("llama.cpp", "gguf-lora", "llama-server -m {name}.gguf --lora out/adapter.gguf"),
    ],
)  # fmt: skip
def test_server_determines_format_and_start_command(
    base: Path, cli: Cli, server: str, format_: str, start: str
) -> None:
    summary = dry_run(cli, save_adapter(base, "patterns"), "--for", server, "--out", "out")
    assert summary["format"] == format_
    assert summary["start"][-1] == start.format(base=base.resolve(), name=base.name)
    Path("model").mkdir()  # the name of a directory that users have
    Path("model/x").touch()
    assert dry_run(cli, "patterns", "--for", server)["format"] == format_
    assert summary["adapters"][0]["rank"] == 12


def test_openvino_start_commands_convert_base_and_load_adapters(base: Path, cli: Cli) -> None:
    Path("all").mkdir()
    for name in ("lora", "rslora"):
        Path(save_adapter(base, name)).rename(Path("all", name))
    summary = dry_run(cli, "all", "--for", "openvino", "--out", "out")
    convert, generate = (shlex.split(command) for command in summary["start"])
    # optimum-cli needs --task for a directory; above 1B weights its default format is int8.
    assert convert[:4] == ["optimum-cli", "export", "openvino", "--model"]
    assert convert[4:] == [
        str(base.resolve()), "--task", "text-generation-with-past", "--weight-format", "fp16",
        f"{base.name}-openvino",
    ]  # fmt: skip
    compile(generate[2], "start", "exec")
    for name in ("lora", "rslora"):
        assert f"'out/{name}/adapter_model.safetensors'" in generate[2]
    assert f"'{base.name}-openvino'" in generate[2]


REJECTED = [
    ("norms", "vllm", "input_layernorm, model.layers.0.post_attention_layernorm and 3 more. Merge "
                      "it: --format merged."),
    ("tokens", "llama.cpp", "llama.cpp does not serve LoRA on lm_head, model.embed_tokens as it "
                            "was trained. Merge it: --format gguf."),
    ("embedding", "mlx", "mlx-lm does not serve LoRA on model.embed_tokens as it was trained"),
    ("dora", "vllm", "DoRA scales each row of the merged weight by a norm of it. Merge it"),
    ("lora", "ollama", "out does not end in .gguf"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "server", "error"), REJECTED)
def test_adapter_unsupported_by_server_is_rejected(
    base: Path, cli: Cli, name: str, server: str, error: str
) -> None:
    assert error in cli.fails("export", save_adapter(base, name), f"--for {server} --out out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--for", "vllm", "--format", "mlx"], "vLLM does not load mlx. It loads peft and merged"),
        (["--for", "vllm", "--max-rank", "4"], "needs rank 8, above --max-rank 4"),
        (["--for", "nowhere"], "nowhere"),
        (
            ["--format", "merged", "--max-rank", "4"],
            "--max-rank has no effect with --format merged: it is for adapters. Drop it.",
        ),
        (
            ["--for", "vllm", "--calibration-rows", "4"],
            "--calibration-rows needs --outtype q5_0 or q4_0 (it is auto). Add",
        ),
    ],
)
def test_invalid_server_options_are_rejected(
    base: Path, cli: Cli, arguments: list[str], error: str
) -> None:
    assert error in cli.fails("export", save_adapter(base, "lora"), *arguments, "--out out")


def test_tgi_export_fills_missing_layers_with_zeros(base: Path, cli: Cli) -> None:
    name = save_adapter(base, "layers")  # of layer 1 alone
    for server in ("tgi", "vllm"):
        cli(f"export {name} --for {server} --out {server} --no-verify -q")
    all_layers, adapted_layers = (
        load_file(Path(s, "adapter_model.safetensors")) for s in ("tgi", "vllm")
    )
    assert len(all_layers) == 2 * len(adapted_layers)
    for key, tensor in all_layers.items():
        assert (
            torch.equal(tensor, adapted_layers[key]) if key in adapted_layers else not tensor.any()
        )


def test_mlx_export_transposes_matrices_and_folds_scale(base: Path, cli: Cli) -> None:
    cli("export", save_adapter(base, "rslora"), "--for mlx --out out -q")
    exported, original = (
        load_file("out/adapters.safetensors"),
        load_file("rslora/adapter_model.safetensors"),
    )
    key = "model.layers.1.mlp.up_proj"
    a, b = (original[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(exported[f"{key}.lora_a"], a.T)
    torch.testing.assert_close(exported[f"{key}.lora_b"], b.T * 16 / 8**0.5)
    config = read_json("out/adapter_config.json")
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["scale"] == 1.0
    assert config["lora_parameters"]["keys"] == sorted(
        [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    )


def test_mlx_rejects_several_adapters(base: Path, cli: Cli) -> None:
    for name in ("lora", "rslora"):
        write_adapter(base, Path("all", name), CASES[name].settings)
    error = cli.fails("export all --for mlx --out out")
    assert "is a directory of 2 adapters (lora, rslora), and --format mlx exports one" in (error)
    cli("export all --for vllm --out out --no-verify -q")
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "lora", "rslora"]
    assert "--max-loras 2 --lora-modules lora=out/lora rslora=out/rslora" in (
        Path("out/README.md").read_text()
    )


def test_separator_characters_are_escaped_or_rejected(base: Path, cli: Cli) -> None:
    adapter_dir = write_adapter(base, Path("a=b,c").absolute(), CASES["lora"].settings)
    summary = dry_run(cli, str(adapter_dir), "--for", "vllm", "--out", "out")
    module = shlex.split(summary["start"][0])[-1]
    assert json.loads(module) == {"name": "a=b,c", "path": "out"}
    plain_dir = write_adapter(base, Path("plain").absolute(), CASES["lora"].settings)
    summary = dry_run(cli, str(plain_dir), "--for", "vllm", "--out", "o,t")
    assert json.loads(shlex.split(summary["start"][0])[-1])["path"] == "o,t"
    for server, out in (("tgi", "out"), ("llama.cpp", "out,1")):
        error = cli.fails("export", adapter_dir, f"--for {server} --out {out} --dry-run")
        assert "uses as a separator on its command line. Choose another." in error


def test_classifier_export_for_text_server_is_rejected(cli: Cli) -> None:
    base = save_tiny(Path("classes").absolute(), "llama", "seqcls")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, settings).save_pretrained("my classes")
    for flags, message in (
        (["--for", "mlx"], "Merge it: ftlevel merge 'my classes' --out DIR"),
        (["--for", "mlx", "--format", "merged"], "mlx-lm serves decoders that write text"),
    ):
        assert message in cli.fails("export 'my classes'", *flags, "--out out --dry-run")


def test_directory_without_adapter_is_reported(base: Path, cli: Cli) -> None:
    write_adapter(base, Path("all", "one"), CASES["lora"].settings)
    save_tiny(Path("all/whole"), "llama")
    assert (
        "all/whole contains no adapter and is skipped."
        in cli.run("export all --for vllm --out out --dry-run").err
    )
    error = cli.fails("export all/whole --for vllm --out out")
    assert "vLLM loads it as it is: vllm serve" in error


def test_adapters_of_different_bases_are_rejected(base: Path, tmp_path: Path, cli: Cli) -> None:
    other_base = save_tiny(tmp_path / "other", "llama", seed=1)
    write_adapter(base, tmp_path / "all" / "one", CASES["lora"].settings)
    write_adapter(other_base, tmp_path / "all" / "two", CASES["lora"].settings)
    assert "one and two have different bases" in cli.fails("export all --for vllm --out out")


def test_ollama_export_is_merged_and_checked(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    base_dir = exportable_model(tiny_model_dir, tmp_path, "llama")
    name = save_adapter(base_dir, "lora")
    output = cli(f"export {name} --for ollama --out mine.gguf")
    assert "saved mine.gguf, mine.Modelfile, mine.served.json  (" in output
    assert "ADAPTER" not in Path("mine.Modelfile").read_text()
    served = read_json("mine.served.json")
    assert served["start"] == ["ollama create mine -f mine.Modelfile", "ollama run mine"]
    prompt = served["adapters"][0]["prompts"][0]
    assert prompt["trained"]["logprobs"] != prompt["base"]["logprobs"]
    cli("check-served mine.gguf --in llama.cpp -q")


def test_gguf_base_is_supported_only_by_llama_cpp(
    tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    base_dir = exportable_model(tiny_model_dir, tmp_path, "llama")
    name = save_adapter(base_dir, "lora")
    cli(f"export {base_dir} --out x.gguf --no-verify -q")
    options = [name, "--model", "x.gguf", "--out", "out"]
    assert dry_run(cli, *options, "--for", "llama.cpp")["start"] == [
        f"llama-server -m {tmp_path / 'x.gguf'} --lora out/adapter.gguf"
    ]
    error = cli.fails("export", *options, "--for mlx --dry-run")
    assert "x.gguf, and mlx-lm serves adapters only on bases in transformers format." in error


def test_merged_format_writes_model_and_start_command(base: Path, cli: Cli) -> None:
    name = save_adapter(base, "rslora")
    command = ["export", name, "--for", "vllm", "--format", "merged", "--out", "out", "-q"]
    cli(*command)
    for command_line in ("vllm serve out", "ftlevel check-served out --url"):
        assert command_line in Path("out/README.md").read_text()
    assert read_json("out/served.json")["adapters"][0]["rank"] is None
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path("out").iterdir()}


def test_pissa_adapter_is_merged_after_peft_export(base: Path, cli: Cli) -> None:
    name = save_adapter(base, "pissa")
    error = cli.fails(f"merge {name} --out merged")
    assert (
        "its initialization changed the base weights and is not in the file. Export it as "
        "plain LoRA first, and use that:"
    ) in error
    cli(f"export {name} --format peft --out plain -q")
    cli("merge plain --out merged -q")


def test_adapter_tokenizer_is_exported(base: Path, cli: Cli) -> None:
    name = save_adapter(base, "rslora")
    (Path(name) / "tokenizer.json").write_bytes(b"{}")
    (Path(name) / "additional_chat_templates").mkdir()
    template = Path(name) / "additional_chat_templates/tools.jinja"
    template.write_text("{{ messages }}")
    cli(f"export {name} --format peft --out plain --no-verify -q")
    for path in (Path(name) / "tokenizer.json", template):
        assert Path("plain", path.relative_to(name)).read_bytes() == path.read_bytes()


def test_server_formats_exist() -> None:
    from ftlevel.extras.serving.config import FORMATS

    assert {name for server in SERVERS.values() for name in server.formats} <= set(FORMATS)
