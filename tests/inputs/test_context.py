"""How many tokens models can read at once, by configs as they are published."""

import pytest
from transformers import (
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
    XLNetConfig,
)

from inputs.context import context_length, stated_length
from tests.tiny import tiny_config, tiny_hybrid, tiny_teacher

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
KINDS = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}


def llama(length, **rope):
    return LlamaConfig(max_position_embeddings=length, rope_scaling=rope or None)


@pytest.mark.parametrize(
    "config,expected",
    [
        (llama(2048), 2048),
        (llama(4096, type="linear", factor=4), 16384),  # vicuna-7b-v1.5-16k
        (llama(4096, rope_type="dynamic", factor=2.5), 10240),
        (llama(131072, **LLAMA3, original_max_position_embeddings=8192), 131072),  # Llama-3.2
        (Qwen2Config(max_position_embeddings=32768, rope_scaling=YARN), 131072),  # as Qwen2.5's README has it
        (Qwen2Config(max_position_embeddings=131072, rope_scaling=YARN), 131072),
        (llama(4096, rope_type="yarn", factor=2.0), 8192),
        (Phi3Config(max_position_embeddings=131072, rope_scaling=LONG), 131072),
        (Gemma3TextConfig(max_position_embeddings=131072, rope_parameters=KINDS), 131072),
        (llama(4096, rope_type="linear", factor=float("inf")), 4096),
        (llama(4096, rope_type="linear", factor=0.5), 4096),
        (GPT2Config(n_positions=64), 64),
        (MptConfig(max_seq_len=512), 512),
        (FalconConfig(max_position_embeddings=256), 256),
        (MambaConfig(), None),
        (tiny_config(), None),
        (tiny_hybrid(teacher=tiny_teacher(max_position_embeddings=96)).config, 96),
        (XLNetConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_context_of_published_configs(config, expected):
    assert context_length(config) == expected


def test_what_a_config_states_is_not_scaled():
    assert stated_length(llama(4096, rope_type="linear", factor=4.0)) == 4096
    assert stated_length(GPT2Config(n_positions=64)) == 64 and stated_length(tiny_config()) is None
