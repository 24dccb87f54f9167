"""benchmarks/check_kernels.py without Triton: what a mixer launches in training's layouts, with played kernels; what
the assembler's log says; the table, the remarks and the errors. With Triton, one kernel from launch to binary.
"""

import functools
import importlib.util
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llamba.mamba_scan import NEEDED, mamba_scan
from tests.llamba import mamba_kernels

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_chunk_state_fwd_kernel' for 'sm_90a'
ptxas info    : Function properties for _chunk_state_fwd_kernel
    72 bytes stack frame, 68 bytes spill stores, 84 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 72 bytes cumulative stack size
ptxas info    : Compile time = 103.201 ms
"""


@pytest.fixture
def watched():
    """Returns a module of played kernels, and a list of their calls: name, and the tensors among the arguments."""
    calls = []
    module = ModuleType("watched_kernels")

    def watch(name, function, *args, **kwargs):
        calls.append((name, [m for m in [*args, *kwargs.values()] if isinstance(m, torch.Tensor)]))
        return function(*args, **kwargs)

    for name in NEEDED:
        setattr(module, name, functools.partial(watch, name, getattr(mamba_kernels, name)))
    return module, calls


@pytest.mark.parametrize("name", ["training", "odd length", "one chunk", "prefill", "documents"])
def test_every_kernel_is_launched_in_the_layouts_of_training(watched, name):
    from kernel_launches import CASES, STUDENTS, calling_kernels, run_mixer

    module, calls = watched
    case, config, scan = CASES[name], STUDENTS["llamba-8b"], mamba_scan(module)
    with calling_kernels(module):
        run_mixer(config, case, scan)
    forward = {"_chunk_state_fwd", "_state_passing_fwd", "_bmm_chunk_fwd", "_chunk_scan_fwd"}
    assert {kernel for kernel, _ in calls} == (forward if case.prefill else NEEDED)
    tensors = dict(calls)
    assert all(m.is_meta for _, given in calls for m in given)
    x = tensors["_chunk_state_fwd"][1]
    assert x.dtype == torch.bfloat16 and x.shape == (case.batch, case.length, 32, 128)
    if not (case.documents or case.prefill):  # a part of the convolution's result, which holds B and C beside it
        assert x.stride() == (case.length * 8192, 8192, 128, 1)
        B_ = tensors["_chunk_state_fwd"][0]
        assert B_.data_ptr() == 4096 * 2 and B_.stride() == (case.length * 8192, 8192, 64, 1)


def test_the_scan_is_itself_again_afterwards(watched):
    from kernel_launches import CASES, STUDENTS, calling_kernels, run_mixer

    module, calls = watched
    scan = mamba_scan(module)
    with calling_kernels(module):
        run_mixer(STUDENTS["llamba-8b"], CASES["one chunk"], scan)
    assert calls
    calls.clear()
    x, B_ = torch.empty(1, 20, 4, 8, device="meta"), torch.empty(1, 20, 2, 8, device="meta")
    scan(x, torch.empty(1, 20, 4, device="meta"), B_, B_, 16)
    assert calls == []


def test_a_launch_is_read_in_every_configuration():
    from kernel_launches import LaunchReader

    def run(kernel, *args, grid, warmup, **options):
        """Plays Triton's, which runs nothing if `warmup` is true, and stops where `keep` says so."""
        assert warmup
        function = SimpleNamespace(module="a_module", name=kernel)
        assert reader.keep(fn=function, compile={"specialization_data": f"{args} {options}"}, is_manual_warmup=True)

    reader = LaunchReader(90, run)
    configs = [SimpleNamespace(all_kwargs=lambda n=n: {"BLOCK": n}) for n in (16, 32)]
    tuned = SimpleNamespace(run=lambda *args, **kwargs: reader.read("tuned", args, kwargs))
    tuner = SimpleNamespace(arg_names=["x"], prune_configs=lambda kwargs: configs, fn=tuned)
    reader.read("first", (1,), {"grid": None, "warmup": False})
    reader.read_tuned(tuner, (2,), {"grid": None, "warmup": False, "N": 3})
    reader.read("last", (4,), {"grid": None, "warmup": False})
    found = [[(launch.kernel, launch.config, launch.specialization) for launch in choice] for choice in reader.choices]
    assert found == [
        [("first", "", "(1,) {}")],
        [("tuned", f"BLOCK {n}", f"(2,) {{'N': 3, 'BLOCK': {n}}}") for n in (16, 32)],
        [("last", "", "(4,) {}")],
    ]
    assert tuner.best_config is configs[0] and tuner.nargs == {"x": 2}


def launch_of(kernel="_chunk_scan_fwd_kernel", target=90, config=""):
    from kernel_launches import Launch

    return Launch("mamba_ssm.ops.triton.ssd_chunk_scan", kernel, target, config, "{}")


def binary(target=90, kernel="_chunk_scan_fwd_kernel", **values):
    from kernel_binaries import Binary

    return Binary(launch_of(kernel, target), seconds=1.25, **values)


