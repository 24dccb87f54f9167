"""The teacher lane: the first rank of each node owns the node's teacher, gathers every rank's input, runs the teacher
once, and hands each rank its own part. Its traffic has a process group of its own.

A caller asks with `submit` and collects with `result`. Both run in the caller's thread for now; work that goes on
between the two is what this seam is for.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from llamba import LlambaForCausalLM
from training_utils import Ranks


class TeacherLane:
    """Answers for one batch shape: what comes back is (B, S, D_t) for the signal "hidden", the teacher's final
    hidden states after its last norm; (B, S, vocab) for "logits".

    teacher: the model on the node's first rank, its meta skeleton on the others.
    vocab: columns of the logits that are sent, the entries that both vocabularies have.
    """

    def __init__(self, teacher: PreTrainedModel, signal: str, vocab: int, ranks: Ranks) -> None:
        self.teacher, self.signal, self.vocab, self.ranks = teacher, signal, vocab, ranks
        self.wait_s = 0.0  # seconds that this rank has waited since `take_wait`
        if ranks.owns_teacher and signal == "hidden":
            _check_hidden_signal(teacher)

    def submit(self, input_ids: Tensor) -> "PendingSignal":
        """input_ids (B, S) on this rank's device, of the same shape on every rank."""
        return PendingSignal(self, input_ids)

    def collect(self, input_ids: Tensor) -> Tensor:
        """The teacher's answer. Only the wait for it is counted, not what the GPU still had to do before."""
        _synchronize(self.ranks.device)
        start = time.perf_counter()
        signal = self._exchange(input_ids)
        _synchronize(self.ranks.device)
        self.wait_s += time.perf_counter() - start
        return signal

    def take_wait(self) -> float:
        waited, self.wait_s = self.wait_s, 0.0
        return waited

    @torch.no_grad()
    def _exchange(self, input_ids: Tensor) -> Tensor:
        ranks = self.ranks
        gathered = parts = None
        if ranks.owns_teacher:
            gathered = [torch.empty_like(input_ids) for _ in range(ranks.local_world_size)]
        dist.gather(input_ids, gathered, dst=ranks.teacher_rank, group=ranks.node)
        if gathered is not None:
            inputs = torch.cat(gathered).to(self.teacher.device)  # (W*B, S)
            answer = self._forward(inputs).to(ranks.device)  # (W*B, S, D_t or vocab)
            parts = list(answer.split(input_ids.shape[0]))
        width = self.teacher.config.hidden_size if self.signal == "hidden" else self.vocab
        received = torch.empty(*input_ids.shape, width, dtype=self.teacher.dtype, device=ranks.device)
        dist.scatter(received, parts, src=ranks.teacher_rank, group=ranks.node)
        return received

    def _forward(self, inputs: Tensor) -> Tensor:
        if self.signal == "hidden":
            return self.teacher.base_model(inputs, use_cache=False).last_hidden_state  # (W*B, S, D_t)
        return self.teacher(inputs, use_cache=False).logits[..., : self.vocab].contiguous()  # (W*B, S, vocab)


class PendingSignal:
    """A batch on its way through the teacher."""

    def __init__(self, lane: TeacherLane, input_ids: Tensor) -> None:
        self.lane, self.input_ids = lane, input_ids

    def result(self) -> Tensor:
        return self.lane.collect(self.input_ids)


def share_layers(student: LlambaForCausalLM, layers: list[int]) -> None:
    """Fills the replaced layers of every rank from rank 0, the one that read the teacher's weights for them."""
    for index in layers:
        for parameter in student.backbone.layers[index].parameters():
            dist.broadcast(parameter.data, src=0)


def share_head(teacher: PreTrainedModel, vocab: int, ranks: Ranks) -> Tensor:
    """The first `vocab` rows of the teacher's output weight, (vocab, D_t), on every rank's own device."""
    head = teacher.get_output_embeddings().weight.detach()[:vocab]
    own = head.to(ranks.device) if ranks.owns_teacher else torch.empty_like(head, device=ranks.device)
    dist.broadcast(own, src=ranks.teacher_rank, group=ranks.node)
    return own


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@torch.no_grad()
def _check_hidden_signal(teacher: PreTrainedModel) -> None:
    """Some models scale or cap the logits after the head; their hidden states alone do not tell their logits."""
    tokens = torch.arange(8, device=teacher.device)[None] % teacher.config.vocab_size  # (1, 8)
    head = teacher.get_output_embeddings()
    from_hidden = teacher.base_model(tokens, use_cache=False).last_hidden_state @ head.weight.T  # (1, 8, V_t)
    logits = teacher(tokens, use_cache=False).logits
    if (from_hidden - logits).abs().max() > 0.05 * logits.abs().max():
        raise ValueError(
            f"--teacher_signal hidden: the logits of this {teacher.config.model_type!r} teacher are not its last "
            "hidden states times its head (a bias, scale or cap comes after); use --teacher_signal logits"
        )
