"""Runs the steps of `make demo-real` on another text and compares what they reach with bounds that a throw-away
prototype reached there, in 51 k tokens of alignment and 113 k in all. The text has the fields `text` and `source`; its
figures are taken on the first 256 tokens of each source, as the prototype's were. The same command again resumes. From
the repository's folder:

    python -m benchmarks.real_bounds --text FOLDER --output runs/bounds

FOLDER holds train.jsonl and heldout.jsonl.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation.report import aligned

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "teachers/smollm2-135m"
WINDOW = 256
SETTINGS = {"REAL_DISTIL": "--max_steps 60", "REAL_EVAL": "--held_out_windows 4"}
LAST_ROWS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the real demo's steps with bounds.", allow_abbrev=False)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    make(args.output, f"{TEACHER}/config.json")
    prepare(args.text, args.output / "text", AutoTokenizer.from_pretrained(ROOT / TEACHER))
    make(args.output, "demo-real")
    rows = list(compare(args.output))
    print(aligned([["figure", "reached", "bound", ""], *rows]))
    sys.exit(any(row[-1] for row in rows))


def make(output: Path, target: str) -> None:
    """Runs the demo's rules up to a target."""
    variables = [f"{name}={value}" for name, value in {"REAL": output, **SETTINGS}.items()]
    subprocess.run(["make", f"BIN={Path(sys.executable).parent}", *variables, target], cwd=ROOT, check=True)


def prepare(text: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the demo's text: what is trained on as it is, and a held-out window of each source."""
    folder.mkdir(parents=True, exist_ok=True)
    by_source: dict[str, list[str]] = {}
    for line in (text / "heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_source.setdefault(row["source"], []).append(row["text"])
    rows = [json.dumps({"text": part}) for texts in by_source.values() for part in one_window(texts, tokenizer)]
    (folder / "heldout.jsonl").write_text("\n".join([*rows, ""]))
    if not (folder / "train.jsonl").exists():
        (folder / "train.jsonl").write_bytes((text / "train.jsonl").read_bytes())


def one_window(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields the beginning of the texts that fills WINDOW tokens, a separator behind each text included. One more
    separator, behind the last, is the label of the last token. A text that would fill them with its separator is one
    token shorter, which the next begins with: the label has to be behind a text.
    """
    left = WINDOW
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(found.input_ids) >= left:
            beginning = text[: found.offset_mapping[left - 1][1]]
            assert tokenizer(beginning, add_special_tokens=False).input_ids == found.input_ids[:left]
            yield beginning
            return
        n_tokens = len(found.input_ids)
        if n_tokens + 1 == left:
            n_tokens -= 1
            text = text[: found.offset_mapping[n_tokens][0]]
        if n_tokens:
            yield text
            left -= n_tokens + 1


def compare(output: Path) -> Iterator[list[str]]:
    """Yields a row for each bound; its last cell is empty where the bound holds."""
    start = json.loads((output / "start.json").read_text())
    models = json.loads((output / "distil" / "eval.json").read_text())["models"]
    trained, teacher = models["hybrid_ft"]["held_out"], models["teacher"]["held_out"]
    rows = [json.loads(line) for line in (output / "align" / "metrics.jsonl").read_text().splitlines()]
    yield _row("closed form, KL, all layers recurrent", start["all"]["closed_form"]["kl"], 2.0)
    yield _row("closed form, KL, every second", start["every second"]["closed_form"]["kl"], 0.92)
    yield _row("error of the mixers, aligned", _error(rows[-LAST_ROWS:]), 0.53)
    yield _row("trained, KL", trained["kl"], 0.27)
    yield _row("trained, disagreement", 1 - trained["agreement"], 0.26)
    yield _row("trained, perplexity, of the teacher's", trained["perplexity"] / teacher["perplexity"], 1.15)


def _error(rows: list[dict[str, Any]]) -> float:
    """Returns the mean over layers and rows, each row of windows that were not trained on before."""
    return sum(sum(row["alignment"]["errors"]) / len(row["alignment"]["errors"]) for row in rows) / len(rows)


def _row(name: str, reached: float, bound: float) -> list[str]:
    return [name, f"{reached:.3f}", f"{bound:.2f}", "" if reached <= bound else "above"]


if __name__ == "__main__":
    main()
