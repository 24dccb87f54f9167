"""The page docs/options.md, made from the options themselves:

python list_options.py > docs/options.md
"""

import typing
from typing import Any

from inputs.option_values import preset_values
from inputs.options import Option, as_text, default_values, kind_of, options_of

INTRO = """\
# Options

This page is made from the options themselves: `python list_options.py > docs/options.md`. A test compares the two.

**Where a value comes from.** The command line comes first, then the file of `--config`, then the preset, then the
default.

- **Presets.** `--preset` names a folder under `presets/`: `llamba-8b` (used if you name none), `llamba-3b`, `llamba-1b`
  and `tiny` have published students; those of `llama-8b`, `llama-3b`, `llama-1b` and `smollm2-135m` are built first,
  by `python make_student.py --preset NAME`. A preset is a file such as `presets/llamba-8b/preset.json`. Defaults
  marked \\* are values of `llamba-8b`.
- **Files.** `--config FILE` reads options from YAML, a line such as `seq_length: 1024` each; `null` means no value.
  `configs/` has files for 1B, 3B and 8B students. A run writes all its options to `args.yaml` in `--output_dir`, which
  `--config` reads too.
- **Data sets are replaced as a whole.** If you give another `--dataset_name`, its subset, split, revision, text column
  and held-out text are not taken from the preset or the file: they belong to the data set named there. Another
  `--eval_dataset_name` replaces the held-out text's subset and split. `--eval_interval 0` drops the held-out text.
- **Warm-up.** Where one place gives both, `--warmup_steps` counts and `--warmup_ratio` does not. A ratio on the command
  line replaces the steps of a file or a preset. A preset's steps are cut to what the decay leaves of a shorter run.

**Paths** are relative to the folder in which the command runs, in files too. In every path, and in every name that may
be a path, `~` at the start is the home directory, `$NAME` and `${NAME}` are environment variables, and `$$` is a dollar
sign; a variable that is not set is an error. Names of the Hugging Face hub and URLs stay as they are. `args.yaml` has
the paths that this gave, so it means the same in another environment. `doctor.py`, `report.py` and `llamba.export` read
their paths in the same way.

**How to write it.** A switch, which is `on` or `off`, has an opposite: `--no_dataset_streaming`, `--no_freeze_mlp`. A
dash means that there is no value. Names cannot be shortened. Of an option that is given twice, the last one counts.
No value may be blank: leave the option out. A number is written in digits (`1024`, `1_000`, `1e-5`); a whole number has
no exponent. All options that cannot be used are reported together, before any model or data is loaded.

**Steps.** In a micro step every rank does one batch forward and backward. `--grad_accumulation_steps` micro steps make
an optimizer step, which changes the weights. `--save_interval` and `--resume_step` count micro steps, and must be
multiples of `--grad_accumulation_steps`; everything else counts optimizer steps.

**A resumed run.** The last column says what `--resume` does with another value than before: `same` refuses it, because
it would be another run; `same (stream)` and `same (cache)` refuse it with `--dataset_streaming` and with
`--no_dataset_streaming`; `logged` accepts it and logs a warning; `free` accepts it. `auto` means what the run had.
"""
NO_VALUE = "–"


def options_page(entries: dict[str, tuple[Any, str]], free: set[str]) -> str:
    """Returns the page as Markdown.

    entries: script -> the dataclass of its options, and its section of a preset.
    free: options of training that a resumed run may change without a warning.
    """
    parts = [INTRO]
    for script, (cls, section) in entries.items():
        header = [script, "Default", "Meaning", "Values", *(["Resumed"] if section == "train" else [])]
        tables: dict[str, list[str]] = {}
        for name, about in options_of(cls).items():
            table = tables.setdefault(about.group, [_row(header), _row(["---"] * len(header))])
            cells = [f"`--{name}`", _default(cls, name, section), about.help, _allowed(cls, name)]
            table.append(_row([*cells, *([_when_resumed(about, name in free)] if section == "train" else [])]))
        parts.append(f"## {script}\n")
        parts += [f"### {group[0].upper()}{group[1:]}\n\n" + "\n".join(table) + "\n" for group, table in tables.items()]
    return "\n".join(parts)


def _row(cells: list[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def _default(cls: Any, name: str, section: str) -> str:
    preset = preset_values(cls.preset, cls, section)
    value = {**default_values(cls), **preset}[name]
    return NO_VALUE if value in (None, []) else f"`{as_text(value)}`" + ("\\*" if name in preset else "")


def _allowed(cls: Any, name: str) -> str:
    _, choices, _ = kind_of(typing.get_type_hints(cls)[name])
    return ", ".join(f"`{choice}`" for choice in choices) if choices else options_of(cls)[name].bounds


def _when_resumed(about: Option, is_free: bool) -> str:
    if about.kept:
        return {True: "same", "streams": "same (stream)", "caches": "same (cache)"}[about.kept]
    return "free" if is_free else "logged"
