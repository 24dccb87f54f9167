"""A GGUF file becomes a folder with the same model and tokenizer, or one line says why not."""

import builtins
import errno
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conversion import gguf as door
from conversion.gguf import convert_gguf, is_gguf
from conversion.teacher_weights import TeacherWeights
from tests.conversion.gguf_files import SPECIAL, TOKENS, rounded, tensors_of, tiny_llama, values_of, write_gguf


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def convert(tmp_path, model, values=None, tensors=None, **settings):
    """Writes a file of `model` and converts it. values: keys to change or, as None, to leave out."""
    changed = {**values_of(model.config), **(values or {})}
    content = {key: value for key, value in changed.items() if value is not None}
    file = write_gguf(tmp_path / "tiny.gguf", tensors or tensors_of(model), content, **settings)
    return convert_gguf("--teacher_model", file, tmp_path / "made" / "tiny")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits  # (1, S, V)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_the_folder_holds_the_model_of_the_file(tmp_path, changes):
    model = tiny_llama(**changes)
    folder = convert(tmp_path, model)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (name, own), (_, given) in zip(made.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(own, given), name
    assert torch.equal(logits(made), logits(model))
    for name in ("tie_word_embeddings", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "head_dim"):
        assert getattr(made.config, name) == getattr(model.config, name)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert set(TeacherWeights(str(folder)).stored) == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_every_type_keeps_its_values(tmp_path, llama, kind):
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    folder = convert(tmp_path, llama, matrices=kind)
    weights = TeacherWeights(str(folder))
    for name, parameter in llama.named_parameters():
        expected = rounded(parameter, kind) if parameter.ndim > 1 else parameter
        assert torch.equal(weights.tensor(name, torch.float32), expected), name
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stored.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)


def test_blocks_of_rows_make_the_same_file(tmp_path, llama, monkeypatch):
    whole = (convert(tmp_path, llama, matrices="Q8_0") / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "made")
    monkeypatch.setattr(door, "BLOCK_BYTES", 4 * 7 * 34)  # some rows of packed bytes
    assert (convert(tmp_path, llama, matrices="Q8_0") / "model.safetensors").read_bytes() == whole


def test_tokenizer_has_the_tokens_of_the_file_and_its_special_ones(tmp_path, llama):
    made = AutoTokenizer.from_pretrained(convert(tmp_path, llama))
    assert [made.convert_ids_to_tokens(i) for i in range(len(TOKENS))] == TOKENS and len(made) == len(TOKENS)
    assert (made.bos_token, made.eos_token, made.pad_token, made.unk_token) == (*SPECIAL[1:], SPECIAL[2], SPECIAL[0])
    assert set(made.all_special_ids) == {0, 1, 2}
    assert made.model_max_length == 96
    chat = made.apply_chat_template([{"role": "user", "content": "hell"}], return_dict=False)
    assert chat == [1, *made.encode("hell"), 2]
    assert made.encode("<think>") == [3]
    text = "hell  12\n<|im_end|> é漢🙂"
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize(
    "pre,tokens",
    [
        ("smollm", ["ĠĠ", "1", "2"]),  # digits stand alone
        ("llama-bpe", ["Ġ", "Ġ", "1", "2"]),  # no space goes with a number
        ("gpt-2", ["Ġ", "Ġ1", "2"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path, llama, pre, tokens):
    made = AutoTokenizer.from_pretrained(convert(tmp_path, llama, {"tokenizer.ggml.pre": pre}))
    assert made.tokenize("  12") == tokens


OF_BOS = [("smollm", None, False), ("llama-bpe", None, True), ("smollm", True, True)]


@pytest.mark.parametrize("pre,given,begins", OF_BOS)
def test_text_begins_with_bos_where_the_file_says_so(tmp_path, llama, pre, given, begins):
    values = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": given}
    made = AutoTokenizer.from_pretrained(convert(tmp_path, llama, values))
    assert (made("hell").input_ids[0] == 1) == begins
    assert made("hell", add_special_tokens=False).input_ids[0] != 1


def test_a_sentencepiece_tokenizer_is_made_too(tmp_path, llama):
    letters = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(250)), *letters]
    scores = [0.0] * 253 + [-float(index) for index in range(len(letters))]
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None}
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    values["tokenizer.ggml.padding_token_id"] = None
    values |= {"tokenizer.ggml.token_type": [2, 3, 3, *[6] * 250, *[1] * len(letters)]}
    made = AutoTokenizer.from_pretrained(convert(tmp_path, llama, {**values, "tokenizer.ggml.add_bos_token": True}))
    assert made.convert_ids_to_tokens(made("hello").input_ids) == ["<s>", "\u2581hello"]
    assert made.decode(made("hello hell", add_special_tokens=False).input_ids) == "hello hell"


