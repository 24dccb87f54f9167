"""A Llama that copies by construction, without training: an induction circuit (arXiv 2209.11895) in two layers and
heads that the seed draws. What looks for the heads that retrieve has to find these two.

    first layer, one head     looks at the previous token by its position, and writes down which it is
    a later layer, one head   looks for a token whose previous one is the present one, and says that token

The width is divided: a token's code, the code of the token before it, the code of the next one, by which the head
decides, and one constant. All else, other heads and layers and all MLPs, is small noise.

Symbols: P width of a head; pair p of the rotary embedding are its channels p and p + P / 2; w_p how far it turns by a
token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

VOCAB, CODE = 64, 40  # tokens, and channels of a code
OF_TOKEN, OF_PREVIOUS, OF_NEXT = (slice(part * CODE, (part + 1) * CODE) for part in range(3))
CONSTANT = 3 * CODE  # the channel that is the same for all tokens
WIDTH, HEAD_WIDTH, N_HEADS, N_KV_HEADS = 128, 64, 4, 2
THETA = 1e6
FAST = range(12)  # pairs that tell positions: w_p from 1 to 0.006
SLOW = range(12, 32)  # pairs that turn by a third at most in 60 tokens: they hold a code
AT_PREVIOUS = 25.0  # score of the previous token, of each fast pair
MATCH = 40.0  # score of a token whose previous one is the present one; of another at most about 0.6 of it
LOGIT = 25.0
NOISE = 0.012  # standard deviation of every weight that is not of the two heads


@dataclass(frozen=True)
class Circuit:
    """Names the two heads as (layer, head)."""

    previous: tuple[int, int]
    induction: tuple[int, int]

    @property
    def layers(self) -> set[int]:
        return {self.previous[0], self.induction[0]}

    @property
    def heads(self) -> set[tuple[int, int]]:
        return {self.previous, self.induction}


@torch.no_grad()
def planted_teacher(seed: int, n_layers: int = 6, noise: float = NOISE) -> tuple[LlamaForCausalLM, Circuit]:
    """Returns a teacher in eval mode, in float32, and where its circuit is. It copies texts of up to 60 tokens whose
    words differ from each other, from their second word on. noise: standard deviation of all other weights; at 0.02 it
    is right seven times in ten where the circuit is late.
    """
    dice = torch.Generator().manual_seed(seed)
    first, second = sorted(torch.randperm(n_layers, generator=dice)[:2].tolist())
    head, other = torch.randint(N_HEADS, (2,), generator=dice).tolist()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=noise, generator=dice)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers have no place in the weights

    codes = nn.functional.normalize(torch.randn(VOCAB, CODE, generator=dice), dim=1)  # (V, CODE)
    embedding, logits = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, OF_TOKEN] += codes
    embedding[:, CONSTANT] += 1
    logits[:, OF_NEXT] += codes * LOGIT / math.sqrt(WIDTH / 2)  # there are more parts then, and the norm divides by all
    # Behind the norm a vector of n parts of length 1 has parts of length sqrt(WIDTH / n).
    plant_previous(model.model.layers[first].self_attn, head, size=math.sqrt(WIDTH / 2))
    plant_induction(model.model.layers[second].self_attn, other, size=math.sqrt(WIDTH / 3))
    return model.eval().requires_grad_(False), Circuit((first, head), (second, other))


def plant_previous(attention: LlamaAttention, head: int, size: float) -> None:
    """Has a head look one token back, and copy that token's code to where that of the previous token is. size: of each
    part of its input.

    With q turned by -w_p in each pair against k, the score sum_p cos(w_p (distance - 1)) is largest at distance 1.
    """
    q, k, v, o = parts_of(attention, head)
    amplitude = math.sqrt(AT_PREVIOUS * math.sqrt(HEAD_WIDTH)) / size
    for pair in FAST:
        turn = THETA ** (-2 * pair / HEAD_WIDTH)
        k[pair, CONSTANT] += amplitude
        q[pair, CONSTANT] += amplitude * math.cos(turn)
        q[pair + HEAD_WIDTH // 2, CONSTANT] -= amplitude * math.sin(turn)
    v[:CODE, OF_TOKEN] += torch.eye(CODE) / size
    o[OF_PREVIOUS, :CODE] += torch.eye(CODE)


def plant_induction(attention: LlamaAttention, head: int, size: float) -> None:
    """Has a head look for tokens whose previous one is the present one, and copy their code to that of the next token.
    The codes are in pairs that hardly turn, so that the distance does not matter.
    """
    q, k, v, o = parts_of(attention, head)
    channels = [*SLOW, *(pair + HEAD_WIDTH // 2 for pair in SLOW)]
    amplitude = math.sqrt(MATCH * math.sqrt(HEAD_WIDTH)) / size
    q[channels, OF_TOKEN] += amplitude * torch.eye(CODE)
    k[channels, OF_PREVIOUS] += amplitude * torch.eye(CODE)
    v[:CODE, OF_TOKEN] += torch.eye(CODE) / size
    o[OF_NEXT, :CODE] += torch.eye(CODE)


def parts_of(attention: LlamaAttention, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns views of what a query head has of q, k and v (P, D), and of o_proj (D, P), all zeros now."""
    own, shared = (slice(h * HEAD_WIDTH, (h + 1) * HEAD_WIDTH) for h in (head, head * N_KV_HEADS // N_HEADS))
    return (
        attention.q_proj.weight[own].zero_(),
        attention.k_proj.weight[shared].zero_(),
        attention.v_proj.weight[shared].zero_(),
        attention.o_proj.weight[:, own].zero_(),
    )
