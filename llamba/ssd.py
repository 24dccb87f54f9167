"""The state-space scan of the discrete Mamba-2 mixer, in plain PyTorch: the definition, the chunked form that
trains, and the single step that decodes.

Glossary (arXiv 2405.21060; the discrete parametrisation is that of MOHAWK, arXiv 2408.10189):
    B, L          batch, sequence length
    H, P          value heads, channels of a head         x   (B, L, H, P)
    G, N          query/key heads (H/G value heads share one), state size
    B_, C         input and output maps of the state      B_, C   (B, L, G, N)
    log_decay     log of the scalar a head's state shrinks by at a token, <= 0   (B, L, H)
    h             state                                   (B, H, P, N)

    h_t = exp(log_decay_t) h_{t-1} + x_t B_t^T,        y_t = h_t C_t

`seq_idx` (B, L), where given, numbers the documents of a packed window in rising order: no state crosses from
one document to the next. The initial state belongs to the window's first document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_definition(
    x: Tensor,
    log_decay: Tensor,
    B_: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence token by token: the reference for tests. Same arguments and results as `ssd_chunked`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = _start_state(x, B_, initial_state, dtype)  # (B, H, P, N)
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            same_document = (seq_idx[:, t] == seq_idx[:, t - 1]).to(dtype)
            state = state * same_document[:, None, None, None]
        y, state = ssd_step(x[:, t], log_decay[:, t], B_[:, t], C[:, t], state)
        ys.append(y)
    return torch.stack(ys, dim=1), state


def ssd_step(x: Tensor, log_decay: Tensor, B_: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Computes one token: x (B, H, P), log_decay (B, H), B_ and C (B, G, N), state (B, H, P, N).

    Returns y (B, H, P) in x's dtype and the next state in the state's.
    """
    repeats = x.shape[1] // B_.shape[1]
    B_, C = (m.repeat_interleave(repeats, dim=1).to(state.dtype) for m in (B_, C))  # (B, H, N)
    decay = log_decay.to(state.dtype).exp()  # (B, H)
    state = decay[..., None, None] * state + x.to(state.dtype)[..., None] * B_[:, :, None, :]
    y = torch.einsum("bhpn,bhn->bhp", state, C)
    return y.to(x.dtype), state


def ssd_chunked(
    x: Tensor,
    log_decay: Tensor,
    B_: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the scan in chunks of Q tokens (arXiv 2405.21060, section 6): a masked matrix product inside a chunk,
    and one state passed from chunk to chunk. Linear in L for a fixed Q; any L, the last chunk is padded.

    Returns y (B, L, H, P) in x's dtype, and the final state (B, H, P, N) in float32 (float64 for float64
    input), in which all of the arithmetic is done.
    """
    b, length, H, P = x.shape
    G, N = B_.shape[2:]
    R = H // G  # value heads that share a query/key head
    Q = min(chunk_size, length)
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = _start_state(x, B_, initial_state, dtype).view(b, G, R, P, N)

    # Padding tokens neither decay the state (log 1 = 0) nor add to it (x = 0).
    x_, B_, C, log_decay = (_chunks(m.to(dtype), Q) for m in (x, B_, C, log_decay))
    x_ = x_.unflatten(3, (G, R))  # (B, c, Q, G, R, P)
    decay_sum = log_decay.unflatten(3, (G, R)).cumsum(2).permute(0, 1, 3, 4, 2)  # (B, c, G, R, Q)
    n_chunks = x_.shape[1]
    within, leaving, entering, crossing = _document_masks(seq_idx, Q, n_chunks, x.device)

    # 1. Inside a chunk: y_i += sum_{j <= i} exp(decay_sum_i - decay_sum_j) (C_i . B_j) x_j
    gap = decay_sum[..., :, None] - decay_sum[..., None, :]  # (B, c, G, R, Q, Q)
    decay = gap.masked_fill(~within, float("-inf")).exp()
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B_)  # (B, c, G, Q, Q)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", scores[:, :, :, None] * decay, x_)

    # 2. What each chunk adds to the state at its end
    to_end = (decay_sum[..., -1:] - decay_sum).masked_fill(~leaving, float("-inf")).exp()  # (B, c, G, R, Q)
    added = torch.einsum("bcgrj,bcjgrp,bcjgn->bcgrpn", to_end, x_, B_)

    # 3. The state that enters each chunk
    through = decay_sum[..., -1].masked_fill(~crossing, float("-inf")).exp()  # (B, c, G, R)
    states = []
    for c in range(n_chunks):
        states.append(state)
        state = through[:, c, :, :, None, None] * state + added[:, c]
    entered = torch.stack(states, dim=1)  # (B, c, G, R, P, N)

    # 4. What the entering state contributes to the outputs
    from_start = decay_sum.masked_fill(~entering, float("-inf")).exp()  # (B, c, G, R, Q)
    y = y + torch.einsum("bcgri,bcign,bcgrpn->bcigrp", from_start, C, entered)

    y = y.reshape(b, n_chunks * Q, H, P)[:, :length]
    return y.to(x.dtype), state.reshape(b, H, P, N)


def _start_state(x: Tensor, B_: Tensor, initial_state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if initial_state is not None:
        return initial_state.to(dtype)
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B_.shape[3], dtype=dtype)  # (B, H, P, N)


def _chunks(m: Tensor, Q: int) -> Tensor:
    """Splits m into chunks, padded with zeros at the end: (B, L, ...) -> (B, c, Q, ...)."""
    padding = -m.shape[1] % Q
    if padding:
        m = F.pad(m, (0, 0) * (m.dim() - 2) + (0, padding))
    return m.unflatten(1, (-1, Q))


def _document_masks(seq_idx: Tensor | None, Q: int, n_chunks: int, device: torch.device):
    """Returns which positions may see one another; without documents, causality alone decides.

    within (B, c, 1, 1, Q, Q): j may feed i; leaving (B, c, 1, 1, Q): j may feed the chunk's last state;
    entering (B, c, 1, 1, Q): the state that enters the chunk may feed i; crossing (B, c, 1, 1): it may leave it.
    """
    causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
    if seq_idx is None:
        everywhere = torch.ones((), dtype=torch.bool, device=device)
        return causal, everywhere, everywhere, everywhere
    padding = n_chunks * Q - seq_idx.shape[1]
    # The padding continues the last document, so that its state reaches the end of the last chunk.
    documents = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, Q))
    before = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], dim=1)[..., None]  # (B, c, 1)
    last = documents[..., -1:]  # (B, c, 1)
    within = causal & (documents[..., :, None] == documents[..., None, :])  # (B, c, Q, Q)
    leaving, entering, crossing = documents == last, documents == before, (before == last)[..., 0]
    return (
        within[:, :, None, None],
        leaving[:, :, None, None],
        entering[:, :, None, None],
        crossing[:, :, None, None],
    )
