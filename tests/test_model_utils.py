"""Loading, replacing layers, freezing and counting, on models small enough to check by eye."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, MistralConfig

from llamba import LlambaConfig
from llamba.parts import parameter_table
from model_utils import (
    adopt_special_tokens,
    apply_replacements,
    check_replacements,
    check_trainable,
    checkpoint_blocks,
    freeze_student_layers,
    freeze_student_mlps,
    get_configs,
    get_student_model,
    get_teacher_model,
    get_tokenizer,
    locate_model,
)
from tests.model_files import change_json
from tests.tiny import tiny_config, tiny_student, tiny_teacher, tokens

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """Returns the directories of a teacher and of a student."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    tiny_student().save_pretrained(tmp_path / "student")
    return str(tmp_path / "teacher"), str(tmp_path / "student")


# --- replacing layers ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_replaced_layer_computes_what_the_teachers_does():
    student, teacher = tiny_student(), tiny_teacher(rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    apply_replacements(student, teacher, [2])
    hidden = torch.randn(2, 9, 32)
    position_ids = torch.arange(9)[None]
    expected = teacher.model.layers[2](hidden, position_embeddings=teacher.model.rotary_emb(hidden, position_ids))
    rotary = student.backbone.rotary_emb(hidden, position_ids)
    torch.testing.assert_close(student.backbone.layers[2](hidden, position_embeddings=rotary), expected)


def test_replaced_layers_are_copies_of_the_teachers():
    student, teacher = tiny_student(), tiny_teacher()
    apply_replacements(student, teacher, [0, 3])
    own = student.backbone.layers[3].self_attn.q_proj.weight
    given = teacher.model.layers[3].self_attn.q_proj.weight
    assert torch.equal(own, given)
    with torch.no_grad():
        own.add_(1.0)
    assert not torch.equal(own, given)
    assert student.backbone.layers[0].self_attn.config is not teacher.config


def test_the_layout_is_recorded_and_untouched_layers_stay(saved):
    teacher, student = tiny_teacher(), get_student_model(saved[1], torch.float32, CPU)
    before = {name: p.clone() for name, p in student.state_dict().items() if ".layers.1." in name}
    apply_replacements(student, teacher, [3, 0])
    assert student.config.attention_layers == [0, 3]
    assert student.config.attention_cfg["num_key_value_heads"] == 2
    for name, weight in before.items():
        assert torch.equal(student.state_dict()[name], weight)


def test_replaced_layers_take_the_students_dtype():
    student = tiny_student().to(torch.bfloat16)
    apply_replacements(student, tiny_teacher(), [1])
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student.backbone.rotary_emb.inv_freq.dtype == torch.float32


def test_layers_of_a_teacher_without_weights_are_not_mistaken_for_weights(saved):
    skeleton = get_teacher_model(saved[0], torch.float32, torch.device("meta"))
    assert all(p.is_meta for p in skeleton.parameters())
    student = tiny_student()
    apply_replacements(student, skeleton, [1])
    assert all(p.isnan().all() for p in student.backbone.layers[1].parameters())


def test_no_layers_leaves_the_student_alone():
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [])
    assert student.config.attention_layers == [] and student.backbone.rotary_emb is None


@pytest.mark.parametrize(
    "teacher,layers,message",
    [
        (LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4), [1, 4], r"\[4\] out of range"),
        (LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4), [2], "expected 0 to 1"),
        (LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4), [1], "64 wide and the student's 32"),
        (MistralConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4), [1], "sliding_window 4096"),
    ],
)
def test_layers_that_cannot_be_replaced(teacher, layers, message):
    with pytest.raises(ValueError, match=message) as error:
        check_replacements(tiny_config(), teacher, layers)
    assert "--layers" in str(error.value)


def test_a_hybrid_keeps_its_own_layers():
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [1, 3])
    check_replacements(student.config, tiny_teacher().config, [3, 1])
    for layers in ([1], [], [1, 2, 3]):
        with pytest.raises(ValueError, match="hybrid already"):
            check_replacements(student.config, tiny_teacher().config, layers)


# --- freezing and counting -----------------------------------------------------------------------------------


