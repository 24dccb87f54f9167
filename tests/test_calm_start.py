"""A student whose start is good stays good: with a warm-up in steps, and a lower rate for what was copied from the
teacher, its KL never jumps. Without them it does.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distillation.adamw import MasterWeightAdamW
from distillation.exchange import AllReduce
from distillation.update import LossScale, step_or_skip
from llamba import LlambaConfig, LlambaForCausalLM
from model_utils import apply_replacements, get_teacher_model, get_tokenizer
from tests.launch import ROOT
from tests.parsing import train_options
from text.encoding import Encoder
from training_utils import build_schedule, parameter_groups

TINY = ROOT / "presets" / "tiny"
OF_TEACHER = [1, 2, 3, 5]
WARM_UP, STEPS, WIDTH = 8, 14, 64


@pytest.fixture(scope="module")
def teacher():
    return get_teacher_model(str(TINY / "teacher"), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def windows():
    """Returns windows of the preset's text in random order, (n, WIDTH)."""
    rows = [json.loads(line)["text"] for line in (TINY / "text" / "train.jsonl").read_text().splitlines()[:400]]
    ids = Encoder(get_tokenizer("", str(TINY / "teacher")))(rows).astype(np.int64)
    cut = torch.from_numpy(ids[: len(ids) // WIDTH * WIDTH]).view(-1, WIDTH)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(1))]


@torch.no_grad()
def good_student(teacher: PreTrainedModel, windows: Tensor) -> LlambaForCausalLM:
    """Returns a student that is the teacher but for two mixers, whose output projection is fitted to the attention's
    output by ridge regression. windows: (n, S) of what it is fitted on.
    """
    torch.manual_seed(0)
    config = LlambaConfig.from_pretrained(TINY / "student")
    student, model = LlambaForCausalLM(config), teacher.base_model
    mixers = {i: student.backbone.layers[i].mixer for i in range(config.n_layer) if i not in OF_TEACHER}
    seen = {}
    for i, mixer in mixers.items():

        def keep(module, args, options, output, i=i):
            seen[i] = (options["hidden_states"], output[0])

        handle = model.layers[i].self_attn.register_forward_hook(keep, with_kwargs=True)
        teacher(windows)
        handle.remove()
        inputs, target = seen[i]  # (n, S, D) each
        mixer.in_proj.weight.normal_(std=0.1)
        mixed = []
        handle = mixer.out_proj.register_forward_pre_hook(lambda module, args, mixed=mixed: mixed.append(args[0]))
        mixer(inputs)
        handle.remove()
        y, a = mixed[0].flatten(0, 1).double(), target.flatten(0, 1).double()  # (N, D_inner), (N, D)
        gram = y.T @ y
        ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        mixer.out_proj.weight.copy_(torch.linalg.solve(gram + ridge, y.T @ a).T)
    for i in mixers:
        own, given = student.backbone.layers[i], model.layers[i]
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            getattr(own, name).load_state_dict(getattr(given, name).state_dict())
    apply_replacements(student, teacher, OF_TEACHER)
    student.backbone.embedding.load_state_dict(model.embed_tokens.state_dict())
    student.backbone.final_layernorm.load_state_dict(model.norm.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return student


def mean_kl(student: LlambaForCausalLM, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns the mean of KL(teacher || student) over all tokens of ids (B, S)."""
    with torch.no_grad():
        expected = teacher(ids).logits.log_softmax(-1)  # (B, S, V)
    return F.kl_div(student(ids).logits.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1).mean()


def kls_of_run(line: str, teacher: PreTrainedModel, windows: Tensor, n_steps: int = STEPS) -> list[float]:
    """Takes the first steps of a run of `STEPS` on the KL, with a run's groups and schedule. Returns the KL on other
    windows before each step and after the last.
    """
    args = train_options(f"--max_lr 1e-2 --min_lr 1e-6 --max_steps {STEPS} {line}")
    student = good_student(teacher, windows[:32])
    groups = parameter_groups(student, args.weight_decay, args.copied_lr_factor)
    optimizer = MasterWeightAdamW(groups, lr=args.max_lr)
    schedule, scale = build_schedule(optimizer, args, STEPS, done=0), LossScale.for_dtype(torch.float32)
    found = []
    for step in range(n_steps + 1):
        with torch.no_grad():
            found.append(mean_kl(student, teacher, windows[-8:]).item())
        if step == n_steps:
            break
        loss = mean_kl(student, teacher, windows[32 + 4 * step : 36 + 4 * step])
        loss.backward()
        step_or_skip(AllReduce(student, optimizer), scale, args.grad_clip, loss.item())
        schedule.step()
    return found


def test_at_one_rate_and_without_warm_up_the_kl_jumps(teacher, windows):
    kls = kls_of_run("--warmup_ratio 0", teacher, windows, n_steps=3)
    assert max(kls) > 1.5 * kls[0]


def test_with_both_it_stays_below_one_and_a_half_times_its_start(teacher, windows):
    kls = kls_of_run(f"--warmup_steps {WARM_UP} --copied_lr_factor 0.1", teacher, windows)
    assert max(kls) < 1.5 * kls[0] and kls[-1] < kls[0]
