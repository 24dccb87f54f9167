"""What a conversion prints at its end, from the figures in conversion.json."""

import math
from typing import Any

STUDENTS = {
    "all_recurrent": "all layers recurrent",
    "no_mixers": "all layers recurrent, no mixers",
    "hybrid": "hybrid with --layers {layers}",
    "hybrid_no_mixers": "that hybrid, no mixers",
}


def format_figures(figures: dict[str, Any]) -> str:
    """Returns the errors of the layers and the figures of the whole students, as text. What is not finite is None in
    conversion.json, and nan here.
    """
    errors = [_numbers(error) for error in figures["layers"]]
    held_out = {name: _numbers(found) for name, found in figures["held_out"].items()}
    lines = [f"{'layer':<8}{'error':>8}{'of the mixer':>14}"]
    lines += [f"{index:<8}{error['own']:>8.3f}{error['mixer']:>14.3f}" for index, error in enumerate(errors)]
    means = [sum(error[name] for error in errors) / len(errors) for name in ("own", "mixer")]
    lines += [f"{'mean':<8}{means[0]:>8.3f}{means[1]:>14.3f}", ""]

    layers = " ".join(map(str, figures["made_with"]["layers"]))
    names = {name: title.format(layers=layers) for name, title in STUDENTS.items() if name in held_out}
    if heads := figures["made_with"].get("heads"):
        names["all_recurrent"] += f" beside {len(heads)} heads"
    width = max(map(len, names.values())) + 2
    tokens = held_out["teacher"]["tokens"]
    lines.append(f"{f'{tokens} held-out tokens':<{width}}{'KL':>8}{'agreement':>11}{'perplexity':>12}")
    for name, title in names.items():
        found = held_out[name]
        lines.append(f"{title:<{width}}{found['kl']:>8.3f}{found['agreement']:>11.3f}{found['perplexity']:>12.1f}")
    lines.append(f"{'teacher':<{width}}{0:>8.3f}{1:>11.3f}{held_out['teacher']['perplexity']:>12.1f}")
    return "\n".join(lines)


def _numbers(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}
