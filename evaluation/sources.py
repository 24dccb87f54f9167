"""The models that an evaluation scores: where each is, and what it has of a teacher. No weights are read."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from arguments import EvalArguments
from distillation.pairing import check_same_teacher, warn_of_another_tokenizer
from inputs.context import stated_length
from inputs.model_files import read_config
from inputs.teacher_parts import Heads, named_parts, pairs_of, parse_heads
from llamba import whole_and_parts
from model_utils import check_replacements, get_tokenizer, locate_model, read_llamba_config
from paths import readable
from text.encoding import check_tokenizer

logger = logging.getLogger("train")


class ModelSource(NamedTuple):
    """Holds where a model comes from."""

    path: str  # a directory, or a name on the hub
    config: PretrainedConfig
    layers: list[int] | None  # those that are the teacher's; None for the teacher itself
    heads: Heads  # those of the teacher's that other layers keep


def find_teacher(args: EvalArguments) -> tuple[ModelSource, PreTrainedTokenizerBase, int]:
    """Returns the teacher, and the tokenizer and the maximum length of a prompt (tokens) that all models share."""
    path = locate_model("--teacher_model", args.teacher_model, args.local_files_only)
    config = read_config("--teacher_model", args.teacher_model, path)
    tokenizer = get_tokenizer("--teacher_model", path)
    check_tokenizer(tokenizer, "--teacher_model", config.vocab_size)
    max_length = args.max_length or stated_length(config)
    if max_length is None:
        raise ValueError(
            f"--max_length: not given, and the config of --teacher_model {args.teacher_model} does not say how long "
            "its context is; give it"
        )
    return ModelSource(path, config, None, {}), tokenizer, max_length


def limited_readers(models: list[str], sources: dict[str, ModelSource | None]) -> dict[str, PretrainedConfig]:
    """Returns the configs of what may have a limited context, by what it is: the teacher and layers of a teacher."""
    readers = {}
    for name in models:
        source = sources.get(name)
        if source is not None and source.layers is None:
            readers["the teacher"] = source.config
        elif name == "hybrid" and (teacher := sources["teacher"]) is not None:
            readers["the hybrid's layers of the teacher"] = teacher.config
        elif source is not None and (source.layers or source.heads):
            readers[f"the layers that {name} has from a teacher"] = source.config.attention_config()
    return readers


def find_student(args: EvalArguments, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    """Returns what training starts with. Raises ValueError, as all of these do."""
    path = locate_model("--student_model", args.student_model, args.local_files_only)
    config = read_llamba_config("--student_model", args.student_model, path)
    if tokenizer is not None:
        check_tokenizer(tokenizer, "--student_model", config.vocab_size)
        warn_of_another_tokenizer(path, tokenizer)
    if config.fitted_beside and {"student", "all"} & set(args.which):
        logger.warning(
            "--which student: its mixers were fitted beside heads of the teacher, and it is scored without them; the "
            "model that was meant is the hybrid with --heads %s",
            ",".join(pairs_of(config.fitted_beside)),
        )
    return ModelSource(path, config, config.attention_layers, parse_heads(pairs_of(config.attention_heads)))


def find_checkpoint(args: EvalArguments, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    """Returns the trained hybrid, of --ckpt."""
    if args.ckpt is None:
        raise ValueError(
            "--which hybrid_ft: needs --ckpt, a checkpoint directory of a training run; give it, "
            "or leave hybrid_ft (and all) out of --which"
        )
    with readable(f"--ckpt {args.ckpt}", args.ckpt):
        if not Path(args.ckpt).is_dir():
            raise ValueError(f"--ckpt {args.ckpt}: not a directory; expected a checkpoint of a training run")
    # A link such as `latest` may point to another checkpoint by the time the weights are read.
    path = os.path.realpath(locate_model("--ckpt", args.ckpt, local_files_only=True))
    config = read_llamba_config("--ckpt", args.ckpt, path)
    own = config.attention_layers, config.attention_heads
    if args.parts_given and own != whole_and_parts(args.layers, args.kept_heads, config.n_teacher_heads):
        raise ValueError(
            f"{named_parts(args.layers, args.kept_heads)}: --ckpt {args.ckpt} was trained with {named_parts(*own)}; "
            "leave both out, or give the checkpoint that has yours"
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, "--ckpt", config.vocab_size)
    return ModelSource(path, config, config.attention_layers, parse_heads(pairs_of(config.attention_heads)))


def find_hybrid(
    args: EvalArguments, student: ModelSource, teacher: ModelSource, trained: ModelSource | None
) -> ModelSource:
    """Returns the student as untrained hybrid, with what the trained one has, so that they differ by training alone."""
    if student.layers or student.heads:
        own = named_parts(student.layers or [], student.heads)
        raise ValueError(
            f"--which hybrid: --student_model {args.student_model} has {own} of a teacher already; give the student "
            "that it was made from, or score it as student or as --ckpt"
        )
    layers, heads = args.layers, args.kept_heads
    if trained is not None and trained.layers is not None:
        check_same_teacher("--which hybrid: --ckpt", trained.config, teacher.config)
        layers, heads = trained.layers, trained.heads
    check_replacements(student.config, teacher.config, layers, heads)
    layers, parts = whole_and_parts(layers, heads, student.config.ssm_cfg["n_v_heads"])  # as its config will have them
    return ModelSource(student.path, student.config, layers, parse_heads(pairs_of(parts)))


def identity(source: ModelSource) -> dict[str, Any]:
    """Returns a model's path and its files' sizes and times: a checkpoint written again counts as another model."""
    # Without heads as earlier versions have it, so that their results can be resumed.
    parts = {"layers": source.layers, **({"heads": pairs_of(source.heads)} if source.heads else {})}
    if not Path(source.path).is_dir():
        return {"path": source.path, **parts}
    stats = [(file.name, file.stat()) for file in sorted(Path(source.path).iterdir()) if file.is_file()]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return {"path": os.path.realpath(source.path), **parts, "files": files}
