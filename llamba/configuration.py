"""The configuration of a Llamba: a Llama whose attention is replaced by discrete Mamba-2 mixers, but for the
layers listed in `attention_layers`, which are whole decoder layers of a Llama teacher.

The published `config.json` files are read unchanged; `attention_layers` and `attention_cfg` are what a hybrid
adds to them. Every dimension that the model needs is derived here, once.
"""

from dataclasses import field
from typing import Any

from transformers import LlamaConfig, PretrainedConfig
from transformers.activations import ACT2FN

# The fields of a teacher's LlamaConfig that decide what one of its decoder layers computes.
ATTENTION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)

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


class LlambaConfig(PretrainedConfig):
    """Describes the shape of a (hybrid) Llamba.

    vocab_size: rows of the embedding and of the head; padded up to a multiple of `pad_vocab_size_multiple`.
    mlp_cfg, ssm_cfg: the published sub-dictionaries; what they leave out has the published default.
    attention_layers: indices of the layers that are `LlamaDecoderLayer`s; empty for a pure Llamba.
    attention_cfg: the teacher's settings for those layers (`ATTENTION_FIELDS`), or None.

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
    attention_cfg: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.mlp_cfg = _filled("mlp_cfg", self.mlp_cfg, MLP_DEFAULTS)
        self.ssm_cfg = _filled("ssm_cfg", self.ssm_cfg, SSM_DEFAULTS)
        self._check_kinds()
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple
        self.attention_layers = sorted(set(self.attention_layers))
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
        if problems:
            raise ValueError("; ".join(problems))
        if self.attention_cfg is not None:
            _check_keys("attention_cfg", self.attention_cfg, ATTENTION_FIELDS)

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
        if self.attention_layers and self.attention_cfg is None:
            raise ValueError("attention_layers is given without attention_cfg, the teacher's settings for them")

    @property
    def d_inner(self) -> int:
        return self.ssm_cfg["expand"] * self.d_model

    @property
    def d_xBC(self) -> int:
        """Returns the channels of the causal convolution: x, then B, then C."""
        return self.d_inner + 2 * self.ssm_cfg["n_qk_heads"] * self.ssm_cfg["d_state"]

    @property
    def headdim(self) -> int:
        return self.d_inner // self.ssm_cfg["n_v_heads"]

    def attention_config(self) -> LlamaConfig:
        """Returns the `LlamaConfig` from which the replaced layers and their rotary embedding are built."""
        assert self.attention_cfg is not None
        config = LlamaConfig(**self.attention_cfg, num_hidden_layers=self.n_layer, vocab_size=self.vocab_size)
        config._attn_implementation = self._attn_implementation
        return config


def attention_cfg_from(teacher: LlamaConfig) -> dict[str, Any]:
    """Returns the part of a teacher's config that its layers need in a hybrid."""
    return {name: getattr(teacher, name) for name in ATTENTION_FIELDS}


def _filled(name: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    _check_keys(name, given, tuple(defaults))
    return {**defaults, **given}


def _check_keys(name: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    if type(given) is not dict:
        raise ValueError(f"{name}={given!r}: expected a dictionary")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} has unknown keys {unknown}; known: {sorted(known)}")
