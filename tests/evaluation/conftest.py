"""MMLU in small, on disk."""

from pathlib import Path

import pytest

from tests.evaluation.mmlu_data import GEOGRAPHY, LOGIC, write_mmlu


@pytest.fixture
def mmlu_dir(tmp_path: Path) -> Path:
    files = {"dev/world_geography_dev": GEOGRAPHY, "test/world_geography_test": GEOGRAPHY[::-1]}
    return write_mmlu(tmp_path / "mmlu", files | {"dev/logic_dev": LOGIC, "test/logic_test": LOGIC})
