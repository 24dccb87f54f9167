"""Checks whether teacher, student and options go together, by what is known before a weight is read."""

import logging

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from arguments import TrainArguments
from inputs.context import shortest
from inputs.model_files import folder_of
from inputs.teacher_parts import pairs_of
from llamba import LlambaConfig, attention_cfg_from, whole_and_parts
from llamba.families import other_form
from model_utils import check_replacements, get_tokenizer
from processes.ranks import is_main_rank
from text.encoding import ids_of

logger = logging.getLogger("train")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
SAME_TOKENIZER = "choose a student and a teacher that were trained with the same tokenizer"
PROBE = "The quick brown fox, naïve café.\n\tdef f(x):\n    return x**2  # 1234567890\n混合模型 😀🚀 e=mc²"


def check_pair(args: TrainArguments, student: LlambaConfig, teacher: PretrainedConfig) -> None:
    """Checks the models of a run against each other and against its options. Raises ValueError."""
    check_replacements(student, teacher, args.layers, args.kept_heads)
    if args.stage == "align":
        check_alignment(args, student, teacher)
    check_context(args, student, teacher)
    check_checkpoint_blocks(student, args.checkpoint_blocks)
    check_layer_map(args.layer_map_interval, student, teacher)


def check_alignment(args: TrainArguments, student: LlambaConfig, teacher: PretrainedConfig) -> None:
    """Raises ValueError if no layer of the student can learn from the teacher's layer of the same index."""
    if (other := other_form(teacher)) is not None:
        raise ValueError(
            "--stage align: the teacher has not the layers that mixers are aligned with: its config says "
            f"{other}; take such a teacher, or --stage distil"
        )
    shapes = [(student.n_layer, student.d_model), (teacher.num_hidden_layers, teacher.hidden_size)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"--stage align: the student has {shapes[0][0]} layers of width {shapes[0][1]}, the teacher {shapes[1][0]} "
            f"of {shapes[1][1]}; expected as many of the same width, make_student.py makes such a student"
        )
    check_same_teacher("--stage align: --student_model", student, teacher)
    whole = student.attention_layers or whole_and_parts(args.layers, args.kept_heads, teacher.num_attention_heads)[0]
    if len(whole) == student.n_layer:
        raise ValueError(
            f"--stage align: all {student.n_layer} layers are the teacher's, and no mixer is left to learn; name fewer "
            "--layers, or take a student that has mixers"
        )


def check_same_teacher(subject: str, student: LlambaConfig, teacher: PretrainedConfig) -> None:
    """Raises ValueError, which begins with `subject`, if the layers and heads that a student has are of another teacher
    than this one, by what they compute.
    """
    if not student.has_attention:
        return
    own, given = attention_cfg_from(student.attention_config()), {"model_type": teacher.model_type}
    if own["model_type"] == teacher.model_type:
        given |= attention_cfg_from(teacher)
    for name, value in given.items():
        if own[name] != value and name != "max_position_embeddings":
            raise ValueError(
                f"{subject} has layers or heads of another teacher, of which {name} is {own[name]}, and {value} of "
                "--teacher_model; give the teacher that it was made with"
            )


def check_context(args: TrainArguments, student: LlambaConfig, teacher: PretrainedConfig) -> None:
    """Raises ValueError if a window is longer than the context of the teacher, if it runs, or of the layers that the
    student has from a teacher. Its other layers have no limit.
    """
    readers: dict[str, PretrainedConfig] = {}
    if student.has_attention:
        readers["the layers that the student has from a teacher"] = student
    elif args.takes_parts:
        readers["the layers that the student takes from the teacher"] = teacher
    if args.has_teacher:
        readers["the teacher"] = teacher
    found = shortest(readers)
    if found is not None and args.seq_length > found[1]:
        raise ValueError(
            f"--seq_length {args.seq_length}: {found[0]} can read {found[1]} tokens at once, by "
            "max_position_embeddings in the config and its scaling; lower --seq_length to that, or take a model with a "
            "longer context"
        )


