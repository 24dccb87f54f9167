"""Converts a Llama in a GGUF file to a folder as save_pretrained writes it, once; everything else reads that folder. It
needs the package gguf, which nothing else does:

    python -m conversion.gguf FILE.gguf FOLDER

Quantised tensors become float32, which holds their values exactly; the others keep their type. The weights are written
a block of rows at a time, so memory stays small whatever the model's size.
"""

import argparse
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from conversion.gguf_config import PLAIN, ROPE_FACTORS, config_of, shape_of, stored_as
from conversion.gguf_tokenizer import make_tokenizer
from inputs.model_files import one_line
from paths import expanded_path, readable
from utils import flush_to_disk, lock_dir, sha256

logger = logging.getLogger("train")

PACKAGE = "gguf==0.19.0"
RECORD = "converted_from.json"
LOCK = ".lock"  # of lock_dir
BLOCK_BYTES = 2**26  # of float32 values in memory at a time

# The name of a tensor in the file, without "blk.N." and ".weight" or ".bias", and in a LlamaForCausalLM.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(name: str) -> bool:
    """Returns whether a teacher's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def convert_gguf(flag: str, file: Path, folder: Path) -> Path:
    """Writes the model in `file` to `folder` with config, weights and tokenizer, and returns the folder. One that an
    earlier call made of the same file is used as it is. The folder appears under its name when it is whole.

    Raises ValueError of one line that begins with `flag` if the package is missing, the file is damaged, holds another
    architecture or no tokenizer, the folder holds something else, or the disk has no room.
    """
    with readable(f"{flag} {file}", file):
        if not file.is_file():
            raise ValueError(f"{flag} {file}: there is no such file; give the path of a .gguf file")
        if folder.is_symlink() or folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not _is_made_of(folder, file):
                raise ValueError(
                    f"{flag} {file}: would be converted to {folder}, which holds something else; move it away, or "
                    "choose another folder"
                )
            return folder
    model = GGUFModel.open(flag, file)
    partial = partial_folder(folder)
    with lock_dir(flag, partial):
        try:
            _empty(partial)  # of an earlier call that was killed
            _check_room(flag, file, folder, model.n_bytes)
            logger.info("Converting %s to %s (%.1f GB)", file, folder, model.n_bytes / 1e9)
            model.save(partial)
            record = {"file": file.name, "sha256": sha256(file)}
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            for written in [*partial.iterdir(), partial]:
                flush_to_disk(written)
            (partial / LOCK).unlink()
            os.replace(partial, folder)  # also over an empty folder
            flush_to_disk(folder.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            what = f"{flag} {file}: cannot be converted to {folder} ({error.strerror})"
            raise ValueError(f"{what}; make room, or choose another folder") from error
    return folder


def partial_folder(folder: Path) -> Path:
    """Returns where a conversion to `folder` writes until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def _empty(folder: Path) -> None:
    """Removes all but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _is_made_of(folder: Path, file: Path) -> bool:
    """Returns whether a folder is what this file was converted to."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["sha256"] == sha256(file)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _check_room(flag: str, file: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ValueError(
            f"{flag} {file}: converted it takes {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB "
            "free; make room, or choose a folder on another disk"
        )


