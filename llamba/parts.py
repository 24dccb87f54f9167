"""The student's parameters by part of the model: embedding, mixers, attention, MLPs, norms, head."""

from torch import nn

from llamba import LlambaBlock, LlambaForCausalLM


def parts_of_student(student: LlambaForCausalLM) -> dict[str, list[nn.Parameter]]:
    """All parameters by part of the model."""
    parts: dict[str, list[nn.Parameter]] = {
        "embedding and head": [*student.backbone.embedding.parameters(), *student.lm_head.parameters()],
        "mixers": [],
        "MLPs": [],
        "norms": [*student.backbone.final_layernorm.parameters()],
        "replaced layers": [],
    }
    for layer in student.backbone.layers:
        if not isinstance(layer, LlambaBlock):
            parts["replaced layers"] += layer.parameters()
            continue
        parts["mixers"] += layer.mixer.parameters()
        parts["MLPs"] += layer.mlp.parameters()
        parts["norms"] += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    return parts


def parameter_table(student: LlambaForCausalLM) -> str:
    """Total, trainable and frozen parameters by part of the model, as text."""
    lines = [f"{'parameters':<20}{'total':>16}{'trainable':>16}{'frozen':>16}"]
    for name, members in parts_of_student(student).items():
        lines.append(_table_row(name, members))
    lines.append(_table_row("all", list(student.parameters())))
    return "\n".join(lines)


def _table_row(name: str, parameters: list[nn.Parameter]) -> str:
    unique = {id(p): p for p in parameters}.values()  # a tied head is the embedding
    total = sum(p.numel() for p in unique)
    trainable = sum(p.numel() for p in unique if p.requires_grad)
    return f"{name:<20}{total:>16,}{trainable:>16,}{total - trainable:>16,}"
