"""Files of options that hold something else: each is one short line, whatever its size or depth. A pipe is read."""

import os
import threading

import pytest

from inputs.option_files import DEEPEST, MOST_BYTES, read_config_file
from tests.parsing import eval_error, eval_options, train_error, train_options

LEVELS = 40  # of aliases: two to the power of this many values
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, LEVELS))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, LEVELS))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param("a: " + "[" * 2000 + "]" * 2000, f"nested more than {DEEPEST} deep", id="nested"),
        pytest.param("[" * 2000, f"nested more than {DEEPEST} deep", id="nested and not closed"),
        pytest.param("\n".join(" " * n + "a:" for n in range(900)), f"nested more than {DEEPEST} deep", id="mappings"),
        pytest.param("- " * 2000, f"nested more than {DEEPEST} deep", id="block lists"),
        pytest.param("? " * 2000, f"nested more than {DEEPEST} deep", id="keys"),
        pytest.param(BOMB, "*a0 stands for a list or a mapping; write it out", id="aliases"),
        pytest.param(MERGES, "*a0 stands for a list or a mapping", id="merges"),
        pytest.param("a: &a [*a]", "*a stands for a list or a mapping", id="itself"),
        pytest.param("#" * (MOST_BYTES + 1), f"has more than {MOST_BYTES:,} bytes", id="huge"),
        pytest.param(b"\x7fELF\x02\x01\x00\xff", "cannot be read", id="binary"),
        pytest.param(b"\x80\x04\x95", "cannot be read", id="not UTF-8"),
        pytest.param("a: \x00", "cannot be read", id="zero byte"),
        pytest.param("seed: !!python/object/apply:os.system [ls]", "could not determine a constructor", id="code"),
        pytest.param("seed: 1\n---\nseed: 2", "expected a single document", id="two documents"),
        pytest.param("false", "expected lines such as `seq_length: 1024`, found False", id="false"),
        pytest.param("[]", "expected lines such as `seq_length: 1024`, found []", id="empty list"),
        pytest.param("x" * 10_000, "expected lines such as", id="a long text"),
        pytest.param("? " + "x" * 10_000 + "\n: 1", "there is no option 'xxx", id="a long name"),
        pytest.param("seed: " + "x" * 10_000, "argument --seed: 'xxx", id="a long value"),
        pytest.param("seed: " + "9" * 10_000, "argument --seed: '999", id="a long number"),
        pytest.param("seed: [" + "[x]," * 1000 + "]", "expected a value of this option", id="a long list"),
        pytest.param("dataset_name: !!binary aGk=", "expected a value of this option", id="bytes"),
        pytest.param("layers: [1, true]", "expected a value of this option", id="a switch in a list"),
        pytest.param("layers: [1, null]", "expected a value of this option", id="nothing in a list"),
        pytest.param('layers: [1, "--wandb"]', "expected a list of values, found the name of an option", id="a flag"),
        pytest.param('output_dir: "a\\0b"', r"'a\x00b': no path holds a zero byte", id="zero in a path"),
        pytest.param('dataset_split: ""', "'': expected some text", id="blank"),
        pytest.param('preset: ""', "--preset : expected one of", id="blank preset"),
        pytest.param("preset: " + "x" * 10_000, "--preset xxx", id="a long preset"),
        pytest.param("output_dir: $" + "x" * 10_000, "argument --output_dir: '$xxx", id="a long path"),
    ],
)
def test_a_file_that_holds_no_options(tmp_path, content, problem):
    file = tmp_path / "options.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = train_error(f"--config {file}")
    assert (message.startswith(f"--config {file}: ") or "--preset" in message) and problem in message
    assert "\n" not in message and len(message) < len(str(file)) + 600


def test_an_alias_of_one_value_is_read(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("teacher_model: &model some/model\nstudent_model: *model\n")
    assert train_options(f"--config {file}").student_model == "some/model"


def test_a_list_that_needs_an_item_is_not_empty(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("retrieval_lengths: []\n")
    assert "argument --retrieval_lengths: expected at least one argument" in eval_error(f"--config {file}")
    file.write_text("tasks: []\nlayers: []\nsubjects: null\n")
    args = eval_options(f"--config {file}")
    assert (args.tasks, args.layers, args.subjects) == ([], [], None)


def test_a_directory_is_no_file(tmp_path):
    assert f"--config {tmp_path}: cannot be read" in train_error(f"--config {tmp_path}")


def test_an_endless_file_is_not_read_to_its_end():
    assert f"has more than {MOST_BYTES:,} bytes" in train_error("--config /dev/zero")


def test_a_pipe_is_read_once():
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(into, b"seed: 7\n"), os.close(into)))
    writer.start()
    try:
        assert train_options(f"--config /dev/fd/{out}").seed == 7
    finally:
        writer.join()
        os.close(out)


def test_a_pipe_without_a_writer_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be read .nothing was written to this pipe"):
        read_config_file(str(tmp_path / "pipe"))
