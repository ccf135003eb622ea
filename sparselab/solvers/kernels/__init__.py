"""The sweep of one block of columns, as fast as each machine can: a module for each way, all of one signature."""

from collections.abc import Callable
from typing import Literal, get_args

import torch

Kernel = Literal["auto", "numba", "torch", "triton"]


def block_sweeper(kernel: str, blocksize: int, device: torch.device) -> Callable[..., None]:
    """The function that takes a block's compensated weights to its pruned ones, in place.

    A removed w_q puts −w_q U_{q,>q} / U_qq on the columns after it (equation 3 of the paper, by the factor's rows).
    Its arguments:

    - W [width, rows]: one column of the weight a row, contiguous.
    - push [width, width]: strictly upper; row q is what a removed w_q, taken once, adds to the columns after it.
    - importance [width]: 1/U_qq of each column, 0 for dead ones; read for N:M only.
    - remove [width, rows]: True for what goes; or None, where the next is given.
    - choose: the pattern by which N:M groups choose in turn, each from weights that those before it have changed; or
      None.

    Args:
        kernel: "numba", compiled for the processor; "torch", for any device; "triton", for a GPU, a block of up to 128
            columns in one launch; or "auto", the first of them on the CPU and the second elsewhere.
        blocksize: columns of the widest block.
        device: of the weights.

    Raises:
        ValueError: no such kernel, or it cannot run there.
    Source: Frantar & Alistarh 2023, algorithm 1, lines 5 to 12.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel: expected one of {', '.join(get_args(Kernel))}, received {kernel!r}")
    if kernel == "auto":
        kernel = "numba" if device.type == "cpu" else "torch"
    if kernel == "numba":
        return _numba(device)
    if kernel == "triton":
        return _triton(blocksize, device)
    from sparselab.solvers.kernels import torch_sweep

    return torch_sweep.sweep_block


def _numba(device: torch.device) -> Callable[..., None]:
    if device.type != "cpu":
        raise ValueError(f"kernel 'numba': expected weights on the CPU, received some on {device}; use kernel 'torch'")
    from sparselab.solvers.kernels import numba_sweep  # here, as numba takes half a second to import

    return numba_sweep.sweep_block


def _triton(blocksize: int, device: torch.device) -> Callable[..., None]:
    try:
        from sparselab.solvers.kernels import triton_sweep
    except ImportError as error:
        raise ValueError(f"kernel 'triton': Triton cannot be imported ({error}); install it, or use 'torch'") from error
    if blocksize > triton_sweep.WIDEST or not (device.type == "cuda" or triton_sweep.interpreted()):
        raise ValueError(
            f"kernel 'triton': expected blocks of at most {triton_sweep.WIDEST} columns on a GPU, "
            f"received blocksize {blocksize} on {device}; use kernel 'torch'"
        )
    return triton_sweep.sweep_block
