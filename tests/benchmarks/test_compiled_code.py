"""benchmarks/compiled_code.py: what it counts in code of Inductor's, here shortened; what it calls waste; and, with
Triton, the code of the loss itself.
"""

import importlib.util

import pytest

# As Inductor writes it; n = 4 tokens, 1000 entries. The second kernel reads single logits, the third all of `buf1`.
CODE = """
triton_red_fused_a_0 = async_compile.triton('triton_red_fused_a_0', '''
@triton.jit
def triton_red_fused_a_0(in_ptr0, in_ptr1, out_ptr0, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp0 = tl.load(in_ptr0 + (r0_1 + 1000*x0), r0_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr0 + (x0), tmp3, xmask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp5 = tl.load(in_ptr0 + (r0_1 + 1000*x0), r0_mask, other=0.0).to(tl.float32)
        tmp6 = tl.load(in_ptr1 + (x0), xmask)
        tl.store(out_ptr1 + (r0_1 + 1000*x0), tmp30, r0_mask)
''', device_str='cuda')

triton_per_fused_b_1 = async_compile.triton('triton_per_fused_b_1', '''
@triton.jit
def triton_per_fused_b_1(in_ptr0, out_ptr0, xnumel, r0_numel):
    tmp0 = tl.load(in_ptr0 + (tmp9 + 1000*r0_0), None)
    tl.store(out_ptr0 + (0), tmp8, None)
''', device_str='cuda')

triton_poi_fused_c_2 = async_compile.triton('triton_poi_fused_c_2', '''
@triton.jit
def triton_poi_fused_c_2(in_ptr0, in_out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x2), None)
    tl.store(in_out_ptr0 + (x2), tmp4, None)
''', device_str='cuda')

    def call(self, args):
            buf0 = empty_strided_cuda((4, 1), (1, 4), torch.float32)
            buf1 = empty_strided_cuda((4, 1000), (1000, 1), torch.float32)
            buf2 = empty_strided_cuda((1, ), (1, ), torch.float32)
            triton_red_fused_a_0.run(arg0_1, arg1_1, buf0, buf1, 4, 1000, stream=raw_stream0)
            triton_per_fused_b_1.run(arg0_1, buf2, 1, 4, stream=raw_stream0)
            triton_poi_fused_c_2.run(buf1, arg0_1, 4000, stream=raw_stream0)

def get_args():
    arg0_1 = rand_strided((4, 1000), (1000, 1), device='cuda:0', dtype=torch.bfloat16)
    arg1_1 = rand_strided((4, ), (1, ), device='cuda:0', dtype=torch.int64)
"""


def test_large_tensors_are_counted_as_often_as_they_are_touched():
    from compiled_code import Traffic, traffic_of

    logits, widened = 4000 * 2, 4000 * 4
    expected = Traffic(3, read=2 * logits + widened, written=widened + logits, buffers={"float32": widened})
    assert traffic_of(CODE, least=4000) == expected
    assert traffic_of(CODE, least=4001) == Traffic(3, 0, 0, {})


def test_large_buffers_in_float32_are_waste():
    from compiled_code import Traffic, row_of, wasted

    rows = [row_of("one", 90, Traffic(2, 10, 10, {"bfloat16": 3 * 10**8}))]
    rows.append(row_of("other", 90, Traffic(3, 10, 10, {"bfloat16": 10**8, "float32": 5 * 10**8})))
    (error,) = wasted(rows)
    assert error.startswith("error: other: 0.10 bfloat16, 0.50 float32 is written")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
def test_the_loss_is_one_kernel_over_the_logits_and_a_small_one():
    from compiled_code import binaries_of, cases, traffic_of, triton_code

    case = cases()["loss at temperature 2"]
    code = triton_code(case.function, case.inputs, 90)
    logits = case.least * 2
    assert traffic_of(code, case.least) == (2, 4 * logits, logits, {"bfloat16": logits})
    assert all(binary.fits for tried in binaries_of(code, "loss", 90) for binary in tried)
