"""The discrete Mamba-2 mixer of phi-mamba and Llamba (arXiv 2408.10189, 2502.14458): the module that stands where
Llama has attention.

    xBC, z, A_log = in_proj(u)
    x, B, C = activation(causal_conv(xBC))
    h_t = exp(-softplus(A_log_t)) h_{t-1} + x_t B_t^T,   y_t = h_t C_t + D x_t
    out = out_proj(y * silu(z + z_bias))
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import RecurrentLayer
from .configuration import LlambaConfig
from .elementwise import gate
from .kernels import causal_conv, kernels_for
from .ssd import ssd_step


class DiscreteMamba2(nn.Module):
    """Mixes the tokens of u (B, L, D) by a causal convolution and a state-space scan.

    n_kept: heads in whose place the teacher's attention heads stand. The mixer is made of the others, each with B and C
        of its own, because what is left of groups that share them need not be equal in size.
    """

    def __init__(self, config: LlambaConfig, n_kept: int = 0) -> None:
        super().__init__()
        ssm, shape = config.ssm_cfg, config.mixer_shape(n_kept)
        self.n_v_heads, self.n_qk_heads, self.d_inner, self.d_xBC = shape
        self.headdim, self.d_state = config.headdim, ssm["d_state"]
        self.d_conv, self.chunk_size = ssm["d_conv"], ssm["chunk_size"]
        self.activation = ssm["activation"]

        d_in_proj = self.d_xBC + self.d_inner + self.n_v_heads
        self.in_proj = nn.Linear(config.d_model, d_in_proj, bias=ssm["bias"])
        self.conv1d = nn.Conv1d(
            self.d_xBC,
            self.d_xBC,
            self.d_conv,
            groups=self.d_xBC,
            padding=self.d_conv - 1,
            bias=ssm["conv_bias"],
        )
        self.D = nn.Parameter(torch.ones(self.n_v_heads))
        # in_proj's bias already covers z where there is one.
        self.z_bias = None if ssm["bias"] else nn.Parameter(torch.zeros(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=ssm["bias"])

    def forward(
        self,
        u: Tensor,
        cache: RecurrentLayer | None = None,
        token_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Returns the mixed tokens: u (B, L, D) -> (B, L, D).

        cache: the states before u; they are replaced by those after it.
        token_mask (B, L) bool: False at padding, which then leaves no trace in the states.
        seq_idx (B, L) int: document of each token; neither convolution nor state crosses documents. It cannot be
            combined with a cache.
        """
        assert cache is None or seq_idx is None
        batch, length, _ = u.shape
        xBC, z, A_log = self.in_proj(u).split([self.d_xBC, self.d_inner, self.n_v_heads], dim=-1)
        log_decay = -F.softplus(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))  # (B, L, H)
        if token_mask is not None:
            xBC = xBC * token_mask[..., None]

        past = None if cache is None else cache.conv_state  # (B, channels, d_conv)
        convolved = self._convolve(xBC.transpose(1, 2), past, seq_idx)  # (B, L, channels)
        x, B_, C = convolved.split([self.d_inner, *[self.n_qk_heads * self.d_state] * 2], dim=-1)
        x = x.unflatten(-1, (self.n_v_heads, self.headdim))  # (B, L, H, P)
        if token_mask is not None:
            x = x * token_mask[..., None, None]  # the convolution's bias is not zero at padding
            log_decay = log_decay * token_mask[..., None]
        B_ = B_.unflatten(-1, (self.n_qk_heads, self.d_state))  # (B, L, G, N)
        C = C.unflatten(-1, (self.n_qk_heads, self.d_state))  # (B, L, G, N)

        y, state = self._scan(x, log_decay, B_, C, None if cache is None else cache.ssm_state, seq_idx)
        if cache is not None:
            cache.update_states(self._last_inputs(xBC.transpose(1, 2), past), state, length)
        # Fused in training alone: elsewhere each length of text would be compiled for.
        apply_gate = kernels_for(x.device.type, x.dtype).elementwise.gate if self.training else gate
        return self.out_proj(apply_gate(y, x, self.D, z, self.z_bias))

    def _convolve(self, xBC: Tensor, past: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Applies the convolution and its activation: (B, channels, L) -> (B, L, channels)."""
        weight = self.conv1d.weight.squeeze(1)  # (channels, d_conv)
        if seq_idx is not None:
            return _convolve_documents(xBC, weight, self.conv1d.bias, self.activation, seq_idx)
        conv = causal_conv if xBC.shape[-1] == 1 else kernels_for(xBC.device.type, xBC.dtype).conv
        return conv(xBC, weight, self.conv1d.bias, self.activation, past).transpose(1, 2)

    def _scan(self, x, log_decay, B_, C, state, seq_idx) -> tuple[Tensor, Tensor]:
        """Returns y (B, L, H, P) and the final state (B, H, P, N)."""
        if x.shape[1] == 1 and state is not None:
            y, state = ssd_step(x[:, 0], log_decay[:, 0], B_[:, 0], C[:, 0], state)
            return y[:, None], state
        scan = kernels_for(x.device.type, x.dtype).scan
        return scan(x, log_decay, B_, C, self.chunk_size, initial_state=state, seq_idx=seq_idx)

    def _last_inputs(self, xBC: Tensor, past: Tensor | None) -> Tensor:
        """Returns the last d_conv inputs of the convolution, zeros before the first: (B, channels, d_conv)."""
        if past is None:
            past = xBC.new_zeros(*xBC.shape[:2], self.d_conv)
        n_new = min(xBC.shape[-1], self.d_conv)
        return torch.cat([past[..., n_new:], xBC[..., -n_new:]], dim=-1)


def _convolve_documents(xBC: Tensor, weight: Tensor, bias: Tensor | None, activation: str, seq_idx: Tensor) -> Tensor:
    """Returns the causal convolution in which no tap reaches into another document: (B, L, channels)."""
    width = weight.shape[1]
    total = torch.zeros_like(xBC) if bias is None else bias[:, None].expand_as(xBC)
    for lag in range(width):
        shifted = F.pad(xBC, (lag, 0))[..., : xBC.shape[-1]]  # (B, channels, L)
        document = F.pad(seq_idx, (lag, 0), value=-1)[..., : xBC.shape[-1]]  # (B, L)
        total = total + weight[:, width - 1 - lag, None] * shifted * (document == seq_idx)[:, None]
    total = total if activation == "identity" else F.silu(total)
    return total.transpose(1, 2)
