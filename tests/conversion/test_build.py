"""Students made of tiny Llamas, against computations on whole models; and how a conversion that was stopped resumes."""

import contextlib
import copy
import errno
import gc
import json
import math
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import build, unfinished
from conversion.build import Recipe, build_student
from conversion.calibration import Windows
from conversion.report import format_figures
from conversion.teacher_weights import TeacherWeights
from inputs.option_values import PRESETS
from llamba import LlambaConfig, LlambaForCausalLM
from model_utils import apply_replacements
from monitoring.layer_map import layer_map
from tests.llamba.test_llamba import GOLDEN
from tests.tiny import tiny_teacher

TOKENIZER = PRESETS / "tiny" / "teacher"
TEXT = Windows(
    torch.randint(0, 50, (12, 16), generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(2)),
)
FLOAT32 = Recipe(dtype="float32", layers=(1, 2))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def make(tmp_path, tokenizer):
    """Returns a function that saves a teacher, makes a student of it, and returns teacher, student and figures."""

    def make(recipe=FLOAT32, output="student", **changes):
        teacher = tiny_teacher(initializer_range=0.2, **changes)
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        if not (tmp_path / "teacher").exists():
            teacher.save_pretrained(tmp_path / "teacher")
        weights = TeacherWeights(str(tmp_path / "teacher"))
        figures = build_student(weights, tmp_path / output, tokenizer, TEXT, recipe)
        return teacher, LlambaForCausalLM.from_pretrained(tmp_path / output).eval(), figures

    return make


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


CASES = [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12}]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("init", ["closed_form", "projections", "random"])
@torch.no_grad()
def test_with_all_layers_given_back_it_is_the_teacher(make, changes, init):
    teacher, student, _ = make(Recipe(init, dtype="float32"), **changes)
    assert student.config.attention_layers == []
    assert student.config.tie_embeddings == bool(changes.get("tie_word_embeddings"))
    apply_replacements(student, teacher, [0, 1, 2, 3])
    ids = TEXT.calibration
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_copied_has_the_bits_of_the_teacher(make):
    teacher, student, _ = make(attention_bias=True, mlp_bias=True)
    own = dict(student.backbone.named_parameters())
    copied = {name for name in own if "mixer" not in name}
    assert len(copied) == 2 + 4 * 8
    given = dict(teacher.model.named_parameters())
    for name in copied:
        expected = {"embedding.weight": "embed_tokens.weight", "final_layernorm.weight": "norm.weight"}.get(name, name)
        assert torch.equal(own[name], given[expected])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)


HEADS = {0: [1, 2], 2: [3]}


@pytest.mark.parametrize(
    "recipe",
    [
        FLOAT32,
        Recipe(layers=(0,)),
        Recipe("random", dtype="float32"),
        Recipe(ssm_bias=False),
        Recipe(dtype="float32", layers=(1,), heads=HEADS),
        Recipe("projections", dtype="float32", ssm_bias=False, heads=HEADS),
    ],
)
@torch.no_grad()
def test_the_figures_are_those_of_whole_models(make, recipe):
    """KL and errors against the models loaded whole: the student as it was written, with the heads that it waits for,
    its hybrid, and both without mixers.
    """
    teacher, student, figures = make(recipe)
    assert student.dtype == getattr(torch, recipe.dtype)
    student.float()
    ids, labels = TEXT.held_out[:, :-1], TEXT.held_out[:, 1:]
    states = teacher(ids, output_hidden_states=True).hidden_states
    last = teacher.model.layers[-1](
        states[-2], position_embeddings=teacher.model.rotary_emb(states[-2], torch.arange(16)[None])
    )
    written = copy.deepcopy(student)
    apply_replacements(student, teacher, [], recipe.heads)
    own = layer_map(student, ids, [*states[:-1], last])["own"]
    assert [layer["own"] for layer in figures["layers"]] == pytest.approx(own, rel=1e-3)

    expected = teacher(ids).logits.log_softmax(-1)
    models = {"all_recurrent": student, "no_mixers": without_mixers(written)}
    if layers := list(recipe.layers):
        models |= {"hybrid": copy.deepcopy(written), "hybrid_no_mixers": copy.deepcopy(models["no_mixers"])}
        apply_replacements(models["hybrid"], teacher, layers, recipe.heads)
        apply_replacements(models["hybrid_no_mixers"], teacher, layers)
    assert set(figures["held_out"]) == {"teacher", *models}
    for name, model in models.items():
        found, log_p = figures["held_out"][name], model(ids).logits.log_softmax(-1)
        kl = (expected.exp() * (expected - log_p)).sum(-1).mean().item()
        ce = torch.nn.functional.nll_loss(log_p.flatten(0, 1), labels.flatten()).item()
        assert (found["kl"], found["ce"]) == pytest.approx((kl, ce), rel=1e-3, abs=1e-5)
    assert figures["held_out"]["teacher"]["ce"] == pytest.approx(
        torch.nn.functional.nll_loss(expected.flatten(0, 1), labels.flatten()).item(), rel=1e-4
    )


