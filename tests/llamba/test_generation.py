"""Generation with the hybrid's cache equals full forwards, token for token: greedy, beams, sampling, prompts in pieces,
conversations, left padding, bfloat16; for a pure Llamba, a hybrid and attention layers alone. And the cache's memory.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, pipeline

from llamba import LlambaCache, LlambaForCausalLM
from llamba.cache import RecurrentLayer
from model_utils import apply_replacements
from tests.tiny import tiny_student, tiny_teacher, tokens

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LAYERS = {"pure": [], "hybrid": [1, 3], "attention": [0, 1, 2, 3], "heads": [3]}
HEADS = {"heads": {0: [1], 1: [0, 2, 3]}}  # beside whole layers; of layer 1 two share a key/value head
CHUNK = 8  # of the tiny models' scan
DECODING = {  # length of the prompt, options
    "one token": (1, {}),
    "greedy": (5 * CHUNK, {}),
    "beam": (9, {"num_beams": 3}),
    "several beams": (1, {"num_beams": 3, "num_return_sequences": 2}),
    "sampling": (5 * CHUNK, {"do_sample": True, "temperature": 0.7}),
    "several samples": (9, {"do_sample": True, "num_return_sequences": 3}),
}


def make(layers, heads=None, **changes):
    """Returns a model whose attention is as strong as its mixers: initial weights would hardly depend on positions."""
    student, teacher = tiny_student(**changes), tiny_teacher(**changes)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    apply_replacements(student, teacher, layers, heads)
    return student


@pytest.fixture(scope="module")
def models():
    return {name: make(layers, HEADS.get(name)) for name, layers in LAYERS.items()}


@pytest.fixture(params=LAYERS)
def model(models, request):
    return models[request.param]


@pytest.fixture
def hybrid(models):
    return models["hybrid"]


def generate(model, ids, mask=None, **options):
    """Generates with a mask always: `generate()` would guess one where a prompt holds the padding token."""
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **settings)


def left_padded(*prompts):
    """Returns prompts (1, L) of different lengths as a batch, padded on the left with a token in use, and its mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    rows = [torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0), value=7) for prompt in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts]
    return torch.cat(rows), torch.cat(masks)


def root_mean_square(difference):
    return difference.square().mean().sqrt()


# --- with the cache and without ------------------------------------------------------------------------------


@torch.no_grad()
def test_prefill_in_pieces_and_single_steps_equal_one_forward(model):
    ids = tokens()
    expected = model(ids, use_cache=False).logits
    cache, logits = LlambaCache(model.config), []
    for start, end in [(0, 3), (3, 4), (4, 13), (13, 20), (20, 21)]:
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == end
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)


@pytest.mark.parametrize("length,options", DECODING.values(), ids=DECODING)
def test_generate_with_cache_equals_without(model, length, options):
    ids = tokens(2, length)
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (2 * options.get("num_return_sequences", 1), length + 12)


def test_what_is_generated_is_the_likeliest_of_a_full_forward(model):
    generated = generate(model, tokens(2, 9))
    with torch.no_grad():
        likeliest = model(generated, use_cache=False).logits.argmax(-1)
    assert torch.equal(generated[:, 9:], likeliest[:, 8:-1])


@pytest.mark.parametrize("piece", [1, 7, CHUNK, 64])
def test_a_long_prompt_in_pieces(model, piece):
    ids, mask = left_padded(tokens(1, 5, seed=5), tokens(1, 4 * CHUNK + 1, seed=6))
    assert torch.equal(generate(model, ids, mask, prefill_chunk_size=piece), generate(model, ids, mask))


def test_a_conversation_continues_from_its_cache(model):
    ids, mask = left_padded(tokens(1, 6, seed=5), tokens(1, 11, seed=6))
    first = generate(model, ids, mask, return_dict_in_generate=True)
    asked = torch.cat([first.sequences, tokens(2, 5, seed=4)], 1)
    mask = torch.cat([mask, torch.ones_like(asked[:, mask.shape[1] :])], 1)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    again = generate(model, asked, mask, past_key_values=first.past_key_values)
    assert torch.equal(again, generate(model, asked, mask, use_cache=False))


