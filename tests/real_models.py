"""Real pretrained weights, reduced to their first blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def keep_first_blocks(model: Path, out: Path, blocks: int) -> Path:
    """Write a Llama of `model`'s first blocks, its norm and its embeddings, and return `out`."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file)
    kept = {name: w for name, w in weights.items() if _block(name, "layers") < blocks}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = blocks
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def keep_first_blocks_of_gguf(model: Path, out: Path, blocks: int) -> Path:
    """Write the same of a GGUF file: its tensors byte for byte as they are stored."""
    import gguf

    reader = gguf.GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = blocks if name == f"{arch}.block_count" else field.contents()
        kind, *inner = field.types
        writer.add_key_value(name, value, kind, sub_type=inner[-1] if inner else None)
    for tensor in reader.tensors:
        if _block(tensor.name, "blk") < blocks:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _block(name: str, before: str) -> int:
    """Return the number of the block a tensor is in; -1 where it is in none."""
    parts = name.split(".")
    return int(parts[parts.index(before) + 1]) if before in parts else -1