def without_mixers(student):
    emptied = copy.deepcopy(student)
    emptied.config.fitted_beside = {}
    for layer in emptied.backbone.layers:
        for parameter in layer.mixer.out_proj.parameters():
            parameter.zero_()
    return emptied


def test_the_closed_form_is_better_than_the_projections_and_the_random_start(make):
    kl = {}
    for init in ("closed_form", "projections", "random"):
        _, _, figures = make(Recipe(init, dtype="float32"), output=init)
        kl[init] = figures["held_out"]["all_recurrent"]["kl"]
    assert kl["closed_form"] < min(kl["projections"], kl["random"])


def test_figures_that_are_not_finite_are_null(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build._Building, "_finish", lambda *_: {"teacher": HELD_OUT, "all_recurrent": IMPOSSIBLE})
    monkeypatch.setattr(build, "_write_rest", lambda *_: None)
    monkeypatch.setattr(build.UnfinishedStudent, "publish", lambda work: None)
    with contextlib.suppress(OSError, ValueError):  # there is no student to load
        make(FLOAT32)
    text = (tmp_path / "student.unfinished" / "conversion.json").read_text()
    figures = json.loads(text, parse_constant=pytest.fail)
    assert figures["held_out"]["all_recurrent"]["kl"] is None
    assert "some figures are not finite: they are null in conversion.json" in caplog.messages
    assert "nan" in format_figures(figures)


HELD_OUT = {"kl": 0.0, "agreement": 1.0, "perplexity": 3.0, "tokens": 48}
IMPOSSIBLE = {**HELD_OUT, "kl": float("nan")}


@pytest.mark.parametrize("init", ["closed_form", "projections", "random"])
def test_a_layer_whose_attention_gives_nothing(tmp_path, tokenizer, caplog, init):
    """Llamas that were made deeper have such layers; of this one the MLP gives nothing either."""
    teacher = tiny_teacher()
    torch.nn.init.zeros_(teacher.model.layers[2].self_attn.o_proj.weight)
    torch.nn.init.zeros_(teacher.model.layers[2].mlp.down_proj.weight)
    teacher.save_pretrained(tmp_path / "teacher")
    caplog.set_level("INFO")
    weights = TeacherWeights(str(tmp_path / "teacher"))
    figures = build_student(weights, tmp_path / "student", tokenizer, TEXT, Recipe(init, dtype="float32"))
    for error in figures["layers"][2].values():  # of random mixers relative to the layer's input, and large
        assert 1 < error < math.inf if init == "random" else error == 0
    assert all(error["mixer"] > 0 for i, error in enumerate(figures["layers"]) if i != 2)
    numbers = [message.split(" |")[0] for message in caplog.messages if message.startswith("layer ")]
    assert numbers == [f"layer {i} done, {i + 1} of 4" for i in range(4)]


@pytest.mark.parametrize(
    "recipe,remedy",
    [
        (Recipe("projections", dtype="float16"), "use --dtype float32 or --init random"),
        (Recipe("random", dtype="float32"), "use another teacher"),
    ],
)
def test_a_mixer_that_is_not_finite(make, monkeypatch, recipe, remedy):
    monkeypatch.setattr(build.LlambaBlock, "float", lambda block: spoil(block))
    with pytest.raises(ValueError, match=f"layer 0 of the student gives values that are not finite, .*; {remedy}$"):
        make(recipe)


