"""Locates and loads teacher and student with one copy of each in memory, checks whether they go together, puts the
teacher's layers into the student, and freezes. Knows nothing of ranks.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arguments import TrainArguments
from inputs.loaded_models import check_all_used, check_weights
from inputs.model_files import check_weight_files, dead_links, one_line, read_config
from inputs.option_values import command_that_makes
from inputs.teacher_parts import Heads, head_problems, named_parts
from llamba import LlambaConfig, LlambaForCausalLM, whole_and_parts
from llamba.families import other_form
from llamba.kernels import kernels_for
from llamba.teacher_parts import take_parts
from paths import readable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def get_tokenizer(flag: str, name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model. Raises ValueError that names the option."""
    remedy = "copy tokenizer.json and tokenizer_config.json into it"
    remark = dead_links(Path(name)) if Path(name).is_dir() else ""
    with one_line(f"{flag} {name}: cannot read its tokenizer{remark}", remedy):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def locate_model(flag: str, name: str, local_files_only: bool, needs_weights: bool = True) -> str:
    """Returns the directory or hub name to load `name` from. With `local_files_only` it is always a directory on this
    disk, with every weight file if they are needed, so that loading touches no network. Raises ValueError that names
    the option.
    """
    with readable(f"{flag} {name}", name):
        return _locate_model(flag, name, local_files_only, needs_weights)


def _locate_model(flag: str, name: str, local_files_only: bool, needs_weights: bool) -> str:
    folder = Path(name)
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        raise ValueError(
            f"{flag} {name}: is a GGUF file, which is converted to a directory once; run "
            f"`python -m conversion.gguf {name} DIR` and give DIR"
        )
    if folder.is_file() or folder.is_symlink() and not folder.exists():
        what = "a file" if folder.is_file() else "a link that leads nowhere"
        raise ValueError(
            f"{flag} {name}: is {what}; expected a directory with config.json and weights, as save_pretrained writes it"
        )
    if not folder.is_dir():
        if (command := command_that_makes(name)) is not None:
            raise ValueError(f"{flag} {name}: is not made yet; run `{command}` first, in this folder")
        if not local_files_only and not name.startswith((".", "/")):
            return name
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{flag} {name}: neither a directory nor complete in the local Hugging Face cache; give a "
                f"directory, or run `hf download {name}` on a machine with network and copy its cache"
            ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{flag} {name}: no config.json in it{dead_links(folder)}; expected a directory written by save_pretrained"
        )
    if needs_weights:
        check_weight_files(flag, name, folder)
    return str(folder)


def get_configs(teacher_name: str, student_name: str) -> tuple[PretrainedConfig, LlambaConfig]:
    """Reads the configs of teacher and student. Raises ValueError that names the option."""
    teacher = read_config("--teacher_model", teacher_name, teacher_name)
    return teacher, read_llamba_config("--student_model", student_name, student_name)


def read_llamba_config(flag: str, name: str, path: str) -> LlambaConfig:
    """Reads the config of a student. Raises ValueError that names the option if it is of another model."""
    config = read_config(flag, name, path)
    if not isinstance(config, LlambaConfig):
        raise ValueError(
            f"{flag} {name}: its config.json says model_type {config.model_type!r}; expected 'llamba', "
            "a Llamba or a checkpoint of a training run"
        )
    return config


def check_replacements(
    student: LlambaConfig, teacher: PretrainedConfig, layers: list[int], heads: Heads | None = None
) -> None:
    """Checks that `layers` of this teacher can replace the student's, and `heads` (layer -> query heads) a part of it.
    Raises ValueError that lists every reason why not. A student that is already a hybrid keeps its own layers and
    heads; they have to be exactly those that are named.
    """
    heads = heads or {}
    if student.has_attention:
        own = student.attention_layers, student.attention_heads
        if own != whole_and_parts(layers, heads, student.n_teacher_heads):
            raise ValueError(
                f"{named_parts(layers, heads)}: --student_model is a hybrid already, with {named_parts(*own)} of its "
                "teacher; name those, or start from a student without"
            )
        return
    flag = named_parts(layers, heads)
    problems = head_problems(student, teacher, layers, heads)
    if not (layers or heads or problems):
        return
    n_layer = min(student.n_layer, teacher.num_hidden_layers)
    if outside := sorted(index for index in {*layers, *heads} if index >= n_layer):
        problems.append(
            f"{flag}: {outside} out of range; the student has {student.n_layer} layers and the teacher "
            f"{teacher.num_hidden_layers}, so expected 0 to {n_layer - 1}"
        )
    if (other := other_form(teacher)) is not None:
        problems.append(
            f"{flag}: no layers can be taken from this teacher, which has {other}; take another teacher, or use "
            "--layers -1, without --heads, to distil without its layers"
        )
    if teacher.hidden_size != student.d_model:
        problems.append(
            f"{flag}: the teacher's layers are {teacher.hidden_size} wide and the student's {student.d_model}; "
            "choose a student made from this teacher, or --layers -1"
        )
    if problems:
        raise ValueError("\n".join(problems))


