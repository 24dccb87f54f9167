"""What the text of an option means: the types that argparse gets. Each raises ArgumentTypeError with the text and what
was expected. The type of a path is `paths.expanded`.
"""

from __future__ import annotations  # doctor.py reports a Python that is too old

import argparse

SHOWN = 60  # characters of a wrong value that an error repeats


def whole_number(text: str) -> int:
    """Returns the whole number that a text is, in plain digits; underscores may group them."""
    try:
        return int(_plain(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.{SHOWN}}: expected a whole number, such as 1000") from error


def number(text: str) -> float:
    """Returns the number that a text is, such as 1e-5."""
    try:
        return float(_plain(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.{SHOWN}}: expected a number, such as 0.5 or 1e-5") from error


def auto_or_int(text: str) -> int | None:
    """Returns None for "auto", else the whole number that `text` is."""
    try:
        return None if text == "auto" else whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.{SHOWN}}: expected a whole number, or auto") from error


class AutoLayers(int):
    """Says that so many layers are chosen by measurement: "auto:4"."""

    def __str__(self) -> str:
        return f"auto:{int(self)}"

    __repr__ = __str__


def layer_or_auto(text: str) -> int:
    """Returns the index of a layer, or the number in a text such as "auto:4" as AutoLayers."""
    is_auto = text.startswith("auto:")
    try:
        return AutoLayers(whole_number(text.removeprefix("auto:"))) if is_auto else whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r:.{SHOWN}}: expected the index of a layer, such as 14, or how many to choose, such as auto:4"
        ) from error


def some_text(text: str) -> str:
    """Returns a text that is not blank, and has no zero byte."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected some text; give it, or leave the option out")
    return text


def _plain(text: str) -> str:
    """Returns the text. Raises ValueError where Python would accept more than a user means: digits of other scripts,
    and more digits than any option needs.
    """
    if not text.isascii() or len(text) > SHOWN:
        raise ValueError(text)
    return text