def spoil(block):
    torch.nn.init.constant_(block.to(torch.float32).mixer.out_proj.weight, float("inf"))
    return block


def test_it_loads_as_any_student_and_says_what_it_is(make, tmp_path):
    _, student, figures = make()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "student")) is LlambaForCausalLM
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == len(AutoTokenizer.from_pretrained(TOKENIZER))
    saved = json.loads((tmp_path / "student" / "conversion.json").read_text())
    assert saved == figures
    assert saved["rope_parameters"]["rope_type"] == "default"
    assert student.config.ssm_cfg["bias"] is True and student.config.ssm_cfg["d_state"] == 8
    text = format_figures(figures)
    assert "hybrid with --layers 1 2" in text and "held-out tokens" in text


def test_without_biases_it_has_the_published_layout(make, tmp_path):
    """Against a small model of a published config, and the official one's names in shared/golden if that is there."""
    _, student, _ = make(Recipe(ssm_bias=False))
    with safe_open(tmp_path / "student" / "model-00002-of-00006.safetensors", "pt") as shard:
        names = {name.removeprefix("backbone.layers.0.") for name in shard.keys()}  # noqa: SIM118
    mixer = ("D", "conv1d.bias", "conv1d.weight", "in_proj.weight", "out_proj.weight", "z_bias")
    parts = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == {*(f"mixer.{name}" for name in mixer), *(f"{part}.weight" for part in parts)}
    assert student.config.ssm_cfg["bias"] is False
    values = json.loads((PRESETS / "llamba-8b" / "student" / "config.json").read_text())
    values |= {"vocab_size": 56, "d_model": 32, "n_layer": 4}
    values["mlp_cfg"] |= {"intermediate_size": 40}
    values["ssm_cfg"] |= {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4}
    published = LlambaForCausalLM(LlambaConfig(**values))
    assert shapes_of(student) == shapes_of(published)
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    for own, expected in (
        (saved, values),
        (saved["ssm_cfg"], values["ssm_cfg"]),
        (saved["mlp_cfg"], values["mlp_cfg"]),
    ):
        of_the_model = {"pad_vocab_size_multiple", "norm_epsilon"}  # these are the teacher's
        for name, value in expected.items():
            assert isinstance(value, dict) or name in of_the_model or own[name] == value, name
    if GOLDEN.is_dir():
        with safe_open(GOLDEN / "untied" / "model.safetensors", "pt") as official:
            official_names = set(official.keys())
        n_layer = json.loads((GOLDEN / "untied" / "config.json").read_text())["n_layer"]
        own = {name for name in student.state_dict() if ".layers." not in name}
        assert own | {f"backbone.layers.{i}.{name}" for i in range(n_layer) for name in names} == official_names


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- one layer at a time, and again --------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bytes(make, tmp_path):
    for output in ("first", "second"):
        make(output=output)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_a_finished_student_is_left_as_it_is(make, tmp_path, monkeypatch):
    _, _, figures = make()
    before = files_of(tmp_path / "student")
    monkeypatch.setattr(build, "fit_mixer", None)
    assert make()[2] == figures
    assert files_of(tmp_path / "student") == before
    (tmp_path / "student" / "model-00003-of-00006.safetensors").unlink()
    with pytest.raises(ValueError, match="student is damaged: .*00003-of-00006.*; delete that folder, and"):
        make()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_once", [3, 4, 7])
