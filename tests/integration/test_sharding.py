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
from tiny_models import save_tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CASES = ("decoder/lora", "encoder/full", "encoder-decoder/prefix")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.syspath_prepend(ROOT / "tests")
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT / 'benchmarks'}:{ROOT / 'src'}")
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distributed import prepare

    folder = tmp_path_factory.mktemp("sharding") / "all"
    prepare(folder)
    return folder


def work(folder: Path, cases: list[str], out: Path, shard: str) -> None:
    from distributed import work as train_all

    train_all(folder, cases, out, shard)


@pytest.fixture(scope="module")
def one(prepared: Path) -> Path:
    """Return the runs of one process."""
    work(prepared, list(CASES), prepared / "one", "none")
    return prepared / "one"


def check_evaluations(one: Path, two: Path) -> None:
    """Compare all metrics of the evaluations of two runs, which are in each other's order."""
    both = []
    for run in (one, two):
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        both.append([
            {name: value for name, value in record.items() if name == "step" or
             (name.startswith("eval_") and isinstance(value, int | float))}
            for record in records if "eval_loss" in record
        ])  # fmt: skip
    assert [record["step"] for record in both[0]] == [0, 2, 4]
    assert len(both[0]) == len(both[1])
    for record, other in zip(*both, strict=True):
        assert record == pytest.approx(other, rel=1e-6)


def check_in_plain_peft(prepared: Path) -> None:
    """Compare the adapters of one process and of two, as plain PEFT loads them."""
    logits = []
    for run in ("one", "two"):
        base = AutoModelForCausalLM.from_pretrained(prepared / "decoder", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, prepared / run / "decoder/lora/adapter").eval()
        with torch.no_grad():
            logits.append(adapted(torch.arange(3, 20)[None]).logits)
            with adapted.disable_adapter():
                assert (adapted(torch.arange(3, 20)[None]).logits - logits[0]).abs().max() > 1e-3
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_two_processes_with_half_a_model_each_are_one_with_the_whole(
    prepared: Path, one: Path
) -> None:
    from distributed import BOUND, STEPS, difference

    two = prepared / "two"
    each = (prepared, list(CASES), two, "full")
    assert ranks.end(ranks.start(work, [each, each])) == [0, 0]
    for case in CASES:
        assert difference(one / case, two / case) <= BOUND
        check_evaluations(one / case, two / case)
        share = json.loads((two / case / "share.json").read_text())
        assert share < (0.55 if case.endswith("full") else 0.85)  # a tiny adapter is a third
        (name,) = (path.name for path in (one / case / "adapter").glob("*model.safetensors"))
        whole, saved = (load_file(run / case / "adapter" / name) for run in (one, two))
        assert whole.keys() == saved.keys()
        for key, tensor in whole.items():  # AdamW's first steps are as large for a small gradient
            assert (tensor - saved[key]).abs().mean() < 1e-5, key
    parts = two / f"encoder/full/checkpoints/checkpoint-{STEPS}"  # as each process wrote them
    model = AutoModelForSequenceClassification.from_pretrained(parts)
    last = load_file(two / "encoder/full/adapter/model.safetensors")
    assert all(tensor.equal(last[key]) for key, tensor in model.named_parameters())
    found = resolve_model(str(parts), device="cpu").load("cpu")
    assert found.task.name == "text-classification"
    assert all(tensor.equal(last[key]) for key, tensor in found.model.named_parameters())
    check_in_plain_peft(prepared)
    broken = prepared / "broken"
    shutil.copytree(parts, broken)
    next(broken.glob("shard-00002*")).unlink()
    with pytest.raises(InputError, match=r"cannot be assembled: shard-00002.* is missing"):
        resolve_model(str(broken), device="cpu")


@pytest.mark.parametrize(
    "case", ["encoder/full", pytest.param("decoder/lora", marks=pytest.mark.sweep)]
)
def test_a_model_that_is_held_until_its_backward_pass_is_evaluated(
    prepared: Path, one: Path, case: str
) -> None:
    """By `--shard grads`, which leaves every block unsharded where no backward pass follows."""
    from distributed import BOUND, difference

    two = prepared / "held"
    each = (prepared, [case], two, "grads")
    assert ranks.end(ranks.start(work, [each, each])) == [0, 0]
    assert difference(one / case, two / case) <= BOUND
    check_evaluations(one / case, two / case)


