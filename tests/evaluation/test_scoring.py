"""Log-likelihoods against a slow reference: prompts that share their beginning or do not, tokenizers of every kind,
Llamas and hybrids; and how much of the model is run for them.
"""

from dataclasses import replace

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from evaluation import scoring
from evaluation.scoring import Request, Scorer
from llamba import SharedPrefix
from tests.byte_tokenizers import TOKENIZERS, byte_tokenizer
from tests.tiny import tiny_model, tiny_student

VOCAB = 300  # more than the tokenizers need, as in a model whose vocabulary is padded
CPU = torch.device("cpu")
ANSWERS = (" A", " B", " C", " D")
HEAD = "Once upon a time.\n"


@pytest.fixture(scope="module", params=["llama", "hybrid", "mamba"])
def model(request):
    return tiny_model(request.param, VOCAB)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_model("llama", VOCAB)


def make_requests(head: str = HEAD, n: int = 10) -> list[Request]:
    bodies = ["", "Is it so?\n", "x" * 37 + " ", "Zoë said 7.\n", "b c d e "]
    bodies += [f"{'ab cd ' * n}\n" for n in (1, 2, 3, 5, 8)]
    return [Request(f"{head}{body}Answer:", ANSWERS) for body in bodies[:n]]


@torch.no_grad()
def slow_log_likelihoods(model, tokenizer, request: Request, max_length: int | None) -> list[float]:
    """Scores as lm-eval defines it, written plainly: one continuation at a time, all logits, no batch, no cache."""
    results = []
    for text in request.continuations:
        context = tokenizer.encode(request.prompt)
        continuation = tokenizer.encode(request.prompt + text)[len(context) :]
        tokens = context + continuation
        if max_length is not None:
            tokens = tokens[-(max_length + 1) :]
        log_probs = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        positions = range(len(tokens) - 1 - len(continuation), len(tokens) - 1)
        results.append(sum(log_probs[p, token].item() for p, token in zip(positions, continuation, strict=True)))
    return results


def check(model, tokenizer, requests: list[Request], batch_size: int | None, max_length: int | None) -> Scorer:
    scorer = Scorer(model, tokenizer, CPU, batch_size, max_length)
    for request, values in zip(requests, scorer(requests), strict=True):
        assert values == pytest.approx(slow_log_likelihoods(model, tokenizer, request, max_length), abs=1e-4)
    return scorer


@pytest.mark.parametrize("max_length", [None, 41])
@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_scores_equal_the_slow_reference(model, kind, batch_size, max_length):
    tokenizer, requests = TOKENIZERS[kind](), make_requests()
    if max_length is not None:
        lengths = [len(tokenizer.encode(request.prompt)) for request in requests]
        assert min(lengths) < max_length < max(lengths)  # some are cut, some are not
    check(model, tokenizer, requests, batch_size, max_length)


def test_a_prompt_that_is_cut_counts_once_however_many_rows_it_takes(llama):
    tokenizer, answers = byte_tokenizer([], True), (" yes", " no", "!")
    scorer = Scorer(llama, tokenizer, CPU, max_length=41)
    scorer([Request("x", answers), Request("x" * 60, answers), Request("y" * 60, answers)])
    assert scorer.n_cut == 2


@pytest.mark.parametrize(
    "requests",
    [
        [Request("Answer:", ANSWERS)],
        [Request("Answer:", ANSWERS)] * 2,  # all of them the beginning of all
        [Request("x Answer:", ANSWERS), Request("y Answer:", ANSWERS)],  # nothing in common but a BOS
        [Request(HEAD, ANSWERS), Request(HEAD * 2, ANSWERS)],  # one is the beginning of the other
        [Request(f"{HEAD * 9}{end}", (" yes", " no", "!")) for end in "abc"],  # of different lengths
    ],
    ids=["one", "equal", "nothing in common", "one within another", "long continuations"],
)
@pytest.mark.parametrize("bos", [True, False])
def test_prompts_share_what_they_can(model, requests, bos):
    check(model, byte_tokenizer([], bos), requests, None, None)


def test_a_beginning_is_run_once_and_no_more_rows_than_it_takes(llama):
    bodies = []
    requests = make_requests(HEAD * 20)
    tokenizer = TOKENIZERS["one token each"]()
    scorer = Scorer(llama, tokenizer, CPU, batch_size=4)
    hook = llama.model.embed_tokens.register_forward_hook(lambda _, inputs, __: bodies.append(inputs[0].shape))
    scorer(requests)
    hook.remove()
    n_shared = len(tokenizer.encode(HEAD * 20))  # with its BOS
    lengths = sorted((len(tokenizer.encode(request.prompt)) - n_shared for request in requests), reverse=True)
    assert bodies[0] == (1, n_shared)
    assert bodies[1:] == [(4, lengths[0]), (4, lengths[4]), (2, lengths[8])]  # by length, the longest first
    assert scorer.tokens_run == n_shared + 4 * lengths[0] + 4 * lengths[4] + 2 * lengths[8]
    assert scorer.tokens_plain == sum(lengths) + n_shared * len(requests)


@pytest.mark.parametrize(
    ("kind", "rows_each", "positions_each"),
    [
        ("one token each", 1, 1),
        ("two tokens each", 1, 2),  # the four differ in the last token alone
        ("one token for A and B, two for C and D", 2, 3),
    ],
)
def test_logits_are_made_for_the_predicting_positions_alone(llama, monkeypatch, kind, rows_each, positions_each):
    rows, positions = [], []
    scorer, real = Scorer(llama, TOKENIZERS[kind](), CPU), scoring.log_normaliser
    hook = llama.model.embed_tokens.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape))
    monkeypatch.setattr(
        scoring, "log_normaliser", lambda hidden, head: (positions.append(hidden.shape), real(hidden, head))[1]
    )
    whole = llama.lm_head.register_forward_hook(lambda *_: pytest.fail("the whole head was run"))
    scorer(make_requests())
    hook.remove()
    whole.remove()
    assert sum(n for n, _ in rows[1:]) == rows_each * len(make_requests())
    assert sum(n for n, _ in positions) == positions_each * len(make_requests())


