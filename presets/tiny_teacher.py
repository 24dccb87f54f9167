"""The tiny preset's teacher: the curriculum that makes a small Llama answer questions from their own text, and its
training. Training on whole questions from the start stays at chance; a table of stages, each with documents that teach
one step more, can succeed in 3,800 steps. It does not always, since stages end after a number of steps, whatever has
been learned (presets/tiny/README.md says how two runs ended).

Shapes: B windows, S tokens, V vocabulary, K matrices of a shape.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from presets import tiny_text as text

ENGLISH = Path(__file__).parent / "tiny" / "text" / "english.txt"
VOCABULARY = 1024
Maker = Callable[[random.Random], list[text.Piece]]


@dataclass(frozen=True)
class Stage:
    """Describes `steps` batches of `batch` windows of `length` tokens, drawn from `kinds` (share, maker). `filler` is
    the weight of tokens that cannot be found by looking back. `layers`, if given, first rebuilds the model from the
    layers with these indices; -1 is a new layer that changes nothing until it is trained.
    """

    name: str
    steps: int
    batch: int
    length: int
    kinds: tuple[tuple[int, Maker], ...]
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    filler: float = 0.1
    decay: float = 0.0  # part of the steps, at the end, in which the learning rates fall to 2%
    layers: tuple[int, ...] = ()


def repeats(low: int, high: int) -> Maker:
    return lambda rng: text.repeat_document(rng, rng.randint(low, high))


def recalls(low: int, high: int, short: float = 0.0) -> Maker:
    return lambda rng: text.recall_document(rng, rng.randint(low, high), short)


def letters(low: int, short: float = 0.0) -> Maker:
    return lambda rng: text.letters_document(rng, rng.randint(low, 4), short)


def whiches(low: int, marked: tuple[float, ...] = (0.0,)) -> Maker:
    return lambda rng: text.which_document(rng, rng.randint(low, 4), rng.choice(marked))


def exams(
    low: int, high: int, facts: int = 4, named: float = 0.0, headed: float = 1.0, marked: tuple[float, ...] = (0.0,)
) -> Maker:
    return lambda rng: text.exam_document(
        rng, rng.randint(low, high), rng.randint(facts, 4), named, rng.choice(marked), headed
    )


def english_documents() -> Maker:
    documents, _ = text.split_english(ENGLISH.read_text(encoding="utf-8"))
    return lambda rng: [(rng.choice(documents), 1.0)]


def stages() -> tuple[Stage, ...]:
    """Returns the curriculum. Each stage builds on the ones before; with whole questions mixed in early, training
    stayed at chance.

    The model first learns to look up what followed a word, then what was near it (first side by side, then at a
    distance), then which letter a value has. To answer a whole question, it has to recognise the right choice before
    it can look for it: lines of choices that are always `marked` as right or wrong teach the first half, lines that
    are sometimes marked the second.
    """
    whole, half, some = (1.0,) * 7 + (0.0,) * 3, (0.0, 0.5, 0.5, 1.0), (0.0, 0.25, 0.5)
    light = (8, recalls(3, 4, 0.1)), (7, letters(4, 0.1)), (5, repeats(4, 12))
    seek = (*light, (40, whiches(2, some)), (40, exams(1, 1, 2, named=0.4, headed=0.1, marked=some)))
    answer = (*light, (15, whiches(2, some)), (68, exams(1, 1, 2, named=0.2, headed=0.1, marked=some)))
    mixture = (
        (10, recalls(2, 6)),
        (5, repeats(6, 20)),
        (8, letters(4)),
        (8, whiches(4)),
        (35, exams(1, 5)),
        (12, english_documents()),
    )
    follow = (5, recalls(2, 4)), (3, repeats(4, 12)), (2, letters(2))
    recall = (50, recalls(2, 4, 0.5)), (15, repeats(4, 12)), (35, letters(2, 0.5))
    lengthen = (
        (30, recalls(3, 5, 0.2)),
        (5, repeats(4, 12)),
        (25, letters(4, 0.2)),
        (20, whiches(4)),
        (30, exams(1, 2, named=0.5, headed=0.3)),
    )
    prompts = (
        (6, recalls(4, 6)),
        (3, repeats(6, 20)),
        (6, letters(4)),
        (8, whiches(4)),
        (15, exams(1, 2, headed=0.2, marked=some)),
        (45, exams(1, 4, headed=0.8)),
        (8, english_documents()),
    )
    return (
        Stage("follow", 400, 64, 64, follow),
        Stage("recall", 400, 64, 64, recall),
        Stage("lengthen", 200, 32, 128, lengthen),
        Stage("recognise", 200, 40, 80, recognise(whole), filler=0.02),
        Stage("recognise some", 100, 40, 80, recognise(half), filler=0.02),
        Stage("seek", 300, 28, 80, seek, filler=0.02),
        Stage("seek slowly", 300, 40, 80, seek, 0.008, 1e-3, filler=0.02),
        Stage("answer", 300, 40, 80, answer, 0.01, 1e-3, filler=0.02),
        # The last layer recognises the right choice, too late for another to look for it: two layers are added.
        Stage("deeper", 300, 40, 80, answer, 0.01, 1e-3, filler=0.02, layers=(0, 1, 2, 3, 4, 5, -1, -1)),
        Stage("prompts", 200, 10, 256, prompts, 0.01, 1e-3, filler=0.05),
        Stage("mixture", 300, 14, 256, mixture, 0.012, 2e-3, filler=0.3),
        # Without layers 1 and 2 the answers are as good: they are removed.
        Stage("settle", 800, 12, 256, mixture, 0.012, 2e-3, filler=0.3, decay=0.75, layers=(0, 3, 4, 5, 6, 7)),
    )


def recognise(marked: tuple[float, ...]) -> tuple[tuple[int, Maker], ...]:
    return (
        (12, recalls(3, 4, 0.2)),
        (8, letters(4, 0.2)),
        (5, repeats(4, 12)),
        (40, whiches(2, marked)),
        (35, exams(1, 1, 2, named=0.6, headed=0.1, marked=marked)),
    )


class Windows:
    """Cuts documents of a stage, each after an END token, into windows without a gap."""

    def __init__(self, stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.stage, self.rng = stage, rng
        self.encode = lru_cache(maxsize=100_000)(lambda piece: tokenizer(piece)["input_ids"])
        self.end = tokenizer.eos_token_id
        self.ids: list[int] = []
        self.weights: list[float] = []

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs, labels and the labels' weights, (B, S) each."""
        shape = (self.stage.batch, self.stage.length)
        n_tokens = shape[0] * shape[1]
        while len(self.ids) <= n_tokens:
            self._add_document()
        ids = torch.tensor(self.ids[: n_tokens + 1])
        weights = torch.tensor(self.weights[1 : n_tokens + 1])
        self.ids, self.weights = self.ids[n_tokens:], self.weights[n_tokens:]
        return ids[:-1].view(shape), ids[1:].view(shape), weights.view(shape)

    def _add_document(self) -> None:
        shares = [share for share, _ in self.stage.kinds]
        _, maker = self.rng.choices(self.stage.kinds, shares)[0]
        self.ids.append(self.end)
        self.weights.append(0.1)
        for piece, weight in maker(self.rng):
            ids = self.encode(piece)
            self.ids += ids
            self.weights += [self.stage.filler if weight is None else weight] * len(ids)


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


