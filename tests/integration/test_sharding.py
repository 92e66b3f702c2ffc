"""Sharded training equals training in one process, and is saved and resumed."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ranks
from ftlevel import TrainConfig, train
from ftlevel.commands.quantize import quantize
from ftlevel.config import QuantConfig, QuantizeConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.models.upstream.shards import local_shard, part_of
from ftlevel.models.upstream.shards import whole as full_tensor
from ftlevel.trained.resolve import resolve_model
from run_files import read_json, read_rows
from tiny_models import save_tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CASES = ("decoder/lora", "encoder/full", "encoder-decoder/prefix")


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.syspath_prepend(ROOT / "tests")
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT / 'benchmarks'}:{ROOT / 'src'}")
        yield


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distributed import prepare

    folder = tmp_path_factory.mktemp("sharding") / "all"
    prepare(folder)
    return folder


def train_cases(folder: Path, cases: list[str], out: Path, shard: str) -> None:
    from distributed import work as train_all

    train_all(folder, cases, out, shard)


@pytest.fixture(scope="module")
def one_process_runs(prepared_dir: Path) -> Path:
    """Return the directory of the runs in one process."""
    train_cases(prepared_dir, list(CASES), prepared_dir / "one", "none")
    return prepared_dir / "one"


def assert_equal_evaluations(first_run: Path, second_run: Path) -> None:
    """Assert that two runs have equal evaluation metrics."""
    evaluations = []
    for run in (first_run, second_run):
        records = read_rows(run / "metrics.jsonl")
        evaluations.append([
            {name: value for name, value in record.items() if name == "step" or
             (name.startswith("eval_") and isinstance(value, int | float))}
            for record in records if "eval_loss" in record
        ])  # fmt: skip
    assert [record["step"] for record in evaluations[0]] == [0, 2, 4]
    assert len(evaluations[0]) == len(evaluations[1])
    for record, expected in zip(*evaluations, strict=True):
        assert record == pytest.approx(expected, rel=1e-6)


def assert_equal_logits_in_peft(prepared_dir: Path) -> None:
    """Assert that adapters of one and two processes have equal logits in PEFT."""
    logits = []
    for run in ("one", "two"):
        base = AutoModelForCausalLM.from_pretrained(prepared_dir / "decoder", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(
            base, prepared_dir / run / "decoder/lora/adapter"
        ).eval()
        with torch.no_grad():
            logits.append(adapted(torch.arange(3, 20)[None]).logits)
            with adapted.disable_adapter():
                assert (adapted(torch.arange(3, 20)[None]).logits - logits[0]).abs().max() > 1e-3
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_two_sharded_processes_match_one_process(
    prepared_dir: Path, one_process_runs: Path
) -> None:
    from distributed import BOUND, STEPS, difference

    two_process_runs = prepared_dir / "two"
    ranks.run(train_cases, prepared_dir, list(CASES), two_process_runs, "full")
    for case in CASES:
        assert difference(one_process_runs / case, two_process_runs / case) <= BOUND
        assert_equal_evaluations(one_process_runs / case, two_process_runs / case)
        memory_share = read_json(two_process_runs / case / "share.json")
        assert memory_share < (
            0.55 if case.endswith("full") else 0.85
        )  # a third of this model is the adapter
        (name,) = (
            path.name for path in (one_process_runs / case / "adapter").glob("*model.safetensors")
        )
        expected, saved = (
            load_file(run / case / "adapter" / name) for run in (one_process_runs, two_process_runs)
        )
        assert expected.keys() == saved.keys()
        for key, tensor in expected.items():  # AdamW amplifies small gradients in its first steps
            assert (tensor - saved[key]).abs().mean() < 1e-5, key
    checkpoint = (
        two_process_runs / f"encoder/full/checkpoints/checkpoint-{STEPS}"
    )  # shards as written by each process
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    final_weights = load_file(two_process_runs / "encoder/full/adapter/model.safetensors")
    assert all(tensor.equal(final_weights[key]) for key, tensor in model.named_parameters())
    loaded = resolve_model(str(checkpoint), device="cpu").load("cpu")
    assert loaded.task.name == "text-classification"
    assert all(tensor.equal(final_weights[key]) for key, tensor in loaded.model.named_parameters())
    assert_equal_logits_in_peft(prepared_dir)
    incomplete = prepared_dir / "broken"
    shutil.copytree(checkpoint, incomplete)
    next(incomplete.glob("shard-00002*")).unlink()
    with pytest.raises(InputError, match=r"cannot be assembled: shard-00002.* is missing"):
        resolve_model(str(incomplete), device="cpu")


@pytest.mark.parametrize(
    "case", ["encoder/full", pytest.param("decoder/lora", marks=pytest.mark.sweep)]
)
def test_shard_grads_evaluates_like_one_process(
    prepared_dir: Path, one_process_runs: Path, case: str
) -> None:
    """`--shard grads` keeps blocks unsharded after a forward pass without backward."""
    from distributed import BOUND, difference

    two_process_runs = prepared_dir / "held"
    ranks.run(train_cases, prepared_dir, [case], two_process_runs, "grads")
    assert difference(one_process_runs / case, two_process_runs / case) <= BOUND
    assert_equal_evaluations(one_process_runs / case, two_process_runs / case)


def run_inference(folder: Path, keeps_unsharded: bool) -> None:
    """Run a sharded model without gradients and assert that its parameters are sharded again."""
    from torch.distributed.tensor import DTensor

    from ftlevel.training.model import shard
    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()
    model = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    sharded = {name for name, p in model.named_parameters() if p.dim() > 1}
    model.requires_grad_(False)
    shard(model, "cpu", keeps_unsharded=keeps_unsharded, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]

    def forward_under(context: Any) -> None:
        with context():
            model(ids)

    def generate() -> None:
        tokens = 3 + 2 * processes.world.rank  # texts of processes end at different tokens
        model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    for inference in (
        lambda: forward_under(torch.no_grad),
        lambda: forward_under(torch.inference_mode),
        generate,
    ):
        inference()
        current = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
        assert current == sharded


@pytest.mark.parametrize("keeps_unsharded", [False, True], ids=["full", "grads"])
def test_parameters_are_sharded_after_a_forward_pass_without_gradients(
    prepared_dir: Path, keeps_unsharded: bool
) -> None:
    ranks.run(run_inference, prepared_dir, keeps_unsharded)


def load_sharded_model(directory: str) -> tuple[Any, dict[str, int]]:
    """Return a float32 model of which each process loads its shard, and memory in bytes."""
    from ftlevel.models.loading import load_config, load_model
    from ftlevel.models.sources import resolve_source
    from ftlevel.models.upstream.shards import LazyWeights
    from ftlevel.training.model import shard

    def read_memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

    source = resolve_source(directory)
    arguments = (source, load_config(source), "AutoModelForCausalLM")
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    load_model(*arguments, **settings, slices=LazyWeights())  # imports what it needs
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    slices = LazyWeights()
    model, _ = load_model(*arguments, **settings, slices=slices)
    shard(model, "cpu", keeps_unsharded=False, dtype=torch.float32, slices=slices)
    peak = read_memory("VmHWM") - before
    sizes = [(p.nbytes, local_shard(p).nbytes) for p in model.parameters()]
    full, local = zip(*sizes, strict=True)
    return model, {"whole": sum(full), "own": sum(local), "largest": max(full), "peak": peak}


def load_large_model(folder: Path, out: Path) -> None:
    """Load the shard of a model of 100 MB in float32, stored in bfloat16."""
    from transformers import LlamaConfig

    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()
    if processes.is_first:
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
                 "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 999}  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
        weights = {name: torch.randn(p.shape).bfloat16() for name, p in model.named_parameters()}
        model.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        del weights
    processes.wait()
    model, memory = load_sharded_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    is_equal = all(
        local_shard(p).equal(part_of(stored[n], p).float()) for n, p in model.named_parameters()
    )
    (out / f"{processes.world.rank}.json").write_text(json.dumps({**memory, "same": is_equal}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks as Linux tells them")
def test_peak_memory_of_loading_is_bounded_by_shard(tmp_path: Path) -> None:
    model_dir = tmp_path / "wide"
    model_dir.mkdir()
    ranks.run(load_large_model, model_dir, tmp_path)
    for rank in range(2):
        memory = read_json(tmp_path / f"{rank}.json")
        assert memory["same"]
        overhead = 16 << 20  # modules, meshes, the allocator
        assert memory["peak"] < memory["whole"] / 2 + memory["largest"] + overhead, memory


def train_in_bfloat16(folder: Path, out: Path, shard: str, method: str) -> None:
    from distributed import settings

    kind, _, recompute = method.partition(", ")
    values = settings(folder, "decoder", kind, out)
    values["model"]["dtype"] = "bfloat16"
    accumulation_steps = (2 if recompute else 1) * (1 if shard != "none" else 2)
    values["train"] |= {"shard": shard, "gradient_accumulation_steps": accumulation_steps,
                        "gradient_checkpointing": bool(recompute)}  # fmt: skip
    train(TrainConfig.model_validate(values))


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("full", marks=pytest.mark.sweep), "full, recomputed"]
)
def test_bfloat16_sharded_run_matches_one_process(
    method: str, prepared_dir: Path, tmp_path: Path
) -> None:
    from distributed import difference

    one_process, sharded = tmp_path / "one", tmp_path / "two"
    train_in_bfloat16(prepared_dir, one_process, "none", method)
    ranks.run(train_in_bfloat16, prepared_dir, sharded, "full", method)
    assert difference(one_process, sharded) < 2e-3  # of bfloat16's 8 bits


def compare_sharded_4bit_model(folder: Path, kind: str, double: bool) -> None:
    """Compare the sharded, quantized base of this process with transformers' quantized base."""
    import bitsandbytes

    from ftlevel.models.loading import load_config, load_model
    from ftlevel.models.quantization import build_quantization_config
    from ftlevel.models.sources import resolve_source
    from ftlevel.models.upstream.shards import LazyWeights
    from ftlevel.training.model import shard
    from ftlevel.training.processes import started_processes

    started_processes().join()
    source = resolve_source(str(folder))
    arguments = (source, load_config(source), "AutoModelForCausalLM")
    quant_config = QuantConfig(kind="4bit", quant_type=kind, double_quant=double, experts=False)
    quantization = build_quantization_config(quant_config, torch.float32, [])
    settings: Any = {"dtype": torch.bfloat16, "device": "cpu", "quantization": quantization}
    reference, _ = load_model(*arguments, **settings)
    slices = LazyWeights()
    sharded, _ = load_model(*arguments, **settings, slices=slices)
    shard(sharded, "cpu", keeps_unsharded=False, dtype=torch.float32, slices=slices)
    expected, actual = dict(reference.named_parameters()), dict(sharded.named_parameters())
    assert expected.keys() == actual.keys()
    for name, parameter in actual.items():
        tensor = full_tensor(parameter.detach())
        assert tensor.dtype == expected[name].dtype
        assert tensor.equal(expected[name].data.view(tensor.shape)), name
    linears = {
        n: m for n, m in reference.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    }
    assert len(linears) == (8 if kind == "fp4" else 14)
    for name, linear in linears.items():
        state, local_state = linear.weight.quant_state, sharded.get_submodule(name).quant_state
        assert local_state.absmax.equal(state.absmax)
        assert (local_state.shape, local_state.dtype, local_state.quant_type) == (
            state.shape,
            state.dtype,
            kind,
        )
        if double:
            assert local_state.offset.equal(state.offset)
            assert local_state.state2.absmax.equal(state.state2.absmax)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert reference(ids).logits.equal(sharded(ids).logits)


