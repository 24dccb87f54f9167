"""The scan by mamba-ssm's Triton kernels, as one operator whose backward pass keeps the bits of slow heads.

mamba-ssm's scan is h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, ours h_t = exp(a_t) h_{t-1} + x_t B_t^T. With A = -1,
dt = -a and x / dt its public function computes ours. But the gradient of a is then a difference of two sums that
cancel, and one of them comes from a gradient of x / dt in bfloat16: where heads forget slowly (A_log about -8) a fifth
of it is noise. So the kernels are called here one by one, in the order of `_mamba_chunk_scan_combined_fwd` and `_bwd`
of mamba_ssm/ops/triton/ssd_combined.py. They take the two roles of dt apart: sums of a for the decay, and 1 for what x
is multiplied by. Nothing is divided, and the gradient of a is what mamba-ssm computes for dt A.

c: chunks of Q tokens; the other symbols are those of ssd.py.
"""

import functools
import re
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# What is taken of ssd_combined.py; 2.2.4 and 2.3.2 have them with the same arguments.
NEEDED = {
    *("_chunk_state_fwd", "_state_passing_fwd", "_bmm_chunk_fwd", "_chunk_scan_fwd"),
    *("_chunk_scan_bwd_dstates", "_state_passing_bwd", "_chunk_scan_chunk_state_bwd_dx", "_chunk_state_bwd_db"),
    *("_chunk_scan_bwd_dC", "_chunk_scan_bwd_dcb", "_bmm_chunk_bwd", "_chunk_scan_bwd_ddAcs_stable"),
}


