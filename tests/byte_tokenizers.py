"""Byte-level tokenizers that encode an answer's letter in a known way."""

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


TOKENIZERS = {
    "one token each": lambda: byte_tokenizer([("Ġ", letter) for letter in "ABCD"], bos=True),
    "two tokens each": lambda: byte_tokenizer([], bos=True),
    "one token for A and B, two for C and D": lambda: byte_tokenizer([("Ġ", "A"), ("Ġ", "B")], bos=False),
    # Here the prompt's last token changes when a continuation follows it.
    "merges across the boundary": lambda: byte_tokenizer([(":", "Ġ")], bos=True, use_regex=False),
}