def test_freezing():
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [1])
    freeze_student_mlps(student)
    freeze_student_layers(student, [1])
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    expected = {
        name for name, _ in student.named_parameters() if ".mlp." in name or name.startswith("backbone.layers.1.")
    }
    assert frozen == expected
    check_trainable(student)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        check_trainable(student)


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_counts_every_parameter_once(tied):
    student = tiny_student(tie_embeddings=tied)
    apply_replacements(student, tiny_teacher(), [1])
    freeze_student_layers(student, [1])
    rows = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in parameter_table(student).splitlines()[1:]}
    counts = {name: [int(value.replace(",", "")) for value in row] for name, row in rows.items()}
    replaced = sum(p.numel() for p in student.backbone.layers[1].parameters())
    total = sum(p.numel() for p in student.parameters())
    assert counts["replaced layers"] == [replaced, 0, replaced]
    assert counts["all"] == [total, total - replaced, replaced]
    parts = [row for name, row in counts.items() if name != "all"]
    assert [sum(column) for column in zip(*parts, strict=True)] == counts["all"]
    assert counts["embedding and head"][0] == (1 if tied else 2) * 56 * 32


def test_the_table_says_which_part_learns_at_which_rate():
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [1])
    freeze_student_layers(student, [1])
    header, *lines = parameter_table(student, 3e-4, 0.1).splitlines()
    assert header.endswith("learning rate")
    rates = {line[:20].strip(): line.split()[-1] for line in lines}
    assert (rates["mixers"], rates["MLPs"], rates["norms"]) == ("0.0003", "3e-05", "3e-05")
    assert (rates["embedding and head"], rates["replaced layers"]) == ("3e-05", "-")


# --- loading -------------------------------------------------------------------------------------------------


def test_models_load_in_the_dtype_asked_for_and_the_teacher_frozen(saved):
    teacher = get_teacher_model(saved[0], torch.bfloat16, CPU)
    student = get_student_model(saved[1], torch.bfloat16, CPU)
    assert {p.dtype for p in [*teacher.parameters(), *student.parameters()]} == {torch.bfloat16}
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert teacher.config._attn_implementation == "sdpa"


def test_a_teacher_without_its_head_still_lends_layers(saved):
    teacher = get_teacher_model(saved[0], torch.float32, CPU, with_head=False)
    assert teacher.get_output_embeddings() is None
    student = tiny_student()
    apply_replacements(student, teacher, [1])
    expected = tiny_teacher().model.layers[1].mlp.up_proj.weight
    assert torch.equal(student.backbone.layers[1].mlp.up_proj.weight, expected)


def test_special_tokens_come_from_the_tokenizer(tmp_path):
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 3, 4, None

    student = tiny_student()
    adopt_special_tokens(student, Tokenizer())
    student.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 4
    assert LlambaConfig.from_pretrained(tmp_path).bos_token_id == 3


def test_a_missing_model_is_one_clear_error(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="--teacher_model meta-llama/Nothing: neither a directory nor complete"):
        locate_model("--teacher_model", "meta-llama/Nothing", local_files_only=True)
    with pytest.raises(ValueError, match="neither a directory"):
        locate_model("--teacher_model", str(tmp_path / "nowhere"), local_files_only=False)
    assert locate_model("--teacher_model", "meta-llama/Some", local_files_only=False) == "meta-llama/Some"


def test_a_directory_that_is_not_whole_says_what_is_missing(saved, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        locate_model("--student_model", str(empty), True)
    (empty / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weights in it"):
        locate_model("--student_model", str(empty), True)
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (empty / "model.safetensors.index.json").write_text(json.dumps(index))
    (empty / "model-1.safetensors").touch()
    with pytest.raises(ValueError, match=r"shards are missing: model-2\.safetensors"):
        locate_model("--student_model", str(empty), True)
    assert locate_model("--student_model", saved[1], True) == saved[1]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: folder / "config.json", "is a file; expected a directory"),
        (
            lambda folder: link_to_nowhere(folder.with_name("gone")),
            "is a link that leads nowhere; expected a dir",
        ),
        (
            lambda folder: link_to_nowhere(folder / "config.json").parent,
            "no config.json in it (links that lead now",
        ),
        (lambda folder: link_to_nowhere(folder / "model.safetensors").parent, "(links that lead nowhere: model.safet"),
    ],
    ids=["file", "link", "config", "weights"],
)
def test_what_is_no_directory_of_a_model(saved, damage, expected):
    name = str(damage(Path(saved[1])))
    with pytest.raises(ValueError) as error:
        locate_model("--student_model", name, False)
    assert str(error.value).startswith(f"--student_model {name}: ") and expected in str(error.value)


