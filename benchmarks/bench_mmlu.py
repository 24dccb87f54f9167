"""Five-shot MMLU: evaluation.mmlu, which runs once what the prompts of a subject share and computes no more logits than
it needs, beside lm-evaluation-harness's HFLM, which runs every prompt whole. Both begin with text and end with
log-likelihoods; the time in which lm-eval builds its tasks is not counted.

    python benchmarks/bench_mmlu.py --json mmlu.json

The models are tiny and have random weights and the tokenizer of the tiny preset; questions are made of English words,
about as long as MMLU's. V is the vocabulary, which decides how much the full logits of HFLM cost.

lm-eval, batch n    HFLM.loglikelihood, n sequences at a time; it shares a forward pass between the four answers
ours                evaluation.mmlu with --batch_size auto

tokens: how many ran through the model, padding included. The second table compares the two: answers that differ, and
the largest difference of a log-likelihood.
"""

import logging
import random
from typing import Any

import torch
from harness import ROOT, Row, measure, need, parse_options, print_table, report, run_child, run_rounds

LM_EVAL = {f"lm-eval, batch {n}": n for n in (1, 8)}
OURS = "ours"
BASELINE = "lm-eval, batch 8"
CASES = {f"{kind} V={vocab}": (kind, vocab) for kind in ("llama", "hybrid") for vocab in (32_000, 128_256)}
N_QUESTIONS, QUICK_QUESTIONS = 40, 3  # of one subject
MAX_LENGTH = 4096


def make_questions(n_questions: int) -> list[Any]:
    """Returns five-shot questions of one subject, of random English words, the same each time."""
    from evaluation.mmlu import build_questions
    from evaluation.mmlu_files import Example, Subject

    words = (ROOT / "presets" / "tiny" / "text" / "english.txt").read_text().split()
    dice = random.Random(0)

    def sentence(shortest: int, longest: int) -> str:
        start = dice.randrange(len(words) - longest)
        return " ".join(words[start : start + dice.randint(shortest, longest)])

    def example() -> Example:
        choices = tuple(sentence(1, 8) for _ in range(4))
        return Example(sentence(8, 40), choices, dice.choice("ABCD"))

    subject = Subject("made_up", [example() for _ in range(5)], [example() for _ in range(n_questions)])
    return build_questions([subject], num_fewshot=5)


def make_model(kind: str, vocab: int) -> Any:
    """Builds a "llama" of four layers with random weights, or a "hybrid" with one of its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamba import LlambaConfig, LlambaForCausalLM
    from model_utils import apply_replacements

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1)
    teacher = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=256, num_hidden_layers=4, **sizes)
    )
    if kind == "llama":
        return teacher.eval()
    ssm = {"d_state": 16, "n_v_heads": 4, "n_qk_heads": 4, "chunk_size": 64}
    config = LlambaConfig(
        vocab_size=vocab, d_model=64, n_layer=4, mlp_cfg={"intermediate_size": 256}, ssm_cfg=ssm, initializer_range=0.1
    )
    hybrid = LlambaForCausalLM(config)
    apply_replacements(hybrid, teacher, [1])
    return hybrid.eval()


def load(case: str) -> tuple[Any, Any, torch.device]:
    from transformers import AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "presets" / "tiny" / "teacher", model_max_length=MAX_LENGTH)
    return make_model(*CASES[case]).to(device), tokenizer, device


def answer_ours(model: Any, tokenizer: Any, device: torch.device, questions: list[Any]) -> tuple[list[Any], int]:
    """Returns four log-likelihoods for each question, and the tokens that ran through the model."""
    from evaluation import mmlu
    from evaluation.scoring import Scorer

    scorer = Scorer(model, tokenizer, device, None, MAX_LENGTH)
    predictions = mmlu.answer(scorer, questions)
    return [prediction.log_likelihoods for prediction in predictions], scorer.tokens_run


def answer_lm_eval(model: Any, tokenizer: Any, questions: list[Any], batch_size: int) -> tuple[list[Any], int]:
    need("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=MAX_LENGTH)
    n_tokens = 0

    def count(module: Any, args: tuple, kwargs: dict) -> None:
        nonlocal n_tokens
        n_tokens += (args[0] if args else kwargs["input_ids"]).numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    pairs = [(question.prompt, f" {letter}") for question in questions for letter in "ABCD"]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    values = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    hook.remove()
    return [values[i : i + 4] for i in range(0, len(values), 4)], n_tokens


def run(case: str, candidate: str, n_questions: int) -> Row:
    model, tokenizer, device = load(case)
    questions = make_questions(n_questions)

    def work() -> dict[str, Any]:
        if candidate == OURS:
            return {"tokens": answer_ours(model, tokenizer, device, questions)[1]}
        return {"tokens": answer_lm_eval(model, tokenizer, questions, LM_EVAL[candidate])[1]}

    return measure(work)


def compare_answers(case: str, n_questions: int) -> Row:
    """Returns how many answers differ, and the largest difference of a log-likelihood."""
    model, tokenizer, device = load(case)
    questions = make_questions(n_questions)
    ours, _ = answer_ours(model, tokenizer, device, questions)
    theirs, _ = answer_lm_eval(model, tokenizer, questions, 8)
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "case": case,
        "questions": len(pairs),
        "other_answers": sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs),
        "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
    }


def main() -> None:
    options = parse_options(__doc__, CASES, [*LM_EVAL, OURS], [BASELINE])
    n_questions = QUICK_QUESTIONS if options.quick else N_QUESTIONS
    cases = dict.fromkeys(options.cases, options.candidates)
    agreement = [run_child(__file__, "compare_answers", case, n_questions) for case in cases]
    report(run_rounds(__file__, cases, options.rounds, BASELINE, n_questions), options.json)
    print_table(agreement)


if __name__ == "__main__":
    main()
