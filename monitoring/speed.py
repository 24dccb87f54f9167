"""How well a run uses its GPUs, for each row of metrics.jsonl: `mfu`, the share of the GPUs' peak operations per second
that the student's model itself needs, and `memory_gb`, the most memory since the row before.
"""

import re
import resource

import torch
from torch import nn

from conversion.alignment import Alignment
from llamba import DiscreteMamba2, LlambaForCausalLM
from llamba.families import ATTENTIONS
from llamba.kept_heads import KeptHeads

# 10^12 dense operations per second in bfloat16 and float16 with sums in float32, by words of the name that
# torch.cuda.get_device_name gives; the first that fits counts. From the vendors' data sheets and, for GeForce cards,
# NVIDIA's architecture whitepapers; where a sheet gives the rate with sparsity alone, its half.
PEAKS: tuple[tuple[str, float], ...] = (
    *(("GB200", 2500.0), ("B300", 2250.0), ("B200", 2250.0), ("B100", 1750.0)),
    *(("H200 NVL", 835.5), ("H200", 989.4), ("GH200", 989.4), ("H20", 148.0)),
    *(("H100 NVL", 835.5), ("H100 PCIE", 756.5), ("H100", 989.4), ("H800 PCIE", 756.5), ("H800", 989.4)),
    *(("A100", 312.0), ("A800", 312.0), ("A40", 149.7), ("A30", 165.0), ("A10", 125.0)),
    *(("L40S", 362.1), ("L40", 181.1), ("L4", 121.0)),
    *(("RTX 6000 ADA", 364.2), ("RTX A6000", 154.8), ("RTX A5000", 111.1)),
    *(("RTX 5090", 209.5), ("RTX 4090", 165.2), ("RTX 3090 TI", 80.0), ("RTX 3090", 71.0)),
    *(("V100 PCIE", 112.0), ("V100", 125.0), ("V100S", 130.0), ("T4", 65.0)),
    *(("MI325X", 1307.4), ("MI300X", 1307.4)),
)
WITHOUT_BFLOAT16 = ("V100", "V100S", "T4")
# 10^12 bytes per second of their memory, from the same sheets; where cards of one name differ, the larger one's.
MEMORY_RATES: tuple[tuple[str, float], ...] = (
    *(("GB200", 8.0), ("B300", 8.0), ("B200", 8.0), ("B100", 8.0)),
    *(("H200 NVL", 4.8), ("H200", 4.8), ("GH200", 4.9), ("H20", 4.0)),
    *(("H100 NVL", 3.9), ("H100 PCIE", 2.0), ("H100", 3.35), ("H800 PCIE", 2.0), ("H800", 3.35)),
    *(("A100", 2.04), ("A800", 2.04), ("A40", 0.7), ("A30", 0.93), ("A10", 0.6)),
    *(("L40S", 0.86), ("L40", 0.86), ("L4", 0.3)),
    *(("RTX 6000 ADA", 0.96), ("RTX A6000", 0.77), ("RTX A5000", 0.77)),
    *(("RTX 5090", 1.79), ("RTX 4090", 1.01), ("RTX 3090 TI", 1.01), ("RTX 3090", 0.94)),
    *(("V100 PCIE", 0.9), ("V100", 0.9), ("V100S", 1.13), ("T4", 0.32)),
    *(("MI325X", 6.0), ("MI300X", 5.3)),
)
OTHER_CARDS = {"MIG", "LAPTOP", "MAX", "MOBILE", "TI", "SUPER", "D"}  # with such a word in its name it is another one


def peak_operations(device_name: str, dtype: torch.dtype) -> float | None:
    """Returns the peak operations per second of one GPU, or None where it is not known, as for float32."""
    name, tera = _find_card(device_name, PEAKS)
    has_dtype = dtype == torch.float16 or (dtype == torch.bfloat16 and not set(name.split()) & set(WITHOUT_BFLOAT16))
    return tera * 1e12 if tera is not None and has_dtype else None


def memory_rate(device_name: str) -> float | None:
    """Returns the bytes per second of one GPU's memory, or None where it is not known."""
    _, tera = _find_card(device_name, MEMORY_RATES)
    return None if tera is None else tera * 1e12


