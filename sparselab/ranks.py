"""Several processes that share the work, as `torchrun` starts them: which of them is this, and who does what."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from sparselab.errors import LostRankError

# For processes that do not answer: a machine may vanish without closing its connections. Longer than any solve.
_PATIENCE = timedelta(minutes=30)
_SETTLE = 0.5  # seconds


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is. Where there is one, everything here does nothing.

    Args:
        rank: from 0 on; rank 0 writes and speaks for all.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def part(self, windows: Int[Tensor, "n seqlen"]) -> Int[Tensor, "part seqlen"]:
        """Which of the windows are for this process; parts as even as can be.

        Raises:
            ValueError: there are fewer windows than processes.
        """
        if len(windows) < self.world:
            raise ValueError(f"nsamples: expected a window for each of {self.world} processes, received {len(windows)}")
        return windows.tensor_split(self.world)[self.rank]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who does which piece of work: the largest first, each by the process that has the least by then."""
        loads, owners = [0.0] * self.world, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
            owners[piece] = loads.index(min(loads))
            loads[owners[piece]] += costs[piece]
        return owners

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes in place of each one's tensor.

        Raises:
            LostRankError: another process has ended.
        """
        if self.world > 1:
            with lost_rank_told():
                dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Put the source's tensor, contiguous and of whatever type, in place of everyone's.

        Raises:
            LostRankError: another process has ended.
        """
        if self.world > 1:
            with lost_rank_told():
                dist.broadcast(tensor.view(torch.uint8), source)

    def check_same(self, what: str, data: bytes, device: torch.device) -> None:
        """Raise ValueError in every process where one has other data than the first; `what` names it."""
        if self.world == 1:
            return
        mine = torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.uint8, device=device)
        first = mine.clone()
        self.broadcast(first, 0)
        if self.any(not torch.equal(mine, first), device):
            raise ValueError(f"{what}: expected the same in all {self.world} processes, received different ones")

    def any(self, fact: bool, device: torch.device) -> bool:
        """Whether it is so in any process.

        Raises:
            LostRankError: another process has ended.
        """
        found = torch.tensor([float(fact)], device=device)
        self.add_up(found)
        return bool(found.item())

    def wait(self, device: torch.device) -> None:
        """Until all processes have come here.

        Raises:
            LostRankError: another process has ended.
        """
        self.add_up(torch.zeros(1, device=device))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, in touch with each other inside; or this one alone.

    Who is ready waits for the others, as torchrun ends them all when one leaves before it is time.

    Raises:
        LostRankError: another process has ended before.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world)
        with lost_rank_told():
            dist.barrier()
        # Where something (DeepSpeed) still holds their group, gloo's threads live on, and one that lets go of the last
        # tensor while Python ends crashes the process.
        time.sleep(_SETTLE)
    finally:
        dist.destroy_process_group()


def everyone() -> Ranks:
    """All processes of a group that somebody else has made."""
    return Ranks(dist.get_rank(), dist.get_world_size())


def own_device(device: str | None) -> str | None:
    """The device of this process: where torchrun has started several on a machine with GPUs, each has its own."""
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def lost_rank_told() -> Iterator[None]:
    """Say in one way that another process is gone: each of torch's backends has its own words.

    Raises:
        LostRankError: another process has ended, or has not answered for half an hour.
    """
    try:
        yield
    except RuntimeError as error:
        lost = ("onnection", "imed out")
        if not isinstance(error, dist.DistError) and not any(words in str(error) for words in lost):
            raise
        raise LostRankError(
            f"another process of this run has ended ({str(error).splitlines()[0]}); its own message says why"
        ) from error
