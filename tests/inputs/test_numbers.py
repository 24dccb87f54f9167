"""Every option that takes a number, of training and of evaluation: it has a least and a largest value, both of which
are accepted, and everything else is one line with the flag. The options are found in the dataclasses, so a new one is
tried too.
"""

import dataclasses
import functools
import math
import typing

import pytest

from arguments import EvalArguments, TrainArguments, parse_eval_args, parse_train_args
from inputs.options import kind_of, make_parser, options_of

PARSE = {TrainArguments: parse_train_args, EvalArguments: parse_eval_args}
NUMBERS = [
    (cls, name, kind_of(typing.get_type_hints(cls)[name])[0])
    for cls in PARSE
    for name in options_of(cls)
    if kind_of(typing.get_type_hints(cls)[name])[0] in (int, float)
    and not kind_of(typing.get_type_hints(cls)[name])[1]  # which says itself what is accepted
]
NONE_AT_ALL = ("layers",)  # any negative index means that there is none
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "9" * 30, "-" + "9" * 30, "9" * 400, "9" * 5000, "", " ", "two", "0x10"]
NO_NUMBERS += ["1,5", "1 2", "١٢", "²", "--5", "1__0", "True", "None", "1e-5j"]
each_number = pytest.mark.parametrize(("cls", "name", "kind"), NUMBERS)


@functools.cache
def prepared(cls):
    """Returns the parser of a class and its options without any on the command line. Both are made once."""
    return make_parser(cls, "", {}), PARSE[cls]([])


def lines_about(cls, name, text):
    """Returns what is wrong with an option that has this text, line by line; what is wrong with others only because of
    it is left out. Nothing but a ValueError may come.
    """
    parser, args = prepared(cls)
    try:
        values = vars(parser.parse_args([f"--{name}={text}"]))
        lines = dataclasses.replace(args, **values).problems()
    except ValueError as error:
        lines = [str(error)]
    assert all("\n" not in line and len(line) < 300 for line in lines)
    return [line for line in lines if line.startswith((f"--{name} ", f"argument --{name}:"))]


def beyond(kind, bound, side):
    """Returns the number next to a bound. side: -1 below, 1 above."""
    return bound + side if kind is int else math.nextafter(bound, side * math.inf)


@each_number
def test_every_number_has_bounds_that_are_documented(cls, name, kind):
    about = options_of(cls)[name]
    assert about.most is not None
    assert about.least is not None or about.above is not None or name in NONE_AT_ALL
    assert about.expected is not None or f"at most {about.most:_}" in about.bounds
    if kind is int and about.least is not None:
        assert isinstance(about.least, int) and isinstance(about.most, int)


@each_number
def test_the_bounds_are_accepted_and_nothing_beyond(cls, name, kind):
    about = options_of(cls)[name]
    for bound in filter(lambda bound: bound is not None, (about.least, about.most)):
        refused = [line for line in lines_about(cls, name, bound) if about.bounds in line]
        assert refused == []
    outside = [beyond(kind, about.most, 1), 10 * about.most]
    if about.least is not None:
        outside += [beyond(kind, about.least, -1), about.least - 10**6]
    if about.above is not None:
        outside += [about.above, about.above - 1]
    for value in outside:
        (line,) = [line for line in lines_about(cls, name, value) if about.bounds in line]
        assert f"--{name} {kind(value)}: expected {about.bounds}" in line


@each_number
def test_no_other_text_is_a_number(cls, name, kind):
    for text in NO_NUMBERS:
        if name not in NONE_AT_ALL or not text.startswith("-9"):
            assert any("expected" in line for line in lines_about(cls, name, text)), text


@pytest.mark.parametrize(
    ("text", "value"), [("1024", 1024), ("1_024", 1024), (" 7 ", 7), ("+7", 7), ("007", 7), ("10_0_00", 10_000)]
)
def test_what_a_whole_number_may_look_like(text, value):
    assert parse_train_args([f"--batch_size={text}"]).batch_size == value
    assert parse_eval_args([f"--batch_size={text}"]).batch_size == value


@pytest.mark.parametrize("text", ["1e3", "1.0", "1.", "0b1"])
def test_a_whole_number_has_no_exponent_and_no_point(text):
    for cls in PARSE:
        (line,) = lines_about(cls, "batch_size", text)
        assert f"'{text}': expected a whole number" in line


@pytest.mark.parametrize(("text", "value"), [("-0", 0.0), ("-0.0", 0.0), ("1e-5", 1e-5), (".5", 0.5), ("1e-400", 0.0)])
def test_what_a_number_may_look_like(text, value):
    assert parse_train_args([f"--kl_weight={text}"]).kl_weight == value


def test_of_an_option_given_twice_the_last_counts():
    args = parse_train_args(["--batch_size", "2", "--layers", "1", "--batch_size", "3", "--layers", "2", "5"])
    assert (args.batch_size, args.layers) == (3, [2, 5])


def test_minus_zero_is_the_first_layer():
    assert parse_train_args(["--layers", "-0"]).layers == [0]