def infer(folder: Path, holds: bool) -> None:
    """Call a sharded model in every way that leaves no gradients, and look at its parameters."""
    from torch.distributed.tensor import DTensor

    from ftlevel.training.model import shard
    from ftlevel.training.processes import started_processes

    started_processes().join()
    model = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    sharded = {name for name, p in model.named_parameters() if p.dim() > 1}
    model.requires_grad_(False)
    shard(model, "cpu", keeps_unsharded=holds, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]

    def forward_under(context: Any) -> None:
        with context():
            model(ids)

    def generate() -> None:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)

    for infers in (
        lambda: forward_under(torch.no_grad),
        lambda: forward_under(torch.inference_mode),
        generate,
    ):
        infers()
        parts = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
        assert parts == sharded


@pytest.mark.parametrize("holds", [False, True], ids=["full", "grads"])
def test_parameters_are_sharded_after_a_forward_pass_without_gradients(
    prepared: Path, holds: bool
) -> None:
    assert ranks.end(ranks.start(infer, [(prepared, holds)] * 2)) == [0, 0]


def load_own_part(directory: str) -> tuple[Any, dict[str, int]]:
    """Return a sharded model in float32 of which each process read its rows, and bytes taken."""
    from ftlevel.models.loading import load_config, load_model
    from ftlevel.models.sources import resolve_source
    from ftlevel.models.upstream.shards import LazyWeights
    from ftlevel.training.model import shard

    def resident(of: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(of)).split()[1]) * 1024

    source = resolve_source(directory)
    given = (source, load_config(source), "AutoModelForCausalLM")
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    load_model(*given, **settings, slices=LazyWeights())  # imports what it needs
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    slices = LazyWeights()
    model, _ = load_model(*given, **settings, slices=slices)
    shard(model, "cpu", keeps_unsharded=False, dtype=torch.float32, slices=slices)
    peak = resident("VmHWM") - before
    sizes = [(p.nbytes, local_shard(p).nbytes) for p in model.parameters()]
    whole, own = zip(*sizes, strict=True)
    return model, {"whole": sum(whole), "own": sum(own), "largest": max(whole), "peak": peak}


