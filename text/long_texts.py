"""Long texts to token ids piece by piece: the ids of the whole text, with the memory of a few pieces, on all cores.

A tokenizer needs some hundred bytes for each character that it holds, and one core for each text. A long text is
therefore cut into pieces, which are tokenised as a batch. Every cut is verified for the tokenizer at hand:

1. `_cut_behind_word`: a cut stands behind a letter or digit and before something else, where tokenizers split words
   anyway. The text around it must give the same ids whole as in two parts. A piece begins with the character before
   its cut, whose ids are dropped: what a tokenizer adds at the start of a text is not added within it.
2. `_cut_inside_word`: a run of letters, digits or signs that is longer than a piece has no such place. A byte-pair
   tokenizer merges neighbours only, so a cut between two of its tokens is exact where both sides end in these tokens.
3. When the pieces are tokenised, the ids on both sides of a cut must be those that the check of the cut found, or the
   two pieces are joined. For byte pairs without words (as in Llama 2) this proves the ids: tokens of which each pair of
   neighbours is one that the tokenizer makes of its text are the tokens of the whole text.

Where no cut can be verified, the piece grows, up to the whole text. The ids are those of the whole text if the
tokenizer's normalizer, and the bounds of its words, depend on at most CONTEXT characters on each side of a place.
"""

import itertools
import logging
import re
import time
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import tokenizers

logger = logging.getLogger("train")

PIECE = 1 << 16  # characters
AT_ONCE = 32  # pieces in a batch for the tokenizer
CONTEXT = 258  # characters on each side of a cut that is verified; a prime + 1, to find words that depend on counting
TRIES = 8  # places to cut, of each kind, before the piece grows
LARGE_PIECE = 1 << 22  # characters that are worth a warning: some hundred megabytes
JOINED = 4  # times a text's length: more is not tokenised again in joined pieces, but the whole text
PROGRESS_S = 10.0

TokenLists = Callable[[list[str]], Iterable[list[int]]]

# Each finds the last place before the end of the search: words and blanks, words and signs, letters and digits.
BEHIND_WORDS = [re.compile(rf".*{pair}", re.DOTALL) for pair in (r"[^\W_]\s", r"[^\W_]\W", r"[^\W\d_]\d")]


class Token(NamedTuple):
    """Holds what the check of a cut looks at."""

    id: int
    starts_word: bool
    begin: int  # in the text, in characters


@dataclass(frozen=True)
class Cut:
    """Marks a place to cut a text, with the ids that must stand on its two sides."""

    at: int
    before: int
    after: int
    head: tuple[int, ...]  # of the character before it, with which the piece begins; () if it begins at the cut


