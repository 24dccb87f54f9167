"""Draws one page of one or several training runs: status, charts, layers against the teacher, scores, options and
warnings. Several runs are drawn into the same charts.

    python report.py runs/llamba-8b
    python report.py runs/first runs/second --output comparison.html

The page is a single file that needs no network. Its charts are also written beside it as PNG files. A run may still be
running, or have been killed.
"""

import argparse
import sys
from pathlib import Path

from paths import expanded_path
from processes.exits import run_entry
from utils import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw one page, and PNG files, of one or several training runs.", allow_abbrev=False
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=expanded_path, metavar="RUN_DIR", help="--output_dir of a training run"
    )
    parser.add_argument(
        "--output",
        type=expanded_path,
        help="HTML file to write or replace (default: report/index.html in RUN_DIR; for several, "
        "report/comparison/index.html in the first)",
    )
    args = parser.parse_args()
    print(write_page(args.run_dirs, args.output))


def write_page(run_dirs: list[Path], output: Path | None) -> Path:
    """Draws page and charts, then writes all of them, and returns the page's path. Raises ValueError if a directory is
    not a run's, or if the page cannot be written.
    """
    # Imported here: --help and a wrong option do not wait for matplotlib.
    from report_page.charts import draw
    from report_page.page import make_page
    from report_page.run_data import read_runs
    from report_page.series import charts_of, span_of

    runs = read_runs(run_dirs)
    if output is None:
        output = runs[0].folder / "report" / ("index.html" if len(runs) == 1 else "comparison/index.html")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: expected an HTML file; name one that ends in .html")
    drawings, names, span = charts_of(runs), [run.name for run in runs], span_of(runs)
    contents = {
        output.with_name(f"{output.stem}-{drawing.key}.png"): draw(drawing, names, span, "png") for drawing in drawings
    }
    page = make_page(runs, drawings, [draw(drawing, names, span, "svg") for drawing in drawings])
    contents[output] = page.encode(errors="replace")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            write_whole(path, content)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror}); name another file") from error
    return output


if __name__ == "__main__":
    sys.exit(run_entry(main))
