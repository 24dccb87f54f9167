"""Reads a teacher from its files piece by piece: one tensor or one layer at a time, so that a model that is larger than
the memory can be worked on.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from inputs.loaded_models import check_all_used, not_finite
from inputs.model_files import downloaded, one_line, read_config, weight_files
from llamba.families import FAMILIES, DecoderLayer, other_form

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


class TeacherWeights:
    """Holds the config of a teacher, of one of the `FAMILIES`, and where its tensors are. Keeps no tensor: each is read
    anew when it is asked for.

    config: its config. folder: that of its files. stored: of each tensor, by the name that transformers' causal model
    has for it, its name in the files, its file and its shape.
    """

    def __init__(self, path: str, flag: str = "--teacher_model", name: str | None = None) -> None:
        """path: a folder, or a name on the Hub, which is downloaded. name: what `flag` was given, for errors.

        Raises ValueError of one line if its layers are not like Llama's, or if weights are missing, misshapen or
        quantised. Reads headers only.
        """
        self.flag, self.name = flag, path if name is None else name
        self.folder = Path(path)
        if not self.folder.is_dir():
            self.folder = downloaded(flag, path)
        config = read_config(flag, self.name, str(self.folder))
        if (other := other_form(config)) is not None:
            raise ValueError(f"{flag} {self.name}: its config.json says {other}")
        self.family = FAMILIES[config.model_type]
        self.config = config
        self.config._attn_implementation = "sdpa"
        self.own_head: tuple[str, Path] | None = None  # stored beside the embedding that it should be
        self.stored = self._find()

    def _find(self) -> dict[str, tuple[str, Path, tuple[int, ...]]]:
        """Returns `stored`, of which every tensor of the model has its shape. Raises ValueError."""
        with torch.device("meta"):
            model = self.family.model(self.config)
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found, unexpected = {}, []
        for file in weight_files(self.flag, self.name, self.folder):
            for stored, shape in self._shapes(file).items():
                name = next((own for own in (stored, f"model.{stored}") if own in wanted), None)
                if name is None:
                    unexpected.append(stored)
                    self.own_head = (stored, file) if stored == HEAD else self.own_head
                else:
                    found[name] = (stored, file, shape)
        if self.config.tie_word_embeddings and HEAD in unexpected:
            unexpected.remove(HEAD)
        misshapen = [(name, found[name][2], wanted[name]) for name in found if found[name][2] != wanted[name]]
        info = {"missing_keys": sorted(wanted.keys() - found.keys()), "mismatched_keys": misshapen}
        check_all_used(self.flag, self.name, model, {**info, "unexpected_keys": unexpected})
        return found

    def check_values(self, dtype: torch.dtype) -> None:
        """Raises ValueError if a tensor is not finite in `dtype`, or if the files have a head of their own where the
        config ties it to the embedding: transformers would use that head. Reads all, one tensor at a time.
        """
        for name in self.stored:
            self.tensor(name, dtype)
        if self.own_head is None:
            return
        stored, file = self.own_head
        with self._opened(file) as opened:
            head = opened[stored] if isinstance(opened, dict) else opened.get_tensor(stored)
            is_embedding = torch.equal(head.float(), self.embedding(torch.float32))
        if not is_embedding:
            raise ValueError(
                f"{self.flag} {self.name}: its config.json says tie_word_embeddings, and {stored} in {file.name} is "
                "another tensor than its embedding; correct one of them, or copy the model again"
            )

    def _shapes(self, file: Path) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors in a file."""
        with self._opened(file) as opened:
            if isinstance(opened, dict):
                return {name: tuple(tensor.shape) for name, tensor in opened.items()}
            return {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """Opens a weight file: a dictionary of mapped tensors for a .bin file, else a handle of safetensors."""
        with one_line(f"{self.flag} {self.name}: cannot read {file.name}"):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    yield opened
            else:
                yield torch.load(file, map_location="cpu", weights_only=True, mmap=True)

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Returns a copy of one tensor, by the name that the causal model has for it. Raises ValueError if it is not
        finite.
        """
        stored, file, _ = self.stored[name]
        with self._opened(file) as opened:
            mapped = opened[stored] if isinstance(opened, dict) else opened.get_tensor(stored)
            copy = mapped.to(dtype, copy=True)
        low, high = (value.item() for value in copy.aminmax())  # both NaN if any value is
        for value in (low, high):
            if not abs(value) < float("inf"):
                raise ValueError(not_finite(self.flag, self.name, stored, value, dtype))
        return copy.to(device)

    def layer(self, index: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> DecoderLayer:
        """Returns a whole decoder layer, frozen and in eval mode."""
        with torch.device("meta"):
            layer = self.family.layer(self.config, index)
        return self._filled(layer, f"model.layers.{index}.", dtype, device)

    def norm(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """Returns the norm before the head, frozen."""
        with torch.device("meta"):
            norm = self.family.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        return self._filled(norm, NORM.removesuffix("weight"), dtype, device)

    def _filled(self, module: Any, prefix: str, dtype: torch.dtype, device: torch.device | str) -> Any:
        """Returns a module on the meta device with its weights, which are `prefix` and their names in it."""
        weights = {name: self.tensor(prefix + name, dtype, device) for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        return module.eval().requires_grad_(False)

    def embedding(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Returns the embedding (V, D)."""
        return self.tensor(EMBEDDING, dtype, device)

    def head(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Returns the head (V, D), which is the embedding where they are tied."""
        return self.tensor(EMBEDDING if self.config.tie_word_embeddings else HEAD, dtype, device)

    def rotary(self, device: torch.device | str = "cpu") -> nn.Module:
        """Returns what gives the layers their `position_embeddings`, of hidden states and positions (B, L)."""
        return LlamaRotaryEmbedding(self.config).to(device)
