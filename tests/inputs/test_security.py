"""Models and tokenizers from anyone: their files run no code and lead to no other file, and each damaged one is one
clear error. With real files, crafted by hand.
"""

import json
import pickle
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llamba.configuration import MOST_LAYERS
from model_utils import get_configs, get_student_model, get_teacher_model, get_tokenizer, locate_model
from tests.model_files import Command, change_json
from tests.tiny import tiny_student, tiny_teacher

ROOT = Path(__file__).parents[2]
TINY = ROOT / "presets" / "tiny"
CPU = torch.device("cpu")
HUGE = 10**12


@pytest.fixture
def student(tmp_path):
    tiny_student().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def teacher(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    shutil.copy(TINY / "teacher" / "tokenizer.json", tmp_path / "teacher")
    shutil.copy(TINY / "teacher" / "tokenizer_config.json", tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))


def error_of(function, *inputs):
    """Returns the message of a ValueError, which is one line."""
    with pytest.raises(ValueError) as error:
        function(*inputs)
    message = str(error.value)
    assert "\n" not in message and message.strip()
    return message


def load(folder):
    return get_student_model(locate_model("--student_model", str(folder), True), torch.float32, CPU)


# --- code beside the weights ---------------------------------------------------------------------------------


def add_code(folder, marker):
    """Writes a module that creates `marker` when it is imported; returns an auto_map to it."""
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    return {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    }


def test_code_of_a_known_architecture_is_left_alone(student, teacher, tmp_path, no_terminal):
    marker = tmp_path / "marker"
    for folder in (student, teacher):
        change_json(folder / "config.json", auto_map=add_code(folder, marker))
    change_json(teacher / "tokenizer_config.json", auto_map=add_code(teacher, marker))
    assert [config.model_type for config in get_configs(str(teacher), str(student))] == ["llama", "llamba"]
    load(student)
    get_teacher_model(str(teacher), torch.float32, CPU)
    get_teacher_model(str(teacher), torch.float32, torch.device("meta"))
    get_teacher_model(str(teacher), torch.float32, CPU, with_head=False)
    assert get_tokenizer("--teacher_model", str(teacher)).eos_token == "<|endoftext|>"
    assert not marker.exists()


def test_an_architecture_that_is_only_code_is_refused(student, teacher, tmp_path, no_terminal):
    marker = tmp_path / "marker"
    change_json(teacher / "config.json", auto_map=add_code(teacher, marker), model_type="evil")
    message = error_of(get_configs, str(teacher), str(student))
    assert f"--teacher_model {teacher}" in message and "custom code" in message
    with pytest.raises(ValueError, match="custom code"):
        get_teacher_model(str(teacher), torch.float32, CPU)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["evil", "someone/repository--evil"])
def test_a_tokenizer_that_is_only_code_is_refused(teacher, tmp_path, no_terminal, where):
    marker = tmp_path / "marker"
    add_code(teacher, marker)
    auto_map = {"AutoTokenizer": [f"{where}.Tokenizer", None]}
    change_json(teacher / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    assert f"--teacher_model {teacher}: cannot read its tokenizer" in error_of(
        get_tokenizer, "--teacher_model", str(teacher)
    )
    assert not marker.exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"auto_map": 5, "model": 3}', '{"tokenizer_class": 5}'])
def test_nonsense_for_a_tokenizer(teacher, file, content):
    (teacher / file).write_text(content)
    assert "cannot read its tokenizer" in error_of(get_tokenizer, "--teacher_model", str(teacher))


# --- weights that are pickles --------------------------------------------------------------------------------


def as_bin(folder):
    """Turns the weights of a directory into a .bin, as published models have it, and returns them."""
    weights = dict(load(folder).state_dict())
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def test_weights_in_a_bin_load(student):
    weights = as_bin(student)
    loaded = load(student).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_that_would_run_code_does_not(student, tmp_path, legacy):
    marker = tmp_path / "marker"
    weights = {**as_bin(student), "more": Command(marker)}
    torch.save(weights, student / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):  # without the check of the file
        get_student_model(str(student), torch.float32, CPU)
    assert "pytorch_model.bin is damaged or holds more than weights" in error_of(load, student)
    assert not marker.exists()
    torch.load(student / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"PK", b"nonsense", pickle.dumps({"a": 1})[:-3]])
