"""Tables to figures. Pure functions: a table goes in, a matplotlib Figure comes out, nothing is drawn elsewhere."""

from sparselab.figures.methods import layer_errors, sparsity_perplexity
from sparselab.figures.style import png

__all__ = ["layer_errors", "png", "sparsity_perplexity"]
