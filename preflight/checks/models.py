"""The checks of doctor.py for teacher and student: whether they are on this disk, go together and share their tokens.
They load no weights.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arguments import TrainArguments
from checkpointing.resume import Resume
from distillation.losses import shared_vocab
from distillation.pairing import SAME_TOKENIZER, cut_mixers, own_tokenizer, tokenizer_difference
from inputs.model_files import folder_of, read_config
from inputs.option_values import command_that_makes
from inputs.teacher_parts import named_parts
from llamba import LlambaConfig, LlambaForCausalLM
from model_utils import get_tokenizer, locate_model, read_llamba_config
from preflight.checks.basics import FAILURE, OK, WARNING, CheckSkipped, Finding, PlannedRun
from preflight.checks.machine import GB, default_nproc
from preflight.footprint import build_models, find_configs
from preflight.update_footprint import n_bytes
from selection.auto import check_auto, for_plan
from text.encoding import Encoder, check_tokenizer
from text.separators import Separator, choose_separator

HUB_PATTERN = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@functools.cache
def resumed(run: PlannedRun) -> tuple[Resume | None, ValueError | None]:
    """Returns where a run would resume, or what is wrong with its checkpoints; looked for once."""
    try:
        return Resume(run.args, default_nproc(run)), None
    except ValueError as error:
        return None, error


def first_step(run: PlannedRun) -> int:
    """Returns the micro step that a run would begin after."""
    resume, _ = resumed(run)
    return run.args.resume_step if resume is None else resume.start


@functools.cache
def offline(run: PlannedRun) -> TrainArguments:
    """Returns the run's options, but without downloads. A resumed run has the checkpoint as student, and the layers and
    heads of that in place of `auto:K`.
    """
    args, (resume, _) = dataclasses.replace(run.args, local_files_only=True), resumed(run)
    if resume is None or resume.checkpoint is None:
        return args
    return check_auto(dataclasses.replace(args, student_model=str(resume.checkpoint)), resume.parts)


@functools.cache
def skeletons(run: PlannedRun) -> tuple[PreTrainedModel, LlambaForCausalLM]:
    """Builds teacher and student as a run has them when training begins, without weights. Raises CheckSkipped."""
    configs(run)
    try:
        return build_models(offline(run))
    except ValueError as error:  # reported by `check_configs`
        raise CheckSkipped("teacher and student do not go together") from error


def configs(run: PlannedRun) -> tuple[PretrainedConfig, LlambaConfig]:
    """Returns the configs of teacher and student. Raises CheckSkipped."""
    try:
        return find_configs(offline(run))
    except ValueError as error:
        raise CheckSkipped("the config of the teacher or of the student cannot be read") from error


def teacher_place(run: PlannedRun, needs_weights: bool = False) -> str:
    """Returns the directory of the teacher on this disk. Raises CheckSkipped if it is not there."""
    try:
        return locate_model("--teacher_model", run.args.teacher_model, True, needs_weights)
    except ValueError as error:
        missing = "not complete" if needs_weights else "not"
        raise CheckSkipped(f"the teacher is {missing} on this disk") from error


def teacher_tokenizer(run: PlannedRun) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the teacher, which a run uses. Raises CheckSkipped if the teacher is not there."""
    return get_tokenizer("--teacher_model", teacher_place(run))


@functools.cache
def separator_of(run: PlannedRun) -> Separator:
    """Returns what ends a document in a run. Raises ValueError if it cannot be what the options say."""
    tokenizer, (resume, _) = teacher_tokenizer(run), resumed(run)
    option = run.args.document_separator
    if resume is not None:
        option = resume.document_separator(tokenizer.eos_token)
    return choose_separator(option, tokenizer)


# --- models on this disk -------------------------------------------------------------------------------------


def check_resume(run: PlannedRun) -> Iterator[Finding]:
    if run.args.resume is not None:
        resume, problem = resumed(run)
        if resume is None:
            assert problem is not None
            raise problem
        found = f"resumes from {resume.checkpoint}" if resume.checkpoint else "no checkpoint yet, the run starts at 0"
        yield Finding(OK, f"--resume {run.args.resume}", found)


class ModelFiles(NamedTuple):
    """Names a model of a run: the option that gives it, its name, whether its weights are read, and by what its config
    is.
    """

    flag: str
    name: str
    needs_weights: bool
    read: Callable[[str, str, str], PretrainedConfig]


def model_files(run: PlannedRun) -> list[ModelFiles]:
    """Returns the teacher and the student of a run; the student of a resumed one is its checkpoint."""
    args = offline(run)
    resumes = args.student_model != run.args.student_model
    teacher_needed = args.has_teacher or (args.takes_parts and not resumes)
    return [
        ModelFiles("--teacher_model", args.teacher_model, teacher_needed, read_config),
        ModelFiles("--resume" if resumes else "--student_model", args.student_model, True, read_llamba_config),
    ]


