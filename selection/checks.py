"""What can be wrong with a choice, found before a weight is read, and the texts that it is made on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from arguments import TrainArguments
from evaluation.copying import WORDS
from evaluation.held_out import check_not_trained_on_by, read_windows
from inputs.context import shortest
from inputs.teacher_parts import head_problems, named_parts, pairs_of, parse_heads
from llamba import LlambaConfig
from llamba.export import STATE_FILE
from model_utils import check_replacements, get_configs, get_tokenizer, locate_model
from processes.devices import choose_device
from selection.cost import PLANNED_RANKS, Cost, cache_bytes, choice_cost, most_layers
from selection.folder import digest, identity
from selection.material import RETRIEVAL_LENGTH, Material, build_probes, ids_of
from selection.options import FOLDER, ChooseArguments, training_of
from selection.reach import heads_per_group
from text.encoding import check_tokenizer
from text.overlap import TrainedOn, check_not_trained_on
from text.separators import choose_separator
from text.sources import SourceFlags, TextSource, is_part

logger = logging.getLogger("train")

FLAGS = SourceFlags("--text", "--text_subset", "--text_split", "--text_revision", "--text_field", skip_bad_rows=None)


@dataclass(frozen=True)
class Checked:
    """Holds what a choice is made of, before weights."""

    teacher: str  # directories, or names on the hub
    student: str
    configs: tuple[PretrainedConfig, LlambaConfig]
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    n_kept: int  # 0: no layers are chosen, only heads
    folder: Path
    text: TextSource


def check_choice(args: ChooseArguments, flag: str | None = None, text: TextSource | None = None) -> Checked:
    """Finds what a user can get wrong. Raises ValueError.

    flag: what asked for the choice, for errors; None for choose_layers.py's own options. text: if not that of `--text`.
    """
    needs_weights = not args.dry_run
    teacher = locate_model("--teacher_model", args.teacher_model, args.local_files_only, needs_weights)
    student = locate_model("--student_model", args.student_model, args.local_files_only, needs_weights)
    configs = get_configs(teacher, student)
    n_kept = budget_of(args, configs, flag)
    if args.head_budget is not None and flag is None:
        check_head_budget(args.head_budget, configs, n_kept, f"--head_budget {args.head_budget}")
    tokenizer = get_tokenizer("--teacher_model", teacher)
    for name, config in zip(("--teacher_model", "--student_model"), configs, strict=True):
        check_tokenizer(tokenizer, name, config.vocab_size)
    context = shortest({"the teacher": configs[0]})
    if context is not None and args.seq_length > context[1]:
        raise ValueError(
            f"--seq_length {args.seq_length}: the teacher can read {context[1]} tokens at once, by its config; lower "
            "--seq_length to that"
        )
    folder = folder_of_choice(args.output, args.student_model)
    return Checked(
        teacher, student, configs, tokenizer, choose_device(args.device), n_kept, folder, text or text_of(args)
    )


def budget_of(args: ChooseArguments, configs: tuple[PretrainedConfig, LlambaConfig], flag: str | None) -> int:
    """Returns how many layers are kept; 0 if nothing says so. Raises ValueError, also where this teacher cannot give
    the student layers.
    """
    teacher, student = configs
    flag = flag or (f"--budget {args.budget}" if args.cache_bytes is None else f"--cache_bytes {args.cache_bytes}")
    check_pair(configs, flag)
    if args.cache_bytes is not None:
        return most_layers(teacher, student, args.cache_bytes, args.context_length, args.dtype)
    if args.budget is None:
        return 0
    if not 1 <= args.budget < student.n_layer:
        raise ValueError(
            f"{flag}: expected 1 to {student.n_layer - 1} layers of the teacher's; the student has {student.n_layer}"
        )
    return args.budget


def check_head_budget(n_heads: int, configs: tuple[PretrainedConfig, LlambaConfig], n_whole: int, flag: str) -> None:
    """Raises ValueError of one line that begins with `flag` if so many heads cannot be kept beside the whole layers."""
    teacher, student = configs
    most = teacher.num_attention_heads * (student.n_layer - n_whole)
    per_group = heads_per_group(teacher)
    if not 1 <= n_heads <= most or n_heads % per_group:
        steps = f", a multiple of {per_group}: so many share a key/value head and its cache" if per_group > 1 else ""
        raise ValueError(f"{flag}: expected {per_group} to {most} heads, those of layers that are not whole{steps}")
    if problems := head_problems(student, teacher, [], {0: [0]}):
        raise ValueError(f"{flag}: {problems[0].removeprefix('--heads 0:0: ')}")


def check_pair(configs: tuple[PretrainedConfig, LlambaConfig], flag: str) -> None:
    """Raises ValueError of one line that begins with `flag` if layers of this teacher cannot stand in this student."""
    teacher, student = configs
    if student.has_attention:
        own = named_parts(student.attention_layers, student.attention_heads)
        raise ValueError(
            f"{flag}: --student_model is a hybrid already, with {own} of its teacher; name those, or start from a "
            "student without"
        )
    if beside := ",".join(pairs_of(student.fitted_beside)):
        raise ValueError(
            f"{flag}: the mixers of --student_model were fitted beside heads of the teacher, and cannot be compared "
            f"without; name --layers and --heads, {beside} among these, or take a student made without --heads"
        )
    try:
        check_replacements(student, teacher, [0])
    except ValueError as error:
        reason = str(error).splitlines()[0].removeprefix("--layers 0: ")
        raise ValueError(f"{flag}: {reason}") from error
    if teacher.num_hidden_layers != student.n_layer:
        raise ValueError(
            f"{flag}: the teacher has {teacher.num_hidden_layers} layers and the student {student.n_layer}; choose "
            "among layers of a student that was made from this teacher"
        )


def folder_of_choice(output: str | None, student: str) -> Path:
    """Returns where a choice is. Raises ValueError for a student that is a name on the hub."""
    if output is None and not Path(student).is_dir():
        raise ValueError(f"--output: is missing; --student_model {student} is no folder to put the choice in")
    return Path(student) / FOLDER if output is None else Path(output)


def read_material(args: ChooseArguments, checked: Checked) -> Material:
    """Returns the texts of a choice. Raises ValueError."""
    context = shortest({"the teacher": checked.configs[0]})
    probes, left_out = build_probes(checked.tokenizer, args.probe_texts, args.seed, context and context[1])
    separator = choose_separator(args.document_separator, checked.tokenizer)
    text = checked.text
    windows = read_windows(text, checked.tokenizer, args.text_windows, args.seq_length, separator.token)
    if len(windows) < 3:
        raise ValueError(
            f"{text.flags.name} {text.name}: fills {len(windows)} windows of {args.seq_length + 1} tokens; expected at "
            "least 3, use more text"
        )
    return Material(windows, probes, left_out)


def text_of(args: ChooseArguments) -> TextSource:
    """Returns the text of `--text`."""
    assert args.text is not None
    return TextSource(
        args.text,
        args.text_subset,
        args.text_split,
        text_field=args.text_field,
        streaming=not is_part(args.text_split),
        local_files_only=args.local_files_only,
        flags=FLAGS,
    )


def is_held_out(args: ChooseArguments, checked: Checked, training: TrainArguments | None = None) -> str:
    """Returns in words whether the text is held out from what the student has seen and will see, as far as known."""
    who = f"the run of --preset {args.preset}" if training is None else "this run"
    source, training = checked.text, training or training_of(args.preset)
    try:
        check_not_trained_on(source, TextSource.for_training(training), who)
        if (Path(checked.student) / STATE_FILE).is_file():
            check_not_trained_on_by(Path(checked.student), source, "--student_model")
    except TrainedOn:
        return f"not held out: {who}, or that of the student, trains on rows of it"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        return f"whether it is held out is not known ({reason:.100})"
    return f"held out from what {who} trains on; what a student was fitted on when it was built is not recorded"


def planned_tokens(training: TrainArguments, world_size: int = PLANNED_RANKS) -> int:
    """Returns how many tokens a run trains on at most, by its steps."""
    per_step = training.batch_size * training.seq_length * training.grad_accumulation_steps * world_size
    return training.max_steps * per_step


def cost_of(
    args: ChooseArguments,
    configs: tuple[PretrainedConfig, LlambaConfig],
    n_kept: int,
    material: Material | None,
    planned: int,
) -> Cost:
    """Returns what the choice costs. n_kept: layers, 0 where none are chosen. material: None before the texts are read,
    which then count as they are asked for. planned: tokens that the run trains on.
    """
    if material is None:
        n_text = args.text_windows * args.seq_length
        n_probe = args.probe_texts * (2 * WORDS + RETRIEVAL_LENGTH)
    else:
        n_text = material.windows[:, 1:].numel()
        n_probe = sum(probe.ids.numel() for probe in material.probes)
    asked = (n_kept, args.head_budget or 0 if args.head_choice == "search" else 0)
    return choice_cost(configs, asked, (n_text, n_probe), args.ablation, planned, args.dtype)


def settings_of(args: ChooseArguments, checked: Checked, material: Material) -> dict[str, Any]:
    """Returns all that decides what is measured."""
    return {
        "teacher_model": identity("--teacher_model", checked.teacher),
        "student_model": identity("--student_model", checked.student),
        "dtype": args.dtype,
        "device": checked.device.type,
        "texts": digest(*ids_of(material)),
    }


def caches(args: ChooseArguments, checked: Checked) -> list[int]:
    """Returns the bytes of a hybrid's cache by how many layers it keeps, from 0."""
    return [cache_of(args, checked, range(k)) for k in range(checked.configs[1].n_layer + 1)]


def cache_of(args: ChooseArguments, checked: Checked, layers: Iterable[int], heads: Iterable[str] = ()) -> int:
    """Returns the bytes of the cache of a hybrid with some layers and heads of the teacher's."""
    return cache_bytes(checked.configs, layers, parse_heads(heads), args.context_length, args.dtype)
