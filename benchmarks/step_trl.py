"""TRL's trainers as candidates of bench_step.py, on its models and windows and with its optimizer's settings."""

import tempfile
from typing import Any

import torch
from bench_step import STEPS, Case
from datasets import Dataset
from harness import ROOT
from step_candidates import Recorder, build_student, build_teacher, train_options, windows_of
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def train(case: Case, candidate: str, recorder: Recorder) -> None:
    build_trainer = {"trl gkd": gkd, "trl distillation": distillation}[candidate]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(case, common_settings(case, folder))
        trainer.add_callback(TellRecorder(recorder, trainer))
        trainer.train()


class KeepsLoss(Trainer):
    """For a trainer to inherit from as well: the loss of the last step, which its log would round."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.last_loss: Tensor = super().training_step(*args, **kwargs)
        return self.last_loss


class TellRecorder(TrainerCallback):
    def __init__(self, recorder: Recorder, trainer: KeepsLoss) -> None:
        self.recorder, self.trainer = recorder, trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.step_done({"kl": self.trainer.last_loss.item()})


def common_settings(case: Case, folder: str) -> dict[str, Any]:
    ours = train_options(case)
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": case.batch_size,
        "learning_rate": ours.max_lr,
        "adam_beta2": 0.95,
        "weight_decay": ours.weight_decay,
        "max_grad_norm": ours.grad_clip,
        "beta": 0.0,  # KL(teacher || student)
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "ddp_find_unused_parameters": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def models_and_data(case: Case, column: str) -> dict[str, Any]:
    """Every rank has its teacher. The tokenizer is asked for, but has nothing to do."""
    return {
        "model": build_student(case),
        "teacher_model": build_teacher(case),
        "train_dataset": Dataset.from_dict({column: windows_of(case).flatten(0, 2).tolist()}),
        "processing_class": AutoTokenizer.from_pretrained(ROOT / "presets" / "tiny" / "teacher"),
    }


# --- generalized knowledge distillation ----------------------------------------------------------------------


class Gkd(KeepsLoss, GKDTrainer):
    pass


def gkd(case: Case, settings: dict[str, Any]) -> Gkd:
    config = GKDConfig(
        **settings,
        lmbda=0.0,  # learn from the windows, not from what the student generates
        train_sampling_strategy="sequential",
        # Else TRL 1.16 divides by the tokens of all ranks, and DDP by the ranks once more.
        average_tokens_across_devices=False,
    )
    return Gkd(args=config, data_collator=collate, **models_and_data(case, "window"))


def collate(rows: list[dict]) -> dict[str, Tensor]:
    input_ids = torch.tensor([row["window"] for row in rows])  # (B, S + 1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}


# --- distillation --------------------------------------------------------------------------------------------


class OffPolicyDistillation(KeepsLoss, DistillationTrainer):
    """Takes windows in the place of the prompts and completions that it would generate."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_kwarg_keys = ()  # a Llamba knows `logits_to_keep`, its backbone does not

    def _generate(self, prompts: list[list[int]]) -> tuple:
        return [window[:1] for window in prompts], [window[1:] for window in prompts], None, None, None


def distillation(case: Case, settings: dict[str, Any]) -> OffPolicyDistillation:
    config = DistillationConfig(**settings, shuffle_dataset=False)
    return OffPolicyDistillation(args=config, **models_and_data(case, "prompt"))
