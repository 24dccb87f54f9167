"""The config of the student that a teacher becomes, and which teachers it cannot be made of."""

import math
from typing import Any

from llamba import LlambaConfig
from llamba.families import FAMILIES, KNOWN, TeacherConfig, width_of_heads
from llamba.quantised import SUPPORTED, quantisation

# What a model may have that none of the families has, by the field of its config that switches it on.
IN_NO_FAMILY = {
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "num_local_experts": "experts",
}


def problems_of_teacher(values: dict[str, Any], ssm_bias: bool = True) -> list[str]:
    """Returns why no student can be made of a teacher, by the values of its config.json: a reason and a remedy each,
    without the option that named it. ssm_bias: whether the student's mixers are to have biases.
    """
    problems = []
    if (kind := values.get("model_type")) not in FAMILIES:
        problems.append(
            f"its config.json says model_type {kind!r}; {KNOWN}: the student takes over projections, MLPs and norms of "
            "layers like Llama's, so give such a model, or write a conversion of that model to one"
        )
    for field, what in IN_NO_FAMILY.items():
        if values.get(field) is not None:
            problems.append(
                f"its config.json has {field} {values[field]!r}, {what}, which a student has not; give another"
            )
    if method := quantisation(values):
        problems.append(f"its weights are quantised, by {method} as config.json says; {SUPPORTED}")
    if kind in FAMILIES and "attention_bias" in FAMILIES[kind].fields and values.get("attention_bias") and not ssm_bias:
        problems.append(
            "its attention has biases (attention_bias), and with --no_ssm_bias out_proj has none to put that of "
            "o_proj in; leave --no_ssm_bias out"
        )
    return problems


def student_config(teacher: TeacherConfig, d_state: int | None = None, ssm_bias: bool = True) -> LlambaConfig:
    """Returns the config of a student as wide and as deep as the teacher, all of whose layers are recurrent.

    A mixer has a head for each query head. d_state: the size of its state, by default the teacher's head_dim. ssm_bias:
    whether in_proj and out_proj have biases; the published Llambas have none.
    """
    head_dim = width_of_heads(teacher)
    # x is `expand` times as wide as the model. Where the heads are together narrower, each gets channels of zeros.
    expand = math.ceil(teacher.num_attention_heads * head_dim / teacher.hidden_size)
    return LlambaConfig(
        vocab_size=teacher.vocab_size,
        pad_vocab_size_multiple=1,
        d_model=teacher.hidden_size,
        n_layer=teacher.num_hidden_layers,
        tie_embeddings=teacher.tie_word_embeddings,
        norm_epsilon=teacher.rms_norm_eps,
        initializer_range=teacher.initializer_range,
        mlp_cfg={
            "intermediate_size": teacher.intermediate_size,
            "bias": "mlp_bias" in FAMILIES[teacher.model_type].fields and teacher.mlp_bias,
            "act_fn": teacher.hidden_act,
        },
        ssm_cfg={
            "d_state": d_state or head_dim,
            "n_v_heads": teacher.num_attention_heads,
            "n_qk_heads": teacher.num_attention_heads,
            "expand": expand,
            "bias": ssm_bias,
        },
        bos_token_id=teacher.bos_token_id,
        eos_token_id=teacher.eos_token_id,
        pad_token_id=teacher.pad_token_id,
        architectures=["LlambaForCausalLM"],
    )
