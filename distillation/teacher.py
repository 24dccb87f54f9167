"""How students get the teacher's answers, through a lane: `submit` requests the answer to a batch, `result` waits for
it, and the lane counts the waiting. On a device of its own the teacher works while the students do, run by the first
rank of each node; colocated, every rank runs a teacher on its own device.
"""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from distillation.teacher_forward import Teacher
from distillation.wait_clock import WaitClock
from llamba import LlambaForCausalLM
from processes.ranks import Ranks
from text.batch import Batch
from utils import BackgroundThread

# An answer, and the event after which it may be read: None where there is nothing to wait for.
Answer = tuple[Tensor, "torch.cuda.Event | None"]


def ask_ahead(batches: Iterable[Batch], lane: "Lane") -> Iterator[tuple[Batch, "PendingSignal"]]:
    """Yields batches with the answers to them; each answer is requested `lane.prefetch` batches before it is needed."""
    asked: deque[tuple[Batch, PendingSignal]] = deque()
    for batch in batches:
        asked.append((batch, lane.submit(batch.input_ids)))
        if len(asked) > lane.prefetch:
            yield asked.popleft()
    yield from asked


# --- the three lanes -----------------------------------------------------------------------------


class TeacherLane:
    """Sends batches to the one teacher of a node and returns its answers. A thread of each rank serves requests in
    order: the first rank receives the others' inputs, runs the teacher for several ranks at a time, and sends each its
    answer.

    The traffic uses gloo, pinned memory and connections of its own: it needs no agreement on order with the students'
    NCCL collectives, and settings that make those block the caller do not affect it. On GPUs the teacher and the
    copies have streams of their own, and only this thread waits for them.
    """

    def __init__(self, teacher: Teacher, ranks: Ranks, prefetch: int = 0) -> None:
        """prefetch: batches that the teacher works ahead of the students."""
        self.teacher, self.ranks, self.prefetch = teacher, ranks, prefetch
        self.waits = WaitClock(ranks.device)
        self.worker = BackgroundThread("teacher-lane")
        if ranks.device.type == "cuda":
            # A thread's device is GPU 0 at first. When it leaves a stream, torch sets that device again, and on a rank
            # of another GPU CUDA then makes a context of 0.5 GB on GPU 0.
            self.worker.submit(lambda: torch.cuda.set_device(ranks.device)).result()
        devices = [ranks.device, *([teacher.model.device] if ranks.owns_teacher else [])]
        self.streams = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
        for device, stream in self.streams.items():  # the teacher's weights are still being copied, perhaps
            stream.wait_stream(torch.cuda.current_stream(device))

    def submit(self, input_ids: Tensor) -> "PendingSignal":
        """Requests the answer to input_ids (B, S), on the CPU and of the same shape on every rank."""
        return PendingSignal(self.worker.submit(lambda: self._exchange(input_ids)).result, self.waits)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Returns `Teacher.hidden_states` on the student's device. Only for a rank that runs the teacher."""
        return self.worker.submit(
            lambda: [_to_student(state, self.ranks.device) for state in self.teacher.hidden_states(input_ids)]
        ).result()

    def close(self) -> None:
        self.worker.close()

    @torch.no_grad()
    def _exchange(self, input_ids: Tensor) -> Answer:
        device = self.ranks.device
        with contextlib.ExitStack() as stack:
            for stream in reversed(self.streams.values()):  # the last one's device, the student's, becomes current
                stack.enter_context(torch.cuda.stream(stream))
            answer = self._answer_all(input_ids) if self.ranks.owns_teacher else self._ask(input_ids)
            return _to_student(answer, device), _event_after_current_work(device)

    def _answer_all(self, input_ids: Tensor) -> Tensor:
        """Sends all other ranks of the node their answers, and returns this rank's own."""
        first, group = self.ranks.teacher_rank, self.ranks.node
        others = range(first + 1, first + self.ranks.local_world_size)
        asked = [torch.empty_like(input_ids) for _ in others]  # (B, S) each
        arrivals = [dist.irecv(ids, src=rank, group=group) for ids, rank in zip(asked, others, strict=True)]
        for arrival in arrivals:
            assert arrival is not None  # only ranks outside the group get none
            arrival.wait()
        answers = self.teacher.answers([*asked, input_ids])
        copies = [_start_copy_to_host(answer) for answer in itertools.islice(answers, len(asked))]
        own = next(answers)  # last: what the others wait for travels meanwhile
        for (answer, copied), rank in zip(copies, others, strict=True):
            if copied is not None:
                copied.synchronize()
            dist.send(answer, dst=rank, group=group)
        return own

    def _ask(self, input_ids: Tensor) -> Tensor:
        first, group = self.ranks.teacher_rank, self.ranks.node
        dist.send(input_ids, dst=first, group=group)
        answer = torch.empty(
            *input_ids.shape,
            self.teacher.width,
            dtype=self.teacher.model.dtype,
            pin_memory=self.ranks.device.type == "cuda",
        )  # (B, S, width)
        dist.recv(answer, src=first, group=group)
        return answer


