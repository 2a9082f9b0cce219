"""Tensors between the ranks of one machine: NCCL for GPUs, gloo for CPUs.

A group of its own, apart from torch's default one, with which other libraries would change what
they do. Ranks meet in a folder that only their user may read, and gloo listens on loopback alone.
All that is needed is one operation, all to all with any number of elements. Knows no network.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from redux_pipelines.parallel.shares import Shares

ROOT = 0
"""The rank that the others follow."""


class GroupError(RuntimeError):
    """Another rank ended, or took too long; nothing can be exchanged with it any more."""


class Backend(Protocol):
    """What is used of torch's process groups."""

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        /,
    ) -> Any:
        """All to all along the first dimension; its result has a ``wait``."""
        ...

    def abort(self) -> None:
        """Give up what is under way."""
        ...


class Group:
    """The ranks that compute together, of which we are ``rank``.

    All have to call the same methods in the same order. Each raises ``GroupError``; with NCCL work
    is only queued, and a rank that is waited for in vain ends the process (torch's watchdog).
    """

    def __init__(self, backend: Backend, rank: int, ranks: int, device: torch.device) -> None:
        self._backend = backend
        self.rank = rank
        self.ranks = ranks
        self.device = device

    def exchange(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give ``sent[r]`` elements of ``send``, in their order, to rank r; what they gave to us.

        ``send`` is contiguous. ``received[r]`` elements come from rank r: ``(sum,)`` in all.
        Bytes go, so that any dtype does.
        """
        out, size = send.new_empty(sum(received)), send.element_size()
        splits = [[n * size for n in each] for each in (received, sent)]
        try:
            self._backend.alltoall_base(
                out.view(torch.uint8), send.flatten().view(torch.uint8), *splits
            ).wait()
        except RuntimeError as error:
            raise GroupError(f"exchanging rows with other ranks failed: {error}") from error
        return out

    def broadcast(self, values: Tensor) -> None:
        """Give ``values`` to all others, who ``receive`` them."""
        others = self.ranks - 1
        sent = [0 if rank == self.rank else values.numel() for rank in range(self.ranks)]
        self.exchange(values.flatten().repeat(others), sent, [0] * self.ranks)

    def receive(self, count: int, dtype: torch.dtype) -> Tensor:
        """What the root broadcasts, ``(count,)``."""
        nothing = torch.empty(0, dtype=dtype, device=self.device)
        return self.exchange(nothing, [0] * self.ranks, self._from_root(count))

    def scatter(self, rows: Tensor, shares: Shares) -> Tensor:
        """Give each rank its share of ``rows (B, n, C)``: that of the root, who calls this."""
        parts = [rows[:, each] for each in shares.slices]
        sent = [each.numel() for each in parts]
        own = self.exchange(_flat(parts), sent, self._from_root(sent[ROOT]))
        return own.view_as(parts[ROOT])

    def receive_share(
        self, shape: tuple[int, int, int], dtype: torch.dtype, shares: Shares
    ) -> Tensor:
        """Our share of the rows ``shape`` (B, n, C) that the root scatters."""
        batch, _, width = shape
        own = shares.counts[self.rank]
        return self.receive(batch * own * width, dtype).view(batch, own, width)

    def gather(self, rows: Tensor, shares: Shares) -> Tensor | None:
        """All ranks' ``rows (B, share, C)`` in order, at the root; None elsewhere."""
        batch, _, width = rows.shape
        received = [batch * n * width if self.rank == ROOT else 0 for n in shares.counts]
        all_rows = self.exchange(rows.contiguous(), self._from_root(rows.numel()), received)
        if self.rank != ROOT:
            return None
        parts = torch.split(all_rows, received)
        return torch.cat([part.view(batch, -1, width) for part in parts], dim=1)

    def gather_all(self, values: Tensor) -> Tensor:
        """``values (…)`` of each rank, ``(ranks, …)``, the same everywhere."""
        counts = [values.numel()] * self.ranks
        all_values = self.exchange(values.flatten().repeat(self.ranks), counts, counts)
        return all_values.view(self.ranks, *values.shape)

    def abort(self) -> None:
        """Let go of what waits for a rank that is gone; gloo finds that out by itself."""
        if self.device.type == "cuda":
            self._backend.abort()

    def _from_root(self, count: int) -> list[int]:
        return [count if rank == ROOT else 0 for rank in range(self.ranks)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in parts])


def connect(
    folder: Path, rank: int, ranks: int, device: torch.device, *, timeout_s: float
) -> Group:
    """The group of all who call this with one ``folder``; waits for them.

    An exchange that takes longer than ``timeout_s`` has failed. Raises ``GroupError``.
    """
    store = FileStore(str(folder / "ranks"), ranks)
    timeout = timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    make = _nccl if device.type == "cuda" else _gloo
    try:
        return Group(make(store, rank, ranks, timeout), rank, ranks, device)
    except RuntimeError as error:
        raise GroupError(f"the ranks could not meet: {error}") from error


def _gloo(store: FileStore, rank: int, ranks: int, timeout: timedelta) -> Backend:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return cast(Backend, ProcessGroupGloo(store, rank, ranks, options))


def _nccl(store: FileStore, rank: int, ranks: int, timeout: timedelta) -> Backend:
    from torch.distributed import ProcessGroupNCCL

    # Ranks find each other over a socket before they use NVLink or PCIe: not one of the network.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast(Backend, ProcessGroupNCCL(store, rank, ranks, options))