def hold(folder: Path, out: Path) -> None:
    """Read the part of this process of a model of 100 MB in float32, stored in bfloat16."""
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
    model, facts = load_own_part(str(folder))
    stored = load_file(folder / "model.safetensors")
    same = all(
        local_shard(p).equal(part_of(stored[n], p).float()) for n, p in model.named_parameters()
    )
    (out / f"{processes.world.rank}.json").write_text(json.dumps({**facts, "same": same}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks as Linux tells them")
def test_each_process_reads_no_more_than_it_holds(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    assert ranks.end(ranks.start(hold, [(wide, tmp_path)] * 2)) == [0, 0]
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts["same"]
        room = 16 << 20  # modules, meshes, the allocator
        assert facts["peak"] < facts["whole"] / 2 + facts["largest"] + room, facts


def in_half_precision(folder: Path, out: Path, shard: str, way: str) -> None:
    from distributed import settings

    method, _, recomputed = way.partition(", ")
    values = settings(folder, "decoder", method, out)
    values["model"]["dtype"] = "bfloat16"
    parts = (2 if recomputed else 1) * (1 if shard != "none" else 2)
    values["train"] |= {"shard": shard, "gradient_accumulation_steps": parts,
                        "gradient_checkpointing": bool(recomputed)}  # fmt: skip
    train(TrainConfig.model_validate(values))


@pytest.mark.parametrize(
    "way", ["lora", pytest.param("full", marks=pytest.mark.sweep), "full, recomputed"]
)
def test_a_shared_model_computes_in_half_precision(
    way: str, prepared: Path, tmp_path: Path
) -> None:
    from distributed import difference

    one, two = tmp_path / "one", tmp_path / "two"
    in_half_precision(prepared, one, "none", way)
    given = [(prepared, two, "full", way)] * 2
    assert ranks.end(ranks.start(in_half_precision, given)) == [0, 0]
    assert difference(one, two) < 2e-3  # of bfloat16's 8 bits


def hold_four_bits(folder: Path, kind: str, double: bool) -> None:
    """Hold a part of a base that this process quantized beside the whole as transformers does."""
    import bitsandbytes

    from ftlevel.models.loading import load_config, load_model
    from ftlevel.models.quantization import build_quantization_config
    from ftlevel.models.sources import resolve_source
    from ftlevel.models.upstream.shards import LazyWeights
    from ftlevel.training.model import shard
    from ftlevel.training.processes import started_processes

    started_processes().join()
    source = resolve_source(str(folder))
    given = (source, load_config(source), "AutoModelForCausalLM")
    four_bits = QuantConfig(kind="4bit", quant_type=kind, double_quant=double, experts=False)
    quantization = build_quantization_config(four_bits, torch.float32, [])
    settings: Any = {"dtype": torch.bfloat16, "device": "cpu", "quantization": quantization}
    one, _ = load_model(*given, **settings)
    slices = LazyWeights()
    two, _ = load_model(*given, **settings, slices=slices)
    shard(two, "cpu", keeps_unsharded=False, dtype=torch.float32, slices=slices)
    wanted, found = dict(one.named_parameters()), dict(two.named_parameters())
    assert wanted.keys() == found.keys()
    for name, part in found.items():
        tensor = full_tensor(part.detach())
        assert tensor.dtype == wanted[name].dtype
        assert tensor.equal(wanted[name].data.view(tensor.shape)), name
    linears = {n: m for n, m in one.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(linears) == (8 if kind == "fp4" else 14)
    for name, linear in linears.items():
        state, own = linear.weight.quant_state, two.get_submodule(name).quant_state
        assert own.absmax.equal(state.absmax)
        assert (own.shape, own.dtype, own.quant_type) == (state.shape, state.dtype, kind)
        if double:
            assert own.offset.equal(state.offset)
            assert own.state2.absmax.equal(state.state2.absmax)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert one(ids).logits.equal(two(ids).logits)


@pytest.mark.parametrize(
    ("family", "kind", "double", "count"), [("llama", "nf4", True, 3), ("gpt2", "fp4", False, 2)]
)
def test_each_process_quantizes_its_own_rows_as_the_whole_would_be(
    tmp_path: Path, family: str, kind: str, double: bool, count: int
) -> None:
    """Bit for bit, where parts end inside a block of 64 numbers and Conv1D is turned over, too."""
    folder = save_tiny(tmp_path / "base", family)
    given = [(folder, kind, double)] * count
    assert ranks.end(ranks.start(hold_four_bits, given)) == [0] * count


def in_four_bits(folder: Path, out: Path, shard: str, method: dict[str, Any]) -> None:
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
def test_a_method_that_computes_with_the_weights_finds_their_parts_in_four_bits(
    prepared: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """PEFT tells packed weights by their class, which FSDP2 does not keep."""
    from distributed import BOUND, difference

    one, two = tmp_path / "one", tmp_path / "two"
    in_four_bits(prepared, one, "none", method)
    given = [(prepared, two, "full", method)] * 2
    assert ranks.end(ranks.start(in_four_bits, given)) == [0, 0]
    assert difference(one, two) <= BOUND


def step_in_half_precision(folder: Path, out: Path) -> None:
    """Write what one forward pass leaves of the weights for the backward pass, and gradients."""
    from ftlevel.models.hardware import autocast
    from ftlevel.training.model import shard
    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    model = AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    shapes = {tuple(p.shape) for p in model.model.layers.parameters() if p.dim() > 1}
    shapes |= {shape[::-1] for shape in shapes}
    if processes.count > 1:
        shard(model, "cpu", keeps_unsharded=False, dtype=torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast("cpu", "bfloat16"):
        loss = model(input_ids=ids, labels=ids).loss
    held = {t.untyped_storage()._cdata: t for t in saved if tuple(t.shape) in shapes}
    facts = {"held": sum(t.untyped_storage().nbytes() for t in held.values())}
    loss.backward()
    gradients = {n: full_tensor(p.grad) for n, p in model.named_parameters()}
    if processes.is_first:
        save_file(gradients, out / f"{processes.count}.safetensors")
        (out / f"{processes.count}.json").write_text(json.dumps(facts))


def test_no_copy_of_the_weights_in_half_precision_waits_for_the_backward_pass(
    prepared: Path, tmp_path: Path
) -> None:
    """What autocast computes of one process, and none of the casts that it would keep."""
    step_in_half_precision(prepared, tmp_path)
    given = [(prepared, tmp_path)] * 2
    assert ranks.end(ranks.start(step_in_half_precision, given)) == [0, 0]
    one, two = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert all(torch.allclose(one[name], two[name], rtol=1e-2, atol=1e-4) for name in one)
    held = [json.loads((tmp_path / f"{count}.json").read_text())["held"] for count in (1, 2)]
    assert held[0] > 100_000  # as the test would see it
    assert held[1] == 0


def go_on(folder: Path, out: Path, resume: bool, room: int | None = None) -> None:
    """Begin a run or go on with it; its host has `room` bytes for copies of what is written."""
    from distributed import settings

    from ftlevel.models.upstream.shards import AsyncCheckpointWriter
    from ftlevel.training import sharding

    waits, begin = [], AsyncCheckpointWriter.begin
    AsyncCheckpointWriter.begin = lambda writer: (waits.append(writer), begin(writer))[1]
    if room is not None:
        sharding.free_memory_bytes = lambda _: room
    values = settings(folder, "encoder-decoder", "full", out)  # whose embeddings are tied
    values["train"] |= {"gradient_accumulation_steps": 1, "shard": "full", "max_steps": 8,
                        "save_steps": 2}  # fmt: skip
    values["output"] = {"dir": str(out), "resume": resume, "overwrite": not resume}
    train(TrainConfig.model_validate(values))
    assert bool(waits) == (room is None)


def test_a_shared_run_whose_process_was_killed_goes_on_as_if_it_had_not(
    prepared: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    waiting = [(prepared, whole, False, 1 << 20)] * 2  # for each checkpoint, the others for none
    assert ranks.end(ranks.start(go_on, waiting)) == [0, 0]
    broken = ranks.start(go_on, [(prepared, run, False)] * 2)
    deadline = time.monotonic() + 300
    while not list(run.glob("checkpoints/checkpoint-2/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held = [path.stat().st_size for path in run.glob("checkpoints/checkpoint-2/**/shard-*")]
    assert len(held) == 4  # weights and optimizer of each
    assert max(held) < 0.4 * sum(held)
    assert not list(run.glob("checkpoints/*/model*"))  # that one would have gathered
    broken[1].kill()
    began = time.monotonic()
    assert 0 not in ranks.end(broken)
    assert time.monotonic() - began < 30
    assert not (run / "summary.json").exists()
    assert ranks.end(ranks.start(go_on, [(prepared, run, True)] * 2)) == [0, 0]
    saved = [load_file(path / "adapter/model.safetensors") for path in (whole, run)]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][key].equal(saved[1][key]) for key in saved[0])
    # Its last checkpoint, whose embeddings are tied, is the model, put together by one process.
    parts = run / "checkpoints/checkpoint-8"
    last = resolve_model(str(parts), device="cpu").load("cpu")
    trained = dict(last.model.named_parameters())
    assert all(trained[name].equal(saved[0][name]) for name in trained)
    packed = []
    for number, model in enumerate((parts, run / "adapter")):
        out = tmp_path / f"packed-{number}"
        quantize(QuantizeConfig(model=str(model), out=out, quant="4bit", measure=False))
        packed.append(load_file(out / "model.safetensors"))
    assert packed[0].keys() == packed[1].keys()
    assert all(packed[0][key].equal(packed[1][key]) for key in packed[0])


def part_of_each() -> dict[str, torch.Tensor]:
    """Return tensors that all processes share out: rows that go up, and do not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()
    mesh = init_device_mesh("cpu", (processes.count,))
    sizes = {"a": (7, 300), "one row": (1, 5), "b": (6,)}
    wholes = {name: torch.arange(math.prod(s)).float().view(s) for name, s in sizes.items()}
    parts = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in wholes.items()}
    return {**parts, "tied": parts["a"], "in all": torch.arange(4)}


def write(folder: Path, room: int | None, aside: bool = False) -> None:
    import resource

    from ftlevel.artifacts.run_directory import RunDirectory
    from ftlevel.models.upstream.shards import AsyncCheckpointWriter, save_distributed_checkpoint
    from ftlevel.training.saving import explain_disk_errors

    tensors = part_of_each()
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with explain_disk_errors(RunDirectory(folder)):
        if aside:
            writer = AsyncCheckpointWriter()
            writer.copy(tensors, folder / "parts")
            writer.begin()
            writer.then((folder / "written").touch)
            writer.end()
        else:
            save_distributed_checkpoint(tensors, folder / "parts")


def write_slowly(folder: Path) -> None:
    """Change what is being written while it is, of two kinds at once."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from ftlevel.models.upstream.shards import AsyncCheckpointWriter

    tensors, waited = part_of_each(), folder / "parts" / "shard-00001-model-00001-of-00001"
    writes = HuggingFaceStorageWriter.write_data

    def write_late(*given: Any, **named: Any) -> Any:
        time.sleep(1.5)
        return writes(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", write_late)
        writer = AsyncCheckpointWriter()
        writer.copy(tensors, folder / "parts")
        writer.copy(tensors, folder / "others")
        writer.begin()
        writer.then((folder / "written").touch)
        for tensor in tensors.values():
            local_shard(tensor).zero_()
        torch.distributed.all_reduce(torch.zeros(9))  # as the next step does
        begun = [path for path in (waited, folder / "written") if path.exists()]
        writer.end()
    if begun or not (folder / "written").exists():
        raise ConfigError(f"{begun}")


def test_parts_are_written_while_the_run_goes_on(tmp_path: Path) -> None:
    """As they were when that began, of which nothing is said before all processes are done."""
    assert ranks.end(ranks.start(write_slowly, [(tmp_path,)] * 2)) == [0, 0]
    assert ranks.end(ranks.start(read, [(tmp_path,)] * 2)) == [0, 0]
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "others").rename(tmp_path / "parts")
    assert ranks.end(ranks.start(read, [(tmp_path,)] * 2)) == [0, 0]


def read(folder: Path) -> None:
    from ftlevel.models.upstream.shards import load_distributed_checkpoint

    expected = part_of_each()
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    found["tied"] = found["a"]
    load_distributed_checkpoint(found, folder / "parts")
    for name, tensor in expected.items():
        if not local_shard(found[name]).equal(local_shard(tensor)):
            raise ConfigError(name)


def test_parts_are_read_by_any_number_of_processes(tmp_path: Path) -> None:
    assert ranks.end(ranks.start(write, [(tmp_path, None)] * 2)) == [0, 0]
    for count in (2, 3):
        assert ranks.end(ranks.start(read, [(tmp_path,)] * count)) == [0] * count


@pytest.mark.parametrize("aside", [False, True], ids=["waited for", "aside"])
def test_a_part_that_cannot_be_written_is_said_once(tmp_path: Path, aside: bool) -> None:
    says = tmp_path / "errors"
    given = [(tmp_path, None, aside), (tmp_path, 1000, aside)]
    assert ranks.end(ranks.start(write, given, says)) == [1, 1]
    (line,) = says.read_text().splitlines()
    assert "cannot be written: File too large. There is no valid checkpoint" in line
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data": {"dataset": "encoder.jsonl", "validation_file": "encoder-validation.jsonl"}},
         "rank 1 (HOST) is not of the same run as rank 0 (HOST): data.dataset is"),
        ({"data": {"dataset": "nowhere.jsonl"}}, "rank 1 (HOST): "),
        ({"train": {"save_steps": 3}}, "rank 1 (HOST) is not of the same run as rank 0 (HOST): "
         "train.save_steps is 3 and 2 there"),
    ],
)  # fmt: skip
def test_a_process_with_something_else_is_named_by_all(
    prepared: Path, tmp_path: Path, other: dict[str, Any], message: str
) -> None:  # fmt: skip
    import socket

    began, says = time.monotonic(), tmp_path / "errors"
    each = [(prepared, tmp_path / "run", change) for change in ({}, other)]
    assert ranks.end(ranks.start(differ, each, says)) == [2, 2]
    assert time.monotonic() - began < 30
    (line,) = says.read_text().splitlines()
    assert message.replace("HOST", socket.gethostname()) in line


@pytest.mark.parametrize(
    ("name", "more"),
    [("lm_head.weight", {}), ("model.layers.1.mlp.up_proj.weight", {"quant": {"kind": "4bit"}})],
)
def test_a_number_that_is_none_in_the_rows_of_one_process_is_named_by_all(
    prepared: Path, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    says, damaged = tmp_path / "errors", tmp_path / "damaged"
    shutil.copytree(prepared / "decoder", damaged)
    weights = load_file(damaged / "model.safetensors")
    weights[name][-1, 0] = torch.nan  # the second process reads it alone
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    other = {"model": {"name_or_path": str(damaged)}, "train": {"shard": "full"}, **more}
    each = [(prepared, tmp_path / "run", other)] * 2
    assert ranks.end(ranks.start(differ, each, says)) == [2, 2]
    (line,) = says.read_text().splitlines()
    assert ("rank 1 (" in line) != bool(more)  # every process has all scales, and says so
    assert f"NaN or infinity in 1 of its tensors: {name}." in line


def come_late(folder: Path, out: Path) -> None:
    """Train; the second process reads the rows of its third step for 8 s, where 3 are too long."""
    from distributed import settings

    from ftlevel.events import NullListener
    from ftlevel.training import processes as watch_processes
    from ftlevel.world import get_world

    class Told(NullListener):
        def warn(self, message: str) -> None:
            with (out / "warnings").open("a") as file:
                file.write(message + "\n")

    begin = watch_processes.WatchProcesses.on_step_begin

    def begin_late(self: Any, args: Any, state: Any, *more: Any, **named: Any) -> None:
        if get_world().rank == 1 and state.global_step == 2:
            time.sleep(8)
        begin(self, args, state, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch_processes, "HEARTBEAT_TIMEOUT", 3.0)
        patch.setattr(watch_processes.WatchProcesses, "on_step_begin", begin_late)
        values = settings(folder, "decoder", "lora", out / "run")
        values["train"] |= {"gradient_accumulation_steps": 1}
        train(TrainConfig.model_validate(values), listener=Told())


def test_a_process_that_comes_late_to_a_step_is_named_once(prepared: Path, tmp_path: Path) -> None:
    assert ranks.end(ranks.start(come_late, [(prepared, tmp_path)] * 2)) == [0, 0]
    (line,) = [
        line for line in (tmp_path / "warnings").read_text().splitlines() if "rank 1" in line
    ]
    assert "has not started step 3 for 3 s, and the others wait for it" in line


def fail_in_the_first() -> None:
    from ftlevel.training.processes import started_processes

    processes = started_processes()
    processes.join()

    def fail() -> None:
        raise ConfigError("it cannot be.")

    processes.from_first(fail)


def test_what_the_first_process_finds_wrong_it_says_once(tmp_path: Path) -> None:
    says = tmp_path / "errors"
    assert ranks.end(ranks.start(fail_in_the_first, [(), ()], says)) == [2, 2]
    assert says.read_text() == "ftlevel: it cannot be.\n"


def differ(folder: Path, out: Path, other: dict[str, Any]) -> None:
    from distributed import settings

    values = settings(folder, "decoder", "lora", out)
    for section, fields in other.items():
        files = ("dataset", "validation_file")
        fields = {k: str(folder / v) if k in files else v for k, v in fields.items()}
        values[section] = {**values.get(section, {}), **fields}
    train(TrainConfig.model_validate(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "one process has the whole model"),
        ({"method": {"kind": "lora", "init_lora_weights": "pissa"}}, "taken out of the base"),
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
def test_what_cannot_be_shared_is_named_before_weights_load(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any], message: str,
) -> None:  # fmt: skip
    from distributed import settings

    monkeypatch.setattr("ftlevel.commands.train.load_training_model", None)
    values = settings(prepared, "decoder", "lora", tmp_path)
    values["train"]["shard"] = "full"
    for section, fields in change.items():
        values[section] = {**values.get(section, {}), **fields}
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig.model_validate(values))