def test_the_log_of_the_assembler_is_read():
    from kernel_binaries import products_of, read_log

    assert read_log(LOG) == {"registers": 255, "spilled": 68, "serialized": False}
    warning = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient"
    assert read_log(LOG + warning)["serialized"]
    with pytest.raises(ValueError, match="does not say how many registers"):
        read_log("ptxas info    : 0 bytes gmem")
    assert products_of("wgmma.mma_async.sync.aligned\nmma.sync.aligned") == "wgmma"
    assert products_of("mma.sync.aligned") == "mma" and products_of("fma.rn.f32") == ""


def test_the_table_has_a_row_for_each_kernel_and_gpu():
    from kernel_report import table_of

    tried = [
        [binary(registers=168, shared=50_000, products="wgmma"), binary(registers=255, spilled=68, shared=240_000)],
        [binary(registers=200, spilled=12, shared=60_000)],
        [binary(target=80, error="PTXASError: no")],
        [binary(kernel="_bmm_chunk_fwd_kernel", registers=64, products="mma")],
        [binary(target=80, registers=90)],
    ]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of(tried)]
    assert header[:3] == ["kernel", "GPU", "launches"]
    assert rows == [
        ["chunk_scan_fwd", "A100", "2", "1 of 2", "1", "90", "0", "0", "0", "-", "2"],
        ["chunk_scan_fwd", "H100", "2", "3 of 3", "2", "168 to 255", "12", "68", "49 to 234", "wgmma", "4"],
        ["bmm_chunk_fwd", "H100", "1", "1 of 1", "1", "64", "0", "0", "0", "mma", "1"],
    ]


def test_a_kernel_that_cannot_run_is_an_error_and_one_that_spills_a_remark():
    from kernel_report import problems_of, remarks_of

    too_large, broken = binary(shared=300_000), binary(error="PTXASError: `ptxas` failed")
    slow = binary(spilled=1000, target=80)
    assert list(problems_of([[too_large, binary()], [slow]])) == []
    assert list(remarks_of([[too_large, binary()], [slow, binary(spilled=4, target=80)]])) == []
    (problem,) = problems_of([[too_large, broken], [slow]])
    assert problem.startswith("error: chunk_scan_fwd on H100 (sm_90): none of 2 configurations")
    assert "300000 bytes of shared memory, 232448 are there; PTXASError" in problem and "pip uninstall" in problem
    (remark,) = remarks_of([[too_large, broken], [slow]])
    assert "chunk_scan_fwd on A100 (sm_80) spills 1000 bytes" in remark


@pytest.mark.parametrize("spilled,error,code", [(0, "", 0), (999, "", 0), (0, "PTXASError: no", 1)])
def test_the_exit_code_says_whether_every_kernel_can_run(monkeypatch, capsys, spilled, error, code):
    import check_kernels

    monkeypatch.setattr("sys.argv", ["check_kernels.py", "--targets", "90"])
    monkeypatch.setattr(check_kernels.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(check_kernels, "version", lambda name: "1.0")
    monkeypatch.setattr(check_kernels, "launches", lambda *_: {(launch_of(),): ["training of llamba-8b"]})

    def compile_all(jobs, processes, show):
        assert jobs == [((launch_of(),), True)] and processes == 2
        show([binary(spilled=spilled, error=error)])
        return [[binary(spilled=spilled, error=error)]]

    monkeypatch.setattr(check_kernels, "compile_all", compile_all)
    assert check_kernels.main() == code
    printed = capsys.readouterr().out
    assert "| chunk_scan_fwd | H100 |" in printed
    assert ("error: " in printed) == bool(error) and ("warning: " in printed) == (spilled > 0)


def test_only_named_kernels_are_compiled(monkeypatch):
    import check_kernels

    found = {
        (launch_of("_bmm_chunk_fwd_kernel"),): ["training of llamba-8b"],
        (launch_of("_chunk_scan_fwd_kernel"),): ["prefill of llamba-8b"],
        (launch_of("_chunk_state_fwd_kernel"),): ["documents of llamba-8b", "training of llama-8b"],
    }
    monkeypatch.setattr(check_kernels, "launches", lambda *_: found)

    def jobs(*argv):
        monkeypatch.setattr("sys.argv", ["check_kernels.py", *argv])
        options = check_kernels.parse_options()
        return [(choice[0].kernel, every) for choice, every in check_kernels.jobs_for(90, options)]

    assert jobs("--kernels", "chunk_s") == [("_chunk_scan_fwd_kernel", False), ("_chunk_state_fwd_kernel", True)]
    assert [every for _, every in jobs("--configs", "first")] == [False, False, False]
    assert [every for _, every in jobs("--configs", "all")] == [True, True, True]


def test_without_triton_it_says_so(monkeypatch):
    import check_kernels

    monkeypatch.setattr("sys.argv", ["check_kernels.py"])
    monkeypatch.setattr(check_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make check-kernels"):
        check_kernels.main()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there():
    from kernel_binaries import compile_all
    from kernel_launches import launches

    found = launches(90, "mamba-ssm", ["llamba-8b"], ["training"])
    kernels = {choice[0].kernel for choice in found}
    assert len(kernels) == 12
    choice = next(choice for choice in found if choice[0].kernel == "_state_passing_fwd_kernel")
    assert len(choice) == 6
    ((first,),) = compile_all([(choice, False)], 1, lambda tried: None)
    assert first.fits and first.registers > 0
