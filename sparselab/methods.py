"""The pruning methods by name: what each needs to know of a layer's inputs, and its solver.

A method chooses a mask and gives the weights under it; an update gives other weights under the same mask. "wanda+cg" is
Wanda's mask with its weights fitted by conjugate gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from sparselab import solvers
from sparselab.allocation import Allocation
from sparselab.solvers import InputStatistics, Pattern

Weights = Sequence[Float[Tensor, "_ d_in"]]
Masks = Sequence[Bool[Tensor, "_ d_in"]]
Needs = Literal["nothing", "feature norms", "hessian"]
Flop = Callable[[int, int], float]
Solve = Callable[[Weights, InputStatistics, Pattern, "Settings"], Iterable[Float[Tensor, "_ d_in"]]]

_CG_STEPS, _ADMM_ITERATIONS = 20, 20


@dataclass(frozen=True)
class Settings:
    """What is done to each layer.

    Args:
        method: a key of `METHODS`, or one with an update of `UPDATES` after a plus sign: "ria+cg".
        pattern: which fraction goes, or N:M; or an allocation, which says so for each layer.
        percdamp: damping, as a fraction of the mean diagonal; of SparseGPT, ADMM and the updates.
        blocksize: of SparseGPT's sweep; see `solvers.sparsegpt`.
        propagate: "pruned": each block is calibrated on what the pruned blocks before it send on (as in the paper);
            "dense": on what the dense ones would send.
        measure_error: report each layer's error also where the method itself could do without a Hessian.
        kernel: of SparseGPT; see `solvers.sweep`.
        wbits: also round the weights that stay to so many bits, in SparseGPT's sweep; None leaves them as they are.
        true_sequential: within a block too, calibrate each layer on what the pruned layers before it send on; a pass
            of the block for each group of layers that see the same inputs.
        measure_gap: report too how far each layer's weights are from the best under their mask; see
            `solvers.optimality_gap`. It can take longer than the run.
        retries: times that percdamp may be raised tenfold where a Hessian is not positive definite. Each is a warning
            and is counted in the report.
    """

    method: str = "sparsegpt"
    pattern: Pattern | Allocation = field(default_factory=lambda: solvers.Unstructured(0.5))
    percdamp: float = 0.01
    blocksize: int = 128
    propagate: Literal["pruned", "dense"] = "pruned"
    measure_error: bool = True
    kernel: solvers.Kernel = "auto"
    wbits: int | None = None
    true_sequential: bool = False
    retries: int = 0
    measure_gap: bool = False

    def __post_init__(self) -> None:
        method = find(self.method)
        if self.propagate not in ("pruned", "dense"):
            raise ValueError(f"propagate: expected 'pruned' or 'dense', received {self.propagate!r}")
        if self.true_sequential and self.propagate == "dense":
            raise ValueError("true_sequential: expected propagate 'pruned', as dense inputs are the same in any order")
        if self.measure_gap and not self.measure_error:
            raise ValueError("measure_gap: expected measure_error too, which needs the same statistics")
        if self.kernel not in get_args(solvers.Kernel):
            raise ValueError(f"kernel: expected one of {', '.join(get_args(solvers.Kernel))}, received {self.kernel!r}")
        solvers.check_percdamp(self.percdamp)
        solvers.check_blocksize(self.blocksize)
        solvers.check_whole("retries", self.retries, 0)
        if self.wbits is not None:
            solvers.check_wbits(self.wbits)
            if not method.rounds:
                raise ValueError(
                    f"wbits: expected sparsegpt or an update by its sweep, which round while they prune; "
                    f"received method {self.method!r}"
                )

    def pattern_at(self, index: int, name: str) -> Pattern | None:
        """What is pruned of one layer; None leaves it as it is.

        Args:
            index: of the block.
            name: of the layer in it.
        """
        return self.pattern.at(index, name) if isinstance(self.pattern, Allocation) else self.pattern


class Method(NamedTuple):
    """A pruning method: its solver, and what it has to know of a layer's inputs.

    Args:
        solve: (weights [d_out, d_in] of layers that see the same inputs, statistics of these, what to prune of each,
            all other settings) to as many new weights.
        needs: the least that has to be collected.
        flop: of a solve, given d_out and d_in, to tell how long a run will take.
        sweeps: columns are dealt with in blocks, by SparseGPT's sweep.
        rounds: its weights come from that sweep, which can round them to fewer bits.
    """

    solve: Solve
    needs: Needs
    flop: Flop = lambda _d_out, _d_in: 0.0
    sweeps: bool = False
    rounds: bool = False


class Update(NamedTuple):
    """Other weights under a mask that a method has chosen.

    Args:
        fit: (dense weights, masks, the method's weights, statistics of the inputs, settings) to as many new weights.
        needs, flop: see `Method`.
    """

    fit: Callable[[Weights, Masks, Weights, InputStatistics, "Settings"], Iterable[Tensor]]
    needs: Needs
    flop: Flop


METHODS: dict[str, Method] = {}
PUBLISHED = ("magnitude", "wanda", "sparsegpt")  # those that every paper compares
UPDATES: dict[str, Update] = {}


def register(
    name: str, needs: Needs = "hessian", flop: Flop = lambda _d_out, _d_in: 0.0, sweeps: bool = False
) -> Callable[[Solve], Solve]:
    """A decorator that makes a solver a method, under a name that all commands and functions then know.

    Args:
        name: what it will be called, without a plus sign.
        needs, flop, sweeps: see `Method`.

    Raises:
        ValueError: the name is taken, or has a plus sign.
    """
    if name in METHODS or "+" in name or not name:
        raise ValueError(f"name: expected a new name without '+', received {name!r}")

    def keep(solve: Solve) -> Solve:
        METHODS[name] = Method(solve, needs, flop, sweeps, rounds=sweeps)
        return solve

    return keep


def find(name: str) -> Method:
    """The method of a name, or of two: METHOD+UPDATE chooses its mask by the one and its weights by the other.

    Raises:
        ValueError: there is no such method or update.
    """
    base, plus, update = name.partition("+")
    if base not in METHODS or (plus and update not in UPDATES):
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, or one with an update "
            f"({', '.join(f'+{each}' for each in UPDATES)}), received {name!r}"
        )
    return _updated(base, update) if plus else METHODS[base]


def _updated(base: str, name: str) -> Method:
    method, update = METHODS[base], UPDATES[name]

    def solve(weights: Weights, seen: InputStatistics, pattern: Pattern, to: Settings) -> Iterable[Tensor]:
        pruned = list(method.solve(weights, seen, pattern, replace(to, wbits=None, method=base)))
        if pattern.fraction == 0 and to.wbits is None:
            return pruned  # sparsity 0 changes nothing, not even by rounding
        return update.fit(weights, [each != 0 for each in pruned], pruned, seen, to)

    return Method(
        solve,
        max(method.needs, update.needs, key=get_args(Needs).index),
        lambda *shape: method.flop(*shape) + update.flop(*shape),
        method.sweeps or name == "sweep",
        name == "sweep",
    )


@register("magnitude", "nothing")
def _magnitude(weights: Weights, _: InputStatistics, pattern: Pattern, *__: Settings) -> Iterable[Tensor]:
    return [solvers.magnitude(weight, pattern) for weight in weights]


@register("wanda", "feature norms")
def _wanda(weights: Weights, seen: InputStatistics, pattern: Pattern, *_: Settings) -> Iterable[Tensor]:
    return [solvers.wanda(weight, seen.feature_norm, pattern) for weight in weights]


@register("ria", "feature norms")
def _ria(weights: Weights, seen: InputStatistics, pattern: Pattern, *_: Settings) -> Iterable[Tensor]:
    return [solvers.ria(weight, seen.feature_norm, pattern) for weight in weights]


@register("sparsegpt", flop=solvers.least_flop, sweeps=True)
def _sparsegpt(weights: Weights, seen: InputStatistics, pattern: Pattern, to: Settings) -> Iterable[Tensor]:
    factor = seen.factor(to.percdamp)
    return solvers.sweep_together(weights, factor, pattern, to.blocksize, kernel=to.kernel, wbits=to.wbits)


@register("admm", flop=lambda d_out, d_in: d_in**3 + 2 * (_ADMM_ITERATIONS + 1) * d_out * d_in**2)
def _admm(weights: Weights, seen: InputStatistics, pattern: Pattern, to: Settings) -> Iterable[Tensor]:
    system = solvers.admm_system(seen.hessian, to.percdamp)
    return (solvers.admm_iterations(weight, system, pattern, _ADMM_ITERATIONS) for weight in weights)


def _none(weights: Weights, keep: Masks, *_: object) -> Iterable[Tensor]:
    return [weight.masked_fill(~mask, 0) for weight, mask in zip(weights, keep, strict=True)]


def _sweep(weights: Weights, keep: Masks, _: Weights, seen: InputStatistics, to: Settings) -> Iterable[Tensor]:
    factor = seen.factor(to.percdamp)
    return solvers.sweep_together(weights, factor, 0.0, to.blocksize, keep, to.kernel, to.wbits)


def _cg(weights: Weights, keep: Masks, pruned: Weights, seen: InputStatistics, to: Settings) -> Iterable[Tensor]:
    hessian = solvers.damped(seen.hessian, to.percdamp)
    each = zip(weights, keep, pruned, strict=True)
    return (solvers.refine(weight, hessian, mask, start, _CG_STEPS).weight for weight, mask, start in each)


def _exact(weights: Weights, keep: Masks, _: Weights, seen: InputStatistics, to: Settings) -> Iterable[Tensor]:
    hessian = solvers.damped(seen.hessian, to.percdamp)
    return (solvers.reconstruct(weight, hessian, mask) for weight, mask in zip(weights, keep, strict=True))


UPDATES |= {
    "none": Update(_none, "nothing", lambda _d_out, _d_in: 0.0),
    "sweep": Update(_sweep, "hessian", solvers.least_flop),
    "cg": Update(_cg, "hessian", lambda d_out, d_in: 2.0 * (_CG_STEPS + 2) * d_out * d_in**2),
    "exact": Update(_exact, "hessian", lambda d_out, d_in: d_out * d_in**3 / 3),
}