def teacher_config(n_layer: int) -> LlamaConfig:
    """Returns the teacher's shapes with `n_layer` layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=n_layer,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def with_layers(model: LlamaForCausalLM, layers: tuple[int, ...]) -> LlamaForCausalLM:
    """Rebuilds the model from its layers with these indices; -1 is a new layer that adds nothing to its input yet."""
    rebuilt = LlamaForCausalLM(teacher_config(len(layers)))
    for part in ("embed_tokens", "norm"):
        rebuilt.model.get_submodule(part).load_state_dict(model.model.get_submodule(part).state_dict())
    rebuilt.lm_head.load_state_dict(model.lm_head.state_dict())
    for layer, source in zip(rebuilt.model.layers, layers, strict=True):
        if source >= 0:
            layer.load_state_dict(model.model.layers[source].state_dict())
        else:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return rebuilt


def train_stage(model: LlamaForCausalLM, stage: Stage, windows: Windows, steps: int) -> None:
    """Trains the model for `steps` steps: matrices by Muon, everything else by AdamW."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = set(matrices)
    rest = [p for p in model.parameters() if p not in known]
    optimizers = (
        Muon(matrices, lr=stage.muon_lr),
        torch.optim.AdamW(rest, lr=stage.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for step in range(steps):
        factor = min(1.0, (step + 1) / 30)
        if stage.decay:
            factor = min(factor, max(0.02, (steps - step) / (stage.decay * steps)))
        for optimizer, lr in zip(optimizers, (stage.muon_lr, stage.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        inputs, labels, weights = windows.batch()  # (B, S) each
        logits = model(inputs).logits  # (B, S, V)
        token_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")  # (B*S)
        loss = (token_loss * weights.flatten()).sum() / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{stage.name:<16} step {step:>4} loss {loss.item():.3f}", flush=True)


def make_teacher(tokenizer: PreTrainedTokenizerFast, seed: int, scale: float) -> LlamaForCausalLM:
    """Trains a teacher through all stages, with `scale` times their steps."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(teacher_config(n_layer=6))
    for index, stage in enumerate(stages()):
        if stage.layers:
            model = with_layers(model, stage.layers)
        windows = Windows(stage, tokenizer, random.Random(1000 * seed + index))
        train_stage(model, stage, windows, max(1, round(scale * stage.steps)))
    return model
