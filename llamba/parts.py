"""Groups a Llamba's parameters by part of the model and counts them in a table."""

from torch import nn

from .block import LlambaBlock
from .modeling import LlambaForCausalLM


def parameters_by_part(model: LlambaForCausalLM) -> dict[str, list[nn.Parameter]]:
    """Returns every parameter under its part; a tied head stands twice in the first."""
    parts: dict[str, list[nn.Parameter]] = {
        "embedding and head": [*model.backbone.embedding.parameters(), *model.lm_head.parameters()],
        "mixers": [],
        "MLPs": [],
        "norms": [*model.backbone.final_layernorm.parameters()],
        "replaced layers": [],
    }
    if model.config.attention_heads:
        parts["kept heads"] = []
    for layer in model.backbone.layers:
        if not isinstance(layer, LlambaBlock):
            parts["replaced layers"] += layer.parameters()
            continue
        parts["mixers"] += layer.mixer.parameters()
        if layer.attention is not None:
            parts["kept heads"] += layer.attention.parameters()
        parts["MLPs"] += layer.mlp.parameters()
        parts["norms"] += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    return parts


def mixer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters of the mixers in a module, which may wrap a Llamba. Replaced layers have none."""
    blocks = [module for module in model.modules() if isinstance(module, LlambaBlock)]
    return {parameter for block in blocks for parameter in block.mixer.parameters()}


def parameter_table(model: LlambaForCausalLM, max_lr: float | None = None, copied_lr_factor: float = 1.0) -> str:
    """Returns the numbers of total, trainable and frozen parameters by part of the model, as text, and, if `max_lr` is
    given, the learning rate of each part: that of all but the mixers is multiplied by the factor.
    """
    lines = [f"{'parameters':<20}{'total':>16}{'trainable':>16}{'frozen':>16}"]
    parts = {**parameters_by_part(model), "all": list(model.parameters())}
    lines += [_table_row(name, members) for name, members in parts.items()]
    if max_lr is not None:
        rates = {name: max_lr * (1.0 if name == "mixers" else copied_lr_factor) for name in parts}
        learns = {name: any(p.requires_grad for p in members) for name, members in parts.items()}
        column = [f"{rates[name]:.4g}" if learns[name] else "-" for name in parts if name != "all"]
        lines = [f"{line}{cell:>16}" for line, cell in zip(lines, ["learning rate", *column, ""], strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def _table_row(name: str, parameters: list[nn.Parameter]) -> str:
    unique = {id(p): p for p in parameters}.values()  # a tied head and the embedding are one parameter
    total = sum(p.numel() for p in unique)
    trainable = sum(p.numel() for p in unique if p.requires_grad)
    return f"{name:<20}{total:>16,}{trainable:>16,}{total - trainable:>16,}"
