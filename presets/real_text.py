"""Makes the text of `make demo-real`, without a network: chapters of Python's documentation (`pydoc_data.topics`),
docstrings of the standard library, and an excerpt of Shakespeare (`smollm2-135m/text/shakespeare.txt`).

    python -m presets.real_text runs/demo-real/text

Writes train.jsonl and heldout.jsonl, a document per row with its `source`. The held-out documents are others, and
no paragraph of theirs is trained on. Another version of Python has slightly other documentation.
"""

import argparse
import ast
import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from paths import expanded_path
from utils import write_whole

SHAKESPEARE = Path(__file__).parent / "smollm2-135m" / "text" / "shakespeare.txt"
NOT_LIBRARY = {"test", "tests", "site-packages", "idlelib", "idle_test", "lib2to3", "pydoc_data", "ensurepip"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ONE_IN = 10  # documents that are held out
LENGTH = 2500  # characters of a held-out document, about: the first windows should be of many documents
SHORTEST = 500  # characters of a document


class Document(NamedTuple):
    """Holds a text, the source it is of, and its name there."""

    source: str
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Returns whether nothing of it may be trained on. The name alone decides, so that a version of Python with one
        document more holds out the same others.
        """
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % ONE_IN == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the text of `make demo-real`.", allow_abbrev=False)
    parser.add_argument("folder", type=expanded_path, help="where train.jsonl and heldout.jsonl are written")
    folder = parser.parse_args().folder
    training, held_out = split([list(chapters()), list(docstrings()), list(speeches())])
    folder.mkdir(parents=True, exist_ok=True)
    # train.jsonl last: where it is, make takes both for done.
    for name, documents in (("heldout.jsonl", held_out), ("train.jsonl", training)):
        rows = [json.dumps({"text": document.text, "source": document.source}) for document in documents]
        write_whole(folder / name, "\n".join([*rows, ""]).encode())
        print(
            f"{folder / name}: {len(rows)} documents, {sum(len(document.text) for document in documents):,} characters"
        )


# Sources


def chapters() -> Iterator[Document]:
    """Yields the chapters of Python's documentation that `help()` shows."""
    for name, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield Document("documentation", name, text)


def docstrings() -> Iterator[Document]:
    """Yields the docstrings of each module of the standard library together. Modules are read, not imported."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if NOT_LIBRARY.isdisjoint(name.parts):
            nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, DOCUMENTED)]
            yield Document("docstrings", name.as_posix(), "\n\n".join(ast.get_docstring(node) or "" for node in nodes))


def speeches() -> Iterator[Document]:
    """Yields the speeches of Shakespeare's plays in documents of about LENGTH characters."""
    part: list[str] = []
    for i, speech in enumerate(SHAKESPEARE.read_text(encoding="utf-8").split("\n\n")):
        part.append(speech)
        if sum(map(len, part)) >= LENGTH:
            yield Document("shakespeare", f"to speech {i}", "\n\n".join(part))
            part = []


# Training and held-out text


def split(sources: list[list[Document]]) -> tuple[list[Document], list[Document]]:
    """Returns what is trained on, and what is held out: the sources in turn, the beginning of each document. A
    paragraph that has occurred before, there or here, is left out.
    """
    seen: set[str] = set()
    parts = [[document for document in source if document.is_held_out] for source in sources]
    in_turn = [document for row in zip_longest(*parts) for document in row if document is not None]
    held_out = [new for document in in_turn if (new := unseen(document, seen, longest=LENGTH))]
    rest = [document for document in chain(*sources) if not document.is_held_out]
    return [new for document in rest if (new := unseen(document, seen))], held_out


def unseen(document: Document, seen: set[str], longest: int | None = None) -> Document | None:
    """Returns the document without the paragraphs in `seen`, to which its own are added; None if little is left."""
    paragraphs = [part for part in document.text.strip("\n").split("\n\n") if part.strip() and part not in seen]
    kept: list[str] = []
    for paragraph in dict.fromkeys(paragraphs):
        if longest is None or sum(map(len, kept)) < longest:
            kept.append(paragraph)
    seen.update(paragraphs)
    text = "\n\n".join(kept)
    return document._replace(text=text) if len(text) >= SHORTEST else None


if __name__ == "__main__":
    main()
