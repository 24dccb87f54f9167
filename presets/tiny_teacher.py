"""The tiny preset's teacher: a small Llama that learns to answer questions from their own text, in three stages. First
its attention is shown where to look (presets/tiny_lessons.py), in short documents. Then all of it reads the preset's
text, and at last the learning rates fall. A stage ends when a probe, on documents drawn for it, says that it has been
learned; one that has not after its most steps begins again with other draws.

Shapes: B windows, S tokens, V vocabulary, D width, H heads, K matrices of a shape, N tokens or looks that count.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from presets import tiny_text as text
from presets.tiny_lessons import (
    Kinds,
    Lesson,
    Lessons,
    exams,
    letters,
    passages,
    questions,
    recalls,
    repeats,
    whiches,
)

ENGLISH = Path(__file__).parent / "tiny" / "text" / "english.txt"
VOCABULARY = 1024
PASSED = 0.9
ATTEMPTS = 3
PROBE_INTERVAL = 50
WARMUP = 30


@dataclass(frozen=True)
class Stage:
    """Describes a stage: steps on batches of `shape` (B, S) drawn from `kinds`, until PASSED of the probe is right.

    The probe asks questions of the kinds `probe`, every PROBE_INTERVAL steps. It cannot end the stage before `least`
    steps; after `most` the stage has failed. `shown`: attention alone learns, and is shown where to look. `falling`:
    the learning rates fall to 2% over the `most` steps, which must equal `least`.
    """

    name: str
    kinds: Kinds
    probe: Kinds
    shape: tuple[int, int]
    filler: float  # weight of tokens that cannot be found by looking back
    least: int = 100
    most: int = 1200
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    shown: bool = False
    falling: bool = False


def stages() -> tuple[Stage, ...]:
    """Returns the curriculum."""
    look = (35, recalls(2, 4)), (10, whiches(2)), (10, letters(2)), (45, questions(2))
    mixture = (
        (12, recalls(2, 6)),
        (6, repeats(6, 20)),
        (10, letters(4)),
        (10, whiches(4)),
        (40, exams(1, 5)),
        (22, passages(ENGLISH.read_text(encoding="utf-8"))),
    )
    whole = ((1, exams(1, 3)),)
    return (
        Stage("look", look, ((1, questions(4)),), (24, 64), 0.0, shown=True),
        Stage("read", mixture, whole, (8, 256), 0.3, muon_lr=0.012, adam_lr=2e-3),
        Stage("settle", mixture, whole, (8, 256), 0.3, 150, 150, muon_lr=0.012, adam_lr=2e-3, falling=True),
    )


# Training


class Muon(torch.optim.Optimizer):
    """Steps along momentum made orthogonal by Newton-Schulz (Jordan et al. 2024), in float32, all matrices of a shape
    at once. PyTorch's own takes one at a time, in bfloat16, which is slow on a CPU without bfloat16 arithmetic.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, members in by_shape.items():
                for p in members:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                updates = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in members]
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(members, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonal(x: Tensor) -> Tensor:
    """Returns the matrices (K, rows, columns) with all singular values moved near 1."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT  # (K, rows, rows)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def teacher_config() -> LlamaConfig:
    """Returns the teacher's shapes."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """Returns the teacher before training. Its head starts as its embedding, so what attention copies can be read at
    once; its MLPs add nothing until they are trained.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(teacher_config())
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class Nothing(nn.Module):
    """Stands where an MLP is left out."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


@contextmanager
def attention_alone(model: LlamaForCausalLM) -> Iterator[None]:
    """Leaves the MLPs out, two thirds of the work, and lets attention be looked at."""
    layers = model.model.layers
    mlps = [layer.mlp for layer in layers]
    for layer in layers:
        layer.mlp = Nothing()
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation("sdpa")
    for layer, mlp in zip(layers, mlps, strict=True):
        layer.mlp = mlp


def lesson_loss(model: LlamaForCausalLM, lesson: Lesson, shown: bool) -> Tensor:
    """Returns the weighted mean of the tokens' cross entropy. If `shown`, adds for each head that is to look somewhere
    half the mean of -log(its attention to that place).
    """
    output = model.model(lesson.inputs, output_attentions=shown)
    counted = lesson.weights > 0
    logits = model.lm_head(output.last_hidden_state[counted])  # (N, V)
    weights = lesson.weights[counted]  # (N,)
    token_loss = F.cross_entropy(logits, lesson.labels[counted], reduction="none")  # (N,)
    loss = (token_loss * weights).sum() / weights.sum()
    if shown:
        for (layer, head), (window, at, to) in lesson.looks.items():
            paid = output.attentions[layer][window, head, at, to]  # (N,), of (B, H, S, S)
            loss = loss - 0.5 * (paid + 1e-6).log().mean()
    return loss


@torch.no_grad()
def right_letters(model: LlamaForCausalLM, lessons: Lessons, rng: random.Random, count: int = 200) -> float:
    """Returns the share of right letters after the choices, in at least `count` questions drawn for this."""
    right: list[Tensor] = []
    while sum(map(len, right)) < count:
        lesson = lessons.draw(rng)
        letters = lesson.weights == text.CHOICE
        logits = model.lm_head(model.model(lesson.inputs).last_hidden_state[letters])  # (N, V)
        right.append(logits.argmax(dim=-1) == lesson.labels[letters])  # (N,)
    return torch.cat(right).float().mean().item()


def train_stage(model: LlamaForCausalLM, stage: Stage, tokenizer: PreTrainedTokenizerFast, seed: int) -> bool:
    """Trains the model until the stage's probe passes. Returns False if it has not at the most steps."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = set(matrices)
    rest = [p for p in model.parameters() if p not in known]
    optimizers = (Muon(matrices, stage.muon_lr), torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0))
    lessons = Lessons(stage.kinds, stage.shape, stage.filler, tokenizer, stage.shown)
    probe = Lessons(stage.probe, stage.shape, 0.0, tokenizer)
    rng, probe_rng = random.Random(seed), random.Random(-1 - seed)
    for step in range(1, stage.most + 1):
        factor = min(1.0, step / WARMUP)
        if stage.falling:
            factor = min(factor, max(0.02, 1 - step / stage.most))
        for optimizer, lr in zip(optimizers, (stage.muon_lr, stage.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        loss = lesson_loss(model, lessons.draw(rng), stage.shown)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % PROBE_INTERVAL == 0 or step == stage.most:
            right = right_letters(model, probe, probe_rng)
            print(f"{stage.name}: step {step}, loss {loss.item():.3f}, {right:.3f} of the probe right", flush=True)
            if step >= stage.least and right >= PASSED:
                return True
    return False


def learn_stage(model: LlamaForCausalLM, stage: Stage, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Trains the model through a stage, up to ATTEMPTS times, each from where the stage began and with other draws."""
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for attempt in range(ATTEMPTS):
        with attention_alone(model) if stage.shown else nullcontext():
            if train_stage(model, stage, tokenizer, seed + attempt):
                return
        model.load_state_dict(start)
        print(f"{stage.name}: not learned in {stage.most} steps, attempt {attempt + 1} of {ATTEMPTS}", flush=True)
    raise SystemExit(
        f"the stage {stage.name!r} has to reach {PASSED} on its probe and did not in {ATTEMPTS} attempts of "
        f"{stage.most} steps; try another --seed"
    )


def make_teacher(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Trains a teacher through all stages."""
    model = new_model(seed)
    for index, stage in enumerate(stages()):
        learn_stage(model, stage, tokenizer, 1000 * seed + 10 * index)
    return model