@pytest.mark.parametrize("columns", [7, VOCAB, 10_000])
def test_the_normaliser_is_that_of_all_columns(monkeypatch, columns):
    monkeypatch.setattr(scoring, "HEAD_COLUMNS", columns)
    head, hidden = torch.nn.Linear(5, VOCAB), torch.randn(3, 5)
    torch.testing.assert_close(scoring.log_normaliser(hidden, head), head(hidden).logsumexp(-1, keepdim=True))


def test_a_batch_that_does_not_fit_is_halved_until_it_does(llama):
    limit, asked = 3 * 80, []

    def refuse(_, inputs):
        rows, length = inputs[0].shape
        asked.append(rows)
        if rows * length > limit:
            raise torch.OutOfMemoryError("no room")

    requests = [Request(f"{HEAD}{i}{'ab ' * 20}", ANSWERS) for i in range(10)]
    scorer = Scorer(llama, TOKENIZERS["one token each"](), CPU)
    hook = llama.model.embed_tokens.register_forward_pre_hook(refuse)
    values = scorer(requests)
    assert len(asked) > 3 and scorer.batch_tokens <= limit
    n = len(asked)
    scorer(requests)
    assert max(asked[n:]) < 10  # the smaller size is kept
    with pytest.raises(ValueError, match="--batch_size 8: does not fit .* or auto"):
        Scorer(llama, TOKENIZERS["one token each"](), CPU, batch_size=8)(
            [replace(r, prompt=f"{i}{r.prompt}") for i, r in enumerate(requests)]
        )
    hook.remove()
    for got, expected in zip(values, Scorer(llama, TOKENIZERS["one token each"](), CPU)(requests), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_one_sequence_that_does_not_fit_is_the_end(llama):
    def refuse(_, inputs):
        raise torch.OutOfMemoryError("no room")

    scorer = Scorer(llama, TOKENIZERS["one token each"](), CPU)
    hook = llama.model.embed_tokens.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        scorer([Request("x", ANSWERS)])
    hook.remove()


def test_a_model_that_forgets_is_run_whole():
    """A sliding window keeps no prefix to continue from."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = MistralConfig(vocab_size=VOCAB, sliding_window=8, num_key_value_heads=2, initializer_range=0.3, **sizes)
    scorer = check(MistralForCausalLM(config).eval(), byte_tokenizer([], True), make_requests(), None, None)
    assert scorer.tokens_run >= scorer.tokens_plain


def test_a_model_that_scales_its_logits_is_refused():
    """Scores from its hidden states and head alone would be wrong, and nothing would show it."""
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
    granite = GraniteForCausalLM(GraniteConfig(vocab_size=VOCAB, num_key_value_heads=2, logits_scaling=8.0, **sizes))
    with pytest.raises(ValueError, match="granite: does more to its logits"):
        Scorer(granite.eval(), byte_tokenizer([], True), CPU)


def test_a_model_that_breaks_on_one_prompt_is_refused(llama):
    """Its likeliest answer would be the first NaN."""
    broken = LlamaForCausalLM(llama.config).eval()
    tokenizer = byte_tokenizer([], True)
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("q")] = float("nan")
    scorer = Scorer(broken, tokenizer, CPU)
    scorer([Request("abc", ANSWERS), Request("abd", ANSWERS)])
    with pytest.raises(ValueError, match=r"llama: log-likelihoods \[nan.* after 'xq'"):
        scorer([Request("xa", ANSWERS), Request("xq", ANSWERS)])


@pytest.mark.parametrize("bos", [True, False])
def test_a_head_may_have_a_bias(bos):
    student = tiny_student(vocab_size=VOCAB, lm_head_bias=True)
    assert student.lm_head.bias.abs().max() > 0.1
    check(student, byte_tokenizer([("Ġ", "A")], bos), make_requests(), None, None)


def test_a_tokenizer_that_does_not_fit_is_an_error(llama):
    whole = byte_tokenizer([(":", "Ġ"), (":Ġ", "A")], bos=False, use_regex=False)
    with pytest.raises(ValueError, match="no token of its own for ' A'"):
        Scorer(llama, whole, CPU)(make_requests())
    large = byte_tokenizer([(a, b) for a in "abcdefgh" for b in "ABCDEFGH"] + [("Ġ", "A")], bos=False)
    with pytest.raises(ValueError, match=f"token 321, the model knows {VOCAB}"):
        Scorer(llama, large, CPU)(make_requests())
    with pytest.raises(ValueError, match="--max_length 1: an answer alone is 2 tokens"):
        Scorer(llama, TOKENIZERS["two tokens each"](), CPU, max_length=1)(make_requests())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
def test_a_shared_prefix_serves_batch_after_batch(kind):
    model = tiny_model(kind, VOCAB)
    ids = torch.randint(0, VOCAB, (7, 19), generator=torch.Generator().manual_seed(3))
    ids[:, :11] = ids[:1, :11]
    prefix = model(ids[:1, :11], use_cache=True).past_key_values
    whole = model(ids, use_cache=False).logits[:, 11:]
    for rows in (slice(0, 7), slice(2, 3), slice(0, 4)):
        cache = SharedPrefix(prefix, len(ids[rows]))
        shared = model(ids[rows, 11:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(shared, whole[rows], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == prefix.get_seq_length() == 11
