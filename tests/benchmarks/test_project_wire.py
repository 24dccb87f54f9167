"""The projection of the wire to other links and GPUs."""

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_the_docs_is_the_plans():
    """Ten seconds: a student of 8B is traced, and the coding of 27 exchanges."""
    import project_wire

    lines = project_wire.table()
    assert len(lines) == 2 + 9
    assert "\n".join(["", *lines, ""]) in (DOCS / "scaling.md").read_text()