def test_the_end_of_a_turn_is_an_end_too(tmp_path, llama):
    folder = convert(tmp_path, llama, {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2})
    assert AutoConfig.from_pretrained(folder).eos_token_id == [0, 2]


def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_llama(rope_parameters=scaling)
    speeds, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = (plain / speeds).numpy().astype(np.float32)  # as llama.cpp's converter writes them
    tensors = {**tensors_of(model), "rope_freqs.weight": factors}
    assert AutoConfig.from_pretrained(convert(tmp_path, model, tensors=tensors)).rope_parameters == scaling
    shutil.rmtree(tmp_path / "made")
    tensors["rope_freqs.weight"] = factors * np.linspace(1, 2, 16, dtype=np.float32)
    with pytest.raises(ValueError, match="none of the rotary scalings of Llama 3"):
        convert(tmp_path, model, tensors=tensors)


def test_a_file_is_converted_once(tmp_path, llama, monkeypatch):
    folder = convert(tmp_path, llama)
    monkeypatch.setattr(door.GGUFModel, "open", None)
    assert convert_gguf("--teacher_model", tmp_path / "tiny.gguf", folder) == folder
    (tmp_path / "tiny.gguf").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"^--teacher_model .*holds something else; move it away"):
        convert_gguf("--teacher_model", tmp_path / "tiny.gguf", folder)


def test_a_conversion_that_ends_early_leaves_nothing(tmp_path, llama, monkeypatch):
    blocks = door.GGUFModel.blocks

    def killed(self):
        yield from itertools.islice(blocks(self), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(door.GGUFModel, "blocks", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, llama)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_conversion_that_was_killed_leaves_no_copy_for_good(tmp_path, llama, monkeypatch):
    """Killed, it removes nothing; the next call finds what it left, and flushes all of it before the name."""

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(door.shutil, "rmtree", lambda *a, **k: None)
        patches.setattr(door.GGUFModel, "blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path, llama)
    (left,) = (tmp_path / "made").iterdir()
    (left / "of_the_first").touch()
    assert left == door.partial_folder(tmp_path / "made" / "tiny")
    in_the_way = SimpleNamespace(free=1000)  # until it is removed
    room = door.shutil.disk_usage
    usage = lambda path: in_the_way if (left / "of_the_first").exists() else room(path)  # noqa: E731
    monkeypatch.setattr(door.shutil, "disk_usage", usage)
    flushed = []
    monkeypatch.setattr(door, "flush_to_disk", lambda path: flushed.append(path.name))
    folder = convert(tmp_path, llama)
    assert list((tmp_path / "made").iterdir()) == [folder]
    names = {file.name for file in folder.iterdir()}
    assert names.isdisjoint({"of_the_first", ".lock"}) and names <= set(flushed)


BAD_VALUES = [
    ({"tokenizer.ggml.tokens": None}, "the file has no tokenizer"),
    ({"tokenizer.ggml.model": "no_vocab"}, "the file has no tokenizer"),
    ({"tokenizer.ggml.model": "t5"}, "it is of kind 't5'"),
    ({"tokenizer.ggml.pre": "qwen2"}, "how it splits text is not known"),
    ({"tokenizer.ggml.pre": None}, "how it splits text is not known"),
    ({"tokenizer.ggml.eos_token_id": 5000}, "eos_token_id is 5000"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[-2]]}, "the same token twice"),
    ({"tokenizer.ggml.tokens": [*TOKENS, *"αβγδεζ"]}, "the model's embedding 271 rows"),
    ({"llama.expert_count": 8}, "8 experts"),
    ({"llama.attention.sliding_window": 4096}, "a window of 4096 tokens"),
    ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
    ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv is .* expected a whole number"),
    ({"llama.block_count": 3}, "is missing"),
    ({"llama.block_count": 1}, "there is no place for"),
    ({"llama.feed_forward_length": 100}, "expected .*100"),
    ({"llama.context_length": None}, "context_length is None"),
]


