"""Makes a choice in its folder: loads both models, chooses, writes the result. What was chosen before is used."""

import contextlib
import logging
from typing import Any

from model_utils import DTYPES, get_student_model, get_teacher_model
from processes.ranks import Ranks
from selection.checks import Checked, caches, settings_of
from selection.choosing import Request, choose
from selection.folder import finished, taken, write_choice
from selection.material import Material
from selection.measurements import FILE
from selection.options import ChooseArguments
from selection.swaps import share_models

logger = logging.getLogger("train")

GB = 1e9


def make_choice(
    args: ChooseArguments, checked: Checked, material: Material, words: dict[str, str], ranks: Ranks
) -> dict[str, Any]:
    """Returns the choice that the options ask for, on every rank. words: what the report says of text and cost."""
    settings = settings_of(args, checked, material)
    request = {
        "n_kept": checked.n_kept,
        "probe_weight": args.probe_weight,
        "ablation": args.ablation,
        "context_length": args.context_length,
    }
    if not ranks.all_have(settings["texts"].encode()):
        raise ValueError(f"--text {args.text}: is not the same on all nodes; expected the same files on each")
    with taken(checked.folder, settings) if ranks.is_main else contextlib.nullcontext():
        found = ranks.share(finished(checked.folder, request) if ranks.is_main else None)[0]
        if found is None:
            found = _chosen(args, checked, material, ranks)
            found |= {"made_with": settings, "request": request, "models": [args.teacher_model, args.student_model]}
            found |= {"context_length": args.context_length, "cache_bytes": caches(args, checked), **words}
            if ranks.is_main:
                write_choice(checked.folder, found)
        else:
            logger.info("%s holds this choice already", checked.folder)
        ranks.maximum(0)  # no rank goes on before the files are there
    return found


def _chosen(args: ChooseArguments, checked: Checked, material: Material, ranks: Ranks) -> dict[str, Any]:
    dtype = DTYPES[args.dtype]
    teacher = get_teacher_model(checked.teacher, dtype, checked.device)
    student = get_student_model(checked.student, dtype, checked.device).eval().requires_grad_(False)
    freed = share_models(student, teacher)
    logger.info("%.2f GB of the student are the teacher's own, and held once", freed / GB)
    request = Request(material, checked.n_kept, args.probe_weight, args.ablation)
    return choose(teacher, student, request, ranks, checked.folder / FILE)
