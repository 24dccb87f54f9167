"""The sizes of a case of bench_step.py. Imports nothing of the project, so that the script starts without it."""

from dataclasses import dataclass

STEPS = 5  # of one run; the first and the last are not timed


@dataclass(frozen=True)
class Case:
    """Holds the sizes that the name of a case gives."""

    vocab: int
    ranks: int
    d_model: int = 256
    seq_len: int = 512
    batch_size: int = 2

    @classmethod
    def parse(cls, name: str) -> "Case":
        """Reads a name such as "V=32000 ranks=2 seq_len=64"; what it leaves out keeps its default."""
        sizes = {key: int(value) for key, value in (part.split("=") for part in name.split())}
        return cls(vocab=sizes.pop("V"), **sizes)

    @property
    def tokens(self) -> int:
        """Returns the number of tokens that a step trains on, over all ranks."""
        return self.ranks * self.batch_size * self.seq_len
