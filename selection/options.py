"""The options of choose_layers.py. Nothing heavy is imported, so that a mistake is reported at once."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from arguments import CommonArguments, TrainArguments
from inputs.bounds import LONGEST_CONTEXT, MOST_LAYERS
from inputs.groups import MODELS, PLAN
from inputs.option_values import option_values, preset_values
from inputs.options import BY_PRESET, option, out_of_bounds, path_option

CHOICE = "the choice"
TEXTS = "texts"
FOLDER = "choice"  # beside the student


@dataclass(kw_only=True)
class ChooseArguments(CommonArguments):
    """Holds the options of choose_layers.py."""

    layers: list[int] = dataclasses.field(default_factory=list)  # no option: they are what is asked for
    heads: list[str] = dataclasses.field(default_factory=list)  # no option: whole layers are chosen
    dtype: Literal["bfloat16", "float16", "float32"] = option(BY_PRESET, "weights and compute", MODELS)

    budget: int | None = option(
        None, "layers of the teacher's that the hybrid keeps", CHOICE, least=1, most=MOST_LAYERS - 1
    )
    cache_bytes: int | None = option(
        None, "instead: as many as fit a cache of so many bytes at --context_length", CHOICE, least=1, most=10**15
    )
    head_budget: int | None = option(
        None,
        "heads of the teacher's that the hybrid keeps in the other layers, all of a key/value head together",
        CHOICE,
        least=1,
        most=10**6,
    )
    head_choice: Literal["ablation", "search"] = option(
        "ablation",
        "which heads: those without which the probes lose most, or a search for those that have to look far",
        CHOICE,
    )
    context_length: int = option(
        8192, "tokens of the sequence that caches are counted for", CHOICE, least=1, most=LONGEST_CONTEXT
    )
    probe_weight: float = option(
        0.3,
        "weight of the probes' loss beside the KL, both in nats; 0 leaves the probes out",
        CHOICE,
        least=0,
        most=1000,
    )
    ablation: bool = option(True, "also ablate each head and each layer of the teacher; chooses no layers", CHOICE)
    output: str | None = path_option(None, "folder of the result (default: choice in the student's)", CHOICE)
    device: str | None = option(None, "device to run on (default: a GPU for each rank, else the CPU)", CHOICE)

    text: str | None = path_option(
        None, "text for the KL, named as --dataset_name (default: the preset's held-out text, else what it trains on)",
        TEXTS,
    )  # fmt: skip
    text_subset: str | None = option(None, "configuration of that data set", TEXTS)
    text_split: str = option("train", "split of that data set", TEXTS)
    text_field: str = option("text", "column that holds the text", TEXTS)
    text_windows: int = option(
        12, "windows of it; a third is kept aside for the last figures", TEXTS, least=3, most=10**5
    )
    seq_length: int = option(256, "tokens per window", TEXTS, least=2, most=LONGEST_CONTEXT)
    probe_texts: int = option(
        6, "texts of each probe; a third is kept aside for the last figures", TEXTS, least=3, most=10**5
    )

    dry_run: bool = option(False, "print what the choice would cost; reads no weights", PLAN)

    def problems(self) -> list[str]:
        """Returns a line for each option, or pair of options, that cannot be used."""
        return [*out_of_bounds(self), *self._pairs()]

    def _pairs(self) -> Iterator[str]:
        if self.head_budget is not None and self.head_choice == "ablation" and not self.ablation:
            yield f"--head_budget {self.head_budget} --no_ablation: nothing says which; give --head_choice search"
        if self.budget is None and self.cache_bytes is None and self.head_budget is None:
            yield "--budget: is missing; give how many of the teacher's layers to keep, --cache_bytes, or --head_budget"
        if self.budget is not None and self.cache_bytes is not None:
            yield f"--budget {self.budget} --cache_bytes {self.cache_bytes}: both say how many layers; give one of them"


def parse_choose_args(argv: list[str] | None = None) -> ChooseArguments:
    """Returns the options of a choice. Raises ValueError that lists every problem found."""
    description = "Choose which of the teacher's layers a hybrid keeps, by measurement."
    values, given = option_values(ChooseArguments, "common", description, argv)
    args = ChooseArguments(**values)
    if args.text is None:
        _take_text_of_preset(args, given)
    if problems := args.problems():
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))
    return args


def training_of(preset: str) -> TrainArguments:
    """Returns the options of a run by the preset alone."""
    return TrainArguments(**preset_values(preset, TrainArguments, "train"))


def _take_text_of_preset(args: ChooseArguments, given: set[str]) -> None:
    """Names the held-out text of the preset, or what it trains on, but for the options of it that are given."""
    training = training_of(args.preset)
    args.text, subset, split = training.held_out_text()
    values = {"text_subset": subset, "text_split": split, "text_field": training.dataset_text_field}
    for name, value in values.items():
        if name not in given:
            setattr(args, name, value)
