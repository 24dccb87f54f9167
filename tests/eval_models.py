"""Small models for tests of the evaluation, on disk and loaded, and the options of a call that measures all of them."""

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llamba import LlambaConfig, LlambaForCausalLM, attention_cfg_from
from tests.tiny import tiny_teacher

TINY = Path(__file__).parents[1] / "presets" / "tiny"
MODELS = ["student", "hybrid", "hybrid_ft", "teacher"]
LAYERS = ["0", "2"]


def make_student(vocab_size: int, **hybrid) -> LlambaForCausalLM:
    config = LlambaConfig(
        vocab_size=vocab_size,
        pad_vocab_size_multiple=100,
        d_model=32,
        n_layer=3,
        mlp_cfg={"intermediate_size": 64},
        ssm_cfg={"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "chunk_size": 16},
        initializer_range=0.2,
        **hybrid,
    )
    return LlambaForCausalLM(config).eval()


def make_teacher(vocab_size: int) -> LlamaForCausalLM:
    return tiny_teacher(vocab_size=vocab_size, num_hidden_layers=3, max_position_embeddings=512, initializer_range=0.2)


def assemble_hybrid(student: LlambaForCausalLM, teacher: LlamaForCausalLM) -> LlambaForCausalLM:
    """Builds the hybrid weight by weight, not by the function that the entry uses."""
    hybrid = make_student(
        student.config.vocab_size,
        attention_layers=[int(layer) for layer in LAYERS],
        attention_cfg=attention_cfg_from(teacher.config),
    )
    weights = student.state_dict()
    for layer in LAYERS:
        prefix = f"backbone.layers.{layer}."
        weights = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
        given = teacher.model.layers[int(layer)].state_dict()
        weights |= {prefix + name: weight for name, weight in given.items()}
    hybrid.load_state_dict(weights)
    return hybrid


def save_models(root: Path) -> SimpleNamespace:
    """Saves a teacher, a student and a "trained" hybrid with random weights, and returns them loaded too."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    torch.manual_seed(0)
    teacher, student = make_teacher(len(tokenizer)), make_student(len(tokenizer))
    hybrid, trained = assemble_hybrid(student, teacher), assemble_hybrid(student, teacher)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for name, model in {"teacher": teacher, "student": student, "ckpt": trained}.items():
        model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "teacher")
    loaded = {"student": student, "hybrid": hybrid, "hybrid_ft": trained, "teacher": teacher}
    return SimpleNamespace(root=root, tokenizer=tokenizer, loaded=loaded)


def options_of(root: Path) -> dict[str, list[str]]:
    """Returns the options of a correct call, which a test changes in one place."""
    return {
        "teacher_model": [str(root / "teacher")],
        "student_model": [str(root / "student")],
        "ckpt": [str(root / "ckpt")],
        "layers": LAYERS,
        "dtype": ["float32"],
        "device": ["cpu"],
        "mmlu_dir": [str(TINY / "mmlu")],
        "num_fewshot": ["2"],
        "limit": ["3"],
        "batch_size": ["4"],
        "which": MODELS,
    }


def only(options: dict[str, list[str]], *which: str) -> dict[str, list[str]]:
    """Returns the options of a call that scores these models; --ckpt is among them if it is scored."""
    kept = {name: values for name, values in options.items() if name != "ckpt" or "hybrid_ft" in which}
    return {**kept, "which": list(which)}


def command_line(options: dict[str, list[str]]) -> list[str]:
    return [word for name, values in options.items() for word in (f"--{name}", *values)]
