"""Writes the model card of an exported Llamba: what the model is, from its config; how to load it; and how it was made,
from the options of its run. It names no path of the machine on which it was made.
"""

import re
from pathlib import Path
from typing import Any

from .configuration import LlambaConfig
from .families import FAMILIES

TESTED = "5.17.0 and 5.23.0"  # transformers
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

LOAD_MODEL = 'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)'
LOAD_BOTH = f"""from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
{LOAD_MODEL}"""
LOAD_ALONE = f"""from transformers import AutoModelForCausalLM
{LOAD_MODEL}"""
GENERATE = """inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=50)
print(tokenizer.decode(outputs[0]))"""

CARD = """---
{front_matter}
---

# {title}

{summary}

| | |
| --- | --- |
{facts}

## Use

Put the name of this repository, or of the directory that holds it, for `PATH`:

```python
{code}
```

`trust_remote_code=True` lets transformers run the Python files beside the weights; read them first if you do not know
where they come from. They need PyTorch and transformers 5.17 or newer (tried with {tested}). On a GPU,
`mamba-ssm` or `fla-core`, and `causal-conv1d`, are used where they are installed, and are not required.
"""

DISTILLED = """\
Distilled from a teacher: the student learns from text and from the teacher's distribution over the next token.\
"""
ALIGNED = """\
Aligned with a teacher, and not distilled: given the teacher's hidden states, each mixer learns the output of the
attention in whose place it is, or what the heads beside it leave of that. Nothing else was trained.\
"""
RUN = """
## How it was made

{what}
This is the state after optimizer step {step} (micro step {micro_step}), when {tokens:,} tokens had been seen.

| | |
| --- | --- |
{options}
"""


def model_card(
    config: LlambaConfig,
    n_parameters: int,
    dtypes: set[str],
    has_tokenizer: bool,
    state: dict[str, Any] | None,
    near: Path,
) -> str:
    """Returns the text of the card.

    state: training_state.json of the checkpoint, or None. near: the checkpoint's folder; a name is taken for a path if
    it exists below this folder or one of its parents. Raises KeyError or TypeError if `state` is not that of a run.
    """
    facts = {
        "parameters": f"{n_parameters:,}",
        "dtype": ", ".join(sorted(dtypes)),
        "vocabulary": f"{config.vocab_size:,}",
        "width": f"{config.d_model:,}",
        "layers": config.n_layer,
        "attention layers": ", ".join(map(str, config.attention_layers)) or "none",
    }
    if config.attention_heads:
        facts["attention heads beside mixers"] = _heads(config)
    run = None if state is None else state["arguments"]
    card = CARD.format(
        front_matter=_front_matter(run, near),
        title="A hybrid Llamba" if config.has_attention else "A Llamba",
        summary=_summary(config),
        facts=_rows(facts),
        code=f"{LOAD_BOTH}\n\n{GENERATE}" if has_tokenizer else LOAD_ALONE,
        tested=TESTED,
    )
    if state is not None:
        counters = {name: state[name] for name in ("step", "micro_step", "tokens")}
        options = _rows({**_start(state["arguments"], near), **_options(state["arguments"])})
        what = ALIGNED if _is_alignment(state["arguments"]) else DISTILLED
        card += RUN.format(what=what, options=options, **counters)
    return card


def _summary(config: LlambaConfig) -> str:
    n_attention, n_layer = len(config.attention_layers), config.n_layer
    recurrent = "Mamba-2 mixers, whose memory per sequence does not grow with its length"
    text = "A causal language model: a transformer whose attention has been replaced by Mamba-2 mixers "
    text += "([Llamba](https://arxiv.org/abs/2502.14458)). "
    if not config.has_attention:
        return text + f"All {n_layer} layers are {recurrent}."
    family, n_parts = FAMILIES[config.attention_config().model_type].title, len(config.attention_heads)
    parts = [f"{n_layer - n_attention - n_parts} of its {n_layer} layers are {recurrent}"]
    if n_attention:
        parts.append(f"{n_attention} are a {family}'s attention layers, taken over whole: norms, attention, MLP")
    if n_parts:
        parts.append(f"{n_parts} have some of a {family}'s attention heads beside a mixer of the others")
    return text + "; ".join(parts) + ". Layers and heads count from 0."


def _heads(config: LlambaConfig) -> str:
    return ", ".join(f"{layer}:{head}" for layer, kept in config.attention_heads.items() for head in kept)


def _front_matter(run: dict[str, Any] | None, near: Path) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- llamba", "- hybrid", "- mamba-2", "- distillation"]
    if run is not None:
        models = [run[name] for name in ("teacher_model", "student_model") if _is_hub_name(run[name], near)]
        lines += ["base_model:", *(f"- {name}" for name in models)] if models else []
        lines += ["datasets:", f"- {run['dataset_name']}"] if _is_hub_name(run["dataset_name"], near) else []
    return "\n".join(lines)


def _is_alignment(run: dict[str, Any]) -> bool:
    return run.get("stage") == "align"  # earlier versions had no stages


def _start(run: dict[str, Any], near: Path) -> dict[str, Any]:
    """Returns what a run began with."""
    teacher, student, data = (
        run[name] if _is_hub_name(run[name], near) else "local"
        for name in ("teacher_model", "student_model", "dataset_name")
    )
    if data != "local":
        data = ", ".join(filter(None, (data, run["dataset_subset"], run["dataset_split"])))
    return {
        "teacher": teacher,
        "student at the start": student,
        "layers from the teacher": " ".join(map(str, run["layers"])) or "none",
        "heads from the teacher": " ".join(run.get("heads", [])) or "none",  # earlier versions had none
        "data": data,
        "sequence length": run["seq_length"],
    }


def _options(run: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run trained, and how."""
    if _is_alignment(run):
        return {"learning rate": run["max_lr"], "frozen": "all but the mixers"}
    return {
        "cross entropy weight": run["ce_weight"],
        "KL weight": run["kl_weight"],
        "temperature": run["temperature"],
        "learning rate": _rates(run["max_lr"], run.get("copied_lr_factor", 1.0)),
        "frozen": ", ".join(
            part for part, flag in (("MLPs", "freeze_mlp"), ("replaced layers", "freeze_replaced_layers")) if run[flag]
        )
        or "nothing",
    }


def _rates(lr: float, copied_lr_factor: float) -> str:
    return f"{lr}" if copied_lr_factor == 1 else f"{lr} of the mixers, {lr * copied_lr_factor:.4g} of all else"


def _rows(facts: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def _is_hub_name(name: str, near: Path) -> bool:
    """Returns whether a name is of the form `owner/name`, and not a path from here or a folder above the checkpoint."""
    folder = near.resolve()
    begins = (Path.cwd(), folder, *folder.parents)
    return HUB_NAME.fullmatch(name) is not None and not any((begin / name).exists() for begin in begins)