class LongTexts:
    """Tokenises one long text at a time. `token_lists` encodes whole texts; `backend`, if there is one, is the Rust
    tokenizer that it calls.
    """

    def __init__(self, token_lists: TokenLists, backend: tokenizers.Tokenizer | None):
        self._token_lists, self._backend = token_lists, backend
        self._merges_neighbours = (
            backend is not None and isinstance(backend.model, tokenizers.models.BPE) and not backend.model.dropout
        )

    def ids(self, text: str) -> array:
        """Returns the ids of the whole text, as unsigned integers of 4 bytes. Logs how far it is, every 10 seconds."""
        logged = time.monotonic()
        flat = array("I")
        pieces: list[tuple[Cut | None, int]] = []  # where each begins, in the text and in `flat`
        joined = 0  # characters
        for start, end, ids in self._pieces(text):
            while (behind := _behind_cut(ids, flat[-1] if flat else -1, start)) is None:
                start, first = pieces.pop()  # join the piece with the one before it
                del flat[first:]
                joined += end - _begin(start)
                if joined > JOINED * len(text):
                    return array("I", self._one(text))
                ids = self._one(text[_begin(start) : end])
            pieces.append((start, len(flat)))
            flat.extend(behind)
            if time.monotonic() - logged >= PROGRESS_S and end < len(text):
                logged = time.monotonic()
                logger.info("tokenising a document of %d characters: %.0f%%", len(text), 100 * end / len(text))
        return flat

    def _one(self, text: str) -> list[int]:
        if len(text) >= LARGE_PIECE:
            _warn_of_size(len(text))
        return next(iter(self._token_lists([text])))

    def _pieces(self, text: str) -> Iterator[tuple[Cut | None, int, list[int]]]:
        """Yields where each piece begins and ends in the text, and its ids."""
        cuts = self._cuts(text)
        cut: Cut | None = None
        while some := list(itertools.islice(cuts, AT_ONCE)):
            starts = [cut, *some[:-1]]
            ends = [len(text) if end is None else end.at for end in some]
            pieces = [text[_begin(start) : end] for start, end in zip(starts, ends, strict=True)]
            yield from zip(starts, ends, self._token_lists(pieces), strict=True)
            cut = some[-1]

    def _cuts(self, text: str) -> Iterator[Cut | None]:
        """Yields where each piece ends; None is the end of the text."""
        start, size = 0, PIECE
        while start < len(text):
            is_last = start + size >= len(text)
            cut = None if is_last else self._cut(text, start, start + size)
            if cut is None and not is_last:
                size *= 2
                continue
            end = len(text) if cut is None else cut.at
            if end - start >= LARGE_PIECE:
                _warn_of_size(end - start)
            yield cut
            start, size = end, PIECE

    def _cut(self, text: str, start: int, end: int) -> Cut | None:
        if self._backend is None:  # a tokenizer in Python, which does not say what its words are
            return None
        for pattern in BEHIND_WORDS:
            # The first half of a piece that grows was looked at before.
            first, last = (start + 1 if end - start == PIECE else (start + end) // 2), end
            for _ in range(TRIES):
                if (found := pattern.match(text, first, last)) is None:
                    break
                last = found.end() - 1
                if cut := self._cut_behind_word(text, last):
                    return cut
        return self._cut_inside_word(text, start, end) if self._merges_neighbours else None

    def _cut_behind_word(self, text: str, at: int) -> Cut | None:
        left, right = text[max(at - CONTEXT, 0) : at], text[at : at + CONTEXT]
        before, head, after = self._tokens(left), self._tokens(left[-1]), self._tokens(left[-1] + right)
        behind = after[len(head) :]
        whole = self._tokens(left + right)
        if after[: len(head)] != head or not _are_halves(whole, before, behind):
            return None
        if not self._merges_neighbours and not whole[len(before)].starts_word:
            return None
        return Cut(at, before[-1].id, behind[0].id, tuple(token.id for token in head))

    def _cut_inside_word(self, text: str, start: int, end: int) -> Cut | None:
        """Returns a cut between two tokens of text[start:end], or None if it is not certain that more text behind the
        end leaves the words around the cut as they are.
        """
        first = end - 2 * CONTEXT
        if first - CONTEXT < start or not _is_one_run(text[first - CONTEXT : end]):
            return None
        tokens = self._tokens(text[start:end])
        places = [i for i, token in enumerate(tokens) if first <= start + token.begin <= end - CONTEXT]
        # A character may be several tokens.
        places = [i for i in places if tokens[i].begin > tokens[i - 1].begin]
        if not places:
            return None
        i = next((i for i in places if tokens[i].starts_word), places[0])  # words of three digits, say
        at = start + tokens[i].begin
        # Blanks are one word with those behind them if a line ends there, however far that is.
        if text[at].isspace() and (text[start] != text[at] or any(token.starts_word for token in tokens[1 : i + 1])):
            return None
        if not _are_halves(tokens, self._tokens(text[start:at]), self._tokens(text[at:end])):
            return None
        return Cut(at, tokens[i - 1].id, tokens[i].id, ())

    def _tokens(self, text: str) -> list[Token]:
        assert self._backend is not None
        encoding = self._backend.encode(text, add_special_tokens=False)
        words = encoding.word_ids
        starts_word = [word != previous for word, previous in zip(words, [None, *words], strict=False)]
        return list(map(Token, encoding.ids, starts_word, [begin for begin, _ in encoding.offsets]))


def _are_halves(whole: list[Token], left: list[Token], right: list[Token]) -> bool:
    """Returns whether a text in two parts has the tokens of the whole, and between them the same words, which may
    depend on more text than its tokens do.
    """
    if not left or not right or len(whole) != len(left) + len(right):
        return False
    same_ids = all(token.id == part.id for token, part in zip(whole, [*left, *right], strict=True))
    words, in_left, in_right = ([token.starts_word for token in tokens[1:]] for tokens in (whole, left, right))
    return same_ids and words[: len(left) - 1] == in_left and words[len(left) :] == in_right


def _begin(cut: Cut | None) -> int:
    """Returns where the piece behind a cut begins."""
    return 0 if cut is None else cut.at - bool(cut.head)


def _behind_cut(ids: list[int], last: int, cut: Cut | None) -> list[int] | None:
    """Returns a piece's ids without those of the character before its cut, or None if the ids at its edge are not those
    that the cut was verified with.
    """
    if cut is None:
        return ids
    behind = ids[len(cut.head) :]
    is_verified = last == cut.before and tuple(ids[: len(cut.head)]) == cut.head and behind[:1] == [cut.after]
    return behind if is_verified else None


def _is_one_run(text: str) -> bool:
    """Returns whether all characters are letters, all digits, all signs, or all the same one, and none combines with
    its neighbours.
    """
    kinds = {_kind(character) for character in set(text)}
    return len(kinds) == 1 and not any(unicodedata.combining(character) for character in set(text))


def _kind(character: str) -> str:
    if character.isspace():
        return character
    return "letter" if character.isalpha() else "digit" if character.isnumeric() else "sign"


def _warn_of_size(characters: int) -> None:
    logger.warning(
        "%d characters of a document are tokenised at once: nowhere in them can the tokenizer's words be "
        "distinguished for certain. This takes one core and about %d MB; shorter documents take less",
        characters,
        characters // 10_000,
    )
