"""The exchange of gradients in which each rank owns an equal piece of all trained weights: gradients are sent to the
owner alone, summed in float32 in the order of ranks, and what an update has changed in the weights comes back. A rank
receives (R - 1) / R of the gradients' bytes and about a seventh of the weights' for an optimizer step, where an
all-reduce and a broadcast take three times the former.

No last bit depends on buckets, on their size, or on the order in which messages arrive.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distillation.adamw import MasterWeightAdamW
from distillation.buckets import WHOLE, Bucket
from distillation.changes import KERNELS, apply_changes, count_longer, encode_changes, most_longer
from distillation.compiled import DEVICES, Compiled
from distillation.exchange import Kept, Owned
from distillation.gradient_codes import kernels_of
from distillation.levels import Flight, as_bytes, make_levels
from processes.ranks import local_world_size

BUCKET_BYTES = 128 * 2**20
IN_FLIGHT = 4  # messages under way at most, of up to as many bytes: what is sent, and what arrives; shared by levels


class Owners:
    """Exchanges the gradients of a model's trained parameters, and steps AdamW on the piece that this rank owns. All
    ranks make it at the same time, with the same weights.
    """

    def __init__(
        self,
        order: list[nn.Parameter],
        groups: list[dict],
        lr: float,
        master_weights: bool = True,
        by_rows: nn.Parameter | None = None,
        gradient_bits: int = 16,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """order: in which gradients come, of all parameters. groups: of the optimizer, with the trained ones. by_rows:
        an embedding, of which only rows are sent whose gradient is not zero. gradient_bits: of all other gradients on
        their way; 16 sends them as they are. bucket_bytes: of gradients that are sent at once.
        """
        self.n_ranks, self.master_weights = dist.get_world_size(), master_weights
        dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
        assert len(dtypes) == 1, f"parameters of {dtypes} do not fit into buckets of one dtype"
        self.levels = make_levels(gradient_bits, dtypes.pop(), local_world_size())
        place = {parameter: i for i, parameter in enumerate(order)}
        self.buckets: list[Bucket] = []
        stepped = []
        for group in groups:
            members = sorted(group["params"], key=place.__getitem__)
            some = make_buckets(members, by_rows, bucket_bytes)
            stepped.append({**group, "params": [bucket.master for bucket in some]})
            self.buckets += some
        self.optimizer = MasterWeightAdamW(stepped, lr=lr, betas=(0.9, 0.95))
        # As their gradients become whole; the embedding's are counted before they are sent, and come last.
        self.buckets.sort(key=lambda bucket: (bucket.row > 1, max(place[p] for p in bucket.parameters)))
        # Weights of a piece in one message: with those of the other pieces they have the bytes of a bucket.
        room = bucket_bytes // (self.n_ranks * self.buckets[0].weights.element_size())
        self.at_once = max(WHOLE, room // WHOLE * WHOLE)
        self.number = {parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket.parameters}
        self._compile(gradient_bits)
        for parameter in self.number:
            parameter.register_post_accumulate_grad_hook(self._has_gradient)
        self.clear()

    def _compile(self, gradient_bits: int) -> None:
        """Has the coding compiled now, not within the first backward pass."""
        own = self.buckets[0].own
        if self.n_ranks > 1 and own.device.type in DEVICES:
            # Between nodes travels what is summed inside them, in float32.
            dtype = own.dtype if len(self.levels) == 1 else torch.float32
            for function, read in coding_kernels(gradient_bits, own.dtype, dtype):
                function.why_plain(own.device, read)

    # --- gradients to their owners ---------------------------------------------------------------------------

    def begin(self, is_last: bool) -> None:
        """Prepares for the backward pass of a micro step. In the last one of an optimizer step buckets are sent as soon
        as they are whole.
        """
        self.is_last = is_last

    def _has_gradient(self, parameter: Tensor) -> None:
        if not self.is_last or self.n_ranks == 1:
            return
        assert isinstance(parameter, nn.Parameter)
        self.missing[self.number[parameter]] -= 1
        # Strictly by number: all ranks send the same buckets in the same order.
        while self.n_sent < len(self.buckets) and self._can_go(self.n_sent):
            self._send()

    def _can_go(self, i: int) -> bool:
        return self.missing[i] == 0 and self.buckets[i].row == 1

    def _send(self) -> None:
        bucket = self.buckets[self.n_sent]
        self.n_sent += 1
        bucket.master.grad = torch.empty(len(bucket.own), dtype=torch.float32, device=bucket.own.device)
        pieces = bucket.grads.view(self.n_ranks, -1)  # (R, n)
        for part in self._parts(bucket):
            self._depart(0, bucket, part, pieces[:, part])

    def _parts(self, bucket: Bucket) -> Iterator[slice]:
        """Yields the parts of a piece that are sent one by one: a vocabulary's weights alone are gigabytes."""
        for start in range(0, len(bucket.own), self.at_once):
            yield slice(start, min(start + self.at_once, len(bucket.own)))

    def _depart(self, i: int, bucket: Bucket, part: slice, pieces: Tensor) -> None:
        """Sends a part of pieces (R', k) at level i, once there is room for it."""
        if len(self.flights[i]) == IN_FLIGHT // len(self.levels):
            self._arrive(i)
        self.flights[i].append((bucket, part, self.levels[i].send(pieces)))

    def _arrive(self, i: int) -> None:
        """Waits for the oldest flight of level i. What it brings goes on to the next level; at the last it is the
        gradient.
        """
        bucket, part, flight = self.flights[i].popleft()
        grad = _grad(bucket)[part]
        if i == len(self.levels) - 1:
            self.levels[i].receive(flight, grad)
            return
        n_left = math.prod(level.size for level in self.levels[i + 1 :])
        mean = grad.new_empty(n_left * len(grad))
        self.levels[i].receive(flight, mean)
        self._depart(i + 1, bucket, part, mean.view(n_left, -1))

    @torch.no_grad()
    def norm(self) -> float:
        """Waits for all gradients, and returns the L2 norm of their mean over ranks, the same on all."""
        if self.n_ranks == 1:
            for bucket in self.buckets:
                bucket.master.grad = bucket.grads.float()
        else:
            self._complete()
        # In float64: in float32 the last bit would depend on which weights a rank owns.
        squares = [torch.linalg.vector_norm(_grad(bucket), dtype=torch.float64) ** 2 for bucket in self.buckets]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        return total.sqrt().float().item()

    def _complete(self) -> None:
        """Sends what backward did not, and receives all."""
        while self.n_sent < len(self.buckets) and self.buckets[self.n_sent].row == 1:
            self._send()
        for i in range(len(self.levels)):
            while self.flights[i]:
                self._arrive(i)
        for bucket in self.buckets[self.n_sent :]:
            rows = bucket.grads.view(self.n_ranks, -1, bucket.row)  # (R, rows of a rank, D)
            for level in self.levels:
                rows = level.mean_of_rows(rows)
            bucket.master.grad = rows.view(-1)

    # --- weights from their owners ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Steps AdamW on the owned weights, whose gradients it multiplies by `factor`, and gives all ranks the new
        weights of all.
        """
        for group in self.optimizer.param_groups:
            group["grad_factor"] = factor
        self.optimizer.step()
        if self.n_ranks == 1:
            for bucket in self.buckets:
                bucket.own.copy_(bucket.master)
        else:
            self._spread()
        if not self.master_weights:
            for bucket in self.buckets:
                bucket.master.copy_(bucket.own)

    def _spread(self) -> None:
        parts = [(bucket, part) for bucket in self.buckets for part in self._parts(bucket)]
        room = [most_longer(part.stop - part.start) for _, part in parts]
        if self.buckets[0].own.dtype == torch.float32:
            counts = [n + 1 for n in room]  # there is no code for changes of 32 bits
        else:
            # How many weights need more room than 2 bits is agreed upon first; the host waits once for all parts.
            needed = torch.stack([count_longer(bucket.own[part], _rounded(bucket, part)) for bucket, part in parts])
            dist.all_reduce(needed, op=dist.ReduceOp.MAX)
            counts = needed.tolist()
        for (bucket, part), count, most in zip(parts, counts, room, strict=True):
            new = _rounded(bucket, part)
            pieces = [piece[part] for piece in bucket.weights.chunk(self.n_ranks)]
            if count > most:
                for piece, message in zip(pieces, self._gather(as_bytes(new)), strict=True):
                    as_bytes(piece).copy_(message)
                continue
            codes, longer = encode_changes(bucket.own[part], new, count)
            for piece, message in zip(pieces, self._gather(torch.cat([codes, as_bytes(longer)])), strict=True):
                apply_changes(piece, message[: len(codes)], message[len(codes) :].clone().view(torch.int16))

    def _gather(self, message: Tensor) -> Tensor:
        """Returns the messages (R, m) of all ranks, each (m,)."""
        messages = message[None]
        for level in reversed(self.levels):
            messages = level.gather(messages)
        return messages

    @torch.no_grad()
    def clear(self) -> None:
        """Sets the gradients to zero for the next optimizer step."""
        for bucket in self.buckets:
            bucket.grads.zero_()
            bucket.master.grad = None
        self.missing = [len(bucket.parameters) for bucket in self.buckets]
        self.n_sent, self.is_last = 0, False
        self.flights: list[deque[tuple[Bucket, slice, Flight]]] = [deque() for _ in self.levels]

    # --- what is kept here -----------------------------------------------------------------------------------

    def owned(self) -> Iterator[tuple[Owned, Kept]]:
        """Yields which weights this rank owns, and what is kept for them: nothing before the first update."""
        for bucket in self.buckets:
            state = self.optimizer.state.get(bucket.master, {})
            if state and self._has_master(bucket):
                state = {"master": bucket.master.detach(), **state}
            for owned, place in bucket.owned():
                yield owned, {kind: value[place] if kind != "step" else value for kind, value in state.items()}

    @torch.no_grad()
    def restore(self, read: Callable[[Owned, str], Tensor]) -> None:
        """Replaces what is kept by what `read` returns for owned weights and a kind."""
        for bucket in self.buckets:
            self.optimizer.state_of(bucket.master)
        for owned, kept in self.owned():
            for kind, value in kept.items():
                value.copy_(read(owned, kind))

    def _has_master(self, bucket: Bucket) -> bool:
        return self.master_weights and bucket.own.dtype != torch.float32


def coding_kernels(gradient_bits: int, dtype: torch.dtype, summed: torch.dtype) -> list[tuple[Compiled, torch.dtype]]:
    """Returns what is compiled of the coding, with the dtype that each reads. dtype: of the weights. summed: of the
    gradients that travel in so many bits.
    """
    return kernels_of(gradient_bits, summed) + (KERNELS if dtype != torch.float32 else [])


def make_buckets(parameters: list[nn.Parameter], by_rows: nn.Parameter | None, bucket_bytes: int) -> list[Bucket]:
    """Returns buckets of the parameters, in their order; of one by rows, one of its own."""
    buckets: list[Bucket] = []
    some: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter is by_rows:
            buckets.append(Bucket([parameter], row=parameter.shape[1]))
            continue
        if some and sum(p.nbytes for p in some) + parameter.nbytes > bucket_bytes:
            buckets.append(Bucket(some))
            some = []
        some.append(parameter)
    return [*buckets, Bucket(some)] if some else buckets


def _grad(bucket: Bucket) -> Tensor:
    assert bucket.master.grad is not None
    return bucket.master.grad


def _rounded(bucket: Bucket, part: slice) -> Tensor:
    """Returns the new weights of a part of this rank's piece, in their own dtype."""
    return bucket.master.detach()[part].to(bucket.own.dtype)
