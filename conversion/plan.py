"""The plan of a conversion, for `make_student.py --dry_run`: the student that it makes, what it takes in memory and on
the disk, and about how long. Computed from the teacher's config; no weights are read.
"""

import time

import torch

from conversion.checks import GB, disk_bytes, n_parameters, states_bytes
from conversion.closed_form import LONGEST_WINDOW, TOKENS_AT_ONCE, TOKENS_FOR_HEADS
from conversion.options import MakeArguments
from llamba import LlambaConfig
from llamba.families import TeacherConfig, width_of_heads
from model_utils import DTYPES
from utils import format_duration

LIBRARIES = 0.5 * GB  # of a process that has imported torch and transformers
SPEED_OF = 1024  # rows and columns of the product by which this machine's speed is measured


def format_plan(args: MakeArguments, teacher: TeacherConfig, student: LlambaConfig) -> str:
    """Returns the plan as text."""
    ssm = student.ssm_cfg
    biases = "with biases" if ssm["bias"] else "without biases"
    lines = [
        f"Teacher: {args.teacher_model}, {teacher.num_hidden_layers} layers, width {teacher.hidden_size}, "
        f"{teacher.num_attention_heads} query and {teacher.num_key_value_heads} key/value heads of "
        f"{width_of_heads(teacher)}",
        f"Student: {args.output}, {n_parameters(student) / 1e6:,.0f} million parameters in {args.dtype}, "
        f"{'tied' if student.tie_embeddings else 'untied'} embeddings",
        f"Mixers:  {student.n_layer}, each {ssm['n_v_heads']} heads of {student.headdim}, state {ssm['d_state']}, "
        f"{biases}, by --init {args.init}",
        f"Measured: all layers recurrent{f', and the hybrid with --layers {_words(args.layers)}' * bool(args.layers)}",
        "",
    ]
    moments = memory(args, teacher, student)
    lines += [f"{name:<32}{size / GB:>8.1f} GB" for name, size in moments.items()]
    lines.append(f"{'host memory, at most about':<32}{(max(moments.values()) + LIBRARIES) / GB:>8.1f} GB")
    lines.append(f"{'disk':<32}{disk_bytes(args, student) / GB:>8.1f} GB")
    if args.device in (None, "cpu") and not torch.cuda.is_available():
        seconds = sum(
            work / speed_of_products(dtype)
            for dtype, work in zip((torch.float32, torch.float64), operations(args, teacher, student), strict=True)
        )
        lines.append(f"{'time, of matrix products alone':<32} at least {format_duration(seconds)}")
    return "\n".join(lines)


def _words(layers: list[int]) -> str:
    return " ".join(map(str, layers))


def memory(args: MakeArguments, teacher: TeacherConfig, student: LlambaConfig) -> dict[str, int]:
    """Returns the bytes that are held at the same time in each part of a conversion; the largest counts."""
    states, vocab = states_bytes(args, student), 4 * teacher.vocab_size * teacher.hidden_size
    # Beside the states: their copy that is written, or inputs of both models, outputs, and one of these in parts.
    passing = 4 * student.d_model * 4 * max(args.calibration_tokens, args.held_out_tokens)
    return {
        "embedding": 2 * vocab + states,
        "a layer": states + max(states, passing) + layer_bytes(args, student) + fit_bytes(args, student),
        "head": 3 * vocab + states,
    }


def layer_bytes(args: MakeArguments, student: LlambaConfig) -> int:
    """Returns the bytes of a teacher's layer and the student's, in float32, and of the latter as it is written."""
    D, inner, mlp = student.d_model, student.d_inner, student.mlp_cfg["intermediate_size"]
    mixer = D * (student.d_xBC + inner + student.ssm_cfg["n_v_heads"]) + inner * D
    activations = max(TOKENS_AT_ONCE, args.seq_length) * (4 * mlp + 4 * student.d_xBC)
    return 4 * (2 * 3 * D * mlp + 4 * D * D + mixer + activations) + DTYPES[args.dtype].itemsize * (3 * D * mlp + mixer)


def fit_bytes(args: MakeArguments, student: LlambaConfig) -> int:
    """Returns the bytes of the least squares of out_proj, in float64: products of the features, the matrix that is
    solved, and its factors; or those of what the heads have on their tokens, if it is more.
    """
    if args.init != "closed_form":
        return 0
    output = 8 * student.d_inner * (4 * student.d_inner + 4 * student.d_model)
    scores = student.ssm_cfg["n_v_heads"] * min(args.seq_length, LONGEST_WINDOW)  # of a token
    return max(output, TOKENS_FOR_HEADS * (8 * scores + 72 * student.d_inner))


def operations(args: MakeArguments, teacher: TeacherConfig, student: LlambaConfig) -> tuple[int, int]:
    """Returns the multiplications and additions of a conversion in float32, and those in float64."""
    D, inner, mlp = student.d_model, student.d_inner, student.mlp_cfg["intermediate_size"]
    attention = 2 * D * (2 * teacher.num_attention_heads + 2 * teacher.num_key_value_heads) * width_of_heads(teacher)
    mixer = 2 * D * (student.d_xBC + 2 * inner)
    n_streams = 5 if args.layers else 3
    calibration = args.calibration_tokens * (attention + 6 * D * mlp)
    held_out = args.held_out_tokens * (attention + mixer + (n_streams + 1) * (6 * D * mlp + mixer))
    fits = args.init == "closed_form"
    fit = args.calibration_tokens * (3 * mixer + 6 * D * mlp)  # on both inputs, and the student's way to the next layer
    single = student.n_layer * (calibration + held_out + fits * fit)
    single += n_streams * args.held_out_tokens * 2 * D * teacher.vocab_size
    double = 2 * args.calibration_tokens * 2 * inner * (inner + D) + 2 * inner * inner * (inner // 3 + 3 * D)
    return single, fits * student.n_layer * double


def speed_of_products(dtype: torch.dtype) -> float:
    """Returns the operations per second of a matrix product on this machine, measured for a moment."""
    matrix = torch.rand(SPEED_OF, SPEED_OF, dtype=dtype)
    matrix @ matrix
    begun, n_done, passed = time.perf_counter(), 0, 0.0
    while passed < 0.3:
        matrix @ matrix
        n_done += 1
        passed = time.perf_counter() - begun
    return 2 * SPEED_OF**3 * n_done / passed