def _find_card(device_name: str, table: tuple[tuple[str, float], ...]) -> tuple[str, float | None]:
    """Returns a card's name and figure in one of the tables above; None for a card that is not in it."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    for name, figure in table:
        card = set(name.split())
        if card <= words and not (words - card) & OTHER_CARDS:
            return name, figure
    return "", None


def student_operations_per_token(student: LlambaForCausalLM, seq_len: int) -> float:
    """Returns the multiplications and additions of matrix products, forward and backward, for one token of a window of
    `seq_len`. Recomputation does not count. A backward product for weights is needed where they are trained, one for
    inputs where anything in their layer or before it is trained.
    """
    backbone, total = student.backbone, 0.0
    trains = any(parameter.requires_grad for parameter in backbone.embedding.parameters())
    for stage in (*backbone.layers, student.lm_head):
        trains = trains or any(parameter.requires_grad for parameter in stage.parameters())
        for module in stage.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                total += 2 * weight.numel() * (1 + trains + weight.requires_grad)
            else:  # both factors of these products come from the inputs
                total += _mixing_operations(module, seq_len) * (1 + 2 * trains)
    return total


def alignment_operations_per_token(alignment: Alignment, seq_len: int) -> float:
    """Returns likewise those of `--stage align`: the teacher's layers up to the last mixer, forward only and without
    the last one's MLP, and the mixers. Of what a mixer reads no gradient is needed.
    """
    layers = alignment.stream.layers[: max(alignment.blocks) + 1]
    total = sum(_forward_operations(layer, seq_len) for layer in layers)
    total -= _forward_operations(layers[-1].mlp, seq_len)
    for block in alignment.blocks.values():
        total += 0 if block.attention is None else _forward_operations(block.attention, seq_len)
        total += 3 * _forward_operations(block.mixer, seq_len) - 2 * block.mixer.in_proj.weight.numel()
    return total


def _forward_operations(module: nn.Module, seq_len: int) -> float:
    linear = sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
    return linear + sum(_mixing_operations(part, seq_len) for part in module.modules())


def _mixing_operations(module: nn.Module, seq_len: int) -> float:
    """Returns the forward operations per token of attention and scan; 0 for modules that mix no tokens."""
    if isinstance(module, ATTENTIONS):
        return _attention_operations(module.config.num_attention_heads * module.head_dim, seq_len)
    if isinstance(module, KeptHeads):
        return _attention_operations(len(module.heads) * module.head_dim, seq_len)
    if isinstance(module, DiscreteMamba2):  # the scan in chunks: steps 1, 2 and 4 of llamba/ssd.py
        chunk = min(module.chunk_size, seq_len)
        inner = module.n_v_heads * module.headdim
        return 2 * (chunk * (module.n_qk_heads * module.d_state + inner) + 2 * inner * module.d_state)
    return 0.0


def _attention_operations(width: int, seq_len: int) -> float:
    """Returns those of scores and values, over the tokens that one sees on average. width: of all heads together."""
    return 4 * width * (seq_len + 1) / 2


class Gauges:
    """Reads `mfu` and `memory_gb`. A row has no `mfu` where the peak of the GPUs is not known."""

    def __init__(
        self,
        student: LlambaForCausalLM,
        device: torch.device,
        n_students: int,
        seq_length: int,
        tflops: float | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        """device: of this rank's student; tflops: of a GPU, if not by its name; alignment: what the run does, if it is
        one.
        """
        self.device = device
        peak = None if tflops is None else tflops * 1e12
        if peak is None and device.type == "cuda":
            peak = peak_operations(torch.cuda.get_device_name(device), student.dtype)
        self.full_speed = None  # tokens per second of all students, if they did nothing but these operations
        if peak is not None:
            if alignment is None:
                needed = student_operations_per_token(student, seq_length)
            else:
                needed = alignment_operations_per_token(alignment, seq_length)
            self.full_speed = n_students * peak / needed

    def read(self, tokens_per_s: float) -> dict[str, float]:
        """Returns the readings for a step. memory_gb, in 10^9 bytes, is this process's: on a GPU the most that tensors
        took since the last reading, on a CPU the most that the process ever had.
        """
        figures = {} if self.full_speed is None else {"mfu": tokens_per_s / self.full_speed}
        if self.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            figures["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return figures