def check_checkpoint_blocks(student: LlambaConfig, n_blocks: int | None) -> None:
    """Raises ValueError if --checkpoint_blocks names more blocks than the student has."""
    if n_blocks is not None and n_blocks > student.n_layer:
        raise ValueError(
            f"--checkpoint_blocks {n_blocks}: the student has {student.n_layer}; leave it out to recompute all of them"
        )


def check_layer_map(interval: int, student: LlambaConfig, teacher: PretrainedConfig) -> None:
    """Raises ValueError if --layer_map_interval is given and the models' layers cannot be compared one by one."""
    shapes = [(student.n_layer, student.d_model), (teacher.num_hidden_layers, teacher.hidden_size)]
    if interval and shapes[0] != shapes[1]:
        raise ValueError(
            f"--layer_map_interval {interval}: the student has {shapes[0][0]} layers of width "
            f"{shapes[0][1]}, the teacher {shapes[1][0]} of {shapes[1][1]}; expected as many of the same width, leave "
            "the option out"
        )


def warn_of_cut_mixers(args: TrainArguments, student: LlambaConfig) -> None:
    """Logs what `cut_mixers` returns, on rank 0."""
    if (text := cut_mixers(args, student)) is not None and is_main_rank():
        logger.warning(text)


def cut_mixers(args: TrainArguments, student: LlambaConfig) -> str | None:
    """Returns a warning if mixers are to lose heads beside which they were never fitted or trained. What is left of
    such a mixer is further from what the heads leave of the attention than the whole was from all of it.
    """
    if student.has_attention or args.stage == "align":
        return None
    n_heads = student.ssm_cfg["n_v_heads"]  # as many as the teacher's, as `head_problems` has checked
    _, kept = whole_and_parts(args.layers, args.kept_heads, n_heads)  # a layer that keeps all has no mixer
    fitted = pairs_of(student.fitted_beside)
    if not (cut := [pair for pair in pairs_of(kept) if pair not in fitted]):
        return None
    return (
        f"--heads {','.join(cut)}: the mixers of --student_model were not fitted beside these heads, and the hybrid "
        "may begin far from the teacher; make a student with `make_student.py --heads ...`, or align this one first"
    )


# --- tokenizers ----------------------------------------------------------------------------------------------


def own_tokenizer(flag: str, name: str) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer beside a student's files on this disk, or None if it has none. Raises ValueError if it
    cannot be read.
    """
    folder = folder_of(name)
    if folder is None or not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    return get_tokenizer(flag, str(folder))


def tokenizer_difference(own: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase) -> str | None:
    """Returns what a student's own tokenizer does otherwise than the teacher's, which a run uses; None if nothing."""
    vocab = teachers.get_vocab()
    moved = sorted((token, i) for token, i in own.get_vocab().items() if vocab.get(token, i) != i)
    if moved:
        token, i = moved[0]
        ids = f"{i}, not {vocab[token]}"
        return f"{len(moved)} of its tokens, such as {token!r}, have other ids than the teacher's ({ids})"
    if ids_of(PROBE, own) != ids_of(PROBE, teachers):
        return "it splits a text in several scripts into other tokens than the teacher's does"
    return None


def warn_of_another_tokenizer(student: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Logs a warning, on rank 0, if the student was made for other tokens than the teacher's `tokenizer` gives."""
    if not is_main_rank():
        return
    try:
        own = own_tokenizer("--student_model", student)
        found = None if own is None else tokenizer_difference(own, tokenizer)
    except ValueError as error:  # a run does not need it
        logger.warning("the student's tokenizer was not compared with the teacher's: %s", error)
        return
    if found is not None:
        logger.warning(
            "--student_model %s: its own tokenizer is not the teacher's, which the run uses: %s; %s",
            student,
            found,
            SAME_TOKENIZER,
        )
