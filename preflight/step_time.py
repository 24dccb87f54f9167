"""How long an optimizer step takes, and what bounds it: the students' work, the teacher, or the wire."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from preflight.exchange import NOTHING, Exchange

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
    exchange: of gradients and weights between ranks.
    """

    micro_steps: int
    forward: float
    backward: float
    teacher: float
    answers: float
    ahead: int
    update: float
    exchange: Exchange

    @property
    def student(self) -> float:
        return self.forward + self.backward

    @property
    def wire(self) -> float:
        """Returns the seconds of the exchange that work does not hide."""
        return self.exchange.exposed(self.backward)

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
            WIRE: {"exchange": NOTHING},
        }
        return {name: self.seconds - dataclasses.replace(self, **zeros).seconds for name, zeros in parts.items()}

    @property
    def bound_by(self) -> str:
        """Returns the part without which the step would be shortest."""
        savings = self.savings()
        return max(savings, key=savings.__getitem__)
