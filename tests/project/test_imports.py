"""The design's rule of imports, held by walking the source: rooms import rooms below them only, few modules know of
ranks, and one of optional CUDA packages. The walker itself is tried on sources that break each rule.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a room, or a module that stands at the top, may import those of the lines above its own.
HOUSE = (
    {"paths", "appended_file"},
    {"utils", "llamba"},
    {"processes"},
    {"inputs"},
    {"arguments"},
    {"text", "model_utils", "report_page"},
    {"data", "distillation"},
    {"evaluation"},
    {"conversion"},
    {"selection"},
    {"training_utils"},
    {"checkpointing"},
    {"monitoring"},
    {"preflight"},
    {"list_options", "make_student", "choose_layers", "train_gpus", "eval_mmlu_hybrid", "doctor", "report"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}
# Where less is allowed than the floor allows.
ALLOWED: dict[str, set[str]] = {
    "arguments": {"inputs"},
    "distillation.losses": set(),
    "distillation.adamw": set(),
    "text.batch": set(),
    "preflight.checks.collectives": set(),
    "report_page": {"arguments", "inputs", "utils"},
    "report": {"report_page", "utils", "processes", "paths"},
}
KNOW_RANKS = {
    *("processes.ranks", "processes.lifeline", "distillation.teacher", "text.stream_loader"),
    *("distillation.exchange", "distillation.owners", "distillation.levels", "distillation.buckets"),
    *("data", "training_utils", "conversion.alignment", "preflight.checks.collectives"),
}
TYPE_OF_THE_OPTIMIZER = "torch.distributed.optim.ZeroRedundancyOptimizer"  # to name it is not to talk to ranks
OPTIONAL_PACKAGES = {"mamba_ssm", "causal_conv1d", "fla"}
DOTTED_NAME = re.compile(r"\w+(\.\w+)*")


def project_sources():
    """Returns the source of every module that the entries are made of, by its name."""
    rooms = [ROOT / room for room in FLOOR_OF if (ROOT / room).is_dir()]
    files = [*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in files}


def room_of(name):
    return name.split(".")[0]


def imported(tree):
    """Yields absolute dotted names that a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named_in_calls(tree):
    """Yields dotted names that a module gives to calls as text, as `importlib.import_module` wants them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield from DOTTED_NAME.fullmatch(argument.value) and [argument.value] or []


def climbs_out(tree, depth):
    """Returns whether a relative import leaves the package of a module `depth` packages deep."""
    return any(isinstance(node, ast.ImportFrom) and node.level > depth for node in ast.walk(tree))


def uses_distributed(tree):
    names = [*imported(tree), *(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))]
    return any(f"{name}.".startswith("torch.distributed.") for name in names if name != TYPE_OF_THE_OPTIMIZER)


def is_below(module, target):
    room = room_of(module)
    allowed = ALLOWED.get(module, ALLOWED.get(room))
    return target in allowed if allowed is not None else FLOOR_OF[target] < FLOOR_OF[room]


def violations(sources):
    """Returns every breach of the rule, as `module: what`."""
    found = []
    for name, source in sorted(sources.items()):
        room, tree = room_of(name), ast.parse(source)
        if room not in FLOOR_OF:
            found.append(f"{name}: has no place in the house")
            continue
        targets = {room_of(target) for target in imported(tree)}
        project = (targets & set(FLOOR_OF)) - {room}
        found += [f"{name}: imports {target}" for target in sorted(project) if not is_below(name, target)]
        if climbs_out(tree, name.count(".")):
            found.append(f"{name}: imports from above its room")
        if uses_distributed(tree) and name not in KNOW_RANKS:
            found.append(f"{name}: uses torch.distributed")
        optional = (targets | {room_of(text) for text in named_in_calls(tree)}) & OPTIONAL_PACKAGES
        if name != "llamba.kernels":
            found += [f"{name}: imports {package}" for package in sorted(optional)]
    return found


def test_imports_point_down_only():
    assert violations(project_sources()) == []


def test_the_walk_sees_the_project():
    sources = project_sources()
    assert {"train_gpus", "arguments", "llamba.kernels", "text.batch", "preflight.checks.basics"} <= set(sources)
    assert {room_of(name) for name in sources} == set(FLOOR_OF)
    kernels = ast.parse(sources["llamba.kernels"])
    assert {room_of(name) for name in named_in_calls(kernels)} >= OPTIONAL_PACKAGES
    assert {name for name in sources if uses_distributed(ast.parse(sources[name]))} == KNOW_RANKS
    assert set(imported(ast.parse(sources["distillation.teacher"]))) >= {"llamba.LlambaForCausalLM"}


@pytest.mark.parametrize(
    "module,source,breach",
    [
        ("arguments", "import utils", "imports utils"),
        ("utils", "from processes import exits", "imports processes"),
        ("text.rows", "from data import PackedTextDataset", "imports data"),
        ("text.batch", "import utils", "imports utils"),
        ("distillation.losses", "from arguments import DTYPES", "imports arguments"),
        ("distillation.teacher", "def f():\n    import training_utils", "imports training_utils"),
        ("checkpointing.saver", "from monitoring.run_log import RunLog", "imports monitoring"),
        ("report_page.tables", "from evaluation import report", "imports evaluation"),
        ("llamba.ssd", "from ..utils import logger", "imports from above its room"),
        ("stranger", "", "has no place in the house"),
        ("train_gpus", "from torch import distributed", "uses torch.distributed"),
        ("utils", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
        ("monitoring.health", "from torch.distributed.optim import DistributedOptimizer", "uses torch.distributed"),
        ("llamba.mixer", "import mamba_ssm.ops", "imports mamba_ssm"),
        ("llamba.mixer", "import importlib\nimportlib.import_module('causal_conv1d')", "imports causal_conv1d"),
        ("llamba.mixer", "f(name='fla.ops.gla')", "imports fla"),
    ],
)
def test_a_breach_is_seen(module, source, breach):
    assert violations({module: source}) == [f"{module}: {breach}"]


@pytest.mark.parametrize(
    "module,source",
    [
        ("train_gpus", "import data, utils\nfrom preflight import plan\nfrom llamba import LlambaConfig"),
        ("train_gpus", "from torch.nn.parallel import DistributedDataParallel"),
        ("distillation.teacher", "import torch.distributed\nfrom processes.ranks import Ranks"),
        ("checkpointing.saver", "from torch.distributed.optim import ZeroRedundancyOptimizer\nimport training_utils"),
        ("llamba.mixer", "from .kernels import kernels_for\nfrom llamba.ssd import ssd_step"),
        ("llamba.kernels", "import mamba_ssm"),
        ("evaluation.mmlu", "print('the words mamba_ssm and fla in a text')"),
    ],
)
def test_what_is_allowed_is_no_breach(module, source):
    assert violations({module: source}) == []


def test_importing_a_module_runs_no_program():
    """No side effects at import: outside definitions, entries only call what the guard protects."""
    for name in HOUSE[-1]:
        for node in ast.parse(project_sources()[name]).body:
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.If):
                assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def test_no_path_tricks():
    for name, source in project_sources().items():
        assert "sys.path" not in source, name


def test_python_knows_the_modules_as_ours():
    """A standard module of the same name would be imported in our place, or we in its."""
    assert not set(FLOOR_OF) & set(sys.stdlib_module_names)
