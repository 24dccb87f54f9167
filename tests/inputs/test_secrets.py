"""A run writes no secret of its environment anywhere."""

import train_gpus
from tests import fresh


def test_a_run_writes_no_secret_anywhere(tmp_path):
    """Keys that libraries take from the environment are in no file, and in nothing that is printed."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    secrets = {name: f"{index}5ecre7" * 5 + "abcde" for index, name in enumerate(names, start=1)}
    assert {len(secret) for secret in secrets.values()} == {40}  # as W&B wants its key
    folder = tmp_path / "out"
    options = f"--preset tiny --output_dir {folder} --max_steps 2 --log_interval 1 --save_interval 2"
    options += " --wandb --wandb_mode offline"
    code, printed = fresh.script(options.split(), train_gpus.main, **secrets, HOME=str(tmp_path / "home"))
    assert code == 0, printed[-3000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}
    assert any(".wandb" in name for name in written) and any("checkpoint-2" in name for name in written)
    for place, content in {**written, "what is printed": printed.encode()}.items():
        for name, secret in secrets.items():
            assert secret.encode() not in content, f"{name} is in {place}"