class OwnTeacher(Protocol):
    """Answers as a `Teacher` of the signal "hidden" or "logits" does."""

    def __call__(self, input_ids: Tensor) -> Tensor: ...

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]: ...


class ColocatedTeacher:
    """Runs this rank's own teacher on the student's device: no traffic, and nothing to gain from prefetching."""

    prefetch = 0

    def __init__(self, teacher: OwnTeacher, device: torch.device) -> None:
        self.teacher = teacher
        self.waits = WaitClock(device)

    def submit(self, input_ids: Tensor) -> "PendingSignal":
        return PendingSignal(lambda: (self.teacher(input_ids), None), self.waits)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        return self.teacher.hidden_states(input_ids)

    def close(self) -> None:
        pass


class NoTeacher:
    """Replaces the lane where the loss has no KL: every answer is None."""

    prefetch = 0

    def __init__(self, device: torch.device) -> None:
        self.waits = WaitClock(device)

    def submit(self, input_ids: Tensor) -> "PendingSignal":
        return PendingSignal(None, self.waits)

    def close(self) -> None:
        pass


Lane = TeacherLane | ColocatedTeacher | NoTeacher


class PendingSignal:
    """Waits for an answer."""

    def __init__(self, collect: Callable[[], Answer] | None, waits: WaitClock) -> None:
        self.collect, self.waits = collect, waits

    def result(self) -> Tensor | None:
        """Returns the answer (B, S, width) on the rank's device, ready for its current stream, or None without a
        teacher. Raises what the teacher raised.
        """
        if self.collect is None:
            return None
        with self.waits.counting():
            signal, ready = self.collect()
            if ready is not None:
                stream = torch.cuda.current_stream(signal.device)
                stream.wait_event(ready)
                signal.record_stream(stream)
        return signal


def _to_student(answer: Tensor, device: torch.device) -> Tensor:
    """Starts the copy of an answer to the student's device: through the host between GPUs that must not copy to each
    other. torch does not read NCCL's setting, and where it is needed such a copy can arrive changed.
    """
    if {answer.device.type, device.type} == {"cuda"} and answer.device != device and not gpus_may_copy():
        answer, copied = _start_copy_to_host(answer)
        assert copied is not None  # as for every tensor on a GPU
        copied.synchronize()
    return answer.to(device, non_blocking=True)


def gpus_may_copy() -> bool:
    return os.environ.get("NCCL_P2P_DISABLE", "0") != "1"


def _start_copy_to_host(answer: Tensor) -> Answer:
    """Starts the copy to pinned memory; returns it with the event after which it is complete."""
    if answer.device.type == "cpu":
        return answer, None
    host = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
    host.copy_(answer, non_blocking=True)
    return host, _event_after_current_work(answer.device)


def _event_after_current_work(device: torch.device) -> "torch.cuda.Event | None":
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


# --- before the first batch ----------------------------------------------------------------------------------


def open_lane(
    teacher: PreTrainedModel, signal: str, placement: str, vocab: int, ranks: Ranks, prefetch: int = 0
) -> tuple[Tensor | None, Lane]:
    """Returns the teacher's head (vocab, D_t) on this rank's device, or None if it sends logits; and the lane to its
    answers. teacher: with weights where it runs, on the meta device elsewhere. prefetch: of a dedicated teacher.
    """
    answers = Teacher(teacher, signal, vocab)
    head = None
    if placement == "colocated":
        if signal == "hidden":
            head = teacher_head(teacher, vocab)
        return head, ColocatedTeacher(answers, ranks.device)
    if signal == "hidden":
        head = share_head(teacher, vocab, ranks)
    return head, TeacherLane(answers, ranks, prefetch)


def share_layers(student: LlambaForCausalLM) -> None:
    """Broadcasts the layers with attention from rank 0, which has read the teacher's weights for them."""
    for index in student.config.layers_with_attention:
        for parameter in student.backbone.layers[index].parameters():
            dist.broadcast(parameter.data, src=0)


def teacher_head(teacher: PreTrainedModel, vocab: int) -> Tensor:
    """Returns the first `vocab` rows of the teacher's output weight, (vocab, D_t)."""
    return teacher.get_output_embeddings().weight.detach()[:vocab]


def share_head(teacher: PreTrainedModel, vocab: int, ranks: Ranks) -> Tensor:
    """Returns `teacher_head` on this rank's device, sent by the rank that runs the node's teacher."""
    head = teacher_head(teacher, vocab)
    copy = head.cpu() if ranks.owns_teacher else torch.empty_like(head, device="cpu")
    dist.broadcast(copy, src=ranks.teacher_rank, group=ranks.node)
    return copy.to(ranks.device)