@pytest.mark.parametrize("values,message", BAD_VALUES)
def test_what_cannot_be_converted_is_one_line(tmp_path, llama, values, message):
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path, llama, values)
    assert str(error.value).startswith(f"--teacher_model {tmp_path / 'tiny.gguf'}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "made" / "tiny").exists()


def test_another_architecture_is_named(tmp_path, llama):
    values = {key.replace("llama.", "qwen2."): value for key, value in values_of(llama.config).items()}
    file = write_gguf(tmp_path / "tiny.gguf", tensors_of(llama), values, architecture="qwen2")
    with pytest.raises(ValueError, match="its architecture is 'qwen2'; expected 'llama'"):
        convert_gguf("--teacher_model", file, tmp_path / "tiny")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.99])
def test_a_damaged_file_is_one_line(tmp_path, llama, part):
    file = write_gguf(tmp_path / "whole.gguf", tensors_of(llama), values_of(llama.config))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ValueError, match="is damaged or no GGUF file") as error:
        convert_gguf("--teacher_model", cut, tmp_path / "tiny")
    assert "\n" not in str(error.value)


def test_weights_that_are_no_numbers_are_named(tmp_path, llama):
    tensors = tensors_of(llama)
    tensors["blk.1.ffn_up.weight"] = np.where(np.eye(192, 128) > 0, np.nan, tensors["blk.1.ffn_up.weight"])
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].astype(np.float32)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds values that are not finite"):
        convert(tmp_path, llama, tensors=tensors)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(door.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="0.0 GB free; make room"):
        convert(tmp_path, llama)


@pytest.mark.parametrize("name", ["flush_to_disk", "write_safetensors"])
def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left(tmp_path, llama, monkeypatch, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(door, name, fail)
    with pytest.raises(ValueError, match="^--teacher_model .*No space left on device.*; make room"):
        convert(tmp_path, llama)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_link_or_a_file_is_not_replaced_by_the_folder(tmp_path, llama):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tiny").symlink_to("nowhere")
    with pytest.raises(ValueError, match="which holds something else; move it away"):
        convert(tmp_path, llama)
    file = tmp_path / "tiny.gguf"
    with pytest.raises(ValueError, match=r"tiny.gguf/.sub.partial: cannot be written \(Not a directory\)"):
        convert_gguf("--teacher_model", file, file / "sub")


def test_the_missing_package_is_named(tmp_path, llama, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tensors_of(llama), values_of(llama.config))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the package gguf, which is not installed; pip install gguf=="):
        convert_gguf("--teacher_model", file, tmp_path / "tiny")


def test_the_package_is_pinned_alike_everywhere():
    for name in ("requirements-dev.txt", "docs/install.md"):
        assert door.PACKAGE in (door.Path(__file__).parents[2] / name).read_text(), name


def test_names_of_files():
    assert is_gguf("a/B.GGUF") and not is_gguf("meta-llama/gguf")