def test_a_bin_of_nonsense(student, content):
    as_bin(student)
    (student / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin is damaged" in error_of(load, student)


# --- safetensors and their index -----------------------------------------------------------------------------


def parts_of(file):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(file, header, body, length=None):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def damaged(header, kind):
    first, second = [name for name in header if name != "__metadata__"][:2]
    if kind == "overlap":
        header[second]["data_offsets"] = header[first]["data_offsets"]
    if kind == "before the start":
        header[first]["data_offsets"] = [-8, 8]
    if kind == "beyond the end":
        header[second]["data_offsets"][1] += 2**40
    if kind == "overflow":
        header[first]["shape"] = [2**40, 2**40]
    if kind == "unknown type":
        header[first]["dtype"] = "OBJECT"
    return header


@pytest.mark.parametrize("kind", ["overlap", "before the start", "beyond the end", "overflow", "unknown type"])
def test_a_safetensors_header_that_lies(student, kind):
    file = student / "model.safetensors"
    header, body = parts_of(file)
    write_parts(file, damaged(header, kind), body)
    assert f"--student_model {student}: model.safetensors is damaged" in error_of(load, student)


@pytest.mark.parametrize("length", [2**63, 2**40, 90_000_000, 3, 0])
def test_a_safetensors_header_of_a_wrong_length(student, length):
    file = student / "model.safetensors"
    write_parts(file, *parts_of(file), length=length)
    assert "model.safetensors is damaged" in error_of(load, student)


@pytest.mark.parametrize("keep", [0, 5, 600, -1])
def test_safetensors_cut_short(student, keep):
    file = student / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is damaged" in error_of(load, student)


def as_shard(folder, name="model-1.safetensors"):
    """Turns the weights of a directory into one shard with an index."""
    weights = load(folder).state_dict()
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_shard_loads_and_a_damaged_one_is_named(student):
    as_shard(student)
    load(student)
    (student / "model-1.safetensors").write_bytes(b"short")
    assert "model-1.safetensors is damaged" in error_of(load, student)


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/passwd", "../../etc/passwd", "below/model.safetensors"]
)
def test_an_index_that_leads_out_of_the_directory(student, name):
    (student / "below").mkdir()
    as_shard(student)
    for place in (student.parent / "stolen.safetensors", student / "below" / "a.safetensors"):
        shutil.copy(student / "model-1.safetensors", place)
    index = student / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1.safetensors", name))
    message = error_of(load, student)
    assert "model.safetensors.index.json names" in message and name in message


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"metadata": {}, "weight_map": {}}']
    + ['{"metadata": {}, "weight_map": {"a": 3}}', '{"metadata": {}, "weight_map": {"a": ["b"]}}'],
)
def test_nonsense_for_an_index(student, content):
    as_shard(student)
    (student / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in error_of(load, student)


def test_a_config_that_names_weights_elsewhere(student):
    shutil.copy(student / "model.safetensors", student.parent / "stolen.safetensors")
    change_json(student / "config.json", transformers_weights="../stolen.safetensors")
    with pytest.raises(ValueError, match="inside the model directory"):
        load(student)


# --- configs -------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """Limits the memory, so that what is not refused in time fails without taking all of the machine's."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def no_weights_are_read(monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("read weights"))


NO_CONFIG = ["", "not JSON", "[]", "[1]", "null", "3", '"text"', "{}", '{"a":' * 100_000, "\0"]
NO_CONFIG += ['{"model_type": 3}', '{"model_type": []}', '{"model_type": {"a": 1}}', '{"model_type": "../../etc"}']


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("content", NO_CONFIG, ids=lambda content: content[:20])
def test_what_is_no_config(teacher, student, content, role):
    folder = {"teacher": teacher, "student": student}[role]
    (folder / "config.json").write_text(content)
    message = error_of(get_configs, str(teacher), str(student))
    assert f"--{role}_model {folder}: cannot read its config.json" in message and len(message) < 800


SIZES = ["d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "mlp_cfg.intermediate_size", "ssm_cfg.d_state"]
SIZES += ["ssm_cfg.n_v_heads", "ssm_cfg.n_qk_heads", "ssm_cfg.d_conv", "ssm_cfg.expand", "ssm_cfg.chunk_size"]
OTHERS = ["norm_epsilon", "resid_dropout", "initializer_range", "tie_embeddings", "lm_head_bias", "use_cache"]
OTHERS += ["mlp_cfg.act_fn", "mlp_cfg.bias", "ssm_cfg.activation", "ssm_cfg.bias", "ssm_cfg.conv_bias"]
OTHERS += ["attention_layers", "attention_heads", "mlp_cfg", "ssm_cfg", "attention_cfg"]
NO_SIZE = [HUGE, -1, 0, "32", 1.5, None, True, float("nan"), [32], {"a": {"b": [1]}}]


@pytest.mark.parametrize("name", [*SIZES, *OTHERS])
def test_a_student_of_absurd_values(teacher, student, name, little_memory, no_weights_are_read):
    config = (student / "config.json").read_text()
    values = NO_SIZE if name in SIZES else [HUGE, "x", ["x"], {"a": {"b": [1]}}]
    for value in values:
        change_json(student / "config.json", **{name: value})
        message = error_of(get_configs, str(teacher), str(student))
        assert f"--student_model {student}" in message and name.split(".")[0] in message, value
        (student / "config.json").write_text(config)


TEACHER_SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "head_dim",
]


@pytest.mark.parametrize("name", TEACHER_SIZES)
def test_a_teacher_of_absurd_values(teacher, student, name, little_memory, no_weights_are_read):
    config = (teacher / "config.json").read_text()
    for value in [HUGE, -1, 0, "32", 1.5, [32], {"a": {"b": [1]}}]:
        change_json(teacher / "config.json", **{name: value})
        assert f"--teacher_model {teacher}" in error_of(get_configs, str(teacher), str(student)), value
        (teacher / "config.json").write_text(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters.rope_theta": "x"},
        {"rope_parameters.rope_type": "x"},
        {"rope_parameters": 3},
        {"hidden_act": "x"},
        {"auto_map": 5},
        {"dtype": "x"},
        {"dtype": "nn"},
        {"dtype": 5},
        {"dtype": ["bfloat16"]},
    ],
    ids=str,
)
def test_a_teacher_that_cannot_be_built(teacher, student, changes):
    change_json(teacher / "config.json", **changes)
    assert f"--teacher_model {teacher}" in error_of(get_configs, str(teacher), str(student))


