"""The hybrid's cache for generation and prefix reuse: per layer either keys and values (transformers' own dynamic
layer) or a mixer's convolution and state-space states, whose size does not grow with the sequence, or, of a layer with
kept heads, both: the states of its other heads, and keys and values of those kept.

It can be deep-copied, expanded and reordered over the batch. A recurrent state cannot return to an earlier token, so
`crop` is an error. `SharedPrefix` lets one prefix serve many batches of sequences.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .configuration import LlambaConfig


class RecurrentLayer(CacheLayerMixin):
    """Holds one mixer's states: conv_state (B, channels, d_conv), its last inputs; ssm_state (B, H, P, N), float32."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.conv_state: Tensor | None = None
        self.ssm_state: Tensor | None = None
        self.seq_len = 0

    def update_states(self, conv_state: Tensor, ssm_state: Tensor, n_tokens: int) -> None:
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self.seq_len += n_tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seq_len + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.conv_state, self.ssm_state, self.seq_len, self.is_initialized = None, None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        if self.conv_state is not None:
            self.device = self.conv_state.device
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda state: state.to(self.device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.conv_state is not None and self.ssm_state is not None:
            self.conv_state, self.ssm_state = function(self.conv_state), function(self.ssm_state)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a recurrent state cannot be cut back; copy the cache before the tokens to undo")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a mixer's cache holds states, not keys and values")

    def update(self, *args, **kwargs):
        raise TypeError("a mixer's cache holds states, not keys and values")


class HeadsLayer(RecurrentLayer):
    """Holds a mixer's states and, of the heads kept beside it, keys and values (B, their key/value heads, L,
    head_dim).
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = DynamicLayer()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds new keys and values, and returns all: (B, heads, L, head_dim) -> (B, heads, P + L, head_dim)."""
        return self.attention.update(key_states, value_states)

    def reset(self) -> None:
        super().reset()
        self.attention = DynamicLayer()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.attention.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.attention.batch_repeat_interleave(repeats)

    def offload(self) -> None:
        super().offload()
        self.attention.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self.attention.prefetch()


class LlambaCache(Cache):
    """Holds the states, or keys and values, or both, of each layer of the model, as its config says."""

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__(layers=[_layer_of(config, index) for index in range(config.n_layer)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, where every layer has attention alone. Raises ValueError elsewhere, and changes
        nothing.
        """
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicLayer):  # transformers 5.17 resets it to zeros of the same length
                self.layers[index] = DynamicLayer()


def _layer_of(config: LlambaConfig, index: int) -> CacheLayerMixin:
    if index in config.attention_layers:
        return DynamicLayer()
    return HeadsLayer() if config.heads_of(index) else RecurrentLayer()


def cache_bytes(config: LlambaConfig, batch_size: int, length: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a cache of sequences of `length` tokens, of a model in `dtype`: two vectors a token for each
    key/value head of a whole layer, or of the kept heads; a mixer's states, of which the state-space one is float32.
    """
    ssm, total = config.ssm_cfg, 0
    for index in range(config.n_layer):
        total += 2 * length * config.n_kv_heads_of(index) * config.attention_head_dim * dtype.itemsize
        if index not in config.attention_layers:
            shape = config.mixer_shape(len(config.heads_of(index)))
            total += shape.d_xBC * ssm["d_conv"] * dtype.itemsize
            total += shape.d_inner * ssm["d_state"] * torch.float32.itemsize
    return batch_size * total


class SharedPrefix(Cache):
    """Lets every sequence of a batch continue from the same prefix, whose states are held once. A forward pass reads
    them and leaves them unchanged, so one prefix serves many batches. Works for the caches of hybrids and of Llamas;
    see `can_share`.
    """

    def __init__(self, cache: Cache, batch_size: int) -> None:
        super().__init__(layers=[_shared(layer, batch_size) for layer in cache.layers])


def can_share(cache: Cache) -> bool:
    """Returns whether `SharedPrefix` supports all layers of a cache. A sliding window, for one, drops old tokens."""
    return all(type(layer) in (DynamicLayer, RecurrentLayer, HeadsLayer) for layer in cache.layers)


class _SharedAttention(DynamicLayer):
    """Holds the keys and values (1, heads, P, head_dim) of the prefix, which never grow."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Returns the prefix and then the new tokens: (B, heads, L, head_dim) -> (B, heads, P + L, head_dim). They are
        freed after the layer's attention.
        """
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([past.expand(len(new), -1, -1, -1), new], dim=-2) for past, new in pairs)
        return keys, values


class _SharedStates(RecurrentLayer):
    """Holds the states of the prefix as views, one for each row of a batch, which never change."""

    def __init__(self, layer: RecurrentLayer, batch_size: int) -> None:
        super().__init__()
        assert layer.conv_state is not None and layer.ssm_state is not None
        self.conv_state = layer.conv_state.expand(batch_size, -1, -1)
        self.ssm_state = layer.ssm_state.expand(batch_size, -1, -1, -1)
        self.seq_len, self.is_initialized = layer.seq_len, True

    def update_states(self, conv_state: Tensor, ssm_state: Tensor, n_tokens: int) -> None:
        pass


class _SharedHeads(_SharedStates, HeadsLayer):
    """Holds both of a prefix, which never change."""

    def __init__(self, layer: HeadsLayer, batch_size: int) -> None:
        super().__init__(layer, batch_size)
        self.attention = _SharedAttention(layer.attention)


def _shared(layer: CacheLayerMixin, batch_size: int) -> CacheLayerMixin:
    if isinstance(layer, HeadsLayer):
        return _SharedHeads(layer, batch_size)
    if isinstance(layer, RecurrentLayer):
        return _SharedStates(layer, batch_size)
    assert isinstance(layer, DynamicLayer)
    return _SharedAttention(layer)
