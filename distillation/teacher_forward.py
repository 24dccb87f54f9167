"""The teacher's answers: its forward pass over whole windows, of one rank or of several."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.families import FAMILIES, other_form
from model_utils import MOST_BEYOND_HEAD, logits_beyond_head

# Of a forward pass for several ranks. With more, matrix products would not be faster, and take more memory.
TOKENS_AT_ONCE = 8192


def runs_by_layers(model: PreTrainedModel) -> bool:
    """Returns whether the model has Llama's layers, with attention that is causal by itself, without a mask."""
    family = FAMILIES.get(model.config.model_type)
    if family is None or type(model) is not family.model or other_form(model.config) is not None:
        return False
    return model.config._attn_implementation == "sdpa"


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Returns `model.base_model(input_ids).last_hidden_state`, (B, S, D), of whole windows. Layers like Llama's are
    run here one by one: transformers' forward pass reads from the device, at its start, whether positions are
    consecutive, and the thread that runs the teacher would wait there for the answer before.
    """
    if not runs_by_layers(model):
        return model.base_model(input_ids, use_cache=False).last_hidden_state
    decoder = model.base_model
    x = decoder.embed_tokens(input_ids)  # (B, S, D)
    positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, S)
    rotary = decoder.rotary_emb(x, position_ids=positions)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
    return decoder.norm(x)


def batches_at_once(signal: str, n_tokens: int) -> int:
    """Returns how many ranks' batches of `n_tokens` each a teacher answers in one forward pass. The first rank's
    student waits for the interpreter while the teacher's kernels are launched, and fewer, larger ones are faster too.
    Logits are large, and leave as soon as they are computed.
    """
    return max(1, TOKENS_AT_ONCE // n_tokens) if signal == "hidden" else 1


class Teacher:
    """Maps input_ids (B, S) to the frozen model's last hidden states (B, S, D_t) after its last norm for the signal
    "hidden", to its logits (B, S, vocab) for "logits".

    model: with weights where it runs, else on the meta device, which still gives an answer's shape and dtype.
    vocab: columns of the logits, the entries that both vocabularies have.
    """

    def __init__(self, model: PreTrainedModel, signal: str, vocab: int) -> None:
        self.model, self.signal, self.vocab = model, signal, vocab
        self.width = model.config.hidden_size if signal == "hidden" else vocab
        runs_here = model.device.type != "meta"
        if signal == "hidden" and runs_here and logits_beyond_head(model, with_bias=False) > MOST_BEYOND_HEAD:
            raise ValueError(
                f"--teacher_signal hidden: the logits of this {model.config.model_type!r} teacher are not its last "
                "hidden states times its head (a bias, scale or cap comes after); use --teacher_signal logits"
            )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        inputs = input_ids.to(self.model.device, non_blocking=True)  # (B, S)
        if self.signal == "hidden":
            return last_hidden_states(self.model, inputs)  # (B, S, D_t)
        if runs_by_layers(self.model):
            logits = self.model.get_output_embeddings()(last_hidden_states(self.model, inputs))
        else:
            logits = self.model(inputs, use_cache=False).logits
        return logits[..., : self.vocab].contiguous()  # (B, S, vocab)

    def answers(self, batches: list[Tensor]) -> Iterator[Tensor]:
        """Yields the answers to batches of one shape (B, S), in order, of several in one forward pass."""
        n = batches_at_once(self.signal, batches[0].numel())
        for start in range(0, len(batches), n):
            yield from self(torch.cat(batches[start : start + n])).split(len(batches[0]))

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Returns the input of the first layer and the output of each: n_layer + 1 tensors (B, S, D_t). None of them is
        normed, while transformers' `output_hidden_states` returns the last one normed.
        """
        states: list[Tensor] = []
        layers = self.model.base_model.layers
        hooks = [layers[0].register_forward_pre_hook(lambda _module, args: states.append(args[0]))]
        hooks += [layer.register_forward_hook(lambda _module, _args, output: states.append(output)) for layer in layers]
        try:
            last_hidden_states(self.model, input_ids.to(self.model.device))
        finally:
            for hook in hooks:
                hook.remove()
        return states
