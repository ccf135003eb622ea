"""Widgets for notebooks: thin shells over pure views; the mathematics and the drawing are elsewhere.

Each is a panel of controls over a function `view(…, state) -> View` that can be called and tested without a browser.
"""

from sparselab.widgets.panel import Panel, View

__all__ = ["Panel", "View"]
