"""The sweep of one block of columns, as fast as each machine can: a module for each way, all of one signature."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch

Kernel = Literal["auto", "numba", "torch", "triton"]

# Columns of a block that fit in registers together with a tile of rows, in the Triton kernel.
_WIDEST = 128


def block_sweeper(kernel: str, blocksize: int, device: torch.device, rounds: bool = False) -> Callable[..., None]:
    """The function that takes a block's compensated weights to its pruned ones, in place.

    A removed w_q puts −w_q U_{q,>q} / U_qq on the columns after it (equation 3 of the paper, by the factor's rows).
    Its arguments:

    - W [width, rows]: one column of the weight a row, contiguous.
    - push [width, width]: strictly upper; row q is what a removed w_q, taken once, adds to the columns after it.
    - importance [width]: 1/U_qq of each column, 0 for dead ones; read for N:M only.
    - remove [width, rows]: True for what goes; or None, where the next is given.
    - choose: the pattern by which N:M groups choose in turn, each from weights that those before it have changed; or
      None.
    - grid: the values that what stays is rounded to, a row's for each row of the weight; or None. What rounding takes
      from a weight is made good for as what pruning takes is.

    Args:
        kernel: "numba", compiled for the processor; "torch", for any device; "triton", for a GPU, a block of up to 128
            columns in one launch; or "auto": the first of them on the CPU, the last on a GPU for such blocks, if
            Triton can run there (a warning says why not), and else the second.
        blocksize: columns of the widest block.
        device: of the weights.
        rounds: whether there will be a grid, which the Triton kernel does not know.

    Raises:
        ValueError: no such kernel, or it cannot run there.
    Source: Frantar & Alistarh 2023, algorithm 1, lines 5 to 12.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel: expected one of {', '.join(get_args(Kernel))}, received {kernel!r}")
    if kernel == "auto":
        kernel = _fastest(blocksize, device, rounds)
    if kernel == "numba":
        return _numba(device)
    if kernel == "triton":
        return _triton(blocksize, device, rounds)
    from sparselab.solvers.kernels import torch_sweep

    return torch_sweep.sweep_block


def _fastest(blocksize: int, device: torch.device, rounds: bool) -> Kernel:
    if device.type != "cuda":
        return "numba" if device.type == "cpu" else "torch"
    return "triton" if blocksize <= _WIDEST and not rounds and _triton_runs(device) else "torch"


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton is there and works: it compiles with the machine's C compiler, and needs Python's headers."""
    try:
        sweep_block, W = _triton(16, device, rounds=False), torch.zeros(16, 16, device=device)
        sweep_block(W, W.clone(), W[0].clone(), W == 0, None)
    except Exception as error:  # whatever its compiler raises
        warnings.warn(
            f"the Triton kernel cannot run on {device}, so blocks are swept in torch, which takes many times as long: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


def _numba(device: torch.device) -> Callable[..., None]:
    if device.type != "cpu":
        raise ValueError(f"kernel 'numba': expected weights on the CPU, received some on {device}; use kernel 'torch'")
    from sparselab.solvers.kernels import numba_sweep  # here, as numba takes half a second to import

    return numba_sweep.sweep_block


def _triton(blocksize: int, device: torch.device, rounds: bool) -> Callable[..., None]:
    try:
        from sparselab.solvers.kernels import triton_sweep
    except ImportError as error:
        raise ValueError(f"kernel 'triton': Triton cannot be imported ({error}); install it, or use 'torch'") from error
    if rounds:
        raise ValueError("kernel 'triton': expected weights that are pruned only, received wbits; use kernel 'torch'")
    if blocksize > _WIDEST or not (device.type == "cuda" or triton_sweep.interpreted()):
        raise ValueError(
            f"kernel 'triton': expected blocks of at most {_WIDEST} columns on a GPU, "
            f"received blocksize {blocksize} on {device}; use kernel 'torch'"
        )
    return triton_sweep.sweep_block
