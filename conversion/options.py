"""The options of make_student.py. Nothing heavy is imported, so that a mistake is reported at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from arguments import CommonArguments, TrainArguments
from inputs.bounds import LONGEST_CONTEXT
from inputs.groups import MODELS, PLAN
from inputs.option_values import command_that_makes, option_values, preset_values
from inputs.options import BY_PRESET, option, out_of_bounds, path_option
from inputs.teacher_parts import head_list
from inputs.value_types import layer_or_auto

STUDENT = "the student"
CALIBRATION = "calibration"
LEAST_TOKENS = 512  # for --init closed_form


@dataclass(kw_only=True)
class MakeArguments(CommonArguments):
    """Holds the options of make_student.py."""

    dtype: Literal["bfloat16", "float16", "float32"] = option(
        BY_PRESET, "weights that are written; all computing is in float32 and float64", MODELS
    )
    layers: list[int] = option(
        BY_PRESET,
        "layers whose hybrid is measured too, by index; -1 for none, the default for a --teacher_model without "
        "--preset. The student has none of the teacher's: train_gpus.py puts them in",
        MODELS,
        nargs="*",
        parse=layer_or_auto,
    )
    heads: list[str] = option(
        [],
        "heads of the teacher that will stand beside the mixers, 13:18,15:11: the mixers are fitted to what these "
        "leave, and train_gpus.py needs the same --heads",
        MODELS,
        nargs="*",
        parse=head_list,
    )
    student_model: str = path_option(BY_PRESET, "default of --output, by a preset of a student that is built", STUDENT)
    output: str | None = path_option(
        None, "new folder for the student (default: that of a preset whose student is built of this teacher)", STUDENT
    )
    init: Literal["closed_form", "projections", "random"] = option(
        "closed_form",
        "mixers: fitted to attention on a text; with its projections alone, or at random, for comparison",
        STUDENT,
    )
    d_state: int | None = option(
        None, "state of a mixer's head (default: the teacher's head_dim)", STUDENT, least=2, most=4096
    )
    ssm_bias: bool = option(
        True, "biases in the mixers' projections; --no_ssm_bias is the published layout of Llamba", STUDENT
    )
    device: str | None = option(None, "device to compute on (default: a GPU if there is one, else the CPU)", STUDENT)

    calibration: str | None = path_option(
        None, "text to fit the mixers on, named as --dataset_name (default: the preset's data set)", CALIBRATION
    )
    calibration_subset: str | None = option(None, "configuration of that data set", CALIBRATION)
    calibration_revision: str | None = option(None, "branch, tag or commit of that data set", CALIBRATION)
    calibration_split: str = option("train", "split of that data set", CALIBRATION)
    calibration_text_field: str = option("text", "column that holds the text", CALIBRATION)
    calibration_tokens: int = option(8192, "tokens to fit the mixers on", CALIBRATION, least=1, most=10**7)
    held_out_tokens: int = option(
        2048, "tokens of other documents of that text, to measure the student on", CALIBRATION, least=1, most=10**7
    )
    seq_length: int = option(256, "tokens per window of both", CALIBRATION, least=2, most=LONGEST_CONTEXT)

    dry_run: bool = option(False, "print what the student would be and take; reads no weights", PLAN)

    def problems(self) -> list[str]:
        """Returns a line for each option, or pair of options, that cannot be used."""
        return [*out_of_bounds(self), *self._pairs()]

    def _pairs(self) -> Iterator[str]:
        if self.auto_layers is not None:
            yield f"--layers auto:{self.auto_layers}: is for train_gpus.py; name layers, or -1"
        if self.auto_heads is not None:
            yield f"--heads auto:{self.auto_heads}: is for train_gpus.py; name heads, as choose_layers.py finds them"
        if self.output is None:
            yield (
                f"--output: has no default with --teacher_model {self.teacher_model} and --preset {self.preset}, which "
                "builds no student of it; give --output, a new folder"
            )
        if len(set(self.layers)) != len(self.layers) or any(index < 0 for index in self.layers):
            yield f"--layers {' '.join(map(str, self.layers))}: expected each index once, or -1 alone for none"
        for name in ("calibration_tokens", "held_out_tokens"):
            if getattr(self, name) < self.seq_length:
                yield f"--{name} {getattr(self, name)}: fills no window of --seq_length {self.seq_length}; raise it"
        if self.init == "closed_form" and self.calibration_tokens < LEAST_TOKENS:
            yield (
                f"--calibration_tokens {self.calibration_tokens}: is too little text for --init closed_form; expected "
                f"at least {LEAST_TOKENS}"
            )


def parse_make_args(argv: list[str] | None = None) -> MakeArguments:
    """Returns the options of a conversion. Raises ValueError that lists every problem found."""
    description = (
        "Make a student of a Llama, Mistral, Qwen2 or Qwen3: its layers, with recurrent mixers in place of attention."
    )
    values, given = option_values(MakeArguments, "common", description, argv)
    args = MakeArguments(**values)
    is_presets = args.teacher_model == preset_values(args.preset, MakeArguments, "common")["teacher_model"]
    if not (is_presets or {"layers", "preset"} & given):
        args.layers = []  # those of the default preset are of another model
    if args.output is None and ("student_model" in given or is_presets and command_that_makes(args.student_model)):
        args.output = args.student_model
    if args.calibration is None:
        _take_text_of_preset(args, given)
    if problems := args.problems():
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))
    return args


def _take_text_of_preset(args: MakeArguments, given: set[str]) -> None:
    """Names the text that the preset trains on, but for the options of it that are given."""
    of_training = preset_values(args.preset, TrainArguments, "train")
    for part in ("subset", "revision", "split", "text_field"):
        if (name := f"calibration_{part}") not in given:
            setattr(args, name, of_training.get(f"dataset_{part}", getattr(args, name)))
    args.calibration = of_training["dataset_name"]
