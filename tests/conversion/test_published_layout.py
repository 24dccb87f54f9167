"""A student without biases in its mixers has the names and shapes that the official loader asks for:
`LlambaLMHeadModel` of cartesia-pytorch (github.com/cartesia-ai/edge, commit 95d8276), read on 2026-12-01.
"""

import json

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from conversion.build import Recipe, build_student
from conversion.teacher_weights import TeacherWeights
from tests.conversion.test_build import TEXT, TOKENIZER
from tests.tiny import tiny_teacher


def official_shapes(config):
    """Returns the shape of each weight by its name, from the values of a config.json."""
    D, V, ssm, width = (
        config["d_model"],
        config["vocab_size"],
        config["ssm_cfg"],
        config["mlp_cfg"]["intermediate_size"],
    )
    d_inner = ssm["expand"] * D
    d_conv = d_inner + 2 * ssm["n_qk_heads"] * ssm["d_state"]
    of_layer = {
        "mixer.z_bias": (d_inner,),
        "mixer.D": (ssm["n_v_heads"],),
        "mixer.in_proj.weight": (d_conv + d_inner + ssm["n_v_heads"], D),
        "mixer.conv1d.weight": (d_conv, 1, ssm["d_conv"]),
        "mixer.conv1d.bias": (d_conv,),
        "mixer.out_proj.weight": (D, d_inner),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (width, D),
        "mlp.up_proj.weight": (width, D),
        "mlp.down_proj.weight": (D, width),
    }
    if config["mlp_cfg"]["bias"]:
        of_layer |= {"mlp.gate_proj.bias": (width,), "mlp.up_proj.bias": (width,), "mlp.down_proj.bias": (D,)}
    shapes = {"backbone.embedding.weight": (V, D), "backbone.final_layernorm.weight": (D,)}
    for index in range(config["n_layer"]):
        shapes |= {f"backbone.layers.{index}.{name}": shape for name, shape in of_layer.items()}
    return shapes if config["tie_embeddings"] else shapes | {"lm_head.weight": (V, D)}


CASES = [{}, {"tie_word_embeddings": True}, {"head_dim": 12}, {"num_key_value_heads": 1}, {"mlp_bias": True}]


@pytest.mark.parametrize("changes", CASES)
def test_names_and_shapes_are_those_of_the_official_loader(tmp_path, changes):
    tiny_teacher(**changes).save_pretrained(tmp_path / "teacher")
    weights = TeacherWeights(str(tmp_path / "teacher"))
    build_student(weights, tmp_path / "student", AutoTokenizer.from_pretrained(TOKENIZER), TEXT, Recipe(ssm_bias=False))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        with safe_open(tmp_path / "student" / file, "pt") as shard:
            found[name] = tuple(shard.get_slice(name).get_shape())
    assert found == official_shapes({"tie_embeddings": False, **config})
    assert set(config["mlp_cfg"]) == {"intermediate_size", "bias", "act_fn"}  # which it calls its MLP with
    assert config["vocab_size"] % config["pad_vocab_size_multiple"] == 0  # it would make more rows
