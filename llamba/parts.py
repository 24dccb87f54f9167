"""Groups a Llamba's parameters by part of the model and counts them in a table."""

from torch import nn

from .modeling import LlambaBlock, LlambaForCausalLM


def parameters_by_part(model: LlambaForCausalLM) -> dict[str, list[nn.Parameter]]:
    """Returns every parameter under its part; a tied head stands twice in the first."""
    parts: dict[str, list[nn.Parameter]] = {
        "embedding and head": [*model.backbone.embedding.parameters(), *model.lm_head.parameters()],
        "mixers": [],
        "MLPs": [],
        "norms": [*model.backbone.final_layernorm.parameters()],
        "replaced layers": [],
    }
    for layer in model.backbone.layers:
        if not isinstance(layer, LlambaBlock):
            parts["replaced layers"] += layer.parameters()
            continue
        parts["mixers"] += layer.mixer.parameters()
        parts["MLPs"] += layer.mlp.parameters()
        parts["norms"] += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    return parts


def parameter_table(model: LlambaForCausalLM) -> str:
    """Returns the numbers of total, trainable and frozen parameters by part of the model, as text."""
    lines = [f"{'parameters':<20}{'total':>16}{'trainable':>16}{'frozen':>16}"]
    for name, members in parameters_by_part(model).items():
        lines.append(_table_row(name, members))
    lines.append(_table_row("all", list(model.parameters())))
    return "\n".join(lines)


def _table_row(name: str, parameters: list[nn.Parameter]) -> str:
    unique = {id(p): p for p in parameters}.values()  # a tied head and the embedding are one parameter
    total = sum(p.numel() for p in unique)
    trainable = sum(p.numel() for p in unique if p.requires_grad)
    return f"{name:<20}{total:>16,}{trainable:>16,}{total - trainable:>16,}"
