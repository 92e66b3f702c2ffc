"""`ftlevel merge`: verification, rejected inputs, strategies, interruption, quantized bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import task_data
from command_line import Cli
from ftlevel import MergeConfig, merge
from ftlevel.cli.app import run
from ftlevel.commands.generate import generate
from ftlevel.events import NullListener
from ftlevel.extras.serving.config import ExportConfig
from ftlevel.extras.serving.exporting import export
from ftlevel.merging import merged_model
from ftlevel.merging.merge_input import resolve_merge_input, select_rows
from ftlevel.methods.merging import Skeleton, build_skeleton
from ftlevel.models.loading import build_task_model
from ftlevel.weights import checkpoint
from run_files import ModelDir, kill_repeatedly, read_json, read_summary, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")

TRAIN_OPTIONS = ["--max-samples", "16", "--set", "data.max_eval_samples=8", "--max-steps", "3",
       "--learning-rate", "2e-3", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def train_run(
    tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that trains a short run on a tiny model, once per set of arguments."""
    runs: dict[tuple[str, ...], Path] = {}

    def train(family: str, task: str, data: str, head: str | None, *options: str) -> Path:
        key = (family, task, data, str(head), *options)
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            task_data.write(folder / "data", data)
            base = shutil.copytree(tiny_model_dir(family, head), folder / "base")
            columns = ["--map", "source=en", "--map", "target=de"] if data == "pair" else []
            out = folder / "run"
            code = run(["train", "--model", str(base), "--task", task, *columns,
                        "--dataset", str(folder / "data"), "--output-dir", str(out),
                        "--overlong", "drop", *TRAIN_OPTIONS, *options])  # fmt: skip
            assert code == 0
            runs[key] = out
        return runs[key]

    return train


CELLS = [
    ("bert", "token-classification", "tags", "mlm"),
    ("llama", "question-answering", "span", None),  # its class has another prefix
    ("bert", "masked-lm", "mask", "seqcls"),  # a new language head
    pytest.param("roberta", "text-classification", "class", "mlm", marks=pytest.mark.sweep),
    pytest.param("bert", "text-classification", "multi", "mlm", marks=pytest.mark.sweep),
    ("gpt2", "text-classification", "regression", None),
    ("t5", "translation", "pair", None),
    ("mixtral", "text-generation", "mask", None),
]


@pytest.mark.parametrize(("family", "task", "data", "head"), CELLS)
def test_merged_model_matches_run_for_every_task(
    family: str, task: str, data: str, head: str | None, train_run: Callable[..., Path], cli: Cli
) -> None:
    source = train_run(family, task, data, head, "--dtype", "float32")
    summary = cli.json("merge", str(source), "--out", "merged", "--json")
    agreement = summary["agreement"]
    assert agreement["max_difference"] <= 1e-4 * agreement["scale"]
    assert agreement["top1"] == (None if data == "regression" else 1)  # regression has no top-1
    assert agreement["targets"] >= 6
    assert agreement["loss"] == pytest.approx(agreement["loss_reference"], rel=1e-4)
    assert summary["written"]["unchanged"] == 0
    prompt = "the <mask> of" if family == "roberta" else "the [MASK] of"
    context = "The name is module 3." if data == "span" else None
    answers = [generate(name, [prompt], context=context, device="cpu", max_new_tokens=4)[0][0].text
               for name in ("merged", str(source))]  # fmt: skip
    assert answers[0] == answers[1]


