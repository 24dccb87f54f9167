"""Which token ends a document. It has to be one that the teacher saw there in pretraining: after another, what follows
surprises it, and that is what the student would learn.

A base model's eos is that token. A chat model's eos often ends a turn instead, and the token of pretraining is another
one of its vocabulary: SmolLM2-Instruct has `<|im_end|>` and `<|endoftext|>`, Llama-3 Instruct `<|eot_id|>` and
`<|end_of_text|>`.
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

AUTO = "auto"
# Tokens that end documents in pretraining; of several that a vocabulary has, the first counts.
OF_PRETRAINING = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>", "<eos>")
# Tokens that end a turn of a chat, and are an eos of published models.
OF_TURNS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<|end_of_turn|>", "<|end|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|endofturn|>", "<|im_sep|>", "<|return|>"),
)


class Separator(NamedTuple):
    """Names the token that ends each document, and says why it is this one."""

    token: str
    id: int
    why: str

    def __str__(self) -> str:
        return f"{self.token!r} ({self.id})"


def choose_separator(option: str, tokenizer: PreTrainedTokenizerBase) -> Separator:
    """Returns the token that --document_separator names, or what "auto" stands for. Raises ValueError if the tokenizer
    does not have it.
    """
    if option != AUTO:
        return Separator(option, _id_of(option, tokenizer), "by --document_separator")
    eos = tokenizer.eos_token
    if eos is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, expected one to stand between documents; "
            "set it in its tokenizer_config.json, or name a token with --document_separator"
        )
    own, of_pretraining = Separator(eos, tokenizer.eos_token_id, "the eos_token"), pretraining_separators(tokenizer)
    if eos in OF_PRETRAINING or not of_pretraining:
        return own
    if (evidence := _ends_a_turn(tokenizer)) is None:
        return own._replace(why="the eos_token, of which nothing says that it ends a turn of a chat")
    return Separator(*of_pretraining[0], f"it ended documents in pretraining; the eos_token {evidence}")


def pretraining_separators(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """Returns token and id of those that end documents in pretraining."""
    special = special_tokens(tokenizer)
    return [(token, special[token]) for token in OF_PRETRAINING if token in special]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the tokens, with their ids, that no text has: others are how the tokenizer spells a text."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _ends_a_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns what says that the eos ends a turn of a chat, or None. A chat template is only searched: it is a program,
    and may come from anyone.
    """
    eos = tokenizer.eos_token
    if eos in OF_TURNS:
        return f"{eos!r} ends a turn of a chat"
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template or ""]
    if any(eos in text or "eos_token" in text for text in templates):
        return f"{eos!r} ends a turn of its chat template"
    return None


def _id_of(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of a special token. Raises ValueError if the tokenizer has no such token."""
    special = special_tokens(tokenizer)
    if token in special:
        return special[token]
    likely = dict.fromkeys([name for name in (*OF_PRETRAINING, tokenizer.eos_token) if name in special])
    raise ValueError(
        f"--document_separator {token!r:.80}: not a special token of the tokenizer {tokenizer.name_or_path!r}; "
        f"expected auto, or {' or '.join(map(repr, likely)) or 'one that it has'}"
    )
