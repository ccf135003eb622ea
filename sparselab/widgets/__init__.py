"""Widgets for notebooks: thin shells over pure views; the mathematics and the drawing are elsewhere.

Each is a panel of controls over a function `view(…) -> View` that can be called and tested without a browser.
"""

from sparselab.widgets.curve_lab import CurveLab
from sparselab.widgets.layer_lab import LayerLab
from sparselab.widgets.panel import Panel, View
from sparselab.widgets.sweep_form import SweepForm
from sparselab.widgets.sweep_stepper import SweepStepper

__all__ = ["CurveLab", "LayerLab", "Panel", "SweepForm", "SweepStepper", "View"]
