"""The check of doctor.py for `--stage align`: the teacher that a rank runs layer by layer, with its student's weights,
computes what the whole teacher does. Weights are read only if the teacher is small.
"""

from collections.abc import Iterator

import torch

from conversion.alignment import relative_error
from conversion.teacher_stream import TeacherStream
from conversion.teacher_weights import TeacherWeights
from model_utils import DTYPES
from preflight.checks.basics import FAILURE, OK, CheckSkipped, Finding, PlannedRun
from preflight.checks.loss import MOST_DIFFERENCE, teacher_as_student
from preflight.checks.models import configs, skeletons, teacher_place
from preflight.checks.weights import probe_ids, small_teacher

TITLE = "teacher layer by layer"


def check_alignment(run: PlannedRun) -> Iterator[Finding]:
    if run.args.stage != "align":
        return
    _, student_config = configs(run)
    try:
        teacher = small_teacher(run)
    except ValueError as error:  # reported by `check_logits`
        raise CheckSkipped("the teacher cannot be loaded") from error
    if teacher is None:
        n_parameters = sum(p.numel() for p in skeletons(run)[0].parameters())
        yield Finding(OK, TITLE, f"not tried with {n_parameters / 1e9:.1f} billion parameters")
        return
    dtype, ids = DTYPES[run.args.dtype], probe_ids(run, teacher.device)  # (1, N)
    with torch.no_grad():
        whole = teacher.base_model(ids, use_cache=False).last_hidden_state  # (1, N, D)
        if not whole.isfinite().all():  # reported by `check_logits`
            raise CheckSkipped("the teacher's logits are not finite")
        student = teacher_as_student(teacher, student_config).requires_grad_(False)
        stream = TeacherStream(TeacherWeights(teacher_place(run), name=run.args.teacher_model), student, vocab=1)
        difference = relative_error(stream(ids), whole, whole).sqrt().item()
    found = f"relative difference {difference:.1g} from the whole teacher"
    if difference <= MOST_DIFFERENCE[dtype]:
        yield Finding(OK, TITLE, found)
    else:
        expected = f"expected below {MOST_DIFFERENCE[dtype]:g}"
        yield Finding(FAILURE, TITLE, f"{found}; {expected}", "try --dtype float32, or another torch or transformers")
