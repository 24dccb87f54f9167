"""Writes GGUF files of a tiny Llama with a byte-level tokenizer."""

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from conversion.gguf import OF_A_LAYER, OUTER

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell"), ("Ġ", "Ġ"), ("Ġ", "1")]
TOKENS = [*SPECIAL, "<think>", *LETTERS, *("".join(merge) for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
BLOCK = {stored: own for own, stored in OF_A_LAYER.items()}
OUT = {stored: own for own, stored in OUTER.items()}
HALVES = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def tiny_llama(**changes):
    """Returns a Llama of grouped heads of 32, with random weights, its norms too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS) + 5, **{**sizes, **heads, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def values_of(config):
    """Returns what a file says of a model with `config`, by key; a test changes it."""
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, 4, *[1] * (len(TOKENS) - 4)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors_of(model):
    """Returns the tensors of a file, by its names: rows of queries and keys by rotary pairs."""
    tensors = {}
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        values = parameter.detach().numpy()
        if (head := HALVES.get(stem.rpartition(".")[2])) is not None:
            n_heads = getattr(model.config, head)
            paired = values.reshape(n_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2)  # (H, 2, P/2, ...) by pairs
            values = paired.reshape(values.shape)
        if stem in OUT:
            tensors[f"{OUT[stem]}.{kind}"] = values
        else:
            index, _, part = stem.removeprefix("model.layers.").partition(".")
            tensors[f"blk.{index}.{BLOCK[part]}.{kind}"] = values
    return tensors


def write_gguf(file, tensors, values, architecture="llama", matrices="F32"):
    """Writes a file. matrices: GGUF's type of all tensors with rows."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[matrices if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def rounded(tensor, kind):
    """Returns what a tensor's values are after storing them as `kind`."""
    kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(tensor.detach().numpy(), kind), kind).copy())
