"""The mathematics of pruning on plain tensors: nothing here knows about models, files or devices."""

from sparselab.solvers.checks import check_blocksize, check_percdamp, check_weight
from sparselab.solvers.hessian import (
    Factor,
    InputStatistics,
    damped,
    dead_columns,
    factorise,
    layer_error,
    relative_error,
)
from sparselab.solvers.kernels import Kernel, block_sweeper
from sparselab.solvers.magnitude import magnitude
from sparselab.solvers.reconstruction import Refined, reconstruct, refine
from sparselab.solvers.sparsegpt import least_flop, sparsegpt, sweep, sweep_together
from sparselab.solvers.sparsity import (
    NM,
    Pattern,
    Unstructured,
    keep_largest,
    parse_sparsity,
    pattern_from_counts,
    realised_sparsity,
)
from sparselab.solvers.textbook import Step, sparsegpt_textbook, textbook_steps
from sparselab.solvers.wanda import wanda

__all__ = [
    "NM",
    "Factor",
    "InputStatistics",
    "Kernel",
    "Pattern",
    "Refined",
    "Step",
    "Unstructured",
    "check_blocksize",
    "block_sweeper",
    "check_percdamp",
    "check_weight",
    "damped",
    "dead_columns",
    "factorise",
    "keep_largest",
    "layer_error",
    "least_flop",
    "magnitude",
    "parse_sparsity",
    "pattern_from_counts",
    "realised_sparsity",
    "reconstruct",
    "refine",
    "relative_error",
    "sparsegpt",
    "sparsegpt_textbook",
    "sweep",
    "sweep_together",
    "textbook_steps",
    "wanda",
]
