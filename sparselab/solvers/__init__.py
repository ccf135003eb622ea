"""The mathematics of pruning on plain tensors: nothing here knows about models, files or devices."""

from sparselab.solvers.admm import AdmmSystem, admm, admm_iterations, admm_system
from sparselab.solvers.checks import check_blocksize, check_percdamp, check_weight, check_whole
from sparselab.solvers.enumeration import best_mask
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
from sparselab.solvers.quantisation import Grid, check_wbits, row_grids
from sparselab.solvers.reconstruction import Gap, Refined, optimality_gap, reconstruct, refine
from sparselab.solvers.ria import ria
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
    "AdmmSystem",
    "NM",
    "Factor",
    "Gap",
    "Grid",
    "InputStatistics",
    "Kernel",
    "Pattern",
    "Refined",
    "Step",
    "Unstructured",
    "admm",
    "admm_iterations",
    "admm_system",
    "best_mask",
    "block_sweeper",
    "check_blocksize",
    "check_percdamp",
    "check_wbits",
    "check_weight",
    "check_whole",
    "damped",
    "dead_columns",
    "factorise",
    "keep_largest",
    "layer_error",
    "least_flop",
    "magnitude",
    "optimality_gap",
    "parse_sparsity",
    "pattern_from_counts",
    "realised_sparsity",
    "reconstruct",
    "refine",
    "relative_error",
    "ria",
    "row_grids",
    "sparsegpt",
    "sparsegpt_textbook",
    "sweep",
    "sweep_together",
    "textbook_steps",
    "wanda",
]
