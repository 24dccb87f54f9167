"""MMLU: prompts against expected text, scores against a slow reference, sums against ones made by hand."""

import csv
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import mmlu
from mmlu import Example, Prediction, Question, Subject
from tests.tiny import tiny_teacher

REAL_MMLU = Path(__file__).parents[1] / ".." / "shared" / "data" / "mmlu"
VOCAB = 300  # more than the tokenizers below need, as in a model whose vocabulary is padded

GEOGRAPHY = [
    ["  What is the capital of France?\n", "Lyon", " Paris ", "Nice, by the sea", "Lille", "B"],
    ['Who said\n"Here be dragons"?', "A sailor", "A king", "A map", "No one", "C"],
    ["Which is a river?", "Rhine", "Alps", "Ural, the hills", "Etna", "A"],
]
LOGIC = [
    ["Is p and not p ever true?", "Yes", "No", "Maybe", "Often", "B"],
    ["Two plus two?", "1", "2\r\n", "3", "4", "D"],
]


def write_mmlu(root: Path, files: dict[str, list[list[str]]]) -> Path:
    """`files` names each file without its ending, as in {"dev/logic_dev": rows}."""
    for name, rows in files.items():
        path = root / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return root


@pytest.fixture
def mmlu_dir(tmp_path: Path) -> Path:
    files = {"dev/world_geography_dev": GEOGRAPHY, "test/world_geography_test": GEOGRAPHY[::-1]}
    return write_mmlu(tmp_path / "mmlu", files | {"dev/logic_dev": LOGIC, "test/logic_test": LOGIC})