def test_bfloat16_merge_differs_by_rounding_only(train_run: Callable[..., Path], cli: Cli) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "bfloat16")
    summary = cli.json("merge", str(source), "--out", "merged", "--json")
    difference, rounding, exact = (
        summary[name]["mean_difference"] for name in ("agreement", "rounding", "before_rounding")
    )
    assert exact < rounding / 100
    assert rounding / 4 < difference < 4 * rounding
    card = read_json("merged/ftlevel.json")
    assert card["merge"]["verified"]
    assert card["method"] == "full"
    assert "Loaded again and compared" in Path("merged/README.md").read_text()
    config = read_json("merged/config.json")  # transformers 4 reads rope_theta
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    files = {path.name for path in Path("merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files


def faulty_merge(fault: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function of base and update that merges with this fault."""
    return {
        "scaled by 1.02": lambda base, update: base + 1.02 * update,
        "omitted": lambda base, _: base,
        "transposed": lambda base, update: base + update.T,
    }[fault]


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        ("scaled by 1.02", "bfloat16"),
        ("omitted", "float32"),
        ("transposed", "bfloat16"),
        pytest.param("scaled by 1.02", "float32", marks=pytest.mark.sweep),
        pytest.param("omitted", "bfloat16", marks=pytest.mark.sweep),
        pytest.param("transposed", "float32", marks=pytest.mark.sweep),
    ],
)
def test_faulty_merge_of_one_layer_is_rejected(
    fault: str,
    dtype: str,
    train_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    """Rounding to bfloat16 is larger than such a fault and would hide it."""
    source = train_run("llama", "text-generation", "mask", None, "--dtype", dtype,
                       "--learning-rate", "2e-2")  # fmt: skip
    original, faulty = Skeleton.merge, faulty_merge(fault)

    def merge_with_fault(self: Skeleton, path: str, get_base_tensor: Callable[[str], Any]) -> Any:
        merged = original(self, path, get_base_tensor)
        if path != "model.layers.1.self_attn.q_proj":
            return merged
        bases = {name: get_base_tensor(name) for name in merged}
        return {name: faulty(bases[name], merged[name] - bases[name]) for name in merged}

    monkeypatch.setattr(Skeleton, "merge", merge_with_fault)
    error = cli.fails(f"merge {source} --out merged", code=1)
    assert "the merged model is not the base with the adapter" in error
    assert list(Path().iterdir()) == []


def test_corrupted_merged_file_is_rejected(
    train_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "bfloat16")
    original = checkpoint.write_files

    def write_and_corrupt(directory: Path, shards: Any, *others: Any) -> int:
        size = original(directory, shards, *others)
        path = directory / "model.safetensors"
        written = load_file(path)
        written["model.norm.weight"][3] = 0
        save_file(written, path, metadata={"format": "pt"})
        return size

    monkeypatch.setattr(merged_model, "write_files", write_and_corrupt)
    error = cli.fails(f"merge {source} --out merged", code=1)
    assert "model.norm.weight, reloaded, is a different tensor. Nothing was saved." in error
    assert list(Path().iterdir()) == []


def test_unverified_merge_is_marked_in_card(train_run: Callable[..., Path], cli: Cli) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "float32")
    cli(f"merge {source} --out merged --no-verify --quiet")
    assert "**Not verified**" in Path("merged/README.md").read_text()
    assert read_json("merged/ftlevel.json")["merge"]["verified"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--double-quant"],
        pytest.param(["--quant-type", "fp4"], marks=pytest.mark.sweep),
        ["--quant", "8bit"],
    ],
)
def test_quantized_run_is_merged_onto_dequantized_base(
    flags: list[str], train_run: Callable[..., Path], cli: Cli
) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--method", "qlora",
                       "--dtype", "float32", *flags)  # fmt: skip
    summary = cli.json("merge", str(source), "--out", "merged", "--json")
    assert summary["onto"] == "dequantized"
    assert "closer to the trained model" in summary["reason"]
    candidates = summary["candidates"]
    max_ratio = 1.0 if "8bit" in flags else 0.1  # 8 bits round activations as well
    assert candidates["dequantized"]["kl"] < max_ratio * candidates["original"]["kl"]
    assert sorted(p.name for p in Path().iterdir()) == ["merged"]
    original_summary = cli.json(f"merge {source} --out other --onto original --json")
    assert original_summary["onto"] == "original"
    assert (
        original_summary["agreement"]["max_difference"]
        <= 1e-4 * original_summary["agreement"]["scale"]
    )
    assert (
        "measures both options on a quantized run, and --no-verify skips measuring. Use --onto "
        "dequantized (the model as trained) or --onto original."
    ) in cli.fails(f"merge {source} --out third --no-verify")


def test_quantized_run_with_trained_head_of_tied_model_is_merged(
    train_run: Callable[..., Path], cli: Cli
) -> None:
    source = train_run("gpt2", "text-generation", "mask", None, "--method", "qlora",
                       "--set", "method.modules_to_save=lm_head")  # fmt: skip
    assert cli.json("merge", str(source), "--out", "merged", "--json")["written"]["untied"]
    merged = load_file("merged/model.safetensors")
    trained = load_file(source / "adapter" / "adapter_model.safetensors")
    head = trained["base_model.model.lm_head.weight"]
    assert torch.equal(merged["lm_head.weight"], head.to(merged["lm_head.weight"].dtype))
    assert not torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])


WEIGHTS = {"a/adapter_model.safetensors": ""}


def peft_config(kind: str, **settings: Any) -> str:
    return json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM",
                       "base_model_name_or_path": "builtin:tiny-llama", **settings})  # fmt: skip


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["a"], "a does not exist"),
        ({"a/notes.txt": ""}, ["a"], "neither a run nor an adapter (it contains notes.txt)"),
        ({"a/config.yaml": ""}, ["a"], "an unfinished run: it has no adapter yet"),
        ({"a/ftlevel.json": json.dumps({"format": 1, "method": "full", "task": "text-generation",
          "base": {}, "quantization": {}, "dtype": "float32", "max_length": 1})},
         ["a"], "a has no adapter to merge: a is a whole model already"),
        ({"a/adapter_config.json": peft_config("BOTTLENECK")}, ["a"],
         "a bottleneck adapter is not linear"),
        ({"a/adapter_config.json": peft_config("PREFIX_KV")}, ["a"], "virtual tokens are inputs"),
        ({"a/adapter_config.json": peft_config("SOFT_PROMPT")}, ["a"], "virtual tokens are inputs"),
        ({"a/adapter_config.json": peft_config("PROMPT_TUNING")}, ["a"], "virtual tokens are inp"),
        ({"a/adapter_config.json": peft_config("XLORA")}, ["a"], "has not been tried"),
        ({"a/adapter_config.json": peft_config("LORA", layer_replication=[[0, 1]])}, ["a"],
         "layer_replication is set"),
        ({"a/adapter_config.json": peft_config("LORA", task_type="IMAGE_CLS"), **WEIGHTS},
         ["a"], "task_type IMAGE_CLS, for which ftlevel has no task"),
        ({"a/adapter_config.json": peft_config("LORA")}, ["a"], "contains no adapter_model"),
        ({"a/adapter_config.json": peft_config("LORA"), **WEIGHTS}, ["a", "--onto", "dequantized"],
         "not quantized ones. Drop --onto"),
        ({"a/adapter_config.json": peft_config("LORA"), **WEIGHTS}, ["a", "--base", "no/where"],
         "--model no/where: no such directory"),
        ({"m/x": ""}, ["a", "--out", "m"], "--out m exists and is not empty"),
        ({}, ["a", "--onto", "4bit"], "--onto: '4bit': weights of 4 or 8 bits cannot hold"),
        ({}, ["a", "--onto", "origin"], "Did you mean 'original'?"),
        ({}, ["a", "b", "--weights", "1"], "--weights gives 1 numbers for 2 adapters"),
        ({}, ["a", "b", "--weights", "1,x"], "--weights"),
        ({}, ["a", "--strategy", "ties"], "--strategy ties needs several adapters. Drop it."),
        ({}, ["a", "b", "--density", "0.3"], "--density 0.3 needs --strategy ties"),
        ({}, ["a", "--calibration-rows", "3"], "--calibration-rows needs --quant 4bit or 8bit"),
        ({"a/adapter_config.json": peft_config("LORA"), **WEIGHTS,
          "b/adapter_config.json": peft_config("LORA", use_dora=True)}, ["a", "b"],
         "b cannot be mixed: DoRA"),
        ({"a/adapter_config.json": peft_config("LORA"), **WEIGHTS,
          "b/adapter_config.json": peft_config("IA3")}, ["a", "b"], "only LoRA adapters"),
        ({"a/adapter_config.json": peft_config("LORA", modules_to_save=["norm"]), **WEIGHTS,
          "b/adapter_config.json": peft_config("LORA")}, ["a", "b"], "(modules_to_save)"),
    ],
)  # fmt: skip
def test_unmergeable_input_is_rejected_in_one_line(
    files: dict[str, str], arguments: list[str], message: str, cli: Cli
) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    out = [] if "--out" in arguments else ["--out", "merged"]
    error = cli.fails("merge", *arguments, *out)
    assert message.lower() in error.lower()
    assert error.startswith("ftlevel: ")
    assert len(error.splitlines()) == 1
    assert not Path("merged").exists()


def test_merge_onto_other_base_is_rejected(
    train_run: Callable[..., Path], tiny_model_dir: ModelDir, cli: Cli
) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "float32")
    other_base = tiny_model_dir("llama", seed=1)
    assert "has other weights" in cli.fails(f"merge {source} --out merged --base {other_base}")
    moved = shutil.copytree(source.parent / "base", "moved")
    cli(f"merge {source} --out merged --base {moved} --quiet")


def save_lora(base: Path, folder: Path, rank: int, targets: list[str], **settings: Any) -> Path:
    """Save a LoRA adapter of random values on `base`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=rank, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM",
                        init_lora_weights=False, **settings)  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def lora_update(adapter: Path, module: str, scale: float) -> torch.Tensor | float:
    saved = load_file(adapter / "adapter_model.safetensors")
    name = f"base_model.model.{module}.lora_{{}}.weight"
    if name.format("A") not in saved:
        return 0.0
    return saved[name.format("B")] @ saved[name.format("A")] * scale


def test_cat_strategy_equals_weighted_sum(tiny_model_dir: ModelDir) -> None:
    base = tiny_model_dir("llama")
    first = save_lora(base, Path("a"), 4, ["q_proj", "up_proj"])
    second = save_lora(base, Path("b"), 9, ["q_proj", "v_proj"], use_rslora=True)
    names = [str(first), str(second)]
    result = merge(MergeConfig(adapters=names, weights=[0.7, -0.3], output_dir=Path("merged")))
    assert result.summary["agreement"]["top1"] == 1
    merged = load_file("merged/model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        update = 0.7 * lora_update(first, module, 6 / 4) - 0.3 * lora_update(second, module, 6 / 3)
        torch.testing.assert_close(merged[name], weight + update, rtol=0, atol=1e-6)
    assert read_json("merged/ftlevel.json")["merge"]["weights"] == [0.7, -0.3]
    merge(MergeConfig(adapters=names[0], weights=[0.5], output_dir=Path("half")))
    assert read_json("half/ftlevel.json")["merge"]["weights"] == [0.5]


def test_adapters_of_different_bases_do_not_mix(
    train_run: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "float32")
    other = shutil.copytree(source / "adapter", tmp_path / "other")
    card = read_json(other / "ftlevel.json")
    card["base"]["fingerprint"] = "0" * 64
    (other / "ftlevel.json").write_text(json.dumps(card))
    error = cli.fails(f"merge {source} {other} --out {tmp_path / 'merged'}")
    assert "Combine adapters of one base." in error


def test_mixture_names_its_adapters_and_their_different_quantization(
    train_run: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "float32")
    other = shutil.copytree(source / "adapter", tmp_path / "other")
    card = read_json(other / "ftlevel.json")
    card["quantization"] = {"kind": "4bit"}
    (other / "ftlevel.json").write_text(json.dumps(card))
    shown = " ".join(cli(f"merge {source} {other} --out merged --no-verify").split())
    assert f"adapter: {source}, {other} (lora" in shown
    assert f"base as in: {source}: --quant none ({other} was trained with --quant 4bit)" in shown


def test_changed_tensors_and_progress_are_counted(train_run: Callable[..., Path]) -> None:
    """The biases of adapted layers stay as they are."""

    class Steps(NullListener):
        def __init__(self) -> None:
            self.totals: list[int] = []
            self.steps: list[int] = []

        def begin(self, total_steps: int) -> None:
            self.totals.append(total_steps)

        def step(self, step: int) -> None:
            self.steps.append(step)

    source, listener = train_run("gpt2", "text-generation", "mask", None), Steps()
    base = load_file(Path(read_summary(source)["model"]["name"])
                     / "model.safetensors")  # fmt: skip
    config = MergeConfig(adapters=[str(source)], output_dir=Path("merged"))
    written = merge(config, listener=listener).summary["written"]
    merged = load_file("merged/model.safetensors")
    changed = sum(not torch.equal(merged[name], base[name]) for name in merged)
    assert written["changed"] == changed < written["merged"]
    assert listener.totals == [len(listener.steps)] == [listener.steps[-1]]
    out = Path("progress.gguf")
    export(ExportConfig(model=str(source), out=out), listener=(progress := Steps()))
    assert len(progress.totals) == 2, "of the merge, and of the file"


def test_values_too_large_for_float16_are_rejected(tiny_model_dir: ModelDir, cli: Cli) -> None:
    base = shutil.copytree(tiny_model_dir("llama"), Path("base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = save_lora(base, Path("a"), 4, ["q_proj"])
    arguments = ["merge", str(adapter), "--out", "merged", "--no-verify", "--dtype"]
    assert "model.layers.0.mlp.up_proj.weight has values above" in cli.fails(*arguments, "float16")
    assert not Path("merged").exists()
    cli(*arguments, "bfloat16")


def test_random_values_on_the_meta_device_are_not_merged() -> None:
    """DiffLlama draws its lambdas even there, and a merge wrote them in place of the base's."""
    config = AutoConfig.for_model(
        "diffllama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained("adapter")
    skeleton = build_skeleton(build_task_model(config, "AutoModelForCausalLM"), Path("adapter"))
    assert skeleton.trained == {}
    assert sorted(skeleton.units) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_codes_are_chosen_on_other_rows_than_those_compared(tiny_model_dir: ModelDir) -> None:
    rows = [{"text": f"The number {i} is {i * i} squared."} for i in range(8)]
    write_rows("rows.jsonl", rows)
    flags = ["--dataset", "rows.jsonl", "--set", "data.validation_split=0", *TRAIN_OPTIONS]
    model = str(tiny_model_dir("llama"))
    assert run(["train", "--model", model, *flags, "--output-dir", "run"]) == 0
    inputs = resolve_merge_input(MergeConfig(adapters=["run"], output_dir=Path("merged")))
    for count, calibration, sizes in ((32, 128, (1, 7)), (32, 0, (8, 0)), (0, 128, (0, 8))):
        selected = select_rows(inputs, count, calibration)[:2]
        compared, chosen = ([row.input_ids for row in part] for part in selected)
        assert (len(compared), len(chosen)) == sizes
        assert not [ids for ids in compared if ids in chosen]


def test_plain_peft_adapter_mixes_with_run(train_run: Callable[..., Path]) -> None:
    source = train_run("llama", "text-generation", "mask", None, "--dtype", "float32")
    first = save_lora(source.parent / "base", Path("a"), 4, ["q_proj"])
    settings: Any = {"weights": [0.5, 0.5], "verify": False}
    merge(MergeConfig(adapters=[str(source), "a"], output_dir=Path("one"), **settings))
    merge(MergeConfig(adapters=[str(first), str(source)], output_dir=Path("other"), **settings))
    assert read_json("one/ftlevel.json")["merge"]["weights"] == [0.5, 0.5]
    merge(MergeConfig(adapters=["a"], output_dir=Path("half"), weights=[0.5], verify=False))
    assert read_json("half/ftlevel.json")["merge"]["weights"] == [0.5]
    other = load_file("other/model.safetensors")
    for name, tensor in load_file("one/model.safetensors").items():
        torch.testing.assert_close(tensor, other[name])


@pytest.mark.parametrize(
    "strategy", ["svd", "linear", "ties", "dare-ties", "dare-linear", "magnitude-prune"]
)
def test_merge_strategies_match_peft(strategy: str, tiny_model_dir: ModelDir) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model_dir("llama")
    folders = [save_lora(base, Path(name), 4, ["q_proj", "up_proj"]) for name in "ab"]
    merge(MergeConfig(adapters=[str(f) for f in folders], weights=[0.7, 0.3], strategy=strategy,
                      output_dir=Path("merged")))  # fmt: skip
    torch.manual_seed(0)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "a", "a")
    adapted.load_adapter("b", "b")
    density = {} if strategy in ("svd", "linear") else {"density": 0.5}
    adapted.add_weighted_adapter(
        ["a", "b"], [0.7, 0.3], "mix", strategy.replace("-", "_"), **density
    )
    adapted.set_adapter("mix")
    expected = adapted.merge_and_unload(adapter_names=["mix"]).state_dict()
    for name, tensor in load_file("merged/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])


def test_linear_strategy_rejects_different_ranks(tiny_model_dir: ModelDir, cli: Cli) -> None:
    base = tiny_model_dir("llama")
    save_lora(base, Path("a"), 4, ["q_proj"])
    save_lora(base, Path("b"), 8, ["q_proj"])
    error = cli.fails("merge a b --strategy linear --out merged")
    assert error.startswith("ftlevel: --strategy linear: ")
    assert "Use --strategy cat" in error


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, pytest.param(28, marks=pytest.mark.sweep)])
def test_killed_merge_leaves_no_partial_model(tiny_model_dir: ModelDir, kills: int) -> None:
    base = tiny_model_dir("llama", num_hidden_layers=6)
    adapter = save_lora(base, Path("a"), 4, ["q_proj", "v_proj", "up_proj", "down_proj"])
    out = Path("killed")

    def write() -> None:
        merge(MergeConfig(adapters=[str(adapter)], output_dir=out, verify=False))

    def read() -> tuple[set[str], dict[str, bytes]]:
        return ({path.name for path in out.iterdir()},
                {path.name: path.read_bytes() for path in out.glob("*.safetensors")})  # fmt: skip

    def assert_complete() -> None:
        assert read() == expected

    write()
    expected = read()
    shutil.rmtree(out)
    kill_repeatedly(write, out, kills, assert_complete)
