"""Makes a choice in its folder: reads the texts, loads both models, chooses, writes the result. What was chosen before
is used.
"""

import logging
from typing import Any

from arguments import TrainArguments
from model_utils import DTYPES, get_student_model, get_teacher_model
from processes.ranks import Ranks
from selection.checks import Checked, cache_of, caches, cost_of, is_held_out, planned_tokens, read_material, settings_of
from selection.choosing import Request, choose, choose_heads
from selection.cost import GB, PLANNED_RANKS
from selection.folder import finished, prepare, write_choice
from selection.measurements import FILE
from selection.options import ChooseArguments, training_of
from selection.swaps import share_models

logger = logging.getLogger("train")


def make_choice(
    args: ChooseArguments, checked: Checked, ranks: Ranks, training: TrainArguments | None = None
) -> dict[str, Any]:
    """Returns the choice that the options ask for, on every rank. training: the run that needs it; None for
    choose_layers.py. The main rank has taken the folder. Raises ValueError.
    """
    material = read_material(args, checked)
    settings, text = settings_of(args, checked, material), checked.text
    if not ranks.all_have(settings["texts"].encode()):
        raise ValueError(
            f"{text.flags.name} {text.name}: is not the same on all nodes; expected the same files on each"
        )
    n_ranks = PLANNED_RANKS if training is None else ranks.world_size
    planned = planned_tokens(training or training_of(args.preset), n_ranks)
    words = {
        "text": f"{len(material.windows)} windows of {args.seq_length} tokens of {text.name}, split {text.split}",
        "held_out": is_held_out(args, checked, training),
        "cost": str(cost_of(args, checked.configs, checked.n_kept, material, planned)),
    }
    logger.info("at most about %s; text: %s; %s", words["cost"], words["text"], words["held_out"])
    asked = {
        "n_kept": checked.n_kept,
        "n_heads": args.head_budget or 0,
        "head_choice": args.head_choice if args.head_budget else None,
        "probe_weight": args.probe_weight,
        "ablation": args.ablation,
        "context_length": args.context_length,
    }
    whole = () if training is None or checked.n_kept else tuple(sorted(training.layers))
    request = Request(
        material,
        checked.n_kept,
        args.probe_weight,
        args.ablation,
        n_heads=args.head_budget or 0,
        searches_heads=args.head_choice == "search",
        whole=whole,
    )
    if ranks.is_main:
        prepare(checked.folder, settings, training is not None)
    is_written = checked.n_kept > 0 or training is None  # heads beside given layers are of that run alone
    found = ranks.share(finished(checked.folder, asked) if ranks.is_main and is_written else None)[0]
    if found is not None:
        logger.info("%s holds this choice already", checked.folder)
    else:
        found = _chosen(args, checked, request, ranks)
        found |= {"made_with": settings, "request": asked, "models": [args.teacher_model, args.student_model]}
        found |= {"context_length": args.context_length, "cache_bytes": caches(args, checked), **words}
        for one in found["heads"]["sets"] if found["heads"] else []:
            one["cache_bytes"] = cache_of(args, checked, found["layers"], one["heads"])
        if ranks.is_main and is_written:
            write_choice(checked.folder, found)
    ranks.maximum(0)  # no rank goes on before the files are there
    return found


def _chosen(args: ChooseArguments, checked: Checked, request: Request, ranks: Ranks) -> dict[str, Any]:
    dtype = DTYPES[args.dtype]
    teacher = get_teacher_model(checked.teacher, dtype, checked.device)
    if not checked.n_kept:
        return choose_heads(teacher, request, ranks, checked.folder / FILE)
    student = get_student_model(checked.student, dtype, checked.device).eval().requires_grad_(False)
    freed = share_models(student, teacher)
    logger.info("%.2f GB of the student are the teacher's own, and held once", freed / GB)
    return choose(teacher, student, request, ranks, checked.folder / FILE)
