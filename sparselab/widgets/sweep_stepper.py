"""SparseGPT's column sweep, step by step, on a slice of a real layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from ipywidgets import Button, Dropdown, IntSlider, Layout
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from sparselab import solvers
from sparselab.figures.sweep import Frame, sweep_step
from sparselab.models.blocks import Decoder, read_weight
from sparselab.solvers import InputStatistics, Step
from sparselab.widgets.panel import Panel, View, row

SPARSITIES = ("50%", "70%", "2:4", "1:4", "4:8")
PERCDAMPS = (0.0, 0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Slice:
    """A few weights of a layer, and what its inputs say about them.

    With all other weights left alone, a change Δ of these costs tr(ΔHΔᵀ) with H the principal submatrix of XᵀX.

    Args:
        weight: rows × inputs of the layer's weight, float64.
        hessian: the same inputs' rows and columns of XᵀX, not damped, float64.
        caption: where it comes from: model, layer, tokens, seed.
    """

    weight: Float[Tensor, "d_out d_in"]
    hessian: Float[Tensor, "d_in d_in"]
    caption: str


def slice_of(
    model: PreTrainedModel,
    statistics: dict[str, InputStatistics],
    layer: str,
    rows: Sequence[int],
    inputs: Sequence[int],
    source: str,
) -> Slice:
    """The given rows and inputs of one layer of a model.

    Args:
        model: left as it is.
        statistics: from `sparselab.collect` on this model.
        layer: full name, or the end of one with wildcards, such as "2.self_attn.o*_proj".
        rows, inputs: which outputs and inputs of the layer.
        source: model, tokens and seed, for captions.

    Raises:
        ValueError: no layer or more than one has such a name.
    """
    decoder = Decoder(model)
    decoder.check_whole()
    linears = decoder.linears()
    names = [name for name in linears if fnmatch(f".{name}", f"*.{layer}")]
    if len(names) != 1:
        raise ValueError(f"layer: expected the end of one name among {', '.join(linears)}, received {layer!r}")
    weight = read_weight(linears[names[0]]).detach().double()[list(rows)][:, list(inputs)]
    hessian = statistics[names[0]].hessian.double()[list(inputs)][:, list(inputs)]
    where = f"rows {rows[0]}–{rows[-1]} × inputs {inputs[0]}–{inputs[-1]} of {names[0]}"
    return Slice(weight.cpu(), hessian.cpu(), f"{source}; {where}")


@dataclass(frozen=True)
class State:
    """What the controls say.

    Args:
        step: columns done before the one shown; 0 is the first.
        sparsity, percdamp: see `solvers.sparsegpt`.
    """

    step: int = 0
    sparsity: str = "50%"
    percdamp: float = 0.01


@dataclass(frozen=True)
class Trace:
    """A whole sweep over a slice.

    Args:
        layer: what was swept.
        steps: one a column.
        sparsity, percdamp: what was asked for.
    """

    layer: Slice
    steps: tuple[Step, ...]
    sparsity: str
    percdamp: float

    @property
    def hessian(self) -> Float[Tensor, "d_in d_in"]:
        """H + λI."""
        return solvers.damped(self.layer.hessian, self.percdamp)

    @property
    def caption(self) -> str:
        """What every figure of this sweep has to state."""
        realised = 100 * solvers.realised_sparsity(self.steps[-1].weight)
        return f"{self.layer.caption}; {self.sparsity} (realised {realised:.2f}%), percdamp {self.percdamp:g}"

    @cached_property
    def frames(self) -> list[Frame]:
        """The steps as figures want them."""
        return [_frame(step) for step in self.steps]

    @cached_property
    def errors(self) -> pd.DataFrame:
        """After each column, the relative error under H + λI: of the sweep, and of the best weights with its zeros."""
        W, H = self.layer.weight, self.hessian
        rows = []
        for step in self.steps:
            keep = step.keep.clone()
            keep[:, step.column + 1 :] = True
            best = solvers.reconstruct(W, H, keep)
            both = [solvers.relative_error(W, weight, H) for weight in (step.weight, best)]
            rows.append((step.column, *both))
        return pd.DataFrame(rows, columns=["column", "sweep", "optimum"])


def trace_sweep(layer: Slice, sparsity: str, percdamp: float, blocksize: int = 8) -> Trace:
    """Sweep a slice and keep every step.

    Args:
        layer: from `slice_of`.
        sparsity, percdamp, blocksize: see `solvers.sparsegpt`; a small blocksize shows more than one competition.

    Raises:
        ValueError, SparselabError: see `solvers.sparsegpt`.
    """
    solvers.factorise(layer.hessian, percdamp)  # says what is wrong, and how to mend it, before an inverse is taken
    steps = solvers.textbook_steps(layer.weight, layer.hessian, sparsity, percdamp, blocksize)
    return Trace(layer, tuple(steps), sparsity, percdamp)


def view(trace: Trace, state: State) -> View:
    """One step of the sweep: picture, numbers row by row, and a sentence.

    Raises:
        ValueError: the sweep has no such step.
    """
    if not 0 <= state.step < len(trace.steps):
        raise ValueError(f"step: expected 0 to {len(trace.steps) - 1}, received {state.step}")
    step, error = trace.steps[state.step], trace.errors.iloc[state.step]
    gone = int((~step.keep[:, step.column]).sum())
    summary = (
        f"Column {step.column} of {len(trace.steps)}: {gone} of {len(step.weight)} weights pruned; error so far "
        f"{error.sweep:.2%} of the dense output energy, {error.optimum:.2%} at best with this mask."
    )
    return View(_figure(trace, state), _numbers(trace, step), summary)


def _figure(trace: Trace, state: State) -> Figure:
    return sweep_step(trace.frames, state.step, trace.errors, trace.caption)


def _numbers(trace: Trace, step: Step) -> pd.DataFrame:
    pruned = ~step.keep[:, step.column]
    return pd.DataFrame(
        {
            "row": range(len(step.weight)),
            "weight before": [f"{value:.4f}" for value in _before(trace, step).tolist()],
            "score": [f"{value:.3g}" for value in step.scores[:, step.column - step.start].tolist()],
            "pruned": ["×" if gone else "" for gone in pruned.tolist()],
            "error²": [f"{value:.3g}" if value else "" for value in step.errors.square().tolist()],
            "moved to the right": [f"{value:.4f}" if value else "" for value in _moved(step)],
        }
    )


def _before(trace: Trace, step: Step) -> Float[Tensor, " d_out"]:
    before = trace.steps[step.column - 1].weight if step.column else trace.layer.weight
    return before[:, step.column]


def _moved(step: Step) -> list[float]:
    """Sum of the absolute changes of each row."""
    moved: list[float] = step.compensation.abs().sum(dim=1).tolist()
    return moved


def _frame(step: Step) -> Frame:
    arrays = {name: getattr(step, name).numpy() for name in ("weight", "scores", "compensation")}
    done = np.arange(step.weight.shape[1]) <= step.column
    lost = ~step.keep.numpy()
    return Frame(step.column, step.start, pruned=lost & done, marked=lost & ~done, **arrays)


class SweepStepper(Panel):
    """Steps SparseGPT's sweep over a slice forward and back; the slider also takes the arrow keys.

    Args:
        layer: from `slice_of`.
        state: what to show first.
        blocksize: columns whose weights compete, for unstructured sparsity.
    """

    def __init__(self, layer: Slice, state: State | None = None, blocksize: int = 8) -> None:
        state = state or State()
        self._layer, self._blocksize = layer, blocksize
        self._traces: dict[tuple[str, float], Trace] = {}
        self.step = IntSlider(state.step, 0, layer.weight.shape[1] - 1, description="column", continuous_update=False)
        self.back = Button(description="◀ back", tooltip="one column back", layout=Layout(width="6em"))
        self.forward = Button(description="forward ▶", tooltip="one column on", layout=Layout(width="7em"))
        self.sparsity = _choice("sparsity", SPARSITIES, state.sparsity)
        self.percdamp = _choice("percdamp", PERCDAMPS, state.percdamp)
        rows = [row(self.back, self.step, self.forward), row(self.sparsity, self.percdamp)]
        super().__init__(rows, lambda: view(self.trace, self.state))
        self.back.on_click(lambda _: self._go(-1))
        self.forward.on_click(lambda _: self._go(1))
        for control in (self.step, self.sparsity, self.percdamp):
            control.observe(self.refresh, "value")
        self.refresh()

    @property
    def state(self) -> State:
        """What the controls say now."""
        return State(self.step.value, self.sparsity.value, self.percdamp.value)

    @property
    def trace(self) -> Trace:
        """The sweep of the controls' sparsity and percdamp, computed once."""
        asked = self.sparsity.value, self.percdamp.value
        if asked not in self._traces:
            self._traces[asked] = trace_sweep(self._layer, *asked, self._blocksize)
        return self._traces[asked]

    def _go(self, columns: int) -> None:
        self.step.value = min(max(self.step.value + columns, self.step.min), self.step.max)


def _choice(name: str, values: Sequence[Any], chosen: Any) -> Dropdown:
    """A list of values that has the chosen one among them, in words of their own."""
    known = list(values) if chosen in values else [*values, chosen]
    options = [(f"{value:g}" if isinstance(value, float) else str(value), value) for value in known]
    return Dropdown(options=options, value=chosen, description=name)