def check_model_files(run: PlannedRun) -> Iterator[Finding]:
    """Checks each model by itself: its weights are complete, and its config describes a model."""
    for flag, name, needs_weights, read in model_files(run):
        title = f"{flag} {name}"
        try:
            place = locate_model(flag, name, True, needs_weights)
            read(flag, name, place)
        except ValueError as error:
            may_be_on_hub = HUB_PATTERN.fullmatch(name) is not None and command_that_makes(name) is None
            on_hub = may_be_on_hub and not os.path.isdir(name)
            if on_hub and not run.args.local_files_only:
                found = f"not complete in the local cache; a run would download it{_download_size(run, flag)}"
                yield Finding(WARNING, title, found, f"hf download {name}   (now, or where there is a network)")
            else:
                yield Finding.of_error(FAILURE, title, str(error))
            continue
        size = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in Path(place).glob(kind))
        yield Finding(OK, title, f"{size / GB:.3g} GB of weights, complete")


def _download_size(run: PlannedRun, flag: str) -> str:
    """Returns the size of a model's weights as text; empty if neither disk nor preset has the configs."""
    try:
        teacher, student = skeletons(run)
    except CheckSkipped:
        return ""
    return f" ({n_bytes((teacher if flag == '--teacher_model' else student).parameters()) / GB:.0f} GB)"


def check_configs(run: PlannedRun) -> Iterator[Finding]:
    """Checks teacher and student together, as a run has them when training begins; built without weights."""
    args, chosen = for_plan(offline(run), configs(run))
    _, student = build_models(args)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    parts = named_parts(student.config.attention_layers, student.config.attention_heads)
    found = f"hybrid of {total:,} parameters, {trained:,} trained, with {parts} from the teacher"
    yield Finding(OK, "teacher and student together", f"{found}; {chosen.removesuffix('.')}" if chosen else found)
    if not chosen and (warning := cut_mixers(args, configs(run)[1])) is not None:
        yield Finding.of_error(WARNING, "mixers", warning)


# --- tokens --------------------------------------------------------------------------------------------------


def check_tokens(run: PlannedRun) -> Iterator[Finding]:
    tokenizer, (teacher, student) = teacher_tokenizer(run), configs(run)
    title = "tokenizer"
    Encoder(tokenizer, separator_of(run).token)  # raises ValueError if it has no token that separates documents
    for flag, config in (("--teacher_model", teacher), ("--student_model", student)):
        try:
            check_tokenizer(tokenizer, flag, config.vocab_size)
        except ValueError as error:
            yield Finding.of_error(FAILURE, title, str(error))
        else:
            found = f"its {len(tokenizer)} tokens are within the vocabulary of {flag}, {config.vocab_size}"
            yield Finding(OK, title, found)
    vocab = shared_vocab(student.vocab_size, teacher.vocab_size)
    sizes = f"{vocab} entries are shared" + (
        "" if student.vocab_size == teacher.vocab_size else "; the loss leaves out the others of the larger one"
    )
    yield Finding(OK, "vocabulary", sizes)
    yield from _compare_tokenizers(run, tokenizer)


def _compare_tokenizers(run: PlannedRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Compares the student's own tokenizer, if it has one, with the teacher's."""
    name = "student's tokenizer"
    student = offline(run).student_model
    if folder_of(student) is None:
        return  # reported by `check_model_files`
    own = own_tokenizer("--student_model", student)
    if own is None:
        yield Finding(OK, name, "it has none of its own; a run uses the teacher's")
    elif found := tokenizer_difference(own, tokenizer):
        yield Finding(FAILURE, name, found, f"--student_model, --teacher_model: {SAME_TOKENIZER}")
    else:
        yield Finding(OK, name, "has the teacher's ids and splits a text in several scripts as the teacher's does")


def check_special_tokens(run: PlannedRun) -> Iterator[Finding]:
    """Compares the special tokens of both configs with the tokenizer's. The teacher was trained with the tokenizer's,
    and a run sets them in its student's config.
    """
    tokenizer, (teacher, student) = teacher_tokenizer(run), configs(run)
    for role, config, status in (("teacher", teacher, FAILURE), ("student", student, WARNING)):
        for name in ("bos_token_id", "eos_token_id"):
            of_config, of_tokenizer = getattr(config, name), getattr(tokenizer, name)
            known = of_config if isinstance(of_config, list) else [of_config]
            title = f"{role}'s {name}"
            if of_tokenizer in known:
                yield Finding(OK, title, f"{of_config}, as the tokenizer's")
            elif None in (of_config, of_tokenizer):
                found = f"{of_config} in config.json, {of_tokenizer} in the tokenizer: the one that is set counts"
                yield Finding(OK, title, found)
            else:
                found = f"{of_config} in config.json, {of_tokenizer} in the tokenizer"
                remedy = f"copy the {role}'s config.json and tokenizer files again, from the same place"
                if role == "student":
                    remedy = "nothing, if the student was made from this teacher: a run sets the tokenizer's"
                yield Finding(status, title, found, remedy)
    pad = "none" if tokenizer.pad_token_id is None else f"{tokenizer.pad_token_id}"
    yield Finding(OK, "pad token", f"{pad}; training needs none, its windows are full")
