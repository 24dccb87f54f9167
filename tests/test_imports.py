"""The design's rule of imports, held by walking the source: they point down only, few modules know of ranks,
and one of optional CUDA packages. The walker itself is tried on sources that break each rule.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"command_line", "stopping", "llamba"},
    {"settings"},
    {"arguments"},
    {"utils", "bad_rows"},
    {"rows", "speed", "progress", "tracking"},
    {"packing", "run_log"},  # data's lower halves; model_files is model_utils's
    {"sources", "streaming", "model_files"},
    {"batches"},
    {"stream_loader"},
    {"model_utils", "data", "losses", "lifeline", "mmlu_files", "lm_eval_tasks", "partial_results"},
    {"ranks", "optimizer", "training_utils", "checkpoint", "held_out", "scoring"},
    {"mmlu", "retrieval"},
    {"teacher", "run_state", "results"},
    {"resume", "saver", "health", "evaluation", "layer_map", "eval_pieces", "eval_report"},
    {"footprint", "eval_plan"},
    {"plan"},
    {"plan_report"},
    {"checkup", "reporting"},
    {"train_gpus", "eval_mmlu_hybrid", "doctor", "report"},
)
PACKAGES = ("llamba", "checkup", "reporting")
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# Where less is allowed than the level allows.
ALLOWED: dict[str, set[str]] = {
    "llamba": set(),
    "losses": set(),
    "command_line": set(),
    "settings": {"command_line"},
    "arguments": {"command_line", "settings"},
    "utils": {"stopping"},
    "progress": set(),
    "speed": {"arguments", "llamba"},
    "tracking": {"arguments", "utils"},
    "run_log": {"arguments", "utils", "progress", "speed", "tracking"},
    "batches": {"streaming"},
    "lifeline": {"stopping"},
    "ranks": {"lifeline", "utils"},
    "optimizer": {"arguments"},
    "teacher": {name for name in LEVEL_OF if LEVEL_OF[name] < LEVEL_OF["ranks"]} | {"ranks"},
}
KNOW_RANKS = {"ranks", "training_utils", "teacher", "data", "stream_loader", "lifeline", "checkup.all_reduce"}
TYPE_OF_THE_OPTIMIZER = "torch.distributed.optim.ZeroRedundancyOptimizer"  # to name it is not to talk to ranks
OPTIONAL_PACKAGES = {"mamba_ssm", "causal_conv1d", "fla"}
DOTTED_NAME = re.compile(r"\w+(\.\w+)*")


def project_sources():
    """Module name -> source of everything that the entries are made of."""
    files = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in files}


def imported(tree):
    """Absolute dotted names that a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named_in_calls(tree):
    """Dotted names that a module gives to calls as text, as `importlib.import_module` wants them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield from DOTTED_NAME.fullmatch(argument.value) and [argument.value] or []


def climbs_out(tree, depth):
    """Whether a relative import leaves the package of a module `depth` packages deep."""
    return any(isinstance(node, ast.ImportFrom) and node.level > depth for node in ast.walk(tree))


def uses_distributed(tree):
    names = [*imported(tree), *(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))]
    return any(f"{name}.".startswith("torch.distributed.") for name in names if name != TYPE_OF_THE_OPTIMIZER)


def is_below(module, target):
    return target in ALLOWED.get(module, {name for name in LEVEL_OF if LEVEL_OF[name] < LEVEL_OF[module]})


def violations(sources):
    """Every breach of the rule, as `module: what`."""
    found = []
    for name, source in sorted(sources.items()):
        module, tree = name.split(".")[0], ast.parse(source)
        if module not in LEVEL_OF:
            found.append(f"{name}: has no place in LEVELS")
            continue
        targets = {target.split(".")[0] for target in imported(tree)}
        project = (targets & set(LEVEL_OF)) - {module}
        found += [f"{name}: imports {target}" for target in sorted(project) if not is_below(module, target)]
        if climbs_out(tree, name.count(".")):
            found.append(f"{name}: imports from above its package")
        if uses_distributed(tree) and name not in KNOW_RANKS:
            found.append(f"{name}: uses torch.distributed")
        optional = (targets | {text.split(".")[0] for text in named_in_calls(tree)}) & OPTIONAL_PACKAGES
        if name != "llamba.kernels":
            found += [f"{name}: imports {package}" for package in sorted(optional)]
    return found


def test_imports_point_down_only():
    assert violations(project_sources()) == []


def test_the_walk_sees_the_project():
    sources = project_sources()
    assert {"train_gpus", "arguments", "llamba.kernels", "llamba.modeling", "llamba.__init__"} <= set(sources)
    assert {name.split(".")[0] for name in sources} == set(LEVEL_OF)
    kernels = ast.parse(sources["llamba.kernels"])
    assert {name.split(".")[0] for name in named_in_calls(kernels)} >= OPTIONAL_PACKAGES
    assert {name for name in sources if uses_distributed(ast.parse(sources[name]))} == KNOW_RANKS
    assert set(imported(ast.parse(sources["teacher"]))) >= {"llamba.LlambaForCausalLM", "ranks.Ranks"}


@pytest.mark.parametrize(
    "module,source,breach",
    [
        ("arguments", "import utils", "imports utils"),
        ("utils", "import losses", "imports losses"),
        ("utils", "import run_log", "imports run_log"),
        ("utils", "from arguments import TrainArguments", "imports arguments"),
        ("run_log", "import rows", "imports rows"),
        ("stopping", "import utils", "imports utils"),
        ("lifeline", "import utils", "imports utils"),
        ("lifeline", "import ranks", "imports ranks"),
        ("ranks", "from data import Batch", "imports data"),
        ("ranks", "import training_utils", "imports training_utils"),
        ("optimizer", "from ranks import Ranks", "imports ranks"),
        ("optimizer", "import torch.distributed as dist", "uses torch.distributed"),
        ("checkpoint", "import run_state", "imports run_state"),
        ("run_state", "import saver", "imports saver"),
        ("run_state", "import teacher", "imports teacher"),
        ("training_utils", "import resume", "imports resume"),
        ("saver", "import train_gpus", "imports train_gpus"),
        ("saver", "import torch.distributed as dist", "uses torch.distributed"),
        ("health", "from torch.distributed.optim import DistributedOptimizer", "uses torch.distributed"),
        ("run_state", "from torch.distributed import optim", "uses torch.distributed"),
        ("rows", "import packing", "imports packing"),
        ("streaming", "import sources", "imports sources"),
        ("losses", "from arguments import DTYPES", "imports arguments"),
        ("llamba.ssd", "from utils import logger", "imports utils"),
        ("llamba.ssd", "from ..utils import logger", "imports from above its package"),
        ("packing", "import data", "imports data"),
        ("sources", "import torch.distributed", "uses torch.distributed"),
        ("data", "import model_utils", "imports model_utils"),
        ("batches", "from stream_loader import StreamingLoader", "imports stream_loader"),
        ("stream_loader", "import data", "imports data"),
        ("data", "def f():\n    from ranks import Ranks", "imports ranks"),
        ("model_utils", "import checkpoint as c", "imports checkpoint"),
        ("training_utils", "import teacher", "imports teacher"),
        ("training_utils", "from ranks import Ranks", "imports ranks"),
        ("training_utils", "import optimizer", "imports optimizer"),
        ("teacher", "import training_utils", "imports training_utils"),
        ("teacher", "import mmlu", "imports mmlu"),
        ("checkpoint", "import train_gpus", "imports train_gpus"),
        ("held_out", "from ranks import Ranks", "imports ranks"),
        ("held_out", "import training_utils", "imports training_utils"),
        ("evaluation", "import torch.distributed as dist", "uses torch.distributed"),
        ("evaluation", "from health import UpdateHealth", "imports health"),
        ("eval_mmlu_hybrid", "import train_gpus", "imports train_gpus"),
        ("stranger", "", "has no place in LEVELS"),
        ("train_gpus", "import torch.distributed as dist", "uses torch.distributed"),
        ("train_gpus", "from torch import distributed", "uses torch.distributed"),
        ("model_utils", "from torch.distributed import barrier", "uses torch.distributed"),
        ("utils", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
        ("llamba.mixer", "import mamba_ssm.ops", "imports mamba_ssm"),
        ("model_utils", "from fla.ops import simple_gla", "imports fla"),
        ("llamba.mixer", "import importlib\nimportlib.import_module('causal_conv1d')", "imports causal_conv1d"),
        ("llamba.mixer", "f(name='fla.ops.gla')", "imports fla"),
    ],
)
def test_a_breach_is_seen(module, source, breach):
    assert violations({module: source}) == [f"{module}: {breach}"]


@pytest.mark.parametrize(
    "module,source",
    [
        (
            "train_gpus",
            "import teacher, checkpoint, data, losses, arguments, utils\nfrom llamba import LlambaConfig",
        ),
        ("train_gpus", "from torch.nn.parallel import DistributedDataParallel"),
        ("teacher", "import torch.distributed\nfrom ranks import Ranks"),
        ("data", "import packing, sources, arguments, batches, stream_loader"),
        ("utils", "from stopping import Interrupted"),
        ("run_log", "from arguments import TrainArguments"),
        ("ranks", "from lifeline import Lifeline\nfrom utils import checked_device"),
        ("optimizer", "from torch.distributed.optim import ZeroRedundancyOptimizer\nimport arguments"),
        ("saver", "from torch.distributed.optim import ZeroRedundancyOptimizer\nimport run_state, checkpoint, utils"),
        ("llamba.mixer", "from .kernels import kernels_for\nfrom llamba.ssd import ssd_step"),
        ("llamba.kernels", "import mamba_ssm"),
        ("held_out", "import arguments, losses, packing, sources, streaming"),
        ("evaluation", "import held_out, mmlu, ranks, teacher, training_utils, stopping"),
        ("mmlu", "print('the words mamba_ssm and fla in a text')"),
    ],
)
def test_what_is_allowed_is_no_breach(module, source):
    assert violations({module: source}) == []


def test_importing_a_module_runs_no_program():
    """No side effects at import: outside definitions, entries only call what the guard protects."""
    for name in ("train_gpus", "eval_mmlu_hybrid", "doctor", "report"):
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
    assert not set(LEVEL_OF) & set(sys.stdlib_module_names)
