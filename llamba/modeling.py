"""Llamba and its hybrids as a transformers model: Llama's blocks with discrete Mamba-2 mixers in place of attention, or
of all but some of its heads, and, at `config.attention_layers`, whole decoder layers of a teacher. Weight names are
those of the published checkpoints; loading is exact: a missing, unexpected or misshapen weight is an error that lists
it.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .block import LlambaBlock
from .cache import HeadsLayer, LlambaCache, RecurrentLayer
from .configuration import LlambaConfig
from .families import FAMILIES
from .llama import RMSNorm, attention_layer
from .mixer import DiscreteMamba2


class LlambaPreTrainedModel(PreTrainedModel):
    config_class = LlambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlambaBlock", *(family.layer.__name__ for family in FAMILIES.values())]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted generation would need

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DiscreteMamba2):
            init.ones_(module.D)
            if module.z_bias is not None:
                init.zeros_(module.z_bias)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes as transformers does, to as many rows as a model that is loaded from the same config has."""
        multiple = math.lcm(self.config.pad_vocab_size_multiple, pad_to_multiple_of or 1)
        return super().resize_token_embeddings(new_num_tokens, multiple, mean_resizing)

    def set_attn_implementation(self, *args, **kwargs) -> None:
        """Has the layers and heads of a teacher attend as transformers' method of this name says."""
        super().set_attn_implementation(*args, **kwargs)
        if (rotary := self.base_model.rotary_emb) is not None:  # its config is that of everything that attends
            rotary.config._attn_implementation = self.config._attn_implementation

    @classmethod
    def from_pretrained(cls, name, *args, output_loading_info: bool = False, **kwargs):
        """Loads as transformers does. Raises ValueError that lists missing, unexpected and misshapen weights."""
        kwargs["ignore_mismatched_sizes"] = True  # so that they are listed below with the rest
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        problems = []
        for kind, names in ((kind, sorted(map(str, info[kind]))) for kind in info if info[kind]):
            problems.append(f"{kind.replace('_', ' ')} {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
        if problems:
            raise ValueError(
                f"{name}: not the weights that its config.json asks for: {', '.join(problems)}; copy the model again"
            )
        return (model, info) if output_loading_info else model


class LlambaModel(LlambaPreTrainedModel):
    """Runs embedding, blocks and final norm: input_ids (B, L) -> hidden states (B, L, D)."""

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__(config)
        attention_config = config.attention_config() if config.has_attention else None
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            attention_layer(attention_config, i)
            if i in config.attention_layers
            else LlambaBlock(config, i, attention_config)
            for i in range(config.n_layer)
        )
        self.final_layernorm = RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.rotary_emb = LlamaRotaryEmbedding(attention_config) if attention_config else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Returns hidden states (B, L, D) after the final norm, and the cache.

        attention_mask (B, past + L): 0 at padding, which has to be on the left if a cache is used.
        position_ids (B, L): by default, the number of tokens before each one that are not padding.
        past_key_values: a LlambaCache, which this forward extends; made here if `use_cache` asks for one.
        seq_idx (B, L): the document of each token of a packed window; documents do not see one another.
        output_hidden_states: also return the embeddings and every block's output, the last one after the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None and seq_idx is None:
            past_key_values = LlambaCache(self.config)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        token_mask, attention_inputs = self._masks(x, attention_mask, position_ids, past_key_values, seq_idx)

        all_hidden_states = [x] if output_hidden_states else []
        for layer in self.layers:
            if isinstance(layer, LlambaBlock):
                inputs = attention_inputs if layer.attention is not None else {}
                x = layer(x, past_key_values=past_key_values, token_mask=token_mask, seq_idx=seq_idx, **inputs)
            else:
                x = layer(x, past_key_values=past_key_values, use_cache=use_cache, **attention_inputs)
            if output_hidden_states:
                all_hidden_states.append(x)
        x = self.final_layernorm(x)

        outputs = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden_states[:-1], x) if output_hidden_states else None,
        )
        return outputs.to_tuple() if return_dict is False else outputs

    def _check_cache(self, cache) -> None:
        blocks = [layer if isinstance(layer, LlambaBlock) else None for layer in self.layers]
        expected = [(block is not None, block is not None and block.attention is not None) for block in blocks]
        found = [(isinstance(layer, RecurrentLayer), isinstance(layer, HeadsLayer)) for layer in cache.layers]
        if found != expected:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} whose layers are not this model's; expected "
                "LlambaCache(model.config), or what an earlier output of this model holds"
            )

    def _masks(self, x, attention_mask, position_ids, past_key_values, seq_idx):
        """Returns the mixers' token mask (B, L), None without an `attention_mask`, and the inputs of attention."""
        length = x.shape[1]
        n_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        token_mask = None
        if attention_mask is not None:
            expected = (x.shape[0], n_past + length)
            if attention_mask.shape != expected:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; expected {expected}: a row for each "
                    f"sequence, with {n_past} tokens of the cache and {length} new ones"
                )
            token_mask = attention_mask[:, -length:].bool()
        if self.rotary_emb is None:
            return token_mask, {}

        if position_ids is None:
            position_ids = _positions(x, n_past, attention_mask, seq_idx)
        same_document = None
        if seq_idx is not None:
            if (form := self.rotary_emb.config._attn_implementation) not in ("eager", "sdpa"):
                raise ValueError(
                    f"seq_idx: attn_implementation {form!r} takes no mask, and documents would see one another; "
                    "expected 'sdpa' or 'eager'"
                )

            def same_document(b, h, q, kv):
                return seq_idx[b, q] == seq_idx[b, kv]

        mask = create_causal_mask(
            config=self.rotary_emb.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=same_document,
        )
        rotary = self.rotary_emb(x, position_ids)
        return token_mask, {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": rotary,
        }


class LlambaForCausalLM(LlambaPreTrainedModel, GenerationMixin):
    """Predicts the next token: a `LlambaModel` and a head."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__(config)
        self.backbone = LlambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args) -> None:
        """Gives `generate()` an empty LlambaCache, unless the caller gives a cache or sets use_cache=False."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LlambaCache(self.config)

    # All arguments are named: `generate()` inspects the signature for what it may pass, such as position_ids.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Returns logits (B, L or `logits_to_keep`, vocab_size) of input_ids (B, L); the rest is as in `LlambaModel`.

        labels (B, L): next-token cross entropy as transformers counts it (shifted inside, -100 ignored).
        """
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result


def _positions(x: Tensor, n_past: int, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Returns the position of each token of x (B, L, D) in its sequence, or within its document: (1 or B, L)."""
    if seq_idx is not None:
        return _positions_in_documents(seq_idx)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, n_past:]
    return (torch.arange(x.shape[1], device=x.device) + n_past)[None]


def _positions_in_documents(seq_idx: Tensor) -> Tensor:
    """Returns the position of each token within its document: (B, L)."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
