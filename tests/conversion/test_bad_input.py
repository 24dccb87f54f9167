"""What make_student.py cannot use is one line with flag, value and remedy, before any layer is read; and its plan."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import make_student
from conversion import checks
from conversion.checks import check_conversion
from conversion.options import parse_make_args
from conversion.plan import format_plan, memory
from tests.conversion.gguf_files import tensors_of, tiny_llama, values_of, write_gguf
from tests.model_files import change_json, change_weight

TINY = Path(__file__).parents[2] / "presets" / "tiny"
SHORT = ("--calibration_tokens", "512", "--held_out_tokens", "64", "--seq_length", "64")


@pytest.fixture
def teacher(tmp_path):
    """A copy of the tiny teacher, to be changed."""
    return Path(shutil.copytree(TINY / "teacher", tmp_path / "teacher"))


def options(tmp_path, *more):
    given = {"--preset": "tiny", "--teacher_model": tmp_path / "teacher", "--output": tmp_path / "made"}
    words = [str(word) for pair in given.items() for word in pair]
    return parse_make_args([*words, *SHORT, *map(str, more)])


def error_of(tmp_path, *more):
    """Returns the error of a conversion that no layer was read for."""
    with pytest.raises(ValueError) as error:
        make_student.main(options(tmp_path, *more))
    assert not list(tmp_path.glob("made.unfinished/*")), "work has begun"
    return str(error.value)


CONFIGS = [
    ({"model_type": "gpt2"}, "model_type 'gpt2'; expected 'llama', 'mistral', 'qwen2' or 'qwen3'"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
    ({"sliding_window": 64}, "sliding_window 64, by which attention sees the last tokens only"),
    ({"num_local_experts": 8}, "num_local_experts 8, experts"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised, by gptq"),
    ({"num_hidden_layers": 0}, "0 layers; expected 1 to"),
    ({"tie_word_embeddings": True}, "says tie_word_embeddings, and lm_head.weight in model.safetensors is another"),
]


@pytest.mark.parametrize("changes,expected", CONFIGS)
def test_a_teacher_that_is_no_plain_llama(tmp_path, teacher, changes, expected):
    change_json(teacher / "config.json", **changes)
    message = error_of(tmp_path)
    assert expected in message and message.startswith(f"--teacher_model {teacher}: ")


def test_a_teacher_whose_tokenizer_is_missing(tmp_path, teacher):
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    message = error_of(tmp_path)
    assert message.startswith(f"--teacher_model {teacher}: cannot read its tokenizer") and "copy tokenizer" in message


def test_a_tokenizer_beyond_the_vocabulary(tmp_path, teacher):
    content = json.loads((teacher / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 100_000, "content": "<|more|>"})
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    assert "vocabulary" in error_of(tmp_path)


def test_layers_that_the_teacher_has_not(tmp_path, teacher):
    n = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
    message = error_of(tmp_path, "--layers", 1, n)
    expected = f"[{n}] out of range; the student has {n} layers and the teacher {n}, so expected 0 to {n - 1}"
    assert message == f"--layers 1 {n}: {expected}"


@pytest.mark.parametrize(
    "given,expected",
    [
        (["--heads", "0:0,1:9"], "--heads 0:0,1:9: 1:9 out of range; the teacher's layers have heads 0 to "),
        (["--layers", 1, "--heads", "1:0"], "--heads 1:0: --layers keeps [1] whole; name a layer in one of them"),
        (["--heads", "auto:3"], "--heads auto:3: is for train_gpus.py; name heads, as choose_layers.py"),
    ],
)
def test_heads_that_cannot_stand_beside_mixers(tmp_path, teacher, given, expected):
    assert expected in error_of(tmp_path, *given)


def test_windows_that_the_teacher_cannot_read(tmp_path, teacher):
    change_json(teacher / "config.json", max_position_embeddings=32)
    assert error_of(tmp_path).startswith("--seq_length 64: the teacher can read 32 tokens at once")


@pytest.mark.parametrize("place", ["made", "made/model.txt"])
def test_a_folder_that_holds_something(tmp_path, teacher, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    assert error_of(tmp_path).startswith(f"--output {tmp_path / 'made'}: is there already and holds something else")
    assert (tmp_path / place).read_text() == "mine"


@pytest.mark.parametrize("leads_to", ["nowhere", "empty", "made"])
def test_a_link_where_the_folder_is_to_be(tmp_path, teacher, leads_to):
    (tmp_path / "empty").mkdir()
    (tmp_path / "made").symlink_to(leads_to)
    assert error_of(tmp_path).startswith(f"--output {tmp_path / 'made'}: is a link; give the name of a new folder")


def test_a_folder_without_a_name(tmp_path, teacher, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert error_of(tmp_path, "--output", ".") == ("--output .: has no name of its own; give the name of a new folder")


def test_a_config_that_is_a_list(tmp_path, teacher):
    (teacher / "config.json").write_text("[]")
    message = error_of(tmp_path)
    assert message.startswith(f"--teacher_model {teacher}: cannot read its config.json: it holds a list; expected")


def test_states_are_on_the_disk_twice_while_they_are_written(tmp_path, teacher):
    """Those of calibration in both models, and of held-out text in three."""
    few, more = (options(tmp_path, "--layers", -1, "--calibration_tokens", n) for n in (512, 1024))
    _, student = check_conversion(few)
    of_a_token = 4 * student.d_model
    assert checks.disk_bytes(more, student) - checks.disk_bytes(few, student) == 2 * 2 * 512 * of_a_token
    assert checks.states_bytes(few, student) == (2 * 512 + 3 * 64) * of_a_token


def test_a_disk_without_room(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    message = error_of(tmp_path)
    assert message.startswith(f"--output {tmp_path / 'made'}: takes 0.0 GB, and {tmp_path} has 0.0 GB free; make room")


def test_options_are_refused_together(tmp_path, teacher):
    (tmp_path / "made").write_text("mine")
    assert error_of(tmp_path, "--layers", 99).count("\n") == 1


@pytest.mark.parametrize(
    "given,expected",
    [
        (("--init", "magic"), "--init: invalid choice: 'magic'"),
        (("--d_state", "1"), "--d_state 1: expected at least 2"),
        (("--calibration_tokens", "32"), "--calibration_tokens 32: fills no window of --seq_length 64"),
        (("--calibration_tokens", "511"), "--calibration_tokens 511: is too little text for --init closed_form"),
        (("--layers", "1", "1"), "--layers 1 1: expected each index once"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, given, expected):
    with pytest.raises(ValueError) as error:
        options(tmp_path, *given)
    assert expected in str(error.value).replace("argument ", "")


def test_a_text_that_cannot_be_read(tmp_path, teacher):
    assert error_of(tmp_path, "--calibration", tmp_path / "none.jsonl").startswith("--calibration ")
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    message = error_of(tmp_path, "--calibration", tmp_path / "bad.jsonl")
    assert message.startswith(("--calibration", "--calibration_text_field")) and "text" in message


def test_a_text_with_too_few_tokens(tmp_path, teacher):
    (tmp_path / "short.jsonl").write_text('{"text": "two words"}\n' * 50)
    message = error_of(tmp_path, "--calibration", tmp_path / "short.jsonl")
    assert message.startswith("--calibration ") and "expected 8 for --calibration_tokens; use more text" in message


def test_fewer_tokens_than_are_enough_are_named(tmp_path, caplog):
    for more, n_warnings in (((), 0), (("--calibration_tokens", 512), 1), (("--init", "random"), 1)):
        args = options(tmp_path, *more)
        args.calibration_tokens = args.calibration_tokens if more else 8192
        checks.warn_of_few_tokens(args, SimpleNamespace(d_inner=576))
        assert len(caplog.messages) == n_warnings
    assert caplog.messages[0].startswith("--calibration_tokens 512: are fewer than the 576 inputs of out_proj")


WEIGHTS = [
    ("model.layers.5.mlp.down_proj.weight", float("inf"), "float32"),
    ("lm_head.weight", 1e6, "float16"),
    ("model.embed_tokens.weight", 1e6, "float16"),
]


@pytest.mark.parametrize("name,value,dtype", WEIGHTS)
def test_weights_that_are_no_numbers_in_the_student(tmp_path, teacher, name, value, dtype):
    """They are seen before a layer is fitted, even of tokens that no text has."""
    change_weight(teacher, name, lambda weight: weight.float().index_fill(0, torch.tensor(weight.shape[0] - 1), value))
    message = error_of(tmp_path, "--dtype", dtype)
    assert message.startswith(f"--teacher_model {teacher}: {name} holds inf in {dtype}, expected numbers; ")


def test_activations_that_are_not_finite(tmp_path, teacher):
    for name in ("up_proj", "down_proj"):
        change_weight(teacher, f"model.layers.1.mlp.{name}.weight", lambda weight: weight.float() * 1e22)
    with pytest.raises(ValueError, match="its hidden states behind layer 1 are not finite") as error:
        make_student.main(options(tmp_path))
    assert str(error.value).startswith(f"--teacher_model {teacher}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


# --- GGUF ----------------------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_a_student_and_its_teacher_a_folder(tmp_path):
    model = tiny_llama()
    file = write_gguf(tmp_path / "teacher.gguf", tensors_of(model), values_of(model.config), matrices="Q8_0")
    ending = ("--output", f"{tmp_path / 'made'}/")  # as a shell completes it
    args = options(tmp_path, "--teacher_model", file, "--dtype", "float32", "--layers", -1, *ending)
    assert make_student.main(args) == 0
    made = LlamaForCausalLM.from_pretrained(tmp_path / "made-teacher", dtype=torch.float32)
    assert made.config.num_hidden_layers == 2
    assert (tmp_path / "made" / "conversion.json").is_file() and (tmp_path / "made" / "tokenizer.json").is_file()
    assert make_student.main(args) == 0  # all of it is there


def test_a_gguf_file_that_is_not_there(tmp_path):
    assert error_of(tmp_path, "--teacher_model", "none.gguf").startswith("--teacher_model none.gguf: there is no such")
    (tmp_path / "bad.gguf").write_text("no")
    assert "is damaged or no GGUF file" in error_of(tmp_path, "--teacher_model", tmp_path / "bad.gguf")


# --- the plan ------------------------------------------------------------------------------------------------


def test_a_plan_of_8b_needs_no_network_and_no_large_machine(monkeypatch, no_network, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert make_student.main(parse_make_args(["--preset", "llama-8b", "--dry_run"])) == 0
    printed = capsys.readouterr().out
    assert "32 layers, width 4096" in printed and "32 heads of 128, state 128, with biases" in printed
    assert "students/llama-8b, 9,379 million parameters in bfloat16" in printed
    args = parse_make_args(["--preset", "llama-8b", "--dry_run"])
    assert max(memory(args, *check_conversion(args)).values()) < 20e9
    assert not list(tmp_path.iterdir())


def test_a_plan_grows_with_what_is_asked_for(tmp_path, teacher):
    def plan(*more):
        args = options(tmp_path, "--dry_run", *more)
        return memory(args, *check_conversion(args))

    usual = plan()
    assert plan("--calibration_tokens", 10**6)["a layer"] > usual["a layer"] + 4 * 64 * 10**6
    assert plan("--init", "random")["a layer"] < usual["a layer"]
    long = ("--calibration_tokens", 8192, "--held_out_tokens", 8192, "--seq_length")
    change_json(teacher / "config.json", max_position_embeddings=8192)
    assert plan(*long, 8192)["a layer"] > plan(*long, 64)["a layer"]  # a window is never split
    args = options(tmp_path, "--dry_run", "--no_ssm_bias", "--d_state", 8)
    text = format_plan(args, *check_conversion(args))
    assert "state 8, without biases, by --init closed_form" in text