def byte_tokenizer(merges: list[tuple[str, str]], bos: bool, use_regex: bool = True):
    """A byte-level BPE with these merges only ("Ġ" stands for the space), so what " A" becomes is known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", *alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")


TOKENIZERS = {
    "one token each": lambda: byte_tokenizer([("Ġ", letter) for letter in "ABCD"], bos=True),
    "two tokens each": lambda: byte_tokenizer([], bos=True),
    "one token for A and B, two for C and D": lambda: byte_tokenizer([("Ġ", "A"), ("Ġ", "B")], bos=False),
    # Here the prompt's last token changes when a continuation follows it.
    "merges across the boundary": lambda: byte_tokenizer([(":", "Ġ")], bos=True, use_regex=False),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    # Weights wide enough that answers differ clearly.
    return tiny_teacher(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=1024, initializer_range=0.3)


def make_questions() -> list[Question]:
    prompts = [
        "Answer:",
        "Is it so?\nAnswer:",
        "x" * 37 + " Answer:",
        "Zoë said 7.\nAnswer:",
        "b c d e Answer:",
    ]
    prompts += [f"{'ab cd ' * n}\nAnswer:" for n in (1, 2, 3, 5, 8)]
    return [Question("s", i, prompt, "ABCD"[i % 4]) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def slow_log_likelihoods(model, tokenizer, prompt: str, max_length: int | None) -> list[float]:
    """One continuation at a time, all logits, no batch: what lm-eval defines, written plainly."""
    results = []
    for letter in "ABCD":
        context = tokenizer.encode(prompt)
        continuation = tokenizer.encode(f"{prompt} {letter}")[len(context) :]
        tokens = context + continuation
        if max_length is not None:
            tokens = tokens[-(max_length + 1) :]
        log_probs = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        positions = range(len(tokens) - 1 - len(continuation), len(tokens) - 1)
        results.append(sum(log_probs[p, token].item() for p, token in zip(positions, continuation, strict=True)))
    return results


# Loading


def test_fields_with_commas_quotes_and_newlines_survive(mmlu_dir):
    logic, geography = mmlu.load_mmlu(mmlu_dir)
    assert (logic.name, geography.name) == ("logic", "world_geography")
    assert [[e.question, *e.choices, e.answer] for e in logic.test] == LOGIC
    assert [[e.question, *e.choices, e.answer] for e in geography.dev] == GEOGRAPHY
    assert [[e.question, *e.choices, e.answer] for e in geography.test] == GEOGRAPHY[::-1]


def test_only_the_subjects_asked_for_in_that_order_and_once(mmlu_dir):
    asked = ["world_geography", "logic", "world_geography"]
    assert [s.name for s in mmlu.load_mmlu(mmlu_dir, asked)] == ["world_geography", "logic"]
    assert [s.name for s in mmlu.load_mmlu(mmlu_dir, ["logic"])] == ["logic"]


@pytest.mark.parametrize(
    "row",
    [["q", "1", "2", "3", "4"], ["q", "1", "2", "3", "4", "E"], ["q", "1", "2", "3", "4", "A", "B"], []],
)
def test_a_malformed_row_is_named(mmlu_dir, row):
    write_mmlu(mmlu_dir, {"test/logic_test": [LOGIC[0], row]})
    with pytest.raises(ValueError, match=r"logic_test\.csv, row 1 "):
        mmlu.load_mmlu(mmlu_dir)


def test_bytes_that_are_not_utf8_name_the_file(mmlu_dir):
    (mmlu_dir / "dev" / "logic_dev.csv").write_bytes("Zoë?,1,2,3,4,A\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"logic_dev\.csv, row 0 "):
        mmlu.load_mmlu(mmlu_dir)


def test_an_unknown_subject_gets_the_nearest_names(mmlu_dir):
    with pytest.raises(ValueError, match="--subjects word geography.*did you mean world_geography"):
        mmlu.load_mmlu(mmlu_dir, ["logic", "word geography"])
    with pytest.raises(ValueError, match="--subjects zzz.*there are logic, world_geography"):
        mmlu.load_mmlu(mmlu_dir, ["zzz"])


def test_a_folder_without_data_is_named(tmp_path, mmlu_dir):
    with pytest.raises(ValueError, match="--mmlu_dir .*nowhere.*is not a folder"):
        mmlu.load_mmlu(tmp_path / "nowhere")
    (tmp_path / "empty" / "dev").mkdir(parents=True)
    with pytest.raises(ValueError, match="--mmlu_dir .*empty.*holds no"):
        mmlu.load_mmlu(tmp_path / "empty")
    (mmlu_dir / "dev" / "logic_dev.csv").unlink()
    with pytest.raises(ValueError, match="do not both have logic"):
        mmlu.load_mmlu(mmlu_dir)
    (mmlu_dir / "dev" / "logic_dev.csv").touch()
    with pytest.raises(ValueError, match=r"logic_dev\.csv.*empty"):
        mmlu.load_mmlu(mmlu_dir)


# Prompts


def test_the_prompt_byte_for_byte(mmlu_dir):
    subjects = mmlu.load_mmlu(mmlu_dir, ["world_geography"])
    questions = mmlu.build_questions(subjects, num_fewshot=2)
    assert questions[0] == Question(
        subject="world_geography",
        index=0,
        prompt=(
            "The following are multiple choice questions (with answers) about world geography.\n"
            "\n"
            "What is the capital of France?\n"
            "A. Lyon\n"
            "B.  Paris \n"
            "C. Nice, by the sea\n"
            "D. Lille\n"
            "Answer: B\n"
            "\n"
            'Who said\n"Here be dragons"?\n'
            "A. A sailor\n"
            "B. A king\n"
            "C. A map\n"
            "D. No one\n"
            "Answer: C\n"
            "\n"
            "Which is a river?\n"
            "A. Rhine\n"
            "B. Alps\n"
            "C. Ural, the hills\n"
            "D. Etna\n"
            "Answer:"
        ),
        answer="A",
    )
    assert [(q.index, q.answer) for q in questions] == [(0, "A"), (1, "C"), (2, "B")]


def test_zero_shot_has_no_examples(mmlu_dir):
    first, second = mmlu.build_questions(mmlu.load_mmlu(mmlu_dir, ["logic"]), num_fewshot=0)
    head = "The following are multiple choice questions (with answers) about logic.\n\n"
    assert second.prompt == head + "Two plus two?\nA. 1\nB. 2\r\n\nC. 3\nD. 4\nAnswer:"
    assert first.prompt.startswith(head + "Is p ")


def test_limit_counts_per_subject(mmlu_dir):
    questions = mmlu.build_questions(mmlu.load_mmlu(mmlu_dir), num_fewshot=1, limit=1)
    assert [(q.subject, q.index) for q in questions] == [("logic", 0), ("world_geography", 0)]


@pytest.mark.parametrize("num_fewshot", [3, -1])
def test_more_examples_than_dev_rows_is_an_error(mmlu_dir, num_fewshot):
    with pytest.raises(ValueError, match=f"--num_fewshot {num_fewshot}: logic has 2 dev rows"):
        mmlu.build_questions(mmlu.load_mmlu(mmlu_dir), num_fewshot=num_fewshot)


@pytest.mark.skipif(not REAL_MMLU.is_dir(), reason="../shared/data/mmlu, a part of the real MMLU, is not there")
def test_real_mmlu():
    astronomy = mmlu.load_mmlu(REAL_MMLU, ["astronomy"])
    questions = mmlu.build_questions(astronomy, num_fewshot=0)
    assert len(questions) == 152
    assert questions[0].prompt == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        'What is true for a type-Ia ("type one-a") supernova?\n'
        "A. This type occurs in binary systems.\n"
        "B. This type occurs in young galaxies.\n"
        "C. This type produces gamma-ray bursts.\n"
        "D. This type produces high amounts of X-rays.\n"
        "Answer:"
    )
    everything = mmlu.load_mmlu(REAL_MMLU)
    assert len(everything) == len(list((REAL_MMLU / "test").glob("*.csv")))
    assert all(q.prompt.count("\nAnswer:") == 6 for q in mmlu.build_questions(everything, num_fewshot=5))


# Scoring


@pytest.mark.parametrize("max_length", [None, 23])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_score_equals_the_slow_reference(model, kind, batch_size, max_length):
    tokenizer, questions = TOKENIZERS[kind](), make_questions()
    if max_length is not None:
        lengths = [len(tokenizer.encode(q.prompt)) for q in questions]
        assert min(lengths) < max_length < max(lengths)  # some are cut, some are not
    predictions = mmlu.score(model, tokenizer, questions, batch_size, "cpu", max_length)
    assert [(p.subject, p.index, p.answer) for p in predictions] == [(q.subject, q.index, q.answer) for q in questions]
    for question, prediction in zip(questions, predictions, strict=True):
        expected = slow_log_likelihoods(model, tokenizer, question.prompt, max_length)
        assert prediction.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert prediction.prediction == "ABCD"[expected.index(max(expected))]
    assert len({p.prediction for p in predictions}) > 1  # else a constant answer would pass


@pytest.mark.parametrize(
    ("kind", "rows_each", "positions_each"),
    [
        ("one token each", 1, 1),
        ("two tokens each", 1, 2),  # the four differ in the last token alone
        ("one token for A and B, two for C and D", 2, 3),
    ],
)
def test_one_forward_serves_what_it_can_and_the_head_sees_only_what_is_needed(model, kind, rows_each, positions_each):
    bodies, heads = [], []
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: bodies.append(inputs[0].shape)),
        model.lm_head.register_forward_hook(lambda _, inputs, __: heads.append(inputs[0].shape)),
    ]
    questions = make_questions()
    mmlu.score(model, TOKENIZERS[kind](), questions, 4, "cpu", None)
    for hook in hooks:
        hook.remove()
    assert sum(rows for rows, _ in bodies) == rows_each * len(questions)
    assert all(rows <= 4 for rows, _ in bodies)
    assert [len(shape) for shape in heads] == [2] * len(heads)
    assert sum(rows for rows, _ in heads) == positions_each * len(questions)
    widths = [width for _, width in bodies]
    assert widths == sorted(widths, reverse=True)


def test_a_tokenizer_that_does_not_fit_is_an_error(model):
    whole = byte_tokenizer([(":", "Ġ"), (":Ġ", "A")], bos=False, use_regex=False)
    with pytest.raises(ValueError, match="no token of its own for ' A'"):
        mmlu.score(model, whole, make_questions(), 8, "cpu", None)
    large = byte_tokenizer([(a, b) for a in "abcdefgh" for b in "ABCDEFGH"] + [("Ġ", "A")], bos=False)
    with pytest.raises(ValueError, match=f"token 321, the model knows {VOCAB}"):
        mmlu.score(model, large, make_questions(), 8, "cpu", None)
    with pytest.raises(ValueError, match="--max_length 1: an answer alone is 2 tokens"):
        mmlu.score(model, TOKENIZERS["two tokens each"](), make_questions(), 8, "cpu", 1)


def test_a_broken_model_is_not_taken_for_an_answer(model):
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="log-likelihoods"):
        mmlu.score(broken, TOKENIZERS["one token each"](), make_questions(), 8, "cpu", None)


def test_equal_log_likelihoods_go_to_the_first_letter(model):
    flat = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(flat.lm_head.weight)
    prediction, *_ = mmlu.score(flat, TOKENIZERS["one token each"](), make_questions(), 8, "cpu", None)
    assert prediction.prediction == "A"
    # Every column of the head counts, those beyond the tokenizer's vocabulary too.
    assert prediction.log_likelihoods == pytest.approx([-math.log(VOCAB)] * 4, abs=1e-5)


# Aggregation


def predictions_of(subject: str, pairs: list[str]) -> list[Prediction]:
    return [Prediction(subject, i, answer, prediction, (-1.0,) * 4) for i, (answer, prediction) in enumerate(pairs)]


def test_aggregate_by_hand():
    results = predictions_of("logic", ["AA", "BA", "CC"]) + predictions_of("geography", ["DD", "AB"])
    assert mmlu.aggregate(results) == {
        "acc": 0.6,  # 3 of 5 questions, not the mean of the subjects' 2/3 and 1/2
        "stderr": pytest.approx(math.sqrt(0.6 * 0.4 / 4)),
        "n": 5,
        "subjects": {"logic": {"acc": pytest.approx(2 / 3), "n": 3}, "geography": {"acc": 0.5, "n": 2}},
    }


def test_one_question_has_no_standard_error():
    assert mmlu.aggregate(predictions_of("logic", ["AA"]))["stderr"] is None


def test_questions_and_examples_come_from_the_subject_given():
    dev = Example("d?", ("1", "2", "3", "4"), "D")
    (question,) = mmlu.build_questions([Subject("a_b_c", [dev], [dev])], num_fewshot=1)
    assert question.prompt.count(" about a b c.\n\n") == 1
    assert question.prompt.endswith("Answer: D\n\nd?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
