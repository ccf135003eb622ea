"""Who does the runs of a sweep: this process, several on this machine, or a Dask cluster; all are executors."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import connection
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")

_SECONDS_TO_ANSWER = 10

Engine = Executor | Callable[[], Executor]


class InProcess(Executor):
    """Does what is submitted at once, before `submit` returns; an interruption passes through."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """See `concurrent.futures.Executor`."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Pool(ProcessPoolExecutor):
    """Processes that share the cores of this machine.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        share = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers))
        super().__init__(workers, multiprocessing.get_context("spawn"), _settle, (share,))
        for _ in range(workers):  # all begin now, not each when there is work for it
            self.submit(_begin)

    def kill(self) -> None:
        """End at once, whatever is under way."""
        for process in list((self._processes or {}).values()):  # from Python 3.14 on there is `kill_workers`
            process.kill()
        self.shutdown(cancel_futures=True)


def _settle(threads: int) -> None:
    """In a new process: an interruption is for the one that waits, who ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one among processes, which nobody removes when this one is killed
    torch.set_num_threads(threads)
    # What is started from here, as the kernel of a notebook, takes no more.
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _begin() -> None:
    """Import what takes long."""
    import sparselab.worker  # noqa: F401


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever, or go on with what another is given by then."""
    if (parent := multiprocessing.parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class Workers:
    """An executor that is made anew when its processes are lost, if it is known how.

    Args:
        engine: an executor, which is left running in the end, or what makes one; None is this process.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self._make: Callable[[], Executor] | None = None if isinstance(engine, Executor) else engine or InProcess
        self._executor = engine if isinstance(engine, Executor) else None

    @property
    def renewable(self) -> bool:
        """Whether lost processes can be replaced."""
        return self._make is not None

    def submit(self, work: Callable[..., T], *args: Any) -> "Future[T]":
        """Have a piece of work done; if all processes are lost, its future says so."""
        if self._executor is None and self._make is not None:
            self._executor = self._make()
        assert self._executor is not None
        try:
            return self._executor.submit(work, *args)
        except BrokenExecutor as error:
            lost: Future[T] = Future()
            lost.set_exception(error)
            return lost

    def give_up(self, futures: Iterable["Future[Any]"]) -> None:
        """Nobody waits for these any more; what is under way with an executor that was given comes to its end."""
        if not self.renewable:
            for future in futures:
                future.cancel()

    def stop(self, at_once: bool = False) -> None:
        """End what was made here, in mid-work if need be; what is submitted later has processes of its own."""
        executor = self._executor
        if executor is None or not self.renewable:
            return
        self._executor = None
        if at_once and isinstance(executor, Pool):
            executor.kill()
        else:
            executor.shutdown(wait=not at_once, cancel_futures=True)


@contextmanager
def dask_executor(scheduler: str, workers: int = 1) -> Iterator[Executor]:
    """A Dask cluster as an executor: runs of lost workers are done by others.

    Args:
        scheduler: its address, as tcp://host:8786; or "slurm", to have as many workers started as Slurm jobs, in the
            way that Dask's configuration says (`jobqueue.slurm`, see the documentation of dask-jobqueue).
        workers: Slurm jobs.

    Raises:
        ValueError: Dask is not installed, or there is no scheduler at the address.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"scheduler: needs Dask ({error}); pip install 'sparselab[sweep]'") from error
    with _slurm(workers) if scheduler == "slurm" else nullcontext(scheduler) as place:
        try:
            client = Client(place, timeout=_SECONDS_TO_ANSWER)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"scheduler: expected the address of a Dask scheduler, as tcp://host:8786, received {scheduler!r} "
                f"({error or 'no answer'})"
            ) from error
        with client:
            executor = client.get_executor(pure=False)  # what it does, it does on disk
            try:
                yield executor
            finally:
                executor.shutdown(wait=False)  # what has not been begun is not to be, nobody waits for it


@contextmanager
def _slurm(workers: int) -> Iterator[Any]:
    from dask_jobqueue.slurm import SLURMCluster

    with SLURMCluster() as cluster:
        cluster.scale(jobs=workers)
        yield cluster
