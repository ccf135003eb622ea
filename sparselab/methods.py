"""The pruning methods by name: what each needs to know of a layer's inputs, and its solver."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from sparselab import solvers
from sparselab.solvers import InputStatistics, Pattern


@dataclass(frozen=True)
class Settings:
    """What is done to each layer.

    Args:
        method: a key of `METHODS`.
        pattern: which fraction goes, or N:M.
        percdamp, blocksize: of SparseGPT; see `solvers.sparsegpt`.
        propagate: "pruned": each block is calibrated on what the pruned blocks before it send on (as in the paper);
            "dense": on what the dense ones would send.
        measure_error: report each layer's error also where the method itself could do without a Hessian.
        kernel: of SparseGPT; see `solvers.sweep`.
    """

    method: str = "sparsegpt"
    pattern: Pattern = field(default_factory=lambda: solvers.Unstructured(0.5))
    percdamp: float = 0.01
    blocksize: int = 128
    propagate: Literal["pruned", "dense"] = "pruned"
    measure_error: bool = True
    kernel: solvers.Kernel = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, received {self.method!r}")
        if self.propagate not in ("pruned", "dense"):
            raise ValueError(f"propagate: expected 'pruned' or 'dense', received {self.propagate!r}")
        if self.kernel not in get_args(solvers.Kernel):
            raise ValueError(f"kernel: expected one of {', '.join(get_args(solvers.Kernel))}, received {self.kernel!r}")
        solvers.check_percdamp(self.percdamp)
        solvers.check_blocksize(self.blocksize)


class Method(NamedTuple):
    """A pruning method: its solver, and what it has to know of a layer's inputs.

    Args:
        solve: (weights [d_out, d_in] of layers that see the same inputs, statistics of these, settings) to as many new
            weights.
        needs: the least that has to be collected.
    """

    solve: Callable[[Sequence[Float[Tensor, "_ d_in"]], InputStatistics, Settings], Iterable[Float[Tensor, "_ d_in"]]]
    needs: Literal["nothing", "feature norms", "hessian"]


METHODS: dict[str, Method] = {
    "magnitude": Method(
        lambda weights, _, to: [solvers.magnitude(weight, to.pattern) for weight in weights], "nothing"
    ),
    "wanda": Method(
        lambda weights, seen, to: [solvers.wanda(weight, seen.feature_norm, to.pattern) for weight in weights],
        "feature norms",
    ),
    "sparsegpt": Method(
        lambda weights, seen, to: solvers.sweep_together(
            weights, seen.factor(to.percdamp), to.pattern, to.blocksize, kernel=to.kernel
        ),
        "hessian",
    ),
}
