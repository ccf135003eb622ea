"""The layer lab: one layer, every choice under a slider, what it does seen at once."""

from dataclasses import dataclass, replace

import pandas as pd
from ipywidgets import Dropdown, FloatLogSlider, FloatSlider, SelectionSlider, ToggleButtons

from sparselab.analysis import Answer, LayerStudy, Question, effective_boundary, mask_agreement
from sparselab.comparison import caption
from sparselab.figures.layer import LayerPicture, layer_lab
from sparselab.methods import METHODS, PUBLISHED
from sparselab.solvers import realised_sparsity
from sparselab.widgets.panel import Panel, View, row

_PATTERNS = ("fraction", "2:4", "4:8", "1:4")


@dataclass(frozen=True)
class State:
    """Where the controls stand.

    Args:
        block, projection: which layer; the projection is its name inside the block.
        method: whose mask is shown; the others are solved for comparison.
        sparsity: "50%" or "2:4".
        percdamp: damping of SparseGPT.
        nsamples: calibration windows.
    """

    block: int
    projection: str
    method: str = "sparsegpt"
    sparsity: str = "50%"
    percdamp: float = 0.01
    nsamples: int = 128


def view(study: LayerStudy, state: State) -> View:
    """What the lab shows of a state.

    Args:
        study: the layers and their inputs.
        state: the controls.

    Raises:
        ValueError, SparselabError: see `LayerStudy.ask`.
    """
    layer = next(
        (name for name in study.layers if name.endswith(f".{state.block}.{state.projection}")), state.projection
    )
    question = Question(layer, state.method, state.sparsity, state.percdamp, state.nsamples)
    answers = {
        method: study.ask(replace(question, method=method)) for method in dict.fromkeys([*PUBLISHED, question.method])
    }
    numbers = _numbers(answers)
    shown = answers[state.method]
    summary = (
        f"{layer.split('.', 1)[-1]}, {state.method} at {state.sparsity}: relative error "
        f"{shown.calibration_error:.4f} on calibration tokens, {shown.heldout_error:.4f} on held-out ones"
    )
    about = caption(study.name, study.text, state.nsamples, (study.seed,))
    realised = (
        f"{layer}, {state.sparsity} (realised {realised_sparsity(shown.pruned):.2%}), percdamp {state.percdamp:g}"
    )
    return View(layer_lab(_picture(study, question, answers), f"{realised}; {about}"), numbers, summary)


def _numbers(answers: dict[str, Answer]) -> pd.DataFrame:
    kept = answers["sparsegpt"].keep
    rows = [
        {
            "method": method,
            "realised sparsity": f"{realised_sparsity(answer.pruned):.2%}",
            "error, calibration": f"{answer.calibration_error:.5f}",
            "error, held-out": f"{answer.heldout_error:.5f}",
            "mask agreement with SparseGPT": f"{mask_agreement(answer.keep, kept):.3f}",
        }
        for method, answer in answers.items()
    ]
    return pd.DataFrame(rows)


def _picture(study: LayerStudy, question: Question, answers: dict[str, Answer]) -> LayerPicture:
    seen = study.statistics(question.layer, question.nsamples)
    shown = answers[question.method]
    errors = {method: (answer.calibration_error, answer.heldout_error) for method, answer in answers.items()}
    agreement = [[mask_agreement(a.keep, b.keep) for a in answers.values()] for b in answers.values()]
    return LayerPicture(
        method=question.method,
        keep=shown.keep.cpu().numpy(),
        magnitude=shown.weight.abs().float().cpu().numpy(),
        feature_norm=seen.feature_norm.cpu().numpy(),
        boundaries={name: effective_boundary(a.weight, a.keep).cpu().numpy() for name, a in answers.items()},
        errors=pd.DataFrame.from_dict(errors, orient="index", columns=["calibration", "held-out"]),
        error_by_output={name: a.heldout_by_output.cpu().numpy() for name, a in answers.items()},
        eigenvalues=study.spectrum(question.layer, question.nsamples).cpu().numpy(),
        damping=question.percdamp * float(seen.hessian.diagonal().mean()),
        agreement=pd.DataFrame(agreement, index=list(answers), columns=list(answers)),
    )


class LayerLab(Panel):
    """Choose a layer, a method and its settings; see its error, its mask and its Hessian.

    Args:
        study: the layers and their inputs.
        start: where the controls stand first; None is the first layer of the study.
    """

    def __init__(self, study: LayerStudy, start: State | None = None) -> None:
        parts = [name.split(".") for name in study.layers]
        digit = next(index for index, part in enumerate(parts[0]) if part.isdigit())
        blocks = sorted({int(part[digit]) for part in parts})
        projections = list(dict.fromkeys(".".join(part[digit + 1 :]) for part in parts))
        start = start or State(blocks[0], projections[0], nsamples=study.sizes[-1])
        grouped = ":" in start.sparsity
        self.study = study
        self.block = SelectionSlider(options=blocks, value=start.block, description="block", continuous_update=False)
        self.projection = Dropdown(options=projections, value=start.projection, description="projection")
        self.method = ToggleButtons(options=list(METHODS), value=start.method, description="method")
        self.pattern = ToggleButtons(
            options=_PATTERNS, value=start.sparsity if grouped else "fraction", description="pattern"
        )
        self.sparsity = FloatSlider(
            value=0.5 if grouped else float(start.sparsity.rstrip("%")) / 100, min=0, max=0.95, step=0.05,
            description="sparsity", readout_format=".0%", continuous_update=False, disabled=grouped,
        )  # fmt: skip
        self.percdamp = FloatLogSlider(
            value=start.percdamp, base=10, min=-6, max=1, step=0.5, description="percdamp", readout_format=".1e",
            continuous_update=False,
        )  # fmt: skip
        self.nsamples = SelectionSlider(
            options=study.sizes, value=start.nsamples, description="windows", continuous_update=False
        )
        rows = [row(self.block, self.projection, self.nsamples), row(self.method), row(self.pattern)]
        super().__init__([*rows, row(self.sparsity, self.percdamp)], lambda: view(study, self.state))
        self.pattern.observe(self._enable, "value")
        for control in (
            self.block,
            self.projection,
            self.method,
            self.pattern,
            self.sparsity,
            self.percdamp,
            self.nsamples,
        ):
            control.observe(self.refresh, "value")
        self.refresh()

    @property
    def state(self) -> State:
        """The controls as they stand."""
        pattern = f"{100 * self.sparsity.value:g}%" if self.pattern.value == "fraction" else self.pattern.value
        return State(
            self.block.value,
            self.projection.value,
            self.method.value,
            pattern,
            self.percdamp.value,
            self.nsamples.value,
        )

    def _enable(self, *_: object) -> None:
        self.sparsity.disabled = self.pattern.value != "fraction"
