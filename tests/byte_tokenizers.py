"""Byte-level tokenizers: some that encode an answer's letter in a known way, and some with the special tokens of
published ones.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(merges: list[tuple[str, str]], bos: bool, use_regex: bool = True):
    """Returns a byte-level BPE with these merges only ("Ġ" stands for the space), so the tokens of " A" are known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", *alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")


LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # of SmolLM2 and Qwen2.5


def tokenizer_of(special: list[str], template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes with these special tokens, whose ids follow the bytes'. template: of chats; named:
    which token is which, such as `eos_token`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "one token each": lambda: byte_tokenizer([("Ġ", letter) for letter in "ABCD"], bos=True),
    "two tokens each": lambda: byte_tokenizer([], bos=True),
    "one token for A and B, two for C and D": lambda: byte_tokenizer([("Ġ", "A"), ("Ġ", "B")], bos=False),
    # Here the prompt's last token changes when a continuation follows it.
    "merges across the boundary": lambda: byte_tokenizer([(":", "Ġ")], bos=True, use_regex=False),
}
