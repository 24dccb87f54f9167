"""Makes a student of a teacher, layer after layer: each is read, given a mixer, measured, written and forgotten. A
conversion that was stopped resumes behind the last finished layer, and the student has the same bytes.
"""

import functools
import hashlib
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from conversion.calibration import Windows
from conversion.closed_form import Beside, copy_projections, empty_heads, fit_decay, fit_mixer
from conversion.heads import constant_norms, plain_heads
from conversion.measure import HeldOutStreams, add_mlp, attend, in_parts
from conversion.student_config import student_config
from conversion.teacher_weights import TeacherWeights
from conversion.unfinished import FIGURES, UnfinishedStudent, check_shards, finished_figures
from inputs.model_files import one_line, weight_files
from inputs.teacher_parts import Heads, pairs_of
from llamba import DiscreteMamba2, LlambaBlock, LlambaConfig, LlambaModel
from llamba.families import DecoderLayer
from llamba.teacher_parts import copied_heads
from model_utils import DTYPES
from utils import finite, format_duration

logger = logging.getLogger("train")

FLOAT32 = torch.float32


@dataclass(frozen=True)
class Recipe:
    """Says how a student is made of a teacher."""

    init: str = "closed_form"  # or projections, or random
    d_state: int | None = None  # None: the teacher's head_dim
    ssm_bias: bool = True
    dtype: str = "bfloat16"  # of the weights that are written
    layers: tuple[int, ...] = ()  # the hybrid with these of the teacher's is measured too
    seed: int = 0  # of random mixers
    heads: Heads = field(default_factory=dict)  # of the teacher, that will stand beside the mixers

    def made_with(self, device: torch.device) -> dict[str, Any]:
        """Returns all that decides what the student becomes, but for teacher and text, as JSON has it."""
        made_with = {**asdict(self), "layers": list(self.layers), "heads": pairs_of(self.heads), "device": device.type}
        return {name: value for name, value in made_with.items() if name != "heads" or value}  # students made earlier


