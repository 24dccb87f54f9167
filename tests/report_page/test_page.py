"""The page as a whole, and that a browser shows it."""

import base64
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from report import write_page
from report_page.charts import colour_of
from report_page.page import make_page
from report_page.run_data import read_run
from report_page.tables import facts_of
from tests.report_page.run_folders import NASTY, build, full_run, keys, row_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parsed(HTMLParser):
    """Parses a page as a browser would, as far as the tests need it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "line":  # a browser's own text of a page closes it
            return
        assert self.open.pop() == tag, "tags have to nest"

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def images(self) -> dict[str, bytes]:
        """Returns the SVGs by alt text."""
        prefix = "data:image/svg+xml;base64,"
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        assert all(attributes["src"].startswith(prefix) for attributes in found)
        return {image["alt"]: base64.b64decode(image["src"].removeprefix(prefix)) for image in found}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Returns a run that has everything, and its report."""
    run = full_run(tmp_path_factory.mktemp("one"))
    return run, write_page([run], None)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of one name; of the second nothing but its rows is there."""
    folder = tmp_path_factory.mktemp("two")
    runs = [full_run(folder / "a"), build(folder / "b" / "full", [row_of(step) for step in range(1, 6)])]
    (runs[1] / "status.json").unlink()
    return runs, write_page(runs, folder / "out" / "both.html")


def test_the_page_shows_the_run(one):
    run, page = one
    assert page == run / "report" / "index.html"
    parsed = Parsed(page.read_text())
    assert parsed.texts["h1"] == ["full "] and parsed.texts["title"] == ["full"]
    assert "complete" in parsed.texts["span"]
    assert parsed.texts["h2"] == [
        *("Summary", "Training", "Evaluation", "Speed and memory", "Weights that moved", "Layers against the teacher"),
        *("Scores", "Options", "Warnings"),
    ]
    assert dict(zip(parsed.texts["dt"], parsed.texts["dd"], strict=True)) == facts_of(read_run(run, "full"))
    assert "full: 2 rows were computed again after a resume; the earlier ones are left out." in parsed.texts["p"]
    assert {"dataset_name", "hybrid_ft", "the disk is full", "0.2500 ± 0.0100"} <= set(parsed.texts["td"])


def test_every_chart_is_a_picture_with_words(one):
    images = Parsed(one[1].read_text()).images()
    assert len(images) == len(keys(one[0])) == 20
    assert all(svg.startswith(b"<?xml") and b"</svg>" in svg for svg in images.values())
    assert "Cross entropy over optimizer steps: full from 9.5 to 5, between 5 and 9.5." in images
    assert (
        "Heat map: Each layer alone (error relative to what the teacher's layer adds), 3 layers at 2 steps; at the end "
        "layer 0 is furthest from the teacher." in images
    )
    mmlu = next(alt for alt in images if alt.startswith("MMLU"))
    assert mmlu.endswith("between 0.3 and 0.3; full hybrid_ft 0.5000 at step 10.")


def test_there_is_a_file_of_every_chart(one):
    run, page = one
    pictures = {file.name for file in page.parent.iterdir()} - {"index.html"}
    assert pictures == {f"index-{key}.png" for key in keys(run)}
    assert all(matplotlib.image.imread(page.parent / name).std() > 0 for name in pictures)


def test_what_comes_from_a_run_is_escaped_and_nothing_is_loaded(one, two):
    for page in (one[1], two[1]):
        text = page.read_text()
        parsed = Parsed(text)
        assert NASTY not in text and NASTY in "".join(parsed.texts["td"] + parsed.texts["figcaption"])
        assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "a", "base"} == set()
        assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)
        policy = {a.get("http-equiv"): a.get("content") for tag, a in parsed.tags if tag == "meta"}
        assert policy["Content-Security-Policy"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        for part in [text, *(svg.decode() for svg in parsed.images().values())]:
            names = re.sub(
                r'<!DOCTYPE svg[^>]*>|xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", part, flags=re.DOTALL
            )
            assert not re.search(r"https?:|url\((?!#)|@import|href=\"(?!#|data:)|src=\"(?!data:)", names)


def test_a_name_that_is_a_script_is_text(tmp_path):
    run = read_run(
        build(tmp_path / "<img src=x onerror=alert(1)> & \"co'", [row_of(1)]), "<img src=x onerror=alert(1)>"
    )
    parsed = Parsed(make_page([run, run], [], []))
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert parsed.texts["title"] == ["<img src=x onerror=alert(1)> · <img src=x onerror=alert(1)>"]


def test_several_runs_share_their_charts(two):
    parsed = Parsed(two[1].read_text())
    assert parsed.texts["h1"] == ["2 runs"]
    assert {"a/full ", "b/full "} <= set(parsed.texts["span"]) and "not recorded" in parsed.texts["span"]
    strokes = [attributes["stroke"] for tag, attributes in parsed.tags if tag == "line"]
    assert strokes == [colour_of(0), colour_of(1)]
    loss = next(svg.decode() for alt, svg in parsed.images().items() if alt.startswith("Loss"))
    assert all(f"stroke: {colour}" in loss for colour in strokes)
    assert parsed.texts["h3"][0] == "Different between the runs"
    assert "b/full from 9.75 to 7.75" in next(alt for alt in parsed.images() if alt.startswith("Loss"))
    assert [tag["class"] for _, tag in parsed.tags if "charts" in tag.get("class", "")].count("charts pairs") == 1
    assert "both-loss.png" in os.listdir(two[1].parent)


def test_a_run_of_one_row_and_nothing_else_has_a_page(tmp_path):
    run = build(tmp_path / "run", [row_of(1)], '{"step', status={"status": "running", "launched": 0.0})
    parsed = Parsed(write_page([run], None).read_text())
    assert parsed.texts["p"][1:] == [
        "run: has not reported its end: it is still running, or was killed.",
        "run: the last line of metrics.jsonl is left out: it is cut short, as a crash leaves it.",
        "Not recorded: there is no args.yaml, and no checkpoint.",
    ]
    assert "1970-01-01 00:00 UTC" in parsed.texts["dd"]
    assert parsed.texts["h2"] == ["Summary", "Training", "Speed and memory", "Options"]


def test_a_second_call_writes_the_same_and_leaves_the_rest_alone(tmp_path):
    rows = [{"step": step, "loss": float(step), "layer_map": {"own": [0.1, 0.2]}} for step in (1, 2)]
    run = build(tmp_path / "run", rows)
    page = write_page([run], None)
    (page.parent / "own-notes.txt").write_text("kept")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert write_page([run], None) == page and len(before) == 6
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_the_page_of_a_long_run_stays_small(tmp_path):
    noise = np.random.default_rng(0).normal(size=(30_000, 2)).tolist()
    rows = [{"step": i + 1, "loss": a, "grad_norm": math.exp(b)} for i, (a, b) in enumerate(noise)]
    page = write_page([build(tmp_path / "run", rows)], None)
    assert page.stat().st_size < 150_000
    assert "running medians of 601 steps" in page.read_text()


def browse(folder: Path, page: Path, *options: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={folder}", "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_shows_the_page(two, tmp_path):
    document = browse(tmp_path / "profile", two[1], "--dump-dom")
    parsed = Parsed(document)
    assert parsed.texts["title"] == ["a/full · b/full"] and "hit" not in parsed.texts["title"]
    assert NASTY not in document and "0.2500 ± 0.0100" in parsed.texts["td"] and len(parsed.images()) == 20
    for scheme, back in (("1", 1.0), ("0", 0.05)):
        shot = tmp_path / f"{scheme}.png"
        sized = [f"--screenshot={shot}", "--window-size=1200,2400", f"--blink-settings=preferredColorScheme={scheme}"]
        browse(tmp_path / "profile", two[1], *sized)
        picture = matplotlib.image.imread(shot)[:, :, :3]
        assert picture[0, 0].mean() == pytest.approx(back, abs=0.02)
        for colour in (colour_of(0), colour_of(1)):  # lines of both runs in the charts, below the legend
            wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert (np.abs(picture[700:] - wanted).max(axis=2) < 0.05).sum() > 500
