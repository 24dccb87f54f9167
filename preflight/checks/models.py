"""The checks of doctor.py that look at teacher and student: are they here, do they go together, do they speak the same
tokens. No weights are loaded.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arguments import TrainArguments
from checkpointing.resume import Resume
from distillation.losses import shared_vocab
from inputs.model_files import read_config
from llamba import LlambaConfig, LlambaForCausalLM
from model_utils import get_tokenizer, locate_model, read_llamba_config
from preflight.checks.basics import FAILURE, OK, WARNING, Case, Finding, NotLookedAt
from preflight.checks.machine import GB, default_nproc
from preflight.footprint import build_models, find_configs, n_bytes
from text.encoding import Encoder, check_tokenizer

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
PROBE = "The quick brown fox, naïve café.\n\tdef f(x):\n    return x**2  # 1234567890\n混合模型 😀🚀 e=mc²"


@functools.cache
def resumed(case: Case) -> tuple[Resume | None, ValueError | None]:
    """Returns where a run would resume, or what is wrong with its checkpoints; looked for once."""
    try:
        return Resume(case.args, default_nproc(case)), None
    except ValueError as error:
        return None, error


def first_step(case: Case) -> int:
    """Returns the micro step that a run would begin after."""
    resume, _ = resumed(case)
    return case.args.resume_step if resume is None else resume.start


@functools.cache
def offline(case: Case) -> TrainArguments:
    """The options, so that no network is touched and the student of a run that goes on is its checkpoint."""
    args, (resume, _) = dataclasses.replace(case.args, local_files_only=True), resumed(case)
    checkpoint = None if resume is None else resume.checkpoint
    return args if checkpoint is None else dataclasses.replace(args, student_model=str(checkpoint))


@functools.cache
def skeletons(case: Case) -> tuple[PreTrainedModel, LlambaForCausalLM]:
    """Teacher and student as a run has them when training begins, without weights."""
    configs(case)
    try:
        return build_models(offline(case))
    except ValueError as error:  # told by `check_configs`
        raise NotLookedAt("teacher and student do not go together") from error


def configs(case: Case) -> tuple[PretrainedConfig, LlambaConfig]:
    try:
        return find_configs(offline(case))
    except ValueError as error:
        raise NotLookedAt("the config of the teacher or of the student cannot be read") from error


def teacher_place(case: Case, needs_weights: bool = False) -> str:
    try:
        return locate_model("--teacher_model", case.args.teacher_model, True, needs_weights)
    except ValueError as error:
        missing = "not whole" if needs_weights else "not"
        raise NotLookedAt(f"the teacher is {missing} on this disk") from error


def teacher_tokenizer(case: Case) -> PreTrainedTokenizerBase:
    return get_tokenizer("--teacher_model", teacher_place(case))


# --- are they here -------------------------------------------------------------------------------------------


def check_resume(case: Case) -> Iterator[Finding]:
    if case.args.resume is not None:
        resume, problem = resumed(case)
        if resume is None:
            assert problem is not None
            raise problem
        found = f"resumes from {resume.checkpoint}" if resume.checkpoint else "no checkpoint yet, the run starts at 0"
        yield Finding(OK, f"--resume {case.args.resume}", found)


def check_models(case: Case) -> Iterator[Finding]:
    """Each by itself: its weights are whole, its config describes a model."""
    args = offline(case)
    resumes = args.student_model != case.args.student_model
    teacher_needed = args.kl_weight > 0 or (bool(args.layers) and not resumes)
    for flag, name, needs_weights, read in (
        ("--teacher_model", args.teacher_model, teacher_needed, read_config),
        ("--resume" if resumes else "--student_model", args.student_model, True, read_llamba_config),
    ):
        title = f"{flag} {name}"
        try:
            place = locate_model(flag, name, True, needs_weights)
            read(flag, name, place)
        except ValueError as error:
            on_hub = HUB_NAME.fullmatch(name) is not None and not Path(name).is_dir()
            if on_hub and not case.args.local_files_only:
                found = f"not whole in the local cache; a run would download it{_size_of(case, flag)} when it starts"
                yield Finding(WARNING, title, found, f"hf download {name}   (now, or where there is a network)")
            else:
                yield Finding.of_error(FAILURE, title, str(error))
            continue
        size = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in Path(place).glob(kind))
        yield Finding(OK, title, f"{size / GB:.3g} GB of weights, whole")


def _size_of(case: Case, flag: str) -> str:
    """As text, where a preset has a copy of the configs."""
    try:
        teacher, student = skeletons(case)
    except NotLookedAt:
        return ""
    return f" ({n_bytes((teacher if flag == '--teacher_model' else student).parameters()) / GB:.0f} GB)"


def check_configs(case: Case) -> Iterator[Finding]:
    """Together, as a run has them when training begins; built without weights."""
    configs(case)
    _, student = build_models(offline(case))
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total, layers = sum(p.numel() for p in student.parameters()), student.config.attention_layers
    found = f"hybrid of {total:,} parameters, {trained:,} trained, layers {layers} from the teacher"
    yield Finding(OK, "teacher and student together", found)


# --- the same tokens -----------------------------------------------------------------------------------------


def check_tokens(case: Case) -> Iterator[Finding]:
    tokenizer, (teacher, student) = teacher_tokenizer(case), configs(case)
    title = "tokenizer"
    Encoder(tokenizer)  # ValueError where it cannot tell documents apart
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
    yield from _compare_tokenizers(case, tokenizer)


def _compare_tokenizers(case: Case, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """tokenizer: the teacher's."""
    name = "student's tokenizer"
    try:
        place = Path(locate_model("--student_model", offline(case).student_model, True, needs_weights=False))
    except ValueError:
        return  # told by `check_models`
    if not any((place / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        yield Finding(OK, name, "it has none of its own; a run uses the teacher's")
        return
    own = get_tokenizer("--student_model", str(place))
    found, vocab = "", tokenizer.get_vocab()
    moved = sorted(token for token, i in own.get_vocab().items() if vocab.get(token, i) != i)
    if moved:
        found = f"{len(moved)} of its tokens, such as {moved[0]!r}, have other ids than the teacher's"
    elif Encoder(own)([PROBE]).tolist() != Encoder(tokenizer)([PROBE]).tolist():
        found = "cuts a probe into other tokens than the teacher's does"
    if found:
        remedy = "--student_model or --teacher_model: choose two with one tokenizer; this one was trained on others"
        yield Finding(FAILURE, name, found, remedy)
    else:
        yield Finding(OK, name, "has the teacher's ids and cuts a text in several scripts as the teacher's does")


def check_special_tokens(case: Case) -> Iterator[Finding]:
    """The teacher learned with the tokenizer's. A run gives its student the tokenizer's."""
    tokenizer, (teacher, student) = teacher_tokenizer(case), configs(case)
    for role, config, status in (("teacher", teacher, FAILURE), ("student", student, WARNING)):
        for name in ("bos_token_id", "eos_token_id"):
            of_config, of_tokenizer = getattr(config, name), getattr(tokenizer, name)
            known = of_config if isinstance(of_config, list) else [of_config]
            title = f"{role}'s {name}"
            if of_tokenizer in known:
                yield Finding(OK, title, f"{of_config}, as the tokenizer's")
            elif None in (of_config, of_tokenizer):
                found = f"{of_config} in config.json, {of_tokenizer} in the tokenizer: where one is not set"
                yield Finding(OK, title, f"{found}, the other counts")
            else:
                found = f"{of_config} in config.json, {of_tokenizer} in the tokenizer"
                remedy = f"copy the {role}'s config.json and tokenizer files again, from the same place"
                if role == "student":
                    remedy = "nothing, if it was made from this teacher: a run sets the tokenizer's"
                yield Finding(status, title, found, remedy)
    pad = "none" if tokenizer.pad_token_id is None else f"{tokenizer.pad_token_id}"
    yield Finding(OK, "pad token", f"{pad}; training needs none, its windows are full")