def test_killed_again_and_again_it_resumes_to_the_same_bytes(make, tmp_path, monkeypatch, at_once):
    """Each attempt is killed before its fourth write, say, with half of a file beside the whole ones."""
    make(output="whole")
    write_whole, written = unfinished.write_whole, []

    def write(path, content):
        if len(written) == at_once:
            path.with_name(".1-2.partial").write_bytes(content[:10])
            raise Killed
        written.append(path.name)
        write_whole(path, content)

    monkeypatch.setattr(unfinished, "write_whole", write)
    attempts = 0
    while not (tmp_path / "student").exists():
        attempts += 1
        written.clear()
        with contextlib.suppress(Killed):
            make()
    assert attempts >= 13 / at_once  # writes in all
    assert files_of(tmp_path / "student") == files_of(tmp_path / "whole")
    assert not (tmp_path / "student.unfinished").exists()


@pytest.mark.parametrize("owner,name", [(unfinished, "write_whole"), (Path, "rename")])
def test_killed_at_the_very_start_or_end_it_resumes(make, tmp_path, monkeypatch, owner, name):
    def kill(*_):
        raise Killed

    with monkeypatch.context() as patches, pytest.raises(Killed):
        patches.setattr(owner, name, kill)
        make()
    make()
    make(output="whole")
    assert files_of(tmp_path / "student") == files_of(tmp_path / "whole")


def test_only_one_layer_is_in_memory(make, monkeypatch):
    """When a layer is read, no parameter of an earlier one of the teacher's or the student's is alive."""
    alive, reads = [], []
    layer, build_block = TeacherWeights.layer, build._Building._block

    def watched(module, index):
        alive.extend((index, weakref.ref(parameter)) for parameter in module.parameters())
        return module

    def read(self, index, *args):
        gc.collect()
        reads.append({other for other, reference in alive if reference() is not None})
        return watched(layer(self, index, *args), index)

    def written(self, index, *args):
        return watched(build_block(self, index, *args), index)

    monkeypatch.setattr(TeacherWeights, "layer", read)
    monkeypatch.setattr(build._Building, "_block", written)
    make()
    assert len(alive) > 4 * 18
    assert reads == [set()] * 4


@pytest.fixture
def stopped(make, monkeypatch):
    """A conversion that was killed behind layer 1."""
    save_progress = unfinished.UnfinishedStudent.save_progress

    def save_and_die(work, tensors, figures):
        save_progress(work, tensors, figures)
        if len(figures["errors"]) == 2:
            raise Killed

    with monkeypatch.context() as patches, pytest.raises(Killed):
        patches.setattr(unfinished.UnfinishedStudent, "save_progress", save_and_die)
        make()


@pytest.mark.parametrize("name,n_bytes", [("model-00002-of-00006", 0), ("model-00002-of-00006", 100), ("progress", 9)])
def test_a_file_that_was_cut_or_deleted_since_is_named(make, stopped, tmp_path, name, n_bytes):
    folder = tmp_path / "student.unfinished"
    os.truncate(folder / f"{name}.safetensors", n_bytes)
    if not n_bytes:
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=f"^--output {tmp_path / 'student'}: {folder} is damaged: .*; delete that f"):
        make()


@pytest.mark.parametrize("owner,name", [(unfinished, "write_whole"), (LlambaConfig, "save_pretrained")])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(make, stopped, tmp_path, monkeypatch, owner, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patches, pytest.raises(ValueError) as error:
        patches.setattr(owner, name, fail)
        make()
    assert str(error.value) == (
        f"--output {tmp_path / 'student'}: {tmp_path / 'student.unfinished'} cannot be written (No space left on "
        "device); make room, or correct this, and give the same command to resume"
    )
    make()


def test_a_tokenizer_that_cannot_be_written(make, stopped, tokenizer, monkeypatch):
    def fail(*_):
        raise Exception("No space left on device (os error 28)")  # so does the library tokenizers

    with monkeypatch.context() as patches, pytest.raises(ValueError, match="its tokenizer cannot be written to .*28"):
        patches.setattr(type(tokenizer), "save_pretrained", fail)
        make()
    make()


def test_all_files_are_on_the_disk_before_the_student_has_its_name(make, tmp_path, monkeypatch):
    flushed, flush = set(), unfinished.flush_to_disk
    monkeypatch.setattr(unfinished, "flush_to_disk", lambda path: (flushed.add(path.name), flush(path)))
    make()
    assert {file.name for file in (tmp_path / "student").iterdir()} <= flushed