def build_student(
    teacher: TeacherWeights,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows,
    recipe: Recipe,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Makes the student in the new folder `output`, and returns the figures in its conversion.json. A student that was
    made there before with all of the same is left as it is. Raises ValueError.
    """
    config = student_config(teacher.config, recipe.d_state, recipe.ssm_bias)
    config.fitted_beside = {str(layer): heads for layer, heads in recipe.heads.items()}
    device = torch.device(device)
    made_with = {"teacher": _identity(teacher), **recipe.made_with(device), "text": _digest(windows)}
    if (figures := finished_figures(output, made_with)) is not None and output.is_dir():
        check_shards(output, output, weight_files("--output", str(output), output))
        logger.info("%s is finished already", output)
        return figures
    work = UnfinishedStudent(output, made_with, config.n_layer + 2)
    if figures is None and not work.has_progress:
        teacher.check_values(DTYPES[recipe.dtype])  # the last layer's would else be read after hours
    with work.locked():
        if figures is None:
            figures = _Building(teacher, config, recipe, device, work, windows.calibration.shape[1]).build(windows)
            _write_rest(work, config, tokenizer)
            if (some := finite(figures)) != figures:
                logger.warning("some figures are not finite: they are null in %s", FIGURES)
            figures = {"made_with": made_with, "rope_parameters": teacher.config.rope_parameters, **some}
            work.write_json(FIGURES, figures)
        work.publish()
    return figures


class Calibration(NamedTuple):
    """Holds the hidden states of the calibration windows in both models, (n, S, D) float32 each."""

    teacher: Tensor
    student: Tensor  # all of whose layers are recurrent


class _Building:
    """Holds what stays the same from layer to layer."""

    def __init__(
        self,
        teacher: TeacherWeights,
        config: LlambaConfig,
        recipe: Recipe,
        device: torch.device,
        work: UnfinishedStudent,
        seq_length: int,
    ) -> None:
        self.teacher, self.config, self.recipe, self.device, self.work = teacher, config, recipe, device, work
        self.dtype = DTYPES[recipe.dtype]
        positions = torch.arange(seq_length, device=device)[None]  # (1, S)
        self.angles = teacher.rotary(device)(torch.zeros((), device=device), positions)  # (1, S, P) each

    @torch.no_grad()
    def build(self, windows: Windows) -> dict[str, Any]:
        """Writes all shards, and returns the figures."""
        labels = windows.held_out[:, 1:].to(self.device)  # (m, S)
        calibration, streams, errors = self._start(windows)
        begun, n_before, n_layer = time.monotonic(), len(errors), self.config.n_layer
        for index in range(n_before, n_layer):
            layer = self.teacher.layer(index, FLOAT32, self.device)
            attended = in_parts(functools.partial(attend, layer, angles=self.angles), calibration.teacher)
            block = self._block(index, layer, calibration, attended)
            errors.append(streams.advance(index, layer, block, self.angles))
            own = calibration.student
            if self.recipe.init == "closed_form":
                own = in_parts(functools.partial(_through, block, self.angles), own)
            calibration = Calibration(in_parts(functools.partial(add_mlp, layer), calibration.teacher + attended), own)
            self._check_finite(index, errors[-1], calibration.teacher, streams.states["teacher"])
            of_calibration = {f"calibration.{name}": states for name, states in calibration._asdict().items()}
            self.work.save_progress({**of_calibration, **streams.states}, {"errors": errors})
            left = (time.monotonic() - begun) / (index + 1 - n_before) * (n_layer - index - 1)
            logger.info(
                "layer %d done, %d of %d | error %.3f, of the mixer alone %.3f | about %s left",
                index, index + 1, n_layer, errors[-1]["own"], errors[-1]["mixer"], format_duration(left),
            )  # fmt: skip
            del layer, block, attended  # before the next is read
        return {"layers": errors, "held_out": self._finish(streams, labels)}

    def _start(self, windows: Windows) -> tuple[Calibration, HeldOutStreams, list[dict[str, float]]]:
        """Returns the hidden states of calibration and of held-out text behind the last finished layer, and the errors
        of the layers up to there. At the beginning it writes the embedding.
        """
        saved = self.work.progress(self.device)
        if saved is not None:
            tensors, figures = saved
            calibration = Calibration(*(tensors.pop(f"calibration.{name}") for name in Calibration._fields))
            streams = HeldOutStreams(tensors["teacher"], tensors["teacher"], self.recipe.layers)
            streams.states = {name: tensors[name] for name in streams.states}
            logger.info("resuming behind layer %d", len(figures["errors"]) - 1)
            return calibration, streams, figures["errors"]
        embedding = self.teacher.embedding(FLOAT32)  # (V, D)
        written = embedding.to(self.dtype)
        self.work.write_shard(0, {"backbone.embedding.weight": written})

        def both(ids: Tensor) -> tuple[Tensor, Tensor]:  # (n, S) -> (n, S, D) each
            return embedding[ids].to(self.device), written[ids].to(self.device, FLOAT32)

        held_out = HeldOutStreams(*both(windows.held_out[:, :-1]), self.recipe.layers)
        return Calibration(*both(windows.calibration)), held_out, []

    def _block(self, index: int, layer: DecoderLayer, calibration: Calibration, attended: Tensor) -> LlambaBlock:
        """Returns the student's layer as it is written, in float32, with the heads that will stand beside its mixer.
        attended: what attention adds to the teacher's hidden states.
        """
        heads = self.recipe.heads.get(index, [])
        kept = copied_heads(layer.self_attn, heads) if heads else None
        with torch.device("meta"):
            block = LlambaBlock(self.config, index)
        block.mixer = new_mixer(self.config, self.recipe.seed + index).to(self.device)
        for part in ("input_layernorm", "post_attention_layernorm", "mlp"):
            block.get_submodule(part).load_state_dict(layer.get_submodule(part).state_dict(), assign=True)
        inputs = in_parts(layer.input_layernorm, calibration.teacher)  # (n, S, D)
        if self.recipe.init == "closed_form":
            own_inputs = in_parts(layer.input_layernorm, calibration.student)
            beside = None if kept is None else Beside(heads, functools.partial(kept, position_embeddings=self.angles))
            fit_mixer(block.mixer, layer.self_attn, inputs, own_inputs, attended, beside)
        elif self.recipe.init == "projections":
            plain = plain_heads(block.mixer.n_v_heads, self.device)
            plain = plain._replace(norms=constant_norms(layer.self_attn, inputs))
            copy_projections(block.mixer, layer.self_attn, plain)
            if block.mixer.in_proj.bias is None:
                fit_decay(block.mixer, plain.horizon, inputs.flatten(0, 1))
        empty_heads(block.mixer, heads)
        block.eval().requires_grad_(False).to(self.dtype)
        prefix = f"backbone.layers.{index}."
        self.work.write_shard(index + 1, {prefix + name: tensor.cpu() for name, tensor in block.state_dict().items()})
        block.attention = None if kept is None else kept.to(self.dtype)
        return block.float()

    def _check_finite(self, index: int, error: dict[str, float], *states: Tensor) -> None:
        name = f"{self.teacher.flag} {self.teacher.name}"
        if not all(state.isfinite().all() for state in states):
            raise ValueError(
                f"{name}: its hidden states behind layer {index} are not finite; take another teacher, or other text"
            )
        if any(map(math.isnan, error.values())):  # not infinite ones: of an attention that gives zeros, say
            remedies = ["--dtype float32"] * (self.recipe.dtype != "float32")
            remedies += ["--init random"] * (self.recipe.init != "random")
            raise ValueError(
                f"{name}: layer {index} of the student gives values that are not finite, by --init "
                f"{self.recipe.init} in --dtype {self.recipe.dtype}; use {' or '.join(remedies) or 'another teacher'}"
            )

    def _finish(self, streams: HeldOutStreams, labels: Tensor) -> dict[str, Any]:
        """Writes the last shard, and returns the figures of the whole students."""
        norm, head = self.teacher.norm(FLOAT32, self.device), self.teacher.head(FLOAT32, self.device)
        tensors = {"backbone.final_layernorm.weight": norm.weight.to("cpu", self.dtype)}
        if not self.config.tie_embeddings:
            tensors["lm_head.weight"] = head.to("cpu", self.dtype)
        self.work.write_shard(self.config.n_layer + 1, tensors)
        del tensors
        rounded = self.teacher.norm(self.dtype, self.device).float()
        return streams.figures((norm, rounded), (head, head.to(self.dtype).float()), labels)


def _through(block: LlambaBlock, angles: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return block(x, position_embeddings=angles)


def new_mixer(config: LlambaConfig, seed: int) -> DiscreteMamba2:
    """Returns a mixer with the weights that a new student has, drawn by a seed of its own."""
    small = LlambaConfig(**{**config.to_dict(), "n_layer": 1, "vocab_size": 1, "mlp_cfg": {"intermediate_size": 1}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = LlambaModel(small).layers[0].mixer
    assert isinstance(mixer, DiscreteMamba2)
    return mixer


def _write_rest(work: UnfinishedStudent, config: LlambaConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes what stands beside the weights, but for the figures."""
    config.dtype = DTYPES[work.made_with["dtype"]]
    config.save_pretrained(work.folder)
    GenerationConfig.from_model_config(config).save_pretrained(work.folder)
    cannot = f"--output {work.output}: its tokenizer cannot be written to {work.folder}"
    with one_line(cannot, "make room, and give the same command to resume"):  # the library raises no OSError
        tokenizer.save_pretrained(work.folder)
    work.write_index()


def _identity(teacher: TeacherWeights) -> dict[str, Any]:
    """Returns what tells a teacher from another: its config, and sizes and times of its files."""
    stats = [(file.name, file.stat()) for file in sorted({file for _, file, _ in teacher.stored.values()})]
    config = hashlib.sha256(teacher.config.to_json_string().encode()).hexdigest()
    return {"name": teacher.name, "config": config, "files": [[n, s.st_size, s.st_mtime_ns] for n, s in stats]}


def _digest(windows: Windows) -> str:
    parts = [b"%d %d " % part.shape + part.numpy().tobytes() for part in windows]
    return hashlib.sha256(b"".join(parts)).hexdigest()