def link_to_nowhere(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/nowhere/at/all")
    return path


def test_a_tokenizer_that_is_a_link_to_nowhere_is_named(saved):
    link_to_nowhere(Path(saved[0]) / "tokenizer.json")
    with pytest.raises(ValueError, match=r"cannot read its tokenizer \(links that lead nowhere: tokenizer.json\)"):
        get_tokenizer("--teacher_model", saved[0])


def test_a_student_of_another_architecture_is_refused(saved):
    teacher, student = get_configs(*saved)
    assert isinstance(teacher, LlamaConfig) and isinstance(student, LlambaConfig)
    with pytest.raises(ValueError, match="--student_model .* model_type 'llama'"):
        get_configs(saved[0], saved[0])


def test_the_student_keeps_one_copy_while_layers_change_places():
    """The replaced layer is freed, and the other weights stay where they are in memory."""
    import gc
    import weakref

    student = tiny_student()
    old = weakref.ref(student.backbone.layers[1])
    kept = student.backbone.layers[0].mixer.in_proj.weight.data_ptr()
    apply_replacements(student, tiny_teacher(), [1])
    gc.collect()
    assert old() is None
    assert student.backbone.layers[0].mixer.in_proj.weight.data_ptr() == kept


# --- memory and speed of the blocks --------------------------------------------------------------------------


def recomputed(student):
    """Returns how often each block runs in a forward and backward pass: twice if its activations are recomputed."""
    calls = [0] * len(student.backbone.layers)

    def count(index):
        def hook(module, args):
            calls[index] += 1

        return hook

    for index, block in enumerate(student.backbone.layers):
        block.input_layernorm.register_forward_pre_hook(count(index))
    student.train()(tokens(), use_cache=False).logits.sum().backward()
    return calls


@pytest.mark.parametrize("n_blocks,expected", [(None, [2, 2, 2, 2]), (3, [2, 2, 2, 1]), (1, [2, 1, 1, 1])])
def test_as_many_blocks_are_recomputed_as_asked(n_blocks, expected):
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [1])  # a block like the others
    checkpoint_blocks(student, n_blocks)
    assert recomputed(student) == expected


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"), "layers.1.self_attn.q_proj.weight"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(7)}), r"norm.weight \(7, expected 32\)"),
    ],
    ids=["missing", "misshapen"],
)
def test_a_teacher_is_not_filled_up_with_random_weights(tmp_path, damage, named, with_head):
    tiny_teacher().save_pretrained(tmp_path)
    get_teacher_model(str(tmp_path), torch.float32, torch.device("cpu"), with_head)
    weights = load_file(tmp_path / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--teacher_model .* missing or misshapen: .*{named}"):
        get_teacher_model(str(tmp_path), torch.float32, torch.device("cpu"), with_head)


@pytest.mark.parametrize("with_head", [True, False])
def test_a_teachers_layers_are_not_left_out_in_silence(tmp_path, with_head):
    """As a config with fewer layers, or without the biases, would have it."""
    tiny_teacher().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match="--teacher_model .* has no place for weights .*layers.3.input_layernorm"):
        get_teacher_model(str(tmp_path), torch.float32, CPU, with_head)
    tiny_teacher(attention_bias=True).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", attention_bias=False)
    with pytest.raises(ValueError, match="no place for weights .*self_attn.k_proj.bias"):
        get_teacher_model(str(tmp_path), torch.float32, CPU, with_head)


def test_what_is_beside_a_teachers_layers_may_stay_there(tmp_path):
    """As the frequencies of older Llamas."""
    tiny_teacher().save_pretrained(tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "vision.layers.0.mlp.weight": torch.ones(3)}
    save_file({**load_file(tmp_path / "model.safetensors"), **more}, tmp_path / "model.safetensors")
    teacher = get_teacher_model(str(tmp_path), torch.float32, CPU)
    assert torch.equal(teacher.model.norm.weight, load_file(tmp_path / "model.safetensors")["model.norm.weight"])