def test_prompts_given_as_embeddings(model):
    ids = tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(generated, generate(model, ids)[:, 9:])


def test_a_row_that_ends_early_leaves_the_others_alone(hybrid):
    ids = tokens(3, 9)
    alone = [generate(hybrid, row[None])[0] for row in ids]
    end = int(alone[0][11])  # the third token of the first row
    batched = generate(hybrid, ids, eos_token_id=end)
    for row, whole in zip(batched, alone, strict=True):
        ends = (whole[9:] == end).nonzero()
        n_kept = 9 + (int(ends[0]) + 1 if len(ends) else 12)
        assert torch.equal(row[:n_kept], whole[:n_kept])
        assert (row[n_kept:] == 0).all()


@torch.no_grad()
def test_bfloat16_with_the_cache_is_as_exact_as_without(model):
    """Compares both with float32: how far they differ from one another depends on the processor's kernels."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    generated = generate(half, tokens(2, 13), max_new_tokens=20)
    full = half(generated, use_cache=False).logits.float()
    cache = LlambaCache(half.config)
    pieces = [generated[:, :13], *generated[:, 13:].split(1, dim=1)]
    cached = torch.cat([half(piece, past_key_values=cache).logits for piece in pieces], 1).float()
    exact = half.float()(generated, use_cache=False).logits
    assert root_mean_square(cached - exact) < 1.5 * root_mean_square(full - exact)
    states = [layer.ssm_state for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    assert all(state.dtype == torch.float32 for state in states)

    best, second = full[:, 12:-1].topk(2).values.unbind(-1)
    is_clear = best - second > 2 * (cached - full).abs().max()
    assert is_clear.float().mean() > 0.5
    assert torch.equal(generated[:, 13:][is_clear], full[:, 12:-1].argmax(-1)[is_clear])


# --- padding -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_left_padding_leaves_no_trace_in_a_full_forward(model):
    short, long = tokens(1, 6, seed=5), tokens(1, 30, seed=6)
    logits = model(*left_padded(short, long), use_cache=False).logits
    torch.testing.assert_close(logits[:1, 24:], model(short).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:], model(long).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_left_padding_leaves_no_trace_with_eager_attention(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path)
    eager = LlambaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert eager.backbone.layers[1].self_attn.config._attn_implementation == "eager"
    short, long = tokens(1, 6, seed=5), tokens(1, 30, seed=6)
    logits = eager(*left_padded(short, long)).logits
    torch.testing.assert_close(logits[:1, 24:], hybrid(short).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_left_padding_leaves_no_trace_token_by_token(model):
    short = tokens(1, 6, seed=5)
    ids, mask = left_padded(short, tokens(1, 9, seed=6))
    cache = LlambaCache(model.config)
    for end in range(1, 10):
        logits = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache).logits
    torch.testing.assert_close(logits[0, 0], model(short).logits[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beam", "no cache"])
def test_left_padded_prompts_generate_what_they_do_alone(model, options):
    prompts = [tokens(1, length, seed=length) for length in (1, 6, 3 * CHUNK)]
    batched = generate(model, *left_padded(*prompts), **options)[:, 3 * CHUNK :]
    for row, prompt in zip(batched, prompts, strict=True):
        assert torch.equal(row, generate(model, prompt, **options)[0, prompt.shape[1] :])


def test_positions_count_from_the_first_token_that_is_not_padding(hybrid):
    seen = []
    hook = hybrid.backbone.rotary_emb.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    generate(hybrid, *left_padded(tokens(1, 2), tokens(1, 4)), max_new_tokens=3)
    hybrid(*left_padded(tokens(1, 2), tokens(1, 4)))
    hybrid(tokens(1, 3))
    hook.remove()
    padded = [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert [positions.tolist() for positions in seen] == [padded, [[2], [4]], [[3], [5]], padded, [[0, 1, 2]]]


def test_positions_may_be_given(hybrid):
    ids = tokens(1, 9)
    far = torch.arange(100, 109)[None]
    assert torch.equal(generate(hybrid, ids, position_ids=far), generate(hybrid, ids))  # only distances count
    stretched = torch.arange(0, 90, 10)[None]
    with torch.no_grad():
        assert (hybrid(ids, position_ids=stretched).logits - hybrid(ids).logits).abs().max() > 1e-2


@torch.no_grad()
def test_right_padding_leaves_the_recurrent_states_alone():
    model, ids = tiny_student(), tokens(1, 9)
    cache = model(ids, use_cache=True).past_key_values
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 9:] = 0
    padded = model(torch.cat([ids, tokens(1, 3, seed=8)], 1), attention_mask=mask, use_cache=True).past_key_values
    for plain, with_padding in zip(cache.layers, padded.layers, strict=True):
        torch.testing.assert_close(with_padding.ssm_state, plain.ssm_state)


@torch.no_grad()
def test_a_mask_must_cover_the_cache_too(model):
    cache = model(tokens(2, 5)).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\); expected \(2, 8\)"):
        model(tokens(2, 3), attention_mask=torch.ones(2, 3, dtype=torch.long), past_key_values=cache)


# --- the cache -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cache_is_copied_expanded_and_never_cut(hybrid):
    ids = tokens(2, 10)
    cache = hybrid(ids, use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    first = hybrid(tokens(2, 3, seed=9), past_key_values=cache).logits
    again = hybrid(tokens(2, 3, seed=9), past_key_values=copy.deepcopy(kept)).logits
    assert torch.equal(first, again)  # the copy did not move with the original
    kept.batch_repeat_interleave(2)
    repeated = hybrid(tokens(2, 3, seed=9).repeat_interleave(2, 0), past_key_values=kept).logits
    torch.testing.assert_close(repeated, first.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="cannot be cut back"):
        kept.layers[0].crop(-1)


@torch.no_grad()
def test_a_cache_that_is_reset_is_as_new(model):
    cache = model(tokens(2, 10), use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(tokens(2, 3, seed=9), past_key_values=cache).logits
    new = model(tokens(2, 3, seed=9), past_key_values=LlambaCache(model.config)).logits
    assert torch.equal(again, new)


def test_a_cache_of_another_kind_is_refused(models):
    for cache in (
        DynamicCache(),
        DynamicCache(config=models["hybrid"].config),
        LlambaCache(models["pure"].config),
        LlambaCache(models["attention"].config),
    ):
        with pytest.raises(
            ValueError, match=rf"past_key_values is a {type(cache).__name__}.*LlambaCache\(model.config"
        ):
            models["hybrid"](tokens(), past_key_values=cache)


def test_what_a_state_cannot_do_is_refused(hybrid):
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(hybrid, tokens(1, 9), prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_recurrent_layers_keep_their_size_and_attention_layers_grow(hybrid):
    """Counts bytes of storage: a view of a larger tensor keeps all of it."""

    def held(batch, length):
        recurrent, attention, *_ = hybrid(tokens(batch, length), use_cache=True).past_key_values.layers
        pairs = (recurrent.conv_state, recurrent.ssm_state), (attention.keys, attention.values)
        return [sum(tensor.untyped_storage().nbytes() for tensor in pair) for pair in pairs]

    for batch in (1, 2):
        for length in (8, 64, 512):
            # The last 4 inputs of the convolution's 64 channels, and the 4 heads' states of 8 x 8, in float32; keys and
            # values of 2 heads of 8 for each token.
            assert held(batch, length) == [batch * 4 * (64 * 4 + 4 * 8 * 8), batch * 4 * 2 * 2 * 8 * length]


# --- pipelines -----------------------------------------------------------------------------------------------


def test_pipeline(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the pipeline would set it for other tests too
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "presets" / "tiny" / "teacher")
    tokenizer.padding_side = "left"
    model = make([1, 3], vocab_size=1024)
    write = pipeline("text-generation", model, tokenizer=tokenizer)
    prompts = ["A cat", "Where is the brown bear that I saw yesterday?"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    batched = [answer["generated_text"] for (answer,) in write(prompts, batch_size=2, **options)]
    assert batched == [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    assert batched[0] == tokenizer.decode(generate(model, ids, max_new_tokens=8)[0, ids.shape[1] :])
