"""Plays the functions around mamba-ssm's Triton kernels (mamba_ssm/ops/triton/ssd_*.py, 2.3.2.post1) in plain PyTorch:
same arguments, results and dtypes. They compute in float64 and round what the kernels store, and the operands of their
products, to the dtypes that the kernels have there.
"""

import torch
import torch.nn.functional as F


def _up(m, dtype):
    return m.to(dtype).double()


def _chunks(m, dA_cumsum):
    """Splits m (B, L, ...) as dA_cumsum (B, H, c, Q) is, in float64, padded with zeros: (B, c, Q, ...)."""
    c, Q = dA_cumsum.shape[2:]
    padding = c * Q - m.shape[1]
    return F.pad(m.double(), (0, 0) * (m.dim() - 2) + (0, padding)).unflatten(1, (c, Q))


def _per_head(m, dA_cumsum):
    """Returns m (B, c, Q, G, N) with each group repeated for its heads: (B, c, Q, H, N)."""
    return m.repeat_interleave(dA_cumsum.shape[1] // m.shape[3], dim=3)


def _documents(seq_idx, dA_cumsum):
    """Returns the documents of all tokens, the last one going on in the padding: (B, c, Q)."""
    c, Q = dA_cumsum.shape[2:]
    return torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, c * Q - seq_idx.shape[1])], 1).unflatten(1, (c, Q))


def _leaving(seq_idx, dA_cumsum):
    """Returns exp(decay from each token to its chunk's end), 0 in other documents than the last: (B, H, c, Q)."""
    decay = (dA_cumsum[..., -1:] - dA_cumsum).double().exp()
    if seq_idx is None:
        return decay
    documents = _documents(seq_idx, dA_cumsum)
    return decay * (documents == documents[..., -1:])[:, None]


def _entering(seq_idx, dA_cumsum):
    """Returns exp(decay from the chunk's start to each token), 0 in other documents than the one before the chunk,
    which is 0 before the first: (B, H, c, Q).
    """
    decay = dA_cumsum.double().exp()
    if seq_idx is None:
        return decay
    documents = _documents(seq_idx, dA_cumsum)
    before = F.pad(documents[..., -1], (1, 0))[:, :-1, None]
    return decay * (documents == before)[:, None]


def _crossing(dA_chunk_cumsum, seq_idx, chunk_size):
    """Returns what a state is multiplied by over each chunk: (B, c, H, 1)."""
    scale = dA_chunk_cumsum.double().exp()  # (B, H, c)
    if seq_idx is not None:
        ends = [min((i + 1) * chunk_size, seq_idx.shape[1]) - 1 for i in range(scale.shape[2])]
        last = F.pad(seq_idx[:, ends], (1, 0))
        scale = scale * (last[:, 1:] == last[:, :-1])[:, None]
    return scale.transpose(1, 2)[..., None]


def _inside(dA_cumsum):
    """Returns exp(decay from j to i) for j <= i, else 0: (B, H, c, Q, Q)."""
    gap = (dA_cumsum[..., :, None] - dA_cumsum[..., None, :]).double()
    return gap.masked_fill(~torch.ones_like(gap, dtype=torch.bool).tril(), float("-inf")).exp()


def _tokens(m, length):
    return m.flatten(1, 2)[:, :length]


def _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=None, states=None, states_in_fp32=True):
    scale = (_leaving(seq_idx, dA_cumsum) * dt).permute(0, 2, 3, 1)[..., None]  # (B, c, Q, H, 1)
    scaled = _up(_per_head(_chunks(B, dA_cumsum), dA_cumsum) * scale, x.dtype)
    return torch.einsum("bcqhp,bcqhn->bchpn", _chunks(x, dA_cumsum), scaled).float()


def _state_passing_fwd(
    states, dA_chunk_cumsum, initial_states=None, seq_idx=None, chunk_size=None, out_dtype=None
):  # states (B, c, H, P * N)
    crossing = _crossing(dA_chunk_cumsum, seq_idx, chunk_size)
    state = torch.zeros_like(states[:, 0]).double() if initial_states is None else initial_states.double()
    entered = []
    for i in range(states.shape[1]):
        entered.append(state)
        state = crossing[:, i] * state + states[:, i]
    return torch.stack(entered, 1).to(out_dtype or states.dtype), state.float()


