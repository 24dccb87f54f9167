"""The configuration of a Llamba: a Llama whose attention is replaced by discrete Mamba-2 mixers, but for the
layers listed in `attention_layers`, which are whole decoder layers of a teacher, and the heads listed in
`attention_heads`, which a layer keeps of the teacher's attention beside a mixer of the other heads.

The published `config.json` files are read unchanged; `attention_layers`, `attention_heads` and `attention_cfg` are
what a hybrid adds to them, and `fitted_beside` what a student does that waits for heads. Every dimension that the
model needs is derived here, once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, NamedTuple

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .families import FAMILIES, KNOWN, TeacherConfig, config_of, width_of_heads

MLP_DEFAULTS = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
SSM_DEFAULTS = {
    "d_state": 64,
    "n_v_heads": 32,
    "n_qk_heads": 32,
    "d_conv": 4,
    "conv_bias": True,
    "expand": 1,
    "chunk_size": 128,
    "activation": "identity",
    "bias": False,
}
CONV_ACTIVATIONS = ("identity", "silu", "swish")

# Upper bounds of sizes: above those of any existing model, below what only a damaged or hostile file asks for.
MOST_LAYERS = 1024
MOST = {
    "vocab_size": 2**24,
    "d_model": 2**20,
    "n_layer": MOST_LAYERS,
    "pad_vocab_size_multiple": 2**16,
    "mlp_cfg.intermediate_size": 2**22,
    "ssm_cfg.d_state": 2**12,
    "ssm_cfg.n_v_heads": 2**16,
    "ssm_cfg.n_qk_heads": 2**16,
    "ssm_cfg.d_conv": 2**8,
    "ssm_cfg.expand": 2**6,
    "ssm_cfg.chunk_size": 2**12,
}
SWITCHES = ("tie_embeddings", "lm_head_bias", "use_cache", "mlp_cfg.bias", "ssm_cfg.bias", "ssm_cfg.conv_bias")
FRACTIONS = ("norm_epsilon", "resid_dropout", "initializer_range")


class MixerShape(NamedTuple):
    """Holds the sizes of one mixer."""

    n_v_heads: int
    n_qk_heads: int  # groups of heads with the same B and C
    d_inner: int
    d_xBC: int  # channels of the causal convolution: x, then B, then C


class LlambaConfig(PretrainedConfig):
    """Describes the shape of a (hybrid) Llamba.

    vocab_size: rows of the embedding and of the head; padded up to a multiple of `pad_vocab_size_multiple`.
    mlp_cfg, ssm_cfg: the published sub-dictionaries; what they leave out has the published default.
    attention_layers: indices of the layers that are decoder layers of a teacher; empty for a pure Llamba.
    attention_heads: layer, as text, to the indices of the teacher's query heads that it keeps. A layer that keeps all
        of them is a whole layer, and is moved to `attention_layers`.
    attention_cfg: the teacher's family and settings for those layers and heads (`attention_cfg_from`), or None.
    fitted_beside: as `attention_heads`, heads that the student is still without. Its mixers were fitted to what these
        leave, and give nothing in their place.

    Raises ValueError where a value is of the wrong kind or absurd, sizes do not divide, a key is unknown, or an index
    is out of range.
    """

    model_type = "llamba"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 128256
    d_model: int = 4096
    n_layer: int = 32
    tie_embeddings: bool = False
    pad_vocab_size_multiple: int = 8
    lm_head_bias: bool = False
    norm_epsilon: float = 1e-5
    resid_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    mlp_cfg: dict[str, Any] = field(default_factory=dict)
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attention_layers: list[int] = field(default_factory=list)
    attention_heads: dict[str, list[int]] = field(default_factory=dict)
    attention_cfg: dict[str, Any] | None = None
    fitted_beside: dict[str, list[int]] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.mlp_cfg = _filled("mlp_cfg", self.mlp_cfg, MLP_DEFAULTS)
        self.ssm_cfg = _filled("ssm_cfg", self.ssm_cfg, SSM_DEFAULTS)
        self._check_kinds()
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple
        self.attention_layers, self.attention_heads = whole_and_parts(
            self.attention_layers, self.attention_heads, self.n_teacher_heads
        )
        super().__post_init__(**kwargs)
        self._check()

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves as transformers does, without `auto_map` where no modelling files are saved. Those are saved only for a
        model that was loaded with them; one loaded by this package must not name files that its folder lacks.
        """
        if not self.is_remote_code():
            self.__dict__.pop("auto_map", None)
        super().save_pretrained(save_directory, **kwargs)

    def _check_kinds(self) -> None:
        """Raises ValueError that lists every value of the wrong type or outside its range."""
        values = dict(vars(self))
        values |= {f"mlp_cfg.{name}": value for name, value in self.mlp_cfg.items()}
        values |= {f"ssm_cfg.{name}": value for name, value in self.ssm_cfg.items()}
        problems = []
        for name, most in MOST.items():
            if type(values[name]) is not int or not 1 <= values[name] <= most:
                problems.append(f"{name}={values[name]!r}: expected a whole number from 1 to {most}")
        for name in SWITCHES:
            if type(values[name]) is not bool:
                problems.append(f"{name}={values[name]!r}: expected true or false")
        for name in FRACTIONS:
            if type(values[name]) not in (int, float) or not 0 <= values[name] <= 1:
                problems.append(f"{name}={values[name]!r}: expected a number from 0 to 1")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = values[name] if type(values[name]) is list else [values[name]]
            if any(type(token) not in (int, type(None)) for token in given):
                problems.append(f"{name}={values[name]!r}: expected a whole number or none")
        for name, known in (("mlp_cfg.act_fn", ACT2FN), ("ssm_cfg.activation", CONV_ACTIVATIONS)):
            if type(values[name]) is not str or values[name] not in known:
                problems.append(f"{name}={values[name]!r}: expected one of {', '.join(known)}")
        if type(self.attention_layers) is not list or any(type(i) is not int for i in self.attention_layers):
            problems.append(f"attention_layers={self.attention_layers!r}: expected a list of whole numbers")
        for name in ("attention_heads", "fitted_beside"):
            if not _is_layers_to_heads(values[name]):
                problems.append(f"{name}={values[name]!r}: expected a list of heads for each layer")
        if problems:
            raise ValueError("; ".join(problems))
        if self.attention_cfg is not None:
            _check_attention_cfg(self.attention_cfg)

    def _check(self) -> None:
        """Raises ValueError where values contradict one another."""
        ssm = self.ssm_cfg
        if self.d_inner % ssm["n_v_heads"]:
            raise ValueError(f"ssm_cfg.n_v_heads={ssm['n_v_heads']} does not divide d_inner={self.d_inner}")
        if ssm["n_v_heads"] % ssm["n_qk_heads"]:
            raise ValueError(f"ssm_cfg.n_qk_heads={ssm['n_qk_heads']} does not divide n_v_heads={ssm['n_v_heads']}")
        outside = [i for i in self.attention_layers if not 0 <= i < self.n_layer]
        if outside:
            raise ValueError(f"attention_layers {outside} are outside 0..{self.n_layer - 1}")
        if self.has_attention and self.attention_cfg is None:
            name = "attention_layers" if self.attention_layers else "attention_heads"
            raise ValueError(f"{name} is given without attention_cfg, the teacher's settings for them")
        self._check_heads()

    def _check_heads(self) -> None:
        n_heads, n_v_heads = self.n_teacher_heads, self.ssm_cfg["n_v_heads"]
        for layer, heads in self.attention_heads.items():
            if int(layer) >= self.n_layer:
                raise ValueError(f"attention_heads has layer {layer}, which is outside 0..{self.n_layer - 1}")
            if int(layer) in self.attention_layers:
                raise ValueError(f"attention_heads has layer {layer}, which attention_layers keeps whole")
            if type(n_heads) is not int or heads[-1] >= n_heads:
                raise ValueError(f"attention_heads has {heads} of layer {layer}, and a teacher's layer {n_heads} heads")
            if n_v_heads != n_heads:
                raise ValueError(
                    f"attention_heads: expected as many heads in a mixer (ssm_cfg.n_v_heads={n_v_heads}) as in the "
                    f"teacher's attention ({n_heads}), each in the place of one"
                )

    @property
    def has_attention(self) -> bool:
        """Returns whether any layer has attention, whole or by heads."""
        return bool(self.attention_layers or self.attention_heads)

    @property
    def layers_with_attention(self) -> list[int]:
        """Returns the layers that have attention, whole or by heads, in order."""
        return sorted({*self.attention_layers, *map(int, self.attention_heads)})

    @property
    def n_teacher_heads(self) -> int | None:
        """Returns the query heads of a teacher's layer, None without one."""
        return (self.attention_cfg or {}).get("num_attention_heads")

    def heads_of(self, layer: int) -> list[int]:
        """Returns the heads that a layer keeps beside its mixer, in order; none of a whole layer."""
        return self.attention_heads.get(str(layer), [])

    @property
    def d_inner(self) -> int:
        return self.ssm_cfg["expand"] * self.d_model

    @property
    def d_xBC(self) -> int:
        return self.mixer_shape().d_xBC

    @property
    def headdim(self) -> int:
        return self.d_inner // self.ssm_cfg["n_v_heads"]

    def n_kv_heads_of(self, layer: int) -> int:
        """Returns the key/value heads of a layer: of a whole one all, else those of its kept heads."""
        if layer in self.attention_layers:
            return self.attention_config().num_key_value_heads
        if not (kept := self.heads_of(layer)):
            return 0
        attention = self.attention_config()
        return len({head * attention.num_key_value_heads // attention.num_attention_heads for head in kept})

    @property
    def attention_head_dim(self) -> int:
        return width_of_heads(self.attention_config()) if self.has_attention else 0

    def mixer_shape(self, n_kept: int = 0) -> MixerShape:
        """Returns the shape of a mixer beside `n_kept` heads of the teacher, or of one that stands alone."""
        n_heads = self.ssm_cfg["n_v_heads"] - n_kept
        n_groups = n_heads if n_kept else self.ssm_cfg["n_qk_heads"]
        d_inner = n_heads * self.headdim
        return MixerShape(n_heads, n_groups, d_inner, d_inner + 2 * n_groups * self.ssm_cfg["d_state"])

    def attention_config(self) -> TeacherConfig:
        """Returns the config, of the teacher's family, from which its layers, heads and rotary embedding are built."""
        assert self.attention_cfg is not None
        config = config_of(self.attention_cfg, num_hidden_layers=self.n_layer, vocab_size=self.vocab_size)
        config._attn_implementation = self._attn_implementation
        return config


def whole_and_parts(
    layers: Iterable[int], heads: Mapping[Any, Iterable[int]], n_heads: int | None
) -> tuple[list[int], dict[str, list[int]]]:
    """Returns the layers that are whole, in order, those that keep all their `n_heads` heads among them, and the heads
    of the others by layer, as `attention_layers` and `attention_heads` have them.
    """
    parts = {int(layer): sorted(set(kept)) for layer, kept in sorted(heads.items(), key=lambda item: int(item[0]))}
    whole = {layer for layer, kept in parts.items() if len(kept) == n_heads and kept == list(range(len(kept)))}
    kept = {str(layer): kept for layer, kept in parts.items() if kept and layer not in whole}
    return sorted({*layers, *whole}), kept


def _is_layers_to_heads(given: Any) -> bool:
    """Returns whether a value is a dictionary of layers, numbers or text of digits, to lists of whole numbers."""
    return type(given) is dict and all(
        str(layer).isdecimal() and type(heads) is list and all(type(head) is int and head >= 0 for head in heads)
        for layer, heads in given.items()
    )


def _filled(name: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    _check_keys(name, given, tuple(defaults))
    return {**defaults, **given}


def _check_attention_cfg(given: dict[str, Any]) -> None:
    """Raises ValueError if a family is unknown, or a key no setting of its layers."""
    kind = given.get("model_type", "llama") if type(given) is dict else "llama"
    if type(kind) is not str or kind not in FAMILIES:
        raise ValueError(f"attention_cfg.model_type={kind!r}: {KNOWN}")
    _check_keys("attention_cfg", given, ("model_type", *FAMILIES[kind].fields))


def _check_keys(name: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    if type(given) is not dict:
        raise ValueError(f"{name}={given!r}: expected a dictionary")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} has unknown keys {unknown}; known: {sorted(known)}")