@pytest.mark.parametrize(
    ("family", "kind", "double", "count"), [("llama", "nf4", True, 3), ("gpt2", "fp4", False, 2)]
)
def test_sharded_quantization_matches_transformers(
    tmp_path: Path, family: str, kind: str, double: bool, count: int
) -> None:
    """Bit for bit, also where shards end inside a block of 64 values, and for Conv1D."""
    folder = save_tiny(tmp_path / "base", family)
    ranks.run(compare_sharded_4bit_model, folder, kind, double, count=count)


def train_in_4bit(folder: Path, out: Path, shard: str, method: dict[str, Any]) -> None:
    from distributed import settings

    values = settings(folder, "decoder", "qlora", out) | {"method": method}
    values["train"] |= {"shard": shard, "gradient_accumulation_steps": 1 + (shard == "none")}
    train(TrainConfig.model_validate(values))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param({"kind": "hira"}, id="hira", marks=pytest.mark.sweep),
        pytest.param({"kind": "lora", "use_dora": True}, id="dora"),
    ],
)
def test_dora_and_hira_on_sharded_4bit_base_match_one_process(
    prepared_dir: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """PEFT recognizes quantized weights by their class, which FSDP2 does not keep."""
    from distributed import BOUND, difference

    one_process, sharded = tmp_path / "one", tmp_path / "two"
    train_in_4bit(prepared_dir, one_process, "none", method)
    ranks.run(train_in_4bit, prepared_dir, sharded, "full", method)
    assert difference(one_process, sharded) <= BOUND


def save_tensors_of_bfloat16_step(folder: Path, out: Path) -> None:
    """Save the size of weights kept by a forward pass for the backward pass, and the gradients."""
    from ftlevel.models.hardware import autocast
    from ftlevel.training.model import shard
    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()
    saved: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    model = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    shapes = {tuple(p.shape) for p in model.model.layers.parameters() if p.dim() > 1}
    shapes |= {shape[::-1] for shape in shapes}
    if processes.count > 1:
        shard(model, "cpu", keeps_unsharded=False, dtype=torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
    with hooks, autocast("cpu", "bfloat16"):
        loss = model(input_ids=ids, labels=ids).loss
    kept_weights = {t.untyped_storage()._cdata: t for t in saved if tuple(t.shape) in shapes}
    sizes = {"held": sum(t.untyped_storage().nbytes() for t in kept_weights.values())}
    loss.backward()
    gradients = {n: full_tensor(p.grad) for n, p in model.named_parameters()}
    if processes.is_first:
        save_file(gradients, out / f"{processes.count}.safetensors")
        (out / f"{processes.count}.json").write_text(json.dumps(sizes))


def test_no_bfloat16_weights_are_kept_for_backward(prepared_dir: Path, tmp_path: Path) -> None:
    """Gradients match autocast in one process, which does keep bfloat16 copies."""
    save_tensors_of_bfloat16_step(prepared_dir, tmp_path)
    ranks.run(save_tensors_of_bfloat16_step, prepared_dir, tmp_path)
    one_process, two_processes = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert all(
        torch.allclose(one_process[name], two_processes[name], rtol=1e-2, atol=1e-4)
        for name in one_process
    )
    kept_weights = [read_json(tmp_path / f"{count}.json")["held"] for count in (1, 2)]
    assert kept_weights[0] > 100_000  # the check detects kept copies
    assert kept_weights[1] == 0


def train_or_resume(folder: Path, out: Path, resume: bool, free_memory: int | None = None) -> None:
    """Start or resume a run with `free_memory` bytes of host memory for checkpoint copies."""
    from distributed import settings

    from ftlevel.models.upstream.shards import AsyncCheckpointWriter
    from ftlevel.training import sharding

    async_writers, original_begin = [], AsyncCheckpointWriter.begin
    AsyncCheckpointWriter.begin = lambda writer: (
        async_writers.append(writer),
        original_begin(writer),
    )[1]
    if free_memory is not None:
        sharding.free_memory_bytes = lambda _: free_memory
    values = settings(folder, "encoder-decoder", "full", out)  # tied embeddings
    values["train"] |= {"gradient_accumulation_steps": 1, "shard": "full", "max_steps": 8,
                        "save_steps": 2}  # fmt: skip
    values["output"] = {"dir": str(out), "resume": resume, "overwrite": not resume}
    train(TrainConfig.model_validate(values))
    assert bool(async_writers) == (free_memory is None)


def test_killed_sharded_run_resumes_like_uninterrupted_run(
    prepared_dir: Path, tmp_path: Path
) -> None:
    uninterrupted, run = tmp_path / "whole", tmp_path / "run"
    ranks.run(train_or_resume, prepared_dir, uninterrupted, False, 1 << 20)  # not in background
    processes = ranks.start(train_or_resume, [(prepared_dir, run, False)] * 2)
    deadline = time.monotonic() + 300
    while not list(run.glob("checkpoints/checkpoint-2/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shard_sizes = [path.stat().st_size for path in run.glob("checkpoints/checkpoint-2/**/shard-*")]
    assert len(shard_sizes) == 4  # weights and optimizer of each
    assert max(shard_sizes) < 0.4 * sum(shard_sizes)
    assert not list(run.glob("checkpoints/*/model*"))  # no gathered checkpoint
    processes[1].kill()
    start = time.monotonic()
    assert 0 not in ranks.end(processes)
    assert time.monotonic() - start < 30
    assert not (run / "summary.json").exists()
    ranks.run(train_or_resume, prepared_dir, run, True)
    saved = [load_file(path / "adapter/model.safetensors") for path in (uninterrupted, run)]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][key].equal(saved[1][key]) for key in saved[0])
    # One process assembles the last checkpoint, which has tied embeddings.
    checkpoint = run / "checkpoints/checkpoint-8"
    loaded = resolve_model(str(checkpoint), device="cpu").load("cpu")
    parameters = dict(loaded.model.named_parameters())
    assert all(parameters[name].equal(saved[0][name]) for name in parameters)
    packed = []
    for number, model in enumerate((checkpoint, run / "adapter")):
        out = tmp_path / f"packed-{number}"
        quantize(QuantizeConfig(model=str(model), out=out, quant="4bit", measure=False))
        packed.append(load_file(out / "model.safetensors"))
    assert packed[0].keys() == packed[1].keys()
    assert all(packed[0][key].equal(packed[1][key]) for key in packed[0])


def create_sharded_tensors() -> dict[str, torch.Tensor]:
    """Return tensors sharded over all processes; row counts are not always divisible."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()
    mesh = init_device_mesh("cpu", (processes.count,))
    sizes = {"a": (7, 300), "one row": (1, 5), "b": (6,)}
    full_tensors = {name: torch.arange(math.prod(s)).float().view(s) for name, s in sizes.items()}
    sharded = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in full_tensors.items()}
    return {**sharded, "tied": sharded["a"], "in all": torch.arange(4)}


def write_checkpoint(folder: Path, max_file_bytes: int | None, in_background: bool = False) -> None:
    import resource

    from ftlevel.artifacts.run_directory import RunDirectory
    from ftlevel.models.upstream.shards import AsyncCheckpointWriter, save_distributed_checkpoint
    from ftlevel.training.saving import explain_disk_errors

    tensors = create_sharded_tensors()
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    with explain_disk_errors(RunDirectory(folder)):
        if in_background:
            writer = AsyncCheckpointWriter()
            writer.copy(tensors, folder / "parts")
            writer.begin()
            writer.then((folder / "written").touch)
            writer.end()
        else:
            save_distributed_checkpoint(tensors, folder / "parts")


def write_checkpoint_slowly(folder: Path) -> None:
    """Change tensors while two checkpoints of them are being written."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from ftlevel.models.upstream.shards import AsyncCheckpointWriter

    tensors, shard_file = (
        create_sharded_tensors(),
        folder / "parts" / "shard-00001-model-00001-of-00001",
    )
    original_write = HuggingFaceStorageWriter.write_data

    def write_with_delay(*arguments: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return original_write(*arguments, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", write_with_delay)
        writer = AsyncCheckpointWriter()
        writer.copy(tensors, folder / "parts")
        writer.copy(tensors, folder / "others")
        writer.begin()
        writer.then((folder / "written").touch)
        for tensor in tensors.values():
            local_shard(tensor).zero_()
        torch.distributed.all_reduce(torch.zeros(9))  # as the next step does
        early_files = [path for path in (shard_file, folder / "written") if path.exists()]
        writer.end()
    if early_files or not (folder / "written").exists():
        raise ConfigError(f"{early_files}")


def test_async_checkpoint_has_values_at_copy_time(tmp_path: Path) -> None:
    """The callback runs only after all processes have finished writing."""
    ranks.run(write_checkpoint_slowly, tmp_path)
    ranks.run(read_checkpoint, tmp_path)
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "others").rename(tmp_path / "parts")
    ranks.run(read_checkpoint, tmp_path)


def read_checkpoint(folder: Path) -> None:
    from ftlevel.models.upstream.shards import load_distributed_checkpoint

    expected = create_sharded_tensors()
    actual = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    actual["tied"] = actual["a"]
    load_distributed_checkpoint(actual, folder / "parts")
    for name, tensor in expected.items():
        if not local_shard(actual[name]).equal(local_shard(tensor)):
            raise ConfigError(name)


def test_checkpoint_loads_in_other_number_of_processes(tmp_path: Path) -> None:
    ranks.run(write_checkpoint, tmp_path, None)
    for count in (2, 3):
        ranks.run(read_checkpoint, tmp_path, count=count)


@pytest.mark.parametrize("in_background", [False, True], ids=["synchronous", "background"])
def test_write_error_is_reported_once(tmp_path: Path, in_background: bool) -> None:
    error_file = tmp_path / "errors"
    arguments = [(tmp_path, None, in_background), (tmp_path, 1000, in_background)]
    assert ranks.end(ranks.start(write_checkpoint, arguments, error_file)) == [1, 1]
    (line,) = error_file.read_text().splitlines()
    assert "cannot be written: File too large. There is no valid checkpoint" in line
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": {"dataset": "encoder.jsonl", "validation_file": "encoder-validation.jsonl"}},
         "rank 1 (HOST) is not of the same run as rank 0 (HOST): data.dataset is"),
        ({"data": {"dataset": "nowhere.jsonl"}}, "rank 1 (HOST): "),
        ({"train": {"save_steps": 3}}, "rank 1 (HOST) is not of the same run as rank 0 (HOST): "
         "train.save_steps is 3 and 2 there"),
    ],
)  # fmt: skip
def test_process_with_other_config_is_reported(
    prepared_dir: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:  # fmt: skip
    import socket

    start, error_file = time.monotonic(), tmp_path / "errors"
    arguments = [(prepared_dir, tmp_path / "run", fields) for fields in ({}, overrides)]
    assert ranks.end(ranks.start(train_with_overrides, arguments, error_file)) == [2, 2]
    assert time.monotonic() - start < 30
    (line,) = error_file.read_text().splitlines()
    assert message.replace("HOST", socket.gethostname()) in line


@pytest.mark.parametrize(
    ("name", "extra_config"),
    [("lm_head.weight", {}), ("model.layers.1.mlp.up_proj.weight", {"quant": {"kind": "4bit"}})],
)
def test_nan_in_one_shard_is_reported(
    prepared_dir: Path, tmp_path: Path, name: str, extra_config: dict[str, Any]
) -> None:
    error_file, damaged = tmp_path / "errors", tmp_path / "damaged"
    shutil.copytree(prepared_dir / "decoder", damaged)
    weights = load_file(damaged / "model.safetensors")
    weights[name][-1, 0] = torch.nan  # the second process reads it alone
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    overrides = {
        "model": {"name_or_path": str(damaged)},
        "train": {"shard": "full"},
        **extra_config,
    }
    arguments = [(prepared_dir, tmp_path / "run", overrides)] * 2
    assert ranks.end(ranks.start(train_with_overrides, arguments, error_file)) == [2, 2]
    (line,) = error_file.read_text().splitlines()
    assert ("rank 1 (" in line) != bool(extra_config)  # each process has all quantization scales
    assert f"NaN or infinity in 1 of its tensors: {name}." in line


def train_with_late_process(folder: Path, out: Path) -> None:
    """Train; rank 1 starts its third step after 5 s, with a timeout of 3 s."""
    from distributed import settings

    from ftlevel.events import NullListener
    from ftlevel.training import processes as watch_processes
    from ftlevel.world import get_world

    class WarningListener(NullListener):
        def warn(self, message: str) -> None:
            with (out / "warnings").open("a") as file:
                file.write(message + "\n")

    original_begin = watch_processes.WatchProcesses.on_step_begin

    def begin_with_delay(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if get_world().rank == 1 and state.global_step == 2:
            time.sleep(5)
        original_begin(self, args, state, *rest, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch_processes, "HEARTBEAT_TIMEOUT", 3.0)
        patch.setattr(watch_processes, "_INTERVAL", 0.5)
        patch.setattr(watch_processes.WatchProcesses, "on_step_begin", begin_with_delay)
        values = settings(folder, "decoder", "lora", out / "run")
        values["train"] |= {"gradient_accumulation_steps": 1}
        train(TrainConfig.model_validate(values), listener=WarningListener())


def test_late_process_is_reported_once(prepared_dir: Path, tmp_path: Path) -> None:
    ranks.run(train_with_late_process, prepared_dir, tmp_path)
    (line,) = [
        line for line in (tmp_path / "warnings").read_text().splitlines() if "rank 1" in line
    ]
    assert "has not started step 3 for 3 s, and the others wait for it" in line


def fail_in_rank_0() -> None:
    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()

    def fail() -> None:
        raise ConfigError("it cannot be.")

    processes.from_first(fail)


def test_error_of_rank_0_is_reported_once(tmp_path: Path) -> None:
    error_file = tmp_path / "errors"
    assert ranks.end(ranks.start(fail_in_rank_0, [(), ()], error_file)) == [2, 2]
    assert error_file.read_text() == "ftlevel: it cannot be.\n"


def train_with_overrides(folder: Path, out: Path, overrides: dict[str, Any]) -> None:
    from distributed import settings

    values = settings(folder, "decoder", "lora", out)
    for section, fields in overrides.items():
        files = ("dataset", "validation_file")
        fields = {k: str(folder / v) if k in files else v for k, v in fields.items()}
        values[section] = {**values.get(section, {}), **fields}
    train(TrainConfig.model_validate(values))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "one process: it has the whole model"),
        (
            {"method": {"kind": "lora", "init_lora_weights": "pissa"}},
            "an initialization that changes the base",
        ),
        ({"method": {"kind": "adalora"}}, "other shapes than what it trains"),
        ({"quant": {"kind": "8bit"}}, "--quant 8bit"),
        ({"method": {"kind": "full"}, "speed": {"verify": True}}, "Drop --verify-fast"),
        ({"method": {"kind": "full"}}, "Drop --metric-for-best-model loss, or use --shard none"),
        (
            {"method": {"kind": "full"}, "train": {"load_best_model_at_end": True}},
            "Drop --load-best-model-at-end, or use --shard none",
        ),
        ({"method": {"kind": "full"}, "train": {"on_nonfinite": "rollback"}}, "Use skip"),
    ],
)
def test_unsupported_sharding_options_raise_before_loading(
    prepared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any], message: str,
) -> None:  # fmt: skip
    from distributed import settings

    monkeypatch.setattr("ftlevel.commands.train.load_training_model", None)
    values = settings(prepared_dir, "decoder", "lora", tmp_path)
    values["train"]["shard"] = "full"
    for section, fields in overrides.items():
        values[section] = {**values.get(section, {}), **fields}
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig.model_validate(values))
