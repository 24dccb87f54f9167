"""Makes presets/tiny: text, tokenizer, a small Llama that answers questions from their own text, and the student that
make_student.py makes of it. On a CPU core the teacher takes about ten minutes, the rest a minute:

    python -m presets.make_tiny --out presets/tiny
    python -m presets.make_tiny --out tiny --only text tokenizer

The text and the tokenizer are the same on every machine. The weights differ in their last bits, because the order of
sums depends on the number of threads and the processor.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import make_student
from conversion.options import parse_make_args
from evaluation import mmlu, mmlu_files, statistics
from llamba import LlambaForCausalLM
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


# Files


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


def make_student_of(out: Path) -> None:
    """Makes the student of the teacher as make_student.py does by itself, and saves it in bfloat16 in one file."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "student"
        options = {"preset": "tiny", "teacher_model": out / "teacher", "calibration": out / "text" / "train.jsonl"}
        options |= {"output": built, "dtype": "bfloat16"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        make_student.main(parse_make_args(words))
        LlambaForCausalLM.from_pretrained(built, dtype=torch.bfloat16).save_pretrained(out / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "teacher" / name, out / "student" / name)


def make(out: Path, seed: int, parts: list[str]) -> None:
    """Makes the named parts of the preset in `out`. Each part needs those before it."""
    english = ENGLISH.read_text(encoding="utf-8")
    if "text" in parts:
        text.write_files(out, {"text/english.txt": english, **text.make_text(english, seed), **text.make_mmlu(seed)})
    if "tokenizer" in parts:
        save_tokenizer(make_tokenizer(english), out / "teacher")
    if "teacher" in parts:
        tokenizer = AutoTokenizer.from_pretrained(out / "teacher")
        keep_if_it_answers(make_teacher(tokenizer, seed), tokenizer, out)
    if "student" in parts:
        make_student_of(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny preset: text, tokenizer, teacher and student.")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to make (default: all)")
    args = parser.parse_args()
    make(args.out, args.seed, args.only)


if __name__ == "__main__":
    main()