@functools.cache
def mamba_scan(kernels: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns `ssd_chunked` by mamba-ssm, with its arguments and results. kernels: mamba-ssm's module `ssd_combined`.
    To torch.compile it is one operator, and its backward pass another.
    """
    namespace = re.sub(r"\W", "_", __name__)  # an exported student's copy of this file has one of its own

    @torch.library.custom_op(f"{namespace}::mamba_scan", mutates_args=())
    def scan(
        x: Tensor,
        log_decay: Tensor,
        B_: Tensor,
        C: Tensor,
        chunk_size: int,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return _forward(kernels, x, log_decay, B_, C, chunk_size, initial_state, seq_idx)

    @scan.register_fake
    def _(x, log_decay, B_, C, chunk_size, initial_state, seq_idx):
        batch, _, H, P = x.shape
        return x.new_empty(x.shape), log_decay.new_empty(batch, H, P, B_.shape[-1])

    @torch.library.custom_op(f"{namespace}::mamba_scan_backward", mutates_args=())
    def scan_backward(
        d_y: Tensor,
        d_state: Tensor,
        x: Tensor,
        log_decay: Tensor,
        B_: Tensor,
        C: Tensor,
        chunk_size: int,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _backward(kernels, d_y, d_state, x, log_decay, B_, C, chunk_size, initial_state, seq_idx)

    @scan_backward.register_fake
    def _(d_y, d_state, x, log_decay, B_, C, chunk_size, initial_state, seq_idx):
        d_initial = d_state.new_empty(d_state.shape if initial_state is not None else 0)
        d_x, d_B, d_C = (torch.empty_like(_dense(m)) for m in (x, B_, C))
        return d_x, log_decay.new_empty(log_decay.shape), d_B, d_C, d_initial

    def keep_inputs(ctx, inputs, output):
        x, log_decay, B_, C, ctx.chunk_size, initial_state, seq_idx = inputs
        ctx.save_for_backward(x, log_decay, B_, C, initial_state, seq_idx)

    def differentiate(ctx, d_y, d_state):
        *inputs, initial_state, seq_idx = ctx.saved_tensors
        *grads, d_initial = scan_backward(d_y, d_state, *inputs, ctx.chunk_size, initial_state, seq_idx)
        return *grads, None, d_initial if initial_state is not None else None, None

    scan.register_autograd(differentiate, setup_context=keep_inputs)

    def run(x, log_decay, B_, C, chunk_size, initial_state=None, seq_idx=None):
        documents = None if seq_idx is None else seq_idx.int()
        initial_state = None if initial_state is None else initial_state.float()
        return scan(x, log_decay.float(), B_, C, chunk_size, initial_state, documents)

    return run


def _forward(k: ModuleType, x, log_decay, B_, C, chunk_size, initial_state, seq_idx) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, H, P) and the final state (B, H, P, N) in float32."""
    x, B_, C = (_dense(m) for m in (x, B_, C))
    decay_sum, dt = _sums_and_ones(log_decay, chunk_size)  # (B, H, c, Q)
    added = k._chunk_state_fwd(B_, x, dt, decay_sum, seq_idx=seq_idx, states_in_fp32=True)  # (B, c, H, P, N)
    entered, state = k._state_passing_fwd(
        added.flatten(-2),
        decay_sum[..., -1],
        initial_states=None if initial_state is None else initial_state.flatten(-2),
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        out_dtype=C.dtype,
    )  # (B, c, H, P * N), (B, H, P * N)
    entered, state = (m.unflatten(-1, added.shape[-2:]) for m in (entered, state))
    scores = k._bmm_chunk_fwd(C, B_, chunk_size, seq_idx=seq_idx, output_dtype=torch.float32)  # (B, c, G, Q, Q)
    y, _ = k._chunk_scan_fwd(scores, x, dt, decay_sum, C, entered, seq_idx=seq_idx)
    return y, state


def _backward(
    k: ModuleType, d_y, d_state, x, log_decay, B_, C, chunk_size, initial_state, seq_idx
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, log_decay, B_, C, and of the initial state, empty without one."""
    d_y, x, B_, C = (_dense(m) for m in (d_y, x, B_, C))
    decay_sum, dt = _sums_and_ones(log_decay, chunk_size)  # (B, H, c, Q)
    passing = {"seq_idx": seq_idx, "chunk_size": chunk_size}
    ngroups = B_.shape[2]

    # What forward computed, states in float32, and the gradient of the states that enter the chunks
    scores = k._bmm_chunk_fwd(C, B_, chunk_size, seq_idx=seq_idx, output_dtype=torch.float32)  # (B, c, G, Q, Q)
    added = k._chunk_state_fwd(B_, x, dt, decay_sum, seq_idx=seq_idx, states_in_fp32=True)  # (B, c, H, P, N)
    initial = None if initial_state is None else initial_state.flatten(-2)
    states, _ = k._state_passing_fwd(added.flatten(-2), decay_sum[..., -1], initial_states=initial, **passing)
    d_entered = k._chunk_scan_bwd_dstates(C, decay_sum, d_y, seq_idx=seq_idx, dtype=states.dtype)
    d_added, d_chunk_sum, d_initial, states = k._state_passing_bwd(
        states,
        decay_sum[..., -1],
        d_entered.flatten(-2),
        dfinal_states=d_state.flatten(-2),
        has_initial_states=initial_state is not None,
        dstates_dtype=x.dtype,
        states_dtype=x.dtype,
        **passing,
    )
    d_added, states = (m.unflatten(-1, added.shape[-2:]) for m in (d_added, states))  # (B, c, H, P, N)

    d_x, _, _ = k._chunk_scan_chunk_state_bwd_dx(x, dt, decay_sum, B_, scores, d_y, d_added, seq_idx=seq_idx)
    d_B, from_added = k._chunk_state_bwd_db(x, dt, decay_sum, d_added, seq_idx=seq_idx, B=B_, ngroups=ngroups)
    d_C, from_entered = k._chunk_scan_bwd_dC(states, decay_sum, d_y, seq_idx=seq_idx, C=C, ngroups=ngroups)
    d_scores = k._chunk_scan_bwd_dcb(x, dt, decay_sum, d_y, seq_idx=seq_idx, ngroups=ngroups).to(scores.dtype)
    d_B = k._bmm_chunk_bwd(C, d_scores, residual=d_B, out=torch.empty_like(B_))
    d_C = k._bmm_chunk_bwd(B_, d_scores.transpose(-1, -2), residual=d_C, out=torch.empty_like(C))

    # A log decay is in its chunk's sums from its own token on.
    from_entered[..., -1] += d_chunk_sum
    d_decay = k._chunk_scan_bwd_ddAcs_stable(x, dt, decay_sum, d_y, scores)  # (B, H, c, Q)
    d_decay += from_added + from_entered.flip([-1]).cumsum(-1).flip([-1])
    d_decay = d_decay.permute(0, 2, 3, 1).flatten(1, 2)[:, : x.shape[1]].contiguous()  # (B, L, H)
    if d_initial is None:
        return d_x, d_decay, d_B, d_C, d_state.new_empty(0)
    return d_x, d_decay, d_B, d_C, d_initial.unflatten(-1, added.shape[-2:]).to(d_state.dtype)


def _dense(m: Tensor) -> Tensor:
    """Returns m with numbers of a head side by side, as the kernels want it."""
    return m if m.stride(-1) == 1 else m.contiguous()


def _sums_and_ones(log_decay: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Returns sums of log_decay (B, L, H) from the start of its chunk, and ones, 0 behind the last token: (B, H, c, Q)
    each, in float32.
    """
    padding = -log_decay.shape[1] % chunk_size

    def chunks(m: Tensor) -> Tensor:
        return F.pad(m, (0, 0, 0, padding)).unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2).contiguous()

    return chunks(log_decay).cumsum(-1), chunks(torch.ones_like(log_decay))
