"""A choice in this process: one rank, models in memory, probes of random tokens."""

from types import SimpleNamespace

from selection import choosing
from selection.choosing import Request, choose
from selection.material import Material
from selection.probes import random_copies
from tests.tiny import tiny_student, tiny_teacher, tokens

RANK = SimpleNamespace(
    rank=0,
    world_size=1,
    is_main=True,
    share=lambda item: [item],
    all_have=lambda content: True,
    maximum=lambda *values: list(values),
)


def material(n_windows=6, n_texts=6):
    """Returns texts of which the copying probe counts whatever the teacher can do."""
    probe = random_copies(range(50), n_texts, 8, 2, seed=0)
    return Material(tokens(n_windows, 22), [type(probe)(probe.name, probe.ids, probe.answer, probe.text, -1.0)])


def models():
    return tiny_teacher(initializer_range=0.3), tiny_student()


def choice(path=None, n_kept=2, weight=0.3, ablates=True, texts=None, n_heads=0):
    """Returns what is chosen for the tiny models."""
    assert choosing.DIRECTIONS == ("keep", "recur")
    return choose(*models(), Request(texts or material(), n_kept, weight, ablates, n_heads, True), RANK, path)
