"""How long an optimizer step takes, and what bounds it: the students' work, the teacher, or the wire."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from arguments import TrainArguments
from distillation.gradient_sums import needs_sums
from preflight.footprint import Footprint
from preflight.live_memory import BACKWARD
from preflight.machine import Machine
from preflight.transport import GB
from preflight.update_footprint import OptimizerFootprint, bytes_of_sums
from preflight.wire import NOTHING, Traffic, traffic_of

ANSWERS_RATE = 2 * GB  # bytes per second of a teacher's answers: copied to the host, sent by gloo, copied to a GPU
STUDENTS, TEACHER, ANSWERS, WIRE = "students' work", "the teacher", "the teacher's answers", "the wire"


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of what an optimizer step consists of, and how these follow each other.

    micro_steps: of an optimizer step.
    forward, backward: of a student, in a micro step.
    teacher: its work for all students that it answers, in a micro step.
    answers: the way of its answers through the host, beside its work.
    ahead: micro steps that the teacher works ahead of the students. 0: they wait for each answer.
    update: of the optimizer, without the wire.
    traffic: gradients and weights between ranks.
    """

    micro_steps: int
    forward: float
    backward: float
    teacher: float
    answers: float
    ahead: int
    update: float
    traffic: Traffic

    @property
    def student(self) -> float:
        return self.forward + self.backward

    @property
    def wire(self) -> float:
        """Returns the seconds of the traffic that work does not hide."""
        return self.traffic.exposed(self.backward)

    @property
    def seconds(self) -> float:
        """Returns the seconds of the whole step, once a run has got going."""
        n, answering, end = self.micro_steps, max(self.teacher, self.answers), self.update + self.wire
        if self.ahead == 0:
            return n * (self.student + answering) + end
        # While ranks exchange gradients and update, the teacher has gone ahead as far as it may, and then waits.
        last_begins = max((n - 1) * self.student, (n - self.ahead) * answering)
        return max(n * answering, last_begins + self.student + end)

    def savings(self) -> dict[str, float]:
        """Returns by how many seconds the step would be shorter, if each of its parts took no time."""
        parts: dict[str, dict[str, Any]] = {
            STUDENTS: {"forward": 0.0, "backward": 0.0, "update": 0.0},
            TEACHER: {"teacher": 0.0},
            ANSWERS: {"answers": 0.0},
            WIRE: {"traffic": NOTHING},
        }
        return {name: self.seconds - dataclasses.replace(self, **zeros).seconds for name, zeros in parts.items()}

    @property
    def bound_by(self) -> str:
        """Returns the part without which the step would be shortest."""
        savings = self.savings()
        return max(savings, key=savings.__getitem__)


def step_time(
    args: TrainArguments,
    footprint: Footprint,
    optimizer: OptimizerFootprint,
    machine: Machine,
    n_students: int,
    placement: str,
) -> StepTime:
    """Returns what an optimizer step takes, with `n_students` on each node."""
    seconds = {item: machine.seconds(n, footprint.moved[item]) for item, n in footprint.operations.items()}
    backward, teacher, answers = seconds.pop(BACKWARD), 0.0, 0.0
    if needs_sums(args):  # read and written in place of a bucket of 16 bits
        backward += machine.seconds(0, bytes_of_sums(footprint.student))
    if placement != "none":
        assert footprint.teacher is not None
        answered = 1 if placement == "colocated" else n_students
        teacher = answered * machine.seconds(footprint.teacher.operations, footprint.teacher.moved)
        answers = (answered - 1) * footprint.teacher.answer / ANSWERS_RATE  # one student's rank has the teacher
    return StepTime(
        micro_steps=args.grad_accumulation_steps,
        forward=sum(seconds.values()),
        backward=backward,
        teacher=teacher,
        answers=answers,
        ahead=prefetch_of(args, placement) if placement == "dedicated" else 0,
        update=machine.seconds(0, optimizer.moved),
        traffic=traffic_of(args, footprint.student, machine.seats(n_students)),
    )


def prefetch_of(args: TrainArguments, placement: str) -> int:
    """Returns the batches that a teacher works ahead in this place."""
    if placement == "colocated":
        return 0
    return int(placement == "dedicated") if args.teacher_prefetch is None else args.teacher_prefetch