def _package(flag: str, file: Path) -> ModuleType:
    """Returns the package gguf. Raises ValueError if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{flag} {file}: to read it needs the package gguf, which is not installed; pip install {PACKAGE}"
        ) from error
    return gguf


@dataclass(frozen=True)
class GGUFModel:
    """Holds a GGUF file that was opened and checked; its tensors stay on the disk.

    tensors: name in a LlamaForCausalLM -> tensor of the file.
    """

    flag: str
    file: Path
    package: ModuleType
    values: dict[str, Any]
    config: LlamaConfig
    tensors: dict[str, Any]

    @classmethod
    def open(cls, flag: str, file: Path) -> "GGUFModel":
        """Reads all but the weights. Raises ValueError."""
        where, package = f"{flag} {file}", _package(flag, file)
        with one_line(f"{where}: is damaged or no GGUF file"):
            reader = package.GGUFReader(file)
            values = {key: field.contents() for key, field in reader.fields.items()}
            found = {tensor.name: tensor for tensor in reader.tensors}
        with one_line(f"{where}: holds no Llama that can be converted", "take another file, or the original model"):
            config = config_of(values, found)
            tensors = {name_in_model(name): tensor for name, tensor in found.items() if name != ROPE_FACTORS}
            _check_shapes(config, tensors)
        return cls(flag, file, package, values, config, tensors)

    @property
    def n_bytes(self) -> int:
        return sum(math.prod(shape_of(t)) * np.dtype(stored_as(t)[1]).itemsize for t in self.tensors.values())

    def save(self, folder: Path) -> None:
        """Writes tokenizer, configs and weights."""
        where = f"{self.flag} {self.file}"
        with one_line(f"{where}: its tokenizer cannot be used", "take another file, or the original model"):
            tokenizer = make_tokenizer(self.file, self.values, self.config)
            tokenizer.save_pretrained(folder)
        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        with one_line(f"{where}: its weights cannot be converted", "make room if the disk is full, else copy it again"):
            write_safetensors(folder / "model.safetensors", self.header(), self.blocks())

    def header(self) -> dict[str, tuple[str, list[int], int]]:
        """Returns name -> dtype by safetensors' name, shape, and size in bytes, in the order of `blocks`."""
        return {
            name: (stored_as(t)[0], shape_of(t), math.prod(shape_of(t)) * np.dtype(stored_as(t)[1]).itemsize)
            for name, t in self.tensors.items()
        }

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the values of all tensors, a few rows at a time. Raises ValueError if one is not finite."""
        for name, tensor in self.tensors.items():
            shape, type_ = shape_of(tensor), stored_as(tensor)[1]
            is_plain = tensor.tensor_type.name in PLAIN
            stored = tensor.data.view(type_) if is_plain else tensor.data  # else packed bytes
            rows = stored.reshape(-1, stored.shape[-1] if len(shape) > 1 else 1)  # (R, values or bytes of a row)
            order = row_order(name, len(rows), self.config)
            step = max(1, BLOCK_BYTES // (4 * rows.shape[1]))
            for start in range(0, len(rows), step):
                block = np.ascontiguousarray(rows[order[start : start + step]])
                values = self.package.dequantize(block.view(np.uint8), tensor.tensor_type)  # float32
                if not np.isfinite(values).all():
                    raise ValueError(f"{tensor.name} holds values that are not finite")
                yield block if is_plain else values


def name_in_model(name: str) -> str:
    """Returns the name in a LlamaForCausalLM of a file's tensor. Raises ValueError for one that no Llama has."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    block, _, part = stem.partition(".")[2].partition(".")
    if not stem.startswith("blk.") or not block.isdigit() or part not in OF_A_LAYER:
        raise ValueError(f"a Llama has no tensor such as {name}")
    return f"model.layers.{block}.{OF_A_LAYER[part]}.{kind}"


def row_order(name: str, n_rows: int, config: LlamaConfig) -> np.ndarray:
    """Returns which row of a file's tensor is each row of the model's: GGUF has the rows of a head's queries and keys
    by rotary pairs, (pair, half), and transformers by halves, (half, pair).
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part not in heads:
        return np.arange(n_rows)
    return np.arange(n_rows).reshape(heads[part], -1, 2).swapaxes(1, 2).flatten()  # (H, P/2, 2) -> (H, 2, P/2)


def _check_shapes(config: LlamaConfig, tensors: dict[str, Any]) -> None:
    """Raises ValueError if a tensor is missing, misshapen, or has no place in the model."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: shape_of(tensor) for name, tensor in tensors.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{missing[0]} is missing ({len(missing)} in all)")
    if more := sorted(found.keys() - expected.keys()):
        raise ValueError(f"there is no place for {more[0]} ({len(more)} in all)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{name} is {found[name]}; expected {shape}")


# --- the weights ---------------------------------------------------------------------------------------------


def write_safetensors(file: Path, header: dict[str, tuple[str, list[int], int]], blocks: Iterator[np.ndarray]) -> None:
    """Writes a safetensors file of which only one block is in memory at a time.

    header: name -> dtype, shape, bytes, in the order of the blocks.
    Format: https://huggingface.co/docs/safetensors/index#format
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in header.items():
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            opened.write(block.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Converts a Llama in a GGUF file to a folder of transformers.")
    parser.add_argument("file", type=expanded_path, help="the .gguf file")
    parser.add_argument("folder", type=expanded_path, help="where to write the model")
    args = parser.parse_args()
    try:
        print(convert_gguf("FILE", args.file, args.folder))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