@pytest.mark.parametrize("changes", [{"hidden_act": "x"}, {"head_dim": HUGE}, {"anything": 3}], ids=str)
def test_a_hybrid_whose_attention_cannot_be_built(teacher, student, changes):
    given = json.loads((teacher / "config.json").read_text())
    attention = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "rms_norm_eps": given["rms_norm_eps"]}
    change_json(student / "config.json", attention_layers=[1], attention_cfg={**attention, "intermediate_size": 40})
    get_configs(str(teacher), str(student))
    change_json(student / "config.json", attention_cfg={**attention, "intermediate_size": 40, **changes})
    assert f"--student_model {student}" in error_of(get_configs, str(teacher), str(student))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_sizes_far_beyond_the_weights_on_disk(teacher, student, role, little_memory, no_weights_are_read):
    """Each size alone could be real, but transformers would allocate all weights before it reports missing ones."""
    sizes = {"teacher": {"hidden_size": 2**16, "num_hidden_layers": 100}, "student": {"d_model": 2**18, "n_layer": 100}}
    folder = {"teacher": teacher, "student": student}[role]
    change_json(folder / "config.json", **sizes[role])
    message = error_of(get_configs, str(teacher), str(student))
    assert f"--{role}_model {folder}: its config.json asks for" in message and "bytes" in message


def test_too_many_layers_are_refused(teacher, student):
    for folder, name in ((teacher, "num_hidden_layers"), (student, "n_layer")):
        change_json(folder / "config.json", **{name: MOST_LAYERS + 1})
        assert f"1 to {MOST_LAYERS}" in error_of(get_configs, str(teacher), str(student))
        change_json(folder / "config.json", **{name: 4})


def test_a_teacher_of_another_architecture_is_built_for_the_trial(tmp_path, student):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert get_configs(str(tmp_path / "gpt2"), str(student))[0].model_type == "gpt2"