def _bmm_chunk_fwd(a, b, chunk_size, seq_idx=None, causal=False, output_dtype=None):
    shaped = torch.empty(len(a), 1, -(-a.shape[1] // chunk_size), chunk_size)
    out = torch.einsum("bcign,bcjgn->bcgij", _chunks(a, shaped), _chunks(b, shaped))
    if seq_idx is not None:
        documents = _documents(seq_idx, shaped)
        out = out * (documents[..., :, None] == documents[..., None, :])[:, :, None]
    return out.to(output_dtype or a.dtype)


def _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, states, D=None, z=None, seq_idx=None):
    heads = dA_cumsum.shape[1] // cb.shape[2]
    scores = cb.double().repeat_interleave(heads, 2).transpose(1, 2) * _inside(dA_cumsum) * dt[..., None, :]
    y = torch.einsum("bhcij,bcjhp->bcihp", _up(scores, x.dtype), _chunks(x, dA_cumsum))
    C = _per_head(_chunks(C, dA_cumsum), dA_cumsum)
    y = y + torch.einsum("bhcq,bcqhn,bchpn->bcqhp", _entering(seq_idx, dA_cumsum), C, _up(states, x.dtype))
    return _tokens(y, x.shape[1]).to(x.dtype), None


def _chunk_scan_bwd_dstates(C, dA_cumsum, dout, seq_idx=None, dtype=None):
    scale = _entering(seq_idx, dA_cumsum).permute(0, 2, 3, 1)[..., None]
    scaled = _up(_chunks(dout, dA_cumsum) * scale, dout.dtype)
    out = torch.einsum("bcqhp,bcqhn->bchpn", scaled, _per_head(_chunks(C, dA_cumsum), dA_cumsum))
    return out.to(dtype or C.dtype)


def _state_passing_bwd(
    states,
    dA_chunk_cumsum,
    dout,
    dfinal_states=None,
    seq_idx=None,
    has_initial_states=None,
    dstates_dtype=None,
    states_dtype=None,
    chunk_size=None,
):
    crossing = _crossing(dA_chunk_cumsum, seq_idx, chunk_size)
    d_state = torch.zeros_like(dout[:, 0]).double() if dfinal_states is None else dfinal_states.double()
    d_added, d_sums = [], []
    for i in reversed(range(states.shape[1])):
        d_added.insert(0, d_state)
        d_sums.insert(0, (states[:, i].double() * d_state).sum(-1) * crossing[:, i, :, 0])
        d_state = crossing[:, i] * d_state + dout[:, i]
    if not has_initial_states:
        d_sums[0] = torch.zeros_like(d_sums[0])
    d_initial = d_state.to(dstates_dtype) if has_initial_states else None
    return (
        torch.stack(d_added, 1).to(dstates_dtype),
        torch.stack(d_sums, -1).float(),
        d_initial,
        states.to(states_dtype),
    )


def _chunk_scan_chunk_state_bwd_dx(x, dt, dA_cumsum, B, CB, dout, dstates, D=None, seq_idx=None, dx=None):
    B = _per_head(_chunks(B, dA_cumsum), dA_cumsum)
    acc = torch.einsum("bhcq,bcqhn,bchpn->bcqhp", _leaving(seq_idx, dA_cumsum), B, _up(dstates, B.dtype))
    heads = dA_cumsum.shape[1] // CB.shape[2]
    scores = CB.double().repeat_interleave(heads, 2).transpose(1, 2) * _inside(dA_cumsum)
    acc = acc + torch.einsum("bhcij,bcihp->bcjhp", _up(scores, dout.dtype), _chunks(dout, dA_cumsum))
    d_x = _tokens(acc * dt.permute(0, 2, 3, 1)[..., None], x.shape[1]).to(x.dtype)
    return d_x, (acc * _chunks(x, dA_cumsum)).sum(-1).permute(0, 3, 1, 2).float(), None


def _chunk_state_bwd_db(x, dt, dA_cumsum, dstates, seq_idx=None, B=None, ngroups=1):
    scale = _leaving(seq_idx, dA_cumsum) * dt
    d_b = torch.einsum("bhcq,bcqhp,bchpn->bcqhn", scale, _chunks(x, dA_cumsum), _up(dstates, x.dtype))
    d_sums = (d_b * _per_head(_chunks(B, dA_cumsum), dA_cumsum)).sum(-1).permute(0, 3, 1, 2)
    d_sums = F.pad(d_sums, (1, 0))[..., :-1].cumsum(-1)
    return _tokens(d_b.unflatten(3, (ngroups, -1)).sum(4), x.shape[1]).float(), d_sums.float()


def _chunk_scan_bwd_dC(prev_states, dA_cumsum, dout, seq_idx=None, C=None, ngroups=1):
    scale = _entering(seq_idx, dA_cumsum)
    d_c = torch.einsum("bhcq,bcqhp,bchpn->bcqhn", scale, _chunks(dout, dA_cumsum), _up(prev_states, dout.dtype))
    d_sums = (d_c * _per_head(_chunks(C, dA_cumsum), dA_cumsum)).sum(-1).permute(0, 3, 1, 2)
    return _tokens(d_c.unflatten(3, (ngroups, -1)).sum(4), dout.shape[1]).float(), d_sums.float()


def _pairs(x, dt, dA_cumsum, dout):
    """Returns (dout_i . x_j) dt_j exp(decay from j to i) for j <= i: (B, H, c, Q, Q)."""
    products = torch.einsum("bcihp,bcjhp->bhcij", _chunks(dout, dA_cumsum), _chunks(x, dA_cumsum))
    return products * dt[..., None, :] * _inside(dA_cumsum)


def _chunk_scan_bwd_dcb(x, dt, dA_cumsum, dout, seq_idx=None, CB=None, ngroups=1):
    out = _pairs(x, dt, dA_cumsum, dout).unflatten(1, (ngroups, -1)).sum(2).transpose(1, 2)
    if seq_idx is not None:
        documents = _documents(seq_idx, dA_cumsum)
        out = out * (documents[..., :, None] == documents[..., None, :])[:, :, None]
    return out.float()


def _bmm_chunk_bwd(a, dout, residual=None, out=None):
    c, Q = dout.shape[1], dout.shape[-1]
    shaped = torch.empty(len(a), 1, c, Q)
    found = torch.einsum("bcgij,bcign->bcjgn", _up(dout, a.dtype), _chunks(a, shaped))
    return out.copy_(_tokens(found, a.shape[1]) + residual)


def _chunk_scan_bwd_ddAcs_stable(x, dt, dA_cumsum, dout, cb):
    heads = dA_cumsum.shape[1] // cb.shape[2]
    pairs = _pairs(x, dt, dA_cumsum, dout) * cb.double().repeat_interleave(heads, 2).transpose(1, 2)
    sums = pairs.tril(-1).cumsum(-1).tril(-1).sum(-2)  # a pair (i, j) has the decays of j + 1 to i
    return F.pad(sums, (1, 0))[..., :-1].float()
