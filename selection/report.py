"""The report choice.md of a choice, made from its figures alone. Every figure is a mean over texts, with its 95%
interval by Student's t.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from inputs.teacher_parts import named_parts, parse_heads
from selection.statistics import Estimate

MOST_HEADS = 20  # rows of the table of ablated heads, and heads that are named in a row
GB = 1e9
BY = {
    "keep": "greedily, from all recurrent",
    "recur": "greedily, from none recurrent",
    "ranking": "by ranking of single swaps",
    "evenly": "at equal distances",
}


def format_report(choice: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    of_layers = [_aside, _curve, _pareto, _swaps] if choice["n_kept"] else []
    parts = [part(choice) for part in (_head, *of_layers, _far_heads, _ablation, _probes, _made_with)]
    return "\n".join(part for part in parts if part)


def options_line(choice: dict[str, Any]) -> str:
    """Returns the options to paste."""
    return named_parts(choice["layers"], parse_heads(choice["heads"]["names"] if choice["heads"] else []))


def _head(choice: dict[str, Any]) -> str:
    teacher, student = choice["models"]
    line = f"    {options_line(choice)}\n"
    if not choice["n_kept"]:
        return f"# Heads of {teacher} to keep in {student}\n\n{line}"
    return (
        f"# Layers of {teacher} to keep in {student}\n\n{line}\n"
        f"{len(choice['layers'])} of {choice['n_layers']} layers are the teacher's, found {BY[choice['chosen_by']]}. "
        f"The smaller, the better: {_objective(choice)}. Every figure is a mean over texts, with its 95% interval "
        "(Student's t over texts).\n"
    )


def _objective(choice: dict[str, Any]) -> str:
    if not choice["teacher"]["probes"]:
        return "the KL alone, in nats per token, because no probe could be used"
    return (
        f"KL + {choice['probe_weight']:g} x growth, where KL is KL(teacher || hybrid) in nats per token, and growth is "
        "how much larger than the teacher's the loss of the probes is, in nats per answer (0 where it is smaller)"
    )


def _aside(choice: dict[str, Any]) -> str:
    aside = choice["aside"]
    rows = [[BY[row["by"]], _layers(row["kept"]), *_figures(row)] for row in aside["sets"]]
    rows.append(["the teacher", "all", *_figures(aside["teacher"], is_teacher=True)])
    title = f"## Sets of {len(choice['layers'])} layers, on texts that were kept aside"
    probes = " and texts of the probes" if choice["teacher"]["probes"] else ""
    note = f"Nothing was chosen on these {aside['teacher']['kl']['n']} windows{probes}."
    return _section(title, note, ["found", "layers kept", *_columns(choice)], rows)


def _curve(choice: dict[str, Any]) -> str:
    rows = []
    for kept in range(choice["n_layers"] + 1):
        found = [row for row in choice["sets"] if len(row["kept"]) == kept and row["by"] in ("keep", "recur")]
        if found:
            row = min(found, key=lambda row: row["value"])
            cache = f"{choice['cache_bytes'][kept] / GB:.4f}"
            rows.append([str(kept), cache, *_figures(row), f"{row['value']:.3f}", _layers(row["kept"])])
    note = (
        f"The better of both directions. Cache: of one sequence of {choice['context_length']} tokens. These are the "
        "texts that the sets were chosen on, so that the figures are better than others would be."
    )
    header = ["layers kept", "cache, GB", *_columns(choice), "objective", "which"]
    return _section("## How many layers", note, header, rows)


def _pareto(choice: dict[str, Any]) -> str:
    if not choice["teacher"]["probes"]:
        return ""
    rows = [[_layers(row["kept"]), *_figures(row), f"{row['growth']:.3f}"] for row in choice["pareto"]]
    note = "Of all measured sets of this size, those that no other beats in both KL and growth; on the same texts."
    return _section("## KL against probes", note, ["layers kept", *_columns(choice), "growth"], rows)


def _swaps(choice: dict[str, Any]) -> str:
    ranked = sorted(choice["swaps"], key=lambda row: -row["value"])
    rows = [[str(row["layer"]), *_figures(row), f"{row['value']:.3f}"] for row in ranked]
    note = "The student's layer in the teacher's place, all others the teacher's. First what costs most."
    return _section("## Each layer by itself", note, ["layer", *_columns(choice), "objective"], rows)


def _far_heads(choice: dict[str, Any]) -> str:
    heads = choice["heads"]
    if heads is None or not heads["sets"]:
        return ""
    rows = []
    for one in heads["sets"]:
        cache, names = f"{one['cache_bytes'] / GB:.4f}", ",".join(one["heads"])
        is_short = len(one["heads"]) <= MOST_HEADS or one["heads"] == heads["names"]
        rows.append([str(one["n_groups"]), cache, *_of_probes(one), names or "none" if is_short else "in choice.json"])
    note = (
        f"The teacher, of which only so many key/value heads see all tokens{_beside(heads['whole'])}. The others see "
        f"the first {heads['first']} and the last {heads['last']}, which a recurrent head can stand for. On texts of "
        f"the probes that were kept aside; cache of one sequence of {choice['context_length']} tokens. "
        "`make_student.py --heads` fits the mixers beside the heads that are kept."
    )
    header = ["key/value heads", "cache, GB", *_columns_of_probes(heads["sets"][0]), "which heads"]
    return _section("## Heads that have to look far", note, header, rows)


def _beside(whole: Sequence[int]) -> str:
    return f", beside those of layers {_layers(whole)}" if whole else ""


def _ablation(choice: dict[str, Any]) -> str:
    if choice["ablation"] is None:
        return ""
    columns = [
        column
        for name in choice["ablation"]["layers"][0]["probes"]
        for column in (f"{name}: growth", f"{name}: fewer right answers")
    ]
    note = (
        "The teacher's own attention with the output of a layer, or of a head, zeroed. Nothing of the student is in it."
    )
    parts = []
    for title, what, most in (("Layers", "layers", None), ("Heads", "heads", MOST_HEADS)):
        ranked = sorted(choice["ablation"][what], key=lambda row: -row["score"])[:most]
        rows = [
            [
                ":".join(map(str, row["place"])),
                *(_words(probe[figure]) for probe in row["probes"].values() for figure in ("growth", "acc_drop")),
            ]
            for row in ranked
        ]
        first = "layer" if what == "layers" else "layer:head"
        n_more = len(choice["ablation"][what]) - len(ranked)
        shown = f", {n_more} more in choice.json" * (n_more > 0)
        parts.append(_section(f"## {title} of the teacher, ablated{shown}", note, [first, *columns], rows))
    if choice["heads"] is not None and not choice["heads"]["sets"]:
        parts.append(
            "The heads to keep are those of the key/value heads, in layers that are not whole, whose heads have the "
            "largest sums of growth. `make_student.py --heads` fits the mixers beside them.\n"
        )
    return "\n".join(parts)


def _probes(choice: dict[str, Any]) -> str:
    lines = [
        f"- {name}: the teacher is right in {_words(found['acc'])} of its answers, and its loss is "
        f"{_words(found['loss'])} nats per answer, over {found['acc']['n']} texts."
        for name, found in choice["teacher"]["probes"].items()
    ]
    lines += [f"- {name}: left out; {reason}." for name, reason in choice["left_out"].items()]
    return "## Probes\n\n" + "\n".join(lines) + "\n"


def _made_with(choice: dict[str, Any]) -> str:
    return f"## Made with\n\n- Text: {choice['text']}; {choice['held_out']}.\n- Cost: {choice['cost']}.\n"


def _section(title: str, note: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return f"{title}\n\n{note}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def _columns(choice: dict[str, Any]) -> Iterator[str]:
    yield "KL"
    yield from _columns_of_probes(choice["teacher"])


def _columns_of_probes(row: dict[str, Any]) -> Iterator[str]:
    for name in row["probes"]:
        yield from (f"{name}: loss", f"{name}: right answers")


def _figures(row: dict[str, Any], is_teacher: bool = False) -> Iterator[str]:
    yield "0" if is_teacher else _words(row["kl"])
    yield from _of_probes(row)


def _of_probes(row: dict[str, Any]) -> Iterator[str]:
    for found in row["probes"].values():
        yield from (_words(found["loss"]), _words(found["acc"]))


def _words(estimate: dict[str, Any]) -> str:
    return str(Estimate(**estimate))


def _layers(kept: Sequence[int]) -> str:
    return " ".join(map(str, kept)) or "none"
