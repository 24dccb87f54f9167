"""Locates the two models of a run, checks that they go together, and loads them onto each rank."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from distillation.losses import shared_vocab
from distillation.pairing import check_pair, warn_of_another_tokenizer, warn_of_cut_mixers
from distillation.teacher import Lane, NoTeacher, open_lane, share_layers
from inputs.model_files import downloaded
from llamba import LlambaForCausalLM
from llamba.llama import FrozenMLP, use_kernels
from model_utils import (
    DTYPES,
    apply_replacements,
    get_configs,
    get_student_model,
    get_teacher_model,
    get_tokenizer,
    locate_model,
    prepare_student,
)
from processes.devices import default_prefetch
from processes.ranks import Ranks
from text.encoding import check_tokenizer


class Models(NamedTuple):
    """Holds the paths of both models, the size of their shared vocabulary, the tokenizer, and the option that gave the
    student.
    """

    teacher: str
    student: str
    vocab: int  # entries that both vocabularies have
    tokenizer: PreTrainedTokenizerBase
    student_flag: str = "--student_model"


def check_models(args: TrainArguments, checkpoint: Path | None) -> Models:
    """Checks that the models go together, before a weight is read. The student of a resumed run is its checkpoint.
    Raises ValueError.
    """
    runs_teacher = args.has_teacher
    teacher_needed = runs_teacher or (args.takes_parts and checkpoint is None)
    teacher = locate_model("--teacher_model", args.teacher_model, args.local_files_only, teacher_needed)
    if checkpoint is None:
        student = locate_model("--student_model", args.student_model, args.local_files_only)
    else:
        student = locate_model("--resume", str(checkpoint), local_files_only=True)
    teacher_config, student_config = get_configs(teacher, student)
    check_pair(args, student_config, teacher_config)
    tokenizer = get_tokenizer("--teacher_model", teacher)
    check_tokenizer(tokenizer, "--student_model", student_config.vocab_size)
    if checkpoint is None:  # a checkpoint has the teacher's
        warn_of_another_tokenizer(student, tokenizer)
        warn_of_cut_mixers(args, student_config)
    if not runs_teacher:
        return Models(teacher, student, student_config.vocab_size, tokenizer)
    check_tokenizer(tokenizer, "--teacher_model", teacher_config.vocab_size)
    if args.stage == "align" and not os.path.isdir(teacher):  # whose files are read piece by piece
        teacher = str(downloaded("--teacher_model", teacher))
    return Models(teacher, student, shared_vocab(student_config.vocab_size, teacher_config.vocab_size), tokenizer)


def load_models(
    args: TrainArguments, models: Models, ranks: Ranks, teacher_device: torch.device
) -> tuple[LlambaForCausalLM, torch.Tensor | None, Lane]:
    """Returns this rank's student, hybrid and frozen as the options say; the teacher's head (vocab, D_t), if its hidden
    states are sent; and the lane to its answers. The teacher's weights are read where it runs; if it does not run,
    rank 0 reads them for the replaced layers.
    """
    dtype, runs_teacher = DTYPES[args.dtype], args.kl_weight > 0
    student = get_student_model(models.student, dtype, ranks.device, models.student_flag)
    takes_parts = args.takes_parts and not student.config.has_attention  # else a hybrid, trained before
    place = torch.device("meta")
    if runs_teacher and (ranks.owns_teacher or args.teacher_placement == "colocated"):
        place = teacher_device
    elif takes_parts and ranks.is_main:
        place = torch.device("cpu")
    teacher = get_teacher_model(models.teacher, dtype, place, with_head=runs_teacher)
    if takes_parts:
        apply_replacements(student, teacher, args.layers, args.kept_heads)
        share_layers(student)
    prepare_student(student, args)
    if not runs_teacher:
        return student, None, NoTeacher(ranks.device)
    prefetch = default_prefetch(teacher_device) if args.teacher_prefetch is None else args.teacher_prefetch
    head, lane = open_lane(teacher, args.teacher_signal, args.teacher_placement, models.vocab, ranks, prefetch)
    use_kernels(teacher, FrozenMLP)  # after `open_lane`, whose trial of a few tokens is not worth compiling for
    return student, head, lane