def get_teacher_model(name: str, dtype: torch.dtype, device: torch.device, with_head: bool = True) -> PreTrainedModel:
    """Loads the teacher, frozen and in eval mode, directly onto `device` in `dtype`. On the meta device it has all
    shapes and no weights. Without its head it can give layers but has no logits.

    Raises ValueError if a weight is missing or misshapen (transformers would fill it at random), belongs to a layer
    that the model does not have, is quantised or not finite.
    """
    auto_class = AutoModelForCausalLM if with_head else AutoModel
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
    if device.type == "meta":
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            teacher = auto_class.from_config(config, **settings)
    else:
        teacher, info = auto_class.from_pretrained(
            name,
            device_map={"": device},
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed with the rest
            **settings,
        )
        check_all_used("--teacher_model", name, teacher, info)
        check_weights("--teacher_model", name, teacher)
    return teacher.eval().requires_grad_(False)


def get_student_model(
    name: str, dtype: torch.dtype, device: torch.device, flag: str = "--student_model"
) -> LlambaForCausalLM:
    """Loads the student, or a hybrid checkpoint with its layout, directly onto `device` in `dtype`. Anything but
    weights in a .bin file is an error, as it is for the teacher: unpickled, it could run code. So are weights that are
    missing, misshapen, unexpected, quantised or not finite. flag: the option that names it in the error.
    """
    try:
        student = LlambaForCausalLM.from_pretrained(
            name, dtype=dtype, device_map={"": device}, attn_implementation="sdpa", weights_only=True
        )
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error
    check_weights(flag, name, student)
    return student


@torch.no_grad()
def logits_beyond_head(model: PreTrainedModel, with_bias: bool) -> float:
    """Returns how far the model's logits are from its last hidden states times its head, with or without the head's
    bias, as a share of the largest logit: 0 but for rounding, unless the model scales or caps them afterwards. NaN if
    they are not finite.
    """
    tokens = torch.arange(8, device=model.device)[None] % model.config.vocab_size  # (1, 8)
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state  # (1, 8, D)
    logits = model(tokens, use_cache=False).logits  # (1, 8, V)
    head = model.get_output_embeddings()
    difference = F.linear(hidden, head.weight, head.bias if with_bias else None) - logits
    largest = logits.abs().max()
    return (difference.abs().max() / largest).item() if largest > 0 or largest.isnan() else 0.0


MOST_BEYOND_HEAD = 0.01  # that rounding to 16 bits explains


def apply_replacements(
    student: LlambaForCausalLM, teacher: PreTrainedModel, layers: list[int], heads: Heads | None = None
) -> None:
    """Puts the whole layers and the heads (layer -> query heads) of a teacher into the student; see `take_parts`.

    A teacher on the meta device has no weights to copy: these become NaN, so that a caller who forgets to fill them
    (see `teacher.share_layers`) cannot train on noise.
    """
    if layers or heads:
        check_replacements(student.config, teacher.config, layers, heads)
        take_parts(student, teacher.config, layers, heads or {}, teacher.base_model.layers.__getitem__)


def adopt_special_tokens(student: LlambaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the tokenizer's special tokens in the student's config, so that `generate()` begins and ends with them."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(student.config, name, getattr(tokenizer, name))
    student.generation_config = GenerationConfig.from_model_config(student.config)


def prepare_student(student: LlambaForCausalLM, args: TrainArguments) -> None:
    """Freezes, recomputes in backward and compiles what the options say."""
    if args.freeze_mlp:
        freeze_student_mlps(student)
    if args.freeze_replaced_layers:
        freeze_student_layers(student, student.config.attention_layers)
        freeze_kept_heads(student)
    check_trainable(student)
    if args.gradient_checkpointing:
        checkpoint_blocks(student, args.checkpoint_blocks)
    if args.compile:
        compile_modules(student, student.backbone.layers)


def freeze_student_mlps(student: LlambaForCausalLM) -> None:
    """Freezes the MLPs of all layers, those of replaced layers included."""
    for layer in student.backbone.layers:
        layer.mlp.requires_grad_(False)


def freeze_student_layers(student: LlambaForCausalLM, layers: list[int]) -> None:
    """Freezes whole layers."""
    for index in layers:
        student.backbone.layers[index].requires_grad_(False)


def freeze_kept_heads(student: LlambaForCausalLM) -> None:
    """Freezes the teacher's heads of layers that keep some; what is around them has to learn with their mixers."""
    for index in map(int, student.config.attention_heads):
        student.backbone.layers[index].attention.requires_grad_(False)


def checkpoint_blocks(student: LlambaForCausalLM, n_blocks: int | None) -> None:
    """Recomputes the activations of the first `n_blocks` blocks in backward (None: of all) instead of keeping them. It
    is the first blocks because they are recomputed last, when the others' activations have been freed.
    """
    with warnings.catch_warnings():
        # transformers 5.23 deprecates the name; its successor is not known to 5.17.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if n_blocks is not None:
        for block in student.backbone.layers[n_blocks:]:
            block.gradient_checkpointing = False  # type: ignore[assignment]


def compile_modules(student: LlambaForCausalLM, modules: Iterable[nn.Module]) -> None:
    """Compiles each of the student's `modules`, such as its blocks, by itself: those of one kind share their graph, and
    saved weights keep their names. The kernels are chosen first, because logging that choice would break the graph.

    Blocks that keep other numbers of heads are of other kinds, and torch would run all after the eighth uncompiled.
    """
    modules = list(modules)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(modules))
    weight = student.backbone.embedding.weight
    kernels_for(weight.device.type, weight.dtype)
    for module in modules:
        module.compile()


def check_trainable(student: nn.Module) -> None:
    """Raises ValueError if every parameter is frozen."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "nothing is left to train: --freeze_mlp and --freeze_replaced_layers freeze every parameter of this "
            "student; leave one of them out, or replace fewer --layers"
        )
