"""The checks of doctor.py that look at teacher and student: are they here, do they go together, do they speak the same
tokens, and does a student that equals its teacher have no loss. Only a small teacher is loaded.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arguments import TrainArguments
from checkup.basics import FAILURE, OK, WARNING, Case, Finding, NotLookedAt
from checkup.machine import GB, default_nproc, run_device
from footprint import build_models, find_configs, n_bytes
from llamba import LlambaConfig, LlambaForCausalLM
from losses import fused_distill_loss, shared_vocab
from model_files import read_config
from model_utils import apply_replacements, get_teacher_model, get_tokenizer, locate_model, read_llamba_config
from packing import Encoder, check_tokenizer
from resume import checkpoints_to_try
from training_utils import DTYPES, compiles_loss

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
PROBE = "The quick brown fox, naïve café.\n\tdef f(x):\n    return x**2  # 1234567890\n混合模型 😀🚀 e=mc²"
SMALL_MODEL = 200_000_000  # parameters that take seconds to read

# What rounding explains. Equal inputs give equal logits in any dtype; two ways to the same logits do not.
MOST_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, of CE and hidden states


@functools.cache
def resumed(case: Case) -> tuple[list[Path], ValueError | None]:
    """The checkpoints that a run would go on from, or what is wrong with them; looked for once."""
    try:
        return checkpoints_to_try(case.args, default_nproc(case)), None
    except ValueError as error:
        return [], error


@functools.cache
def offline(case: Case) -> TrainArguments:
    """The options, so that no network is touched and the student of a run that goes on is its checkpoint."""
    args, (candidates, _) = dataclasses.replace(case.args, local_files_only=True), resumed(case)
    return dataclasses.replace(args, student_model=str(candidates[0])) if candidates else args


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


def teacher_place(case: Case) -> str:
    try:
        return locate_model("--teacher_model", case.args.teacher_model, local_files_only=True, needs_weights=False)
    except ValueError as error:
        raise NotLookedAt("the teacher is not on this disk") from error


def teacher_tokenizer(case: Case) -> PreTrainedTokenizerBase:
    return get_tokenizer("--teacher_model", teacher_place(case))


# --- are they here -------------------------------------------------------------------------------------------


def check_resume(case: Case) -> Iterator[Finding]:
    if case.args.resume is not None:
        candidates, problem = resumed(case)
        if problem is not None:
            raise problem
        found = f"goes on from {candidates[0]}" if candidates else "no checkpoint yet, the run starts at 0"
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
                yield Finding.of_error(FAILURE, title, str(error).removeprefix(f"{title}: "))
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


# --- no loss where there is no difference --------------------------------------------------------------------


def check_loss(case: Case) -> Iterator[Finding]:
    """Random hidden states and a head of some size, as student and as teacher."""
    device, dtype = run_device(), DTYPES[case.args.dtype]
    hidden, head = torch.randn(64, 256, device=device, dtype=dtype), torch.randn(4096, 256, device=device, dtype=dtype)
    head /= 8  # logits of deviation 2
    labels = torch.randint(4096, (64,), device=device)
    kl, ce = kl_and_ce(case.args, hidden, head, hidden, head, labels)
    plain_ce = F.cross_entropy(F.linear(hidden.float(), head.float()), labels).item()
    yield judge("loss alone", dtype, kl, abs(ce / plain_ce - 1), f"CE {ce:.4f}")


def kl_and_ce(
    args: TrainArguments, hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor
) -> tuple[float, float]:
    """As training computes them of hidden states (N, D), (N, D_t) and heads (V, D), (V, D_t); labels (N,)."""
    vocab, signal = len(teacher_head), teacher
    signal_head: Tensor | None = teacher_head
    if args.teacher_signal == "logits":
        signal, signal_head = F.linear(teacher, teacher_head), None
    mask, compiled = torch.ones_like(labels, dtype=torch.bool), args.compile or compiles_loss(hidden.device)
    weights = (args.ce_weight, args.kl_weight, args.temperature)
    rest = (labels, mask, vocab, *weights, args.loss_chunk_tokens, compiled)
    _, kl, ce = fused_distill_loss(hidden, head, None, signal, signal_head, *rest)
    return kl.item(), ce.item()


EQUAL = "student equal to its teacher ({})"


def judge(name: str, dtype: torch.dtype, kl: float, difference: float, more: str) -> Finding:
    """difference: relative, of what has to be equal beside the KL."""
    title = EQUAL.format(name)
    found = f"KL {kl:.2g}, {more}, off by {difference:.1g}"
    if abs(kl) <= MOST_KL[dtype] and difference <= MOST_DIFFERENCE[dtype]:
        return Finding(OK, title, found)
    expected = f"expected a KL below {MOST_KL[dtype]:g} and a difference below {MOST_DIFFERENCE[dtype]:g}"
    remedy = "do not train on this machine as it is: try --dtype float32, another torch, and without the fast kernels"
    return Finding(FAILURE, title, f"{found}; {expected}", remedy)


def check_equal_models(case: Case) -> Iterator[Finding]:
    """All of the teacher's layers, its embedding, norm and head in a student's frame: nothing to learn is left."""
    teacher_config, student_config = configs(case)
    if case.args.kl_weight == 0:
        return
    place = teacher_place(case)
    skeleton, _ = skeletons(case)
    n_parameters = sum(p.numel() for p in skeleton.parameters())
    if n_parameters > SMALL_MODEL or teacher_config.model_type != "llama":
        found = f"not tried with {n_parameters / 1e9:.1f} billion parameters ({teacher_config.model_type})"
        yield Finding(OK, EQUAL.format("whole models"), found + ", only the loss was")
        return
    device, dtype = run_device(), DTYPES[case.args.dtype]
    teacher = get_teacher_model(place, dtype, device)
    student = teacher_as_student(teacher, student_config)
    ids = torch.from_numpy(Encoder(teacher_tokenizer(case))([PROBE]).astype("int64")).to(device)  # (N + 1,)
    with torch.no_grad():
        of_teacher = teacher.base_model(ids[None, :-1], use_cache=False).last_hidden_state[0]  # (N, D)
        of_student = student.backbone(ids[None, :-1], use_cache=False).last_hidden_state[0]
        head, own_head = teacher.get_output_embeddings().weight, student.lm_head.weight
        kl, ce = kl_and_ce(case.args, of_student, own_head, of_teacher, head, ids[1:])
        _, ce_of_teacher = kl_and_ce(case.args, of_teacher, head, of_teacher, head, ids[1:])
    difference = ((of_student - of_teacher).float().norm() / of_teacher.float().norm()).item()
    yield judge("whole models", dtype, kl, max(difference, abs(ce / ce_of_teacher - 1)), f"CE {ce:.4f}")


def teacher_as_student(teacher: PreTrainedModel, config: LlambaConfig) -> LlambaForCausalLM:
    """config: of the student, for its mixers, which give way to the teacher's layers."""
    given = teacher.config
    config = LlambaConfig(
        vocab_size=given.vocab_size,
        pad_vocab_size_multiple=1,
        d_model=given.hidden_size,
        n_layer=given.num_hidden_layers,
        norm_epsilon=given.rms_norm_eps,
        mlp_cfg=config.mlp_cfg,
        ssm_cfg=config.ssm_cfg,
    )
    student = LlambaForCausalLM._from_config(config, dtype=teacher.dtype, attn_implementation="sdpa")
    student = student.to(teacher.device).eval().requires_grad_(False)
    apply_replacements(student, teacher, list(range(config.n_layer)))
    for own, source in (
        (student.backbone.embedding, teacher.get_input_embeddings()),
        (student.backbone.final_layernorm, teacher.base_model.norm),
        (student.lm_head, teacher.get_output_embeddings()),
    ):
        own.load_state_dict(source.state_dict())
    return student
