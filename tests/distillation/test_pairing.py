"""Teacher, student and options together: windows within the context of all that reads them, and the same tokens."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, MambaConfig

from arguments import parse_train_args
from distillation.pairing import (
    check_pair,
    own_tokenizer,
    tokenizer_difference,
    warn_of_another_tokenizer,
    warn_of_cut_mixers,
)
from tests.model_files import cache_of_the_hub, change_json
from tests.tiny import tiny_config, tiny_family, tiny_hybrid, tiny_teacher

TINY = Path(__file__).parents[2] / "presets" / "tiny"


def pair(teacher, student=None, **options):
    argv = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    check_pair(parse_train_args(["--preset", "tiny", *argv]), student or tiny_config(), teacher)


def llama(length, **changes):
    return tiny_teacher(max_position_embeddings=length, **changes).config


def test_a_window_may_fill_the_context():
    pair(llama(64), seq_length=64)
    with pytest.raises(ValueError, match="--seq_length 65: .* 64 tokens at once"):
        pair(llama(64), seq_length=65)


def test_scaled_positions_count():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    pair(llama(64, rope_parameters=rope), seq_length=256)
    with pytest.raises(ValueError, match="--seq_length 257: .* 256 tokens at once"):
        pair(llama(64, rope_parameters=rope), seq_length=257)


def test_learned_positions_count():
    teacher = GPT2Config(n_positions=64, n_embd=32, n_layer=4, n_head=2)
    pair(teacher, layers=-1, seq_length=64)
    with pytest.raises(ValueError, match="--seq_length 65: the teacher can read 64 tokens"):
        pair(teacher, layers=-1, seq_length=65)


def test_only_what_reads_the_windows_has_a_say():
    with pytest.raises(ValueError, match="the layers that the student takes"):
        pair(llama(64), layers="1 3", kl_weight=0, seq_length=65)
    pair(llama(64), layers=-1, kl_weight=0, seq_length=65)
    pair(MambaConfig(hidden_size=32, num_hidden_layers=4), layers=-1, seq_length=10**6)


def test_a_hybrid_has_the_context_of_its_own_layers():
    hybrid = tiny_hybrid(teacher=tiny_teacher(max_position_embeddings=32)).config
    pair(llama(64), hybrid, layers="1 3", seq_length=32)
    with pytest.raises(ValueError, match="the layers that the student has from a teacher can read 32 tokens"):
        pair(llama(64), hybrid, layers="1 3", seq_length=33)


# --- alignment -----------------------------------------------------------------------------------------------


def aligned(teacher, student=None, **options):
    pair(teacher, student, stage="align", **{"layers": -1, "seq_length": 32, **options})


def test_a_student_of_its_teachers_shape_can_be_aligned():
    aligned(llama(64))
    aligned(llama(64), layers="0 2")
    aligned(llama(64), tiny_hybrid().config, layers="1 3")


@pytest.mark.parametrize(
    "teacher,student,options,message",
    [
        (GPT2Config(n_positions=64, n_embd=32, n_layer=4), None, {}, "model_type 'gpt2'"),
        (llama(64, num_hidden_layers=3), None, {}, "student has 4 layers of width 32, the teacher 3 of 32"),
        (llama(64, hidden_size=40), None, {}, "student has 4 layers of width 32, the teacher 4 of 40"),
        (llama(64), None, {"layers": "0 1 2 3"}, "all 4 layers are the teacher's"),
        (llama(64), None, {"seq_length": 65, "kl_weight": 0}, "the teacher can read 64 tokens"),
        (tiny_family("qwen3").config, tiny_hybrid().config, {"layers": "1 3"}, "model_type is llama, and qwen3 of"),
        (llama(64, rms_norm_eps=0.1), tiny_hybrid().config, {"layers": "1 3"}, "rms_norm_eps is 1e-06, and 0.1 of"),
    ],
)
def test_what_cannot_be_aligned_is_one_line(teacher, student, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        aligned(teacher, student, **options)
    assert "\n" not in str(raised.value)


# --- tokenizers ----------------------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path):
    """Returns a student's directory with a tokenizer whose q is the teacher's Q, and the reverse."""
    folder = Path(shutil.copytree(TINY / "student", tmp_path / "student"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    swapped = {**model["vocab"], "q": model["vocab"]["Q"], "Q": model["vocab"]["q"]}
    change_json(folder / "tokenizer.json", model={**model, "vocab": swapped})
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "teacher")


def test_other_ids_are_counted_and_logged_once(student, tokenizer, caplog, monkeypatch):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        warn_of_another_tokenizer(str(student), tokenizer)
    (record,) = caplog.records
    vocab = tokenizer.get_vocab()
    assert record.levelname == "WARNING"
    assert f"--student_model {student}: " in record.message
    assert f"2 of its tokens, such as 'Q', have other ids than the teacher's ({vocab['q']}, not {vocab['Q']})" in (
        record.message
    )


def test_equal_tokenizers_and_none_are_not_worth_a_line(student, tokenizer, caplog):
    warn_of_another_tokenizer(str(TINY / "student"), tokenizer)
    for file in student.glob("tokenizer*"):
        file.unlink()
    warn_of_another_tokenizer(str(student), tokenizer)
    warn_of_another_tokenizer("someone/who-is-not-in-the-cache", tokenizer)
    assert own_tokenizer("--student_model", str(student)) is None
    assert not caplog.records


def test_a_name_in_the_cache_of_the_hub_is_compared(student, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache_of_the_hub(tmp_path / "hub", "someone/student", student)
    own = own_tokenizer("--student_model", "someone/student")
    assert "2 of its tokens" in tokenizer_difference(own, tokenizer)


def test_tokenizers_are_compared_without_a_token_that_ends_documents(tokenizer):
    """The run names one, and a student's own tokenizer need not have it."""
    for eos in (None, "<|other|>"):
        own = AutoTokenizer.from_pretrained(TINY / "teacher")
        own.eos_token = eos
        assert tokenizer_difference(own, tokenizer) is None


def test_a_damaged_tokenizer_of_a_student_does_not_stop_a_run(student, tokenizer, caplog):
    (student / "tokenizer.json").write_text("{")
    warn_of_another_tokenizer(str(student), tokenizer)
    (record,) = caplog.records
    assert f"not compared with the teacher's: --student_model {student}: cannot read its tokenizer" in record.message


# --- heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line,config,cut",
    [
        ("--heads 1:2,0:3", {}, "0:3,1:2"),
        ("--heads 1:2,0:3", {"fitted_beside": {"0": [3]}}, "1:2"),
        ("--heads 1:2,0:3", {"fitted_beside": {"0": [3], "1": [2]}}, None),
        ("--heads 1:2 --stage align", {}, None),  # which is what the warning tells to do
        ("--layers 1", {}, None),
        ("--heads 1:0,1:1,1:2,1:3", {}, None),  # a whole layer, without a mixer
    ],
)
def test_mixers_that_lose_heads_beside_which_they_were_not_fitted(caplog, line, config, cut):
    warn_of_cut_mixers(parse_train_args(["--preset", "tiny", *line.split()]), tiny_config(**config))
    assert len(caplog.messages) == (cut is not None)
    if cut is not None:
        assert caplog.messages[0].startswith(f"--heads {cut}: the mixers of --student_model were not fitted beside")


def test_a_hybrid_has_learned_beside_its_heads(caplog):
    args = parse_train_args(["--preset", "tiny", "--heads", "0:1"])
    warn_of_cut_mixers(args, tiny_hybrid(heads={0: [1]}).config)
    assert not caplog.messages
