"""The tokenizer of a Llama, made of what a GGUF file holds of it: tokens, merges, special tokens, and by name how text
is split before the merges. transformers reads such files too, but splits text as GPT-2 does where it does not know the
name, and then the model gets other tokens than it was trained on; here an unknown name is an error.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
OF_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # they begin with BOS, and whole tokens come before merges
BY_DIGITS = ("smollm", "starcoder")
AS_GPT_2 = ("gpt-2",)


def make_tokenizer(file: Path, values: dict[str, Any], config: LlamaConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer. Raises ValueError if the file has none, or one that cannot be made of it."""
    tokens: list[str] = values.get("tokenizer.ggml.tokens") or []
    kind = values.get("tokenizer.ggml.model")
    if not tokens or kind in (None, "none", "no_vocab"):
        raise ValueError("the file has no tokenizer")
    if len(tokens) > config.vocab_size:
        raise ValueError(f"it has {len(tokens)} tokens, and the model's embedding {config.vocab_size} rows")
    if len(set(tokens)) != len(tokens):
        raise ValueError("it has the same token twice")
    special = special_tokens(values, tokens)
    if kind == "gpt2":
        made = PreTrainedTokenizerFast(tokenizer_object=byte_level(values, tokens, special), **special)
    elif kind == "llama":  # SentencePiece
        made = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    else:
        raise ValueError(f"it is of kind {kind!r}; expected gpt2 (byte-level BPE) or llama (SentencePiece)")
    made.model_max_length = config.max_position_embeddings
    made.chat_template = values.get("tokenizer.chat_template")
    check_ids(made, tokens, special)
    return made


def special_tokens(values: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """Returns bos_token, eos_token and so on, as far as the file names them. Raises ValueError for an id that is none
    of a token.
    """
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for name, key in names.items():
        index = values.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise ValueError(f"tokenizer.ggml.{key}_token_id is {index}, and there are {len(tokens)} tokens")
        found[name] = tokens[index]
    return found


def byte_level(values: dict[str, Any], tokens: list[str], special: dict[str, str]) -> Tokenizer:
    """Returns a byte-level BPE. Raises ValueError if it is not known how text is split before the merges."""
    pre = values.get("tokenizer.ggml.pre")
    if pre not in (*OF_LLAMA_3, *BY_DIGITS, *AS_GPT_2):
        known = ", ".join((*OF_LLAMA_3, *BY_DIGITS, *AS_GPT_2))
        raise ValueError(f"how it splits text is not known (tokenizer.ggml.pre is {pre!r}; expected one of {known})")
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("tokenizer.ggml.merges", ())]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=pre in OF_LLAMA_3))
    tokenizer.pre_tokenizer = splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    types = values.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    marked = {token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL} | set(special.values())
    whole = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens if t in marked])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in whole if t not in marked])
    if values.get("tokenizer.ggml.add_bos_token", pre in OF_LLAMA_3) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    """Returns what splits text before the merges."""
    if pre in OF_LLAMA_3:
        words = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    as_gpt_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in BY_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt_2])
    return as_gpt_2


def check_ids(made: PreTrainedTokenizerBase, tokens: list[str], special: dict[str, str]) -> None:
    """Raises ValueError unless every token has the id that it has in the file, and special tokens stay whole."""
    vocab = made.get_vocab()
    moved = [token for index, token in enumerate(tokens) if vocab.get(token) != index]
    if moved or len(vocab) != len(tokens):
        raise ValueError(f"{len(moved)} tokens, such as {moved[:1]}, would have other ids than in the file")
    for name, token in special.items():
        if getattr(made, name) != token or made.encode(token, add_special_tokens=False) != [vocab[token]]:
            raise ValueError(f"its {name} {token!r} would not stay whole")
