"""Makes presets/tiny: text, tokenizer, a small Llama that answers questions from their own text, and the Llamba made
from it. On a CPU core the teacher takes about ten minutes, the rest a minute:

    python -m presets.make_tiny --out presets/tiny
    python -m presets.make_tiny --out tiny --only text tokenizer

The text and the tokenizer are the same on every machine. The weights differ in their last bits, because the order of
sums depends on the number of threads and the processor.

Shapes: D width, H heads, P head width, N state.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

from evaluation import mmlu, mmlu_files, statistics
from llamba import DiscreteMamba2, LlambaConfig, LlambaForCausalLM
from paths import expanded_path
from presets import tiny_text as text
from presets.tiny_teacher import ENGLISH, VOCABULARY, make_teacher

END = "<|endoftext|>"
LEAST_ACCURACY = 0.9
PARTS = ("text", "tokenizer", "teacher", "student")


# Tokenizer


def tokenizer_corpus(english: str) -> Iterator[str]:
    """Yields English, and the words of the questions so often that each becomes one token, its space included."""
    yield english
    rng = random.Random(0)
    for subject in text.SUBJECTS * 740:
        question = text.draw_question(rng, subject)
        yield text.heading(subject) + "".join(piece for piece, _ in question.pieces(rng))
    words = [*text.WORDS, "Note", "Say", "Again", "Answer", *text.LETTERS]
    yield from [*(f" {word}" for word in words), "\nWhich is", "Say:", " Again:"] * 3000


def make_tokenizer(english: str) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE that decodes any text unchanged and adds no tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(english), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


# Student


def student_config(teacher: LlamaConfig) -> LlambaConfig:
    """Returns the shapes of a student as wide and as deep as the teacher."""
    return LlambaConfig(
        vocab_size=teacher.vocab_size,
        d_model=teacher.hidden_size,
        n_layer=teacher.num_hidden_layers,
        tie_embeddings=False,
        norm_epsilon=teacher.rms_norm_eps,
        mlp_cfg={"intermediate_size": teacher.intermediate_size, "bias": False, "act_fn": "silu"},
        ssm_cfg={
            "d_state": 16,
            "n_v_heads": teacher.num_attention_heads,
            "n_qk_heads": teacher.num_attention_heads,
            "expand": 1,
            "chunk_size": 64,
            "activation": "identity",
            "bias": False,
        },
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
    )


def make_student(teacher: LlamaForCausalLM, seed: int) -> LlambaForCausalLM:
    """Builds the teacher with Mamba-2 mixers in place of attention, initialised from its projections: x from V, B from
    K, C from Q and the output from O ('The Mamba in the Llama', arXiv 2408.15237). Everything else is copied.
    """
    torch.manual_seed(seed)
    student = LlambaForCausalLM(student_config(teacher.config))
    backbone = student.backbone
    backbone.embedding.load_state_dict(teacher.model.embed_tokens.state_dict())
    backbone.final_layernorm.load_state_dict(teacher.model.norm.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    for block, layer in zip(backbone.layers, teacher.model.layers, strict=True):
        for part in ("input_layernorm", "post_attention_layernorm", "mlp"):
            block.get_submodule(part).load_state_dict(layer.get_submodule(part).state_dict())
        init_mixer(block.mixer, layer.self_attn)
    return student


@torch.no_grad()
def init_mixer(mixer: DiscreteMamba2, attention: LlamaAttention) -> None:
    """Initialises a mixer from the projections of an attention layer."""
    n_heads, width, n_state = mixer.n_v_heads, attention.head_dim, mixer.d_state
    d_model = attention.q_proj.in_features

    def heads(projection: nn.Linear) -> Tensor:  # (H, P, D), each key or value head once per query head
        weight = projection.weight.unflatten(0, (-1, width))
        return weight.repeat_interleave(n_heads // weight.shape[0], dim=0)

    # The last N/2 of the rotated pairs (i, i + P/2): they turn slowest, so they match content, not distance.
    half = torch.arange(width // 2 - n_state // 2, width // 2)
    kept = torch.cat([half, half + width // 2])  # (N,)
    x = heads(attention.v_proj).reshape(-1, d_model)  # (H*P, D)
    B = heads(attention.k_proj)[:, kept].reshape(-1, d_model)  # (H*N, D)
    C = heads(attention.q_proj)[:, kept].reshape(-1, d_model) / width**0.5  # (H*N, D)
    mixer.in_proj.weight[: mixer.d_xBC] = torch.cat([x, B, C])  # z and A_log stay random
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0  # at first the convolution passes each token through
    mixer.conv1d.bias.zero_()
    mixer.D.zero_()  # attention has no such path
    mixer.z_bias.fill_(1.2785)  # silu(1.2785) = 1: the gate starts open
    mixer.out_proj.weight.copy_(attention.o_proj.weight)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves a tokenizer so that transformers 4 can load it too."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    del config["backend"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def keep_if_it_answers(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves the teacher in bfloat16 if it answers the questions. Otherwise saves it as teacher.rejected and exits: no
    student should be made of it.
    """
    questions = mmlu.build_questions(mmlu_files.load_mmlu(out / "mmlu"), num_fewshot=0)
    accuracy = statistics.aggregate(mmlu.score(teacher.eval(), tokenizer, questions, 16, torch.device("cpu"), 1024))[
        "acc"
    ]
    print(f"teacher: {accuracy:.3f} of {len(questions)} questions")
    answers = accuracy >= LEAST_ACCURACY
    teacher.to(torch.bfloat16).save_pretrained(out / ("teacher" if answers else "teacher.rejected"))
    if not answers:
        raise SystemExit(
            f"a teacher has to answer {LEAST_ACCURACY:.0%}; this one is in teacher.rejected, try another --seed"
        )


def make(out: Path, seed: int, parts: list[str]) -> None:
    """Makes the named parts of the preset in `out`. Each part needs those before it."""
    english = ENGLISH.read_text(encoding="utf-8")
    if "text" in parts:
        text.write_files(out, {"text/english.txt": english, **text.make_text(english, seed), **text.make_mmlu(seed)})
    if "tokenizer" in parts:
        for model in ("teacher", "student"):
            save_tokenizer(make_tokenizer(english), out / model)
    if "teacher" in parts:
        tokenizer = AutoTokenizer.from_pretrained(out / "teacher")
        keep_if_it_answers(make_teacher(tokenizer, seed), tokenizer, out)
    if "student" in parts:
        teacher = LlamaForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32)
        make_student(teacher, seed).to(torch.bfloat16).save_pretrained(out / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny preset: text, tokenizer, teacher and student.")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to make (default: all)")
    args = parser.parse_args()
    make(args.out, args.seed, args.only)


if __name__ == "__main__":
    main()
