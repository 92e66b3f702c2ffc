"""Real pretrained weights, reduced to their first blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def keep_first_blocks(model: Path, out: Path, blocks: int) -> Path:
    """Save a Llama with the first blocks, norm and embeddings of `model`, and return `out`."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file)
    first_weights = {
        name: w for name, w in weights.items() if _block_index(name, "layers") < blocks
    }
    save_file(first_weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = blocks
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def keep_first_blocks_of_gguf(model: Path, out: Path, blocks: int) -> Path:
    """Save the first blocks of a GGUF file; tensors are copied byte for byte."""
    import gguf

    from ftlevel.models.upstream.conversions import FastGGUFReader

    reader = FastGGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = blocks if name == f"{arch}.block_count" else field.contents()
        kind, *inner = field.types
        writer.add_key_value(name, value, kind, sub_type=inner[-1] if inner else None)
    for tensor in reader.tensors:
        if _block_index(tensor.name, "blk") < blocks:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _block_index(name: str, before: str) -> int:
    """Return the block index of a tensor, or -1."""
    parts = name.split(".")
    return int(parts[parts.index(before) + 1]) if before in parts else -1
