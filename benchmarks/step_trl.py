"""TRL's trainers as candidates of bench_step.py, on its models and windows and with its optimizer's settings."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from harness import ROOT
from step_case import STEPS, Case
from step_models import Recorder, build_student, build_teacher, train_options, windows_of
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def train(case: Case, candidate: str, recorder: Recorder) -> None:
    """Trains one of the two trainers for `STEPS` steps on this rank."""
    build_trainer = {"trl gkd": build_gkd, "trl distillation": build_distillation}[candidate]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(case, common_settings(case, folder))
        trainer.add_callback(RecordSteps(recorder, trainer))
        trainer.train()


class KeepsLoss(Trainer):
    """Keeps the loss of the last step, which a trainer's log would round. Both trainers inherit from it."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.last_loss: Tensor = super().training_step(*args, **kwargs)
        return self.last_loss


class RecordSteps(TrainerCallback):
    """Marks the trainer's steps in a recorder."""

    def __init__(self, recorder: Recorder, trainer: KeepsLoss) -> None:
        self.recorder, self.trainer = recorder, trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.step_done({"kl": self.trainer.last_loss.item()})


def common_settings(case: Case, folder: str) -> dict[str, Any]:
    """Returns the settings of both trainers: sizes and optimizer as in our runs, float32 on CPU."""
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
    """Returns what both trainers are built from. Every rank has a teacher; the tokenizer is required but not used."""
    return {
        "model": build_student(case),
        "teacher_model": build_teacher(case),
        "train_dataset": Dataset.from_dict({column: windows_of(case).flatten(0, 2).tolist()}),
        "processing_class": AutoTokenizer.from_pretrained(ROOT / "presets" / "tiny" / "teacher"),
    }


# --- generalized knowledge distillation ----------------------------------------------------------------------


class Gkd(KeepsLoss, GKDTrainer):
    """Runs GKDTrainer unchanged, and keeps its loss."""


def build_gkd(case: Case, settings: dict[str, Any]) -> Gkd:
    """Builds the trainer of generalized knowledge distillation, off-policy."""
    config = GKDConfig(
        **settings,
        lmbda=0.0,  # learn from the windows, not from what the student generates
        train_sampling_strategy="sequential",
        # With True, TRL 1.16 divides by the tokens of all ranks, and DDP divides by the ranks once more.
        average_tokens_across_devices=False,
    )
    return Gkd(args=config, data_collator=collate, **models_and_data(case, "window"))


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Makes a batch of whole windows, each (B, S + 1); the trainer shifts the labels."""
    input_ids = torch.tensor([row["window"] for row in rows])  # (B, S + 1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}


# --- distillation --------------------------------------------------------------------------------------------


class OffPolicyDistillation(KeepsLoss, DistillationTrainer):
    """Trains on given windows instead of the completions that it would generate."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_kwarg_keys = ()  # a Llamba knows `logits_to_keep`, its backbone does not

    def _generate(self, prompts: list[list[int]]) -> tuple:
        return [window[:1] for window in prompts], [window[1:] for window in prompts], None, None, None


def build_distillation(case: Case, settings: dict[str, Any]) -> OffPolicyDistillation:
    """Builds the trainer of distillation in chunks of the vocabulary."""
    config = DistillationConfig(**settings, shuffle_dataset=False)
    return OffPolicyDistillation(args=config, **models_and_data(case, "prompt"))
