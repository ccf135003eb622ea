"""One-shot pruning of language models: magnitude, Wanda and SparseGPT, with results one can trust.

Nothing heavy is imported before it is used: `import sparselab` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparselab import solvers
    from sparselab.calibration import collect
    from sparselab.comparison import compare
    from sparselab.corpora import calibration_tokens, evaluation_tokens
    from sparselab.evaluation import Perplexity, bits_per_byte, perplexity
    from sparselab.gradual import prune_gradually
    from sparselab.inheritance import block_errors
    from sparselab.inspection import Inspection, inspect_checkpoint
    from sparselab.models import load, stream
    from sparselab.outliers import owl
    from sparselab.pruners import Magnitude, SparseGPT, Wanda
    from sparselab.pruning import Report, prune
    from sparselab.quality import layer_quality
    from sparselab.recovery import recover
    from sparselab.reproduction import papers_table
    from sparselab.samples import completions
    from sparselab.saved import check_saved
    from sparselab.streaming import prune_checkpoint
    from sparselab.sweeps import sweep
    from sparselab.tasks import evaluate_tasks
    from sparselab.training import train
    from sparselab.uncertainty import difference

__version__ = "0.1.0"

_HOME = {
    "Inspection": "inspection",
    "Magnitude": "pruners",
    "Perplexity": "evaluation",
    "Report": "pruning",
    "SparseGPT": "pruners",
    "Wanda": "pruners",
    "bits_per_byte": "evaluation",
    "block_errors": "inheritance",
    "calibration_tokens": "corpora",
    "check_saved": "saved",
    "collect": "calibration",
    "compare": "comparison",
    "completions": "samples",
    "difference": "uncertainty",
    "evaluate_tasks": "tasks",
    "evaluation_tokens": "corpora",
    "inspect_checkpoint": "inspection",
    "layer_quality": "quality",
    "load": "models",
    "owl": "outliers",
    "papers_table": "reproduction",
    "perplexity": "evaluation",
    "prune": "pruning",
    "prune_checkpoint": "streaming",
    "prune_gradually": "gradual",
    "recover": "recovery",
    "stream": "models",
    "sweep": "sweeps",
    "train": "training",
}

__all__ = [
    "Inspection",
    "Magnitude",
    "Perplexity",
    "Report",
    "SparseGPT",
    "Wanda",
    "bits_per_byte",
    "block_errors",
    "calibration_tokens",
    "check_saved",
    "collect",
    "compare",
    "completions",
    "difference",
    "evaluate_tasks",
    "evaluation_tokens",
    "inspect_checkpoint",
    "layer_quality",
    "load",
    "owl",
    "papers_table",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "prune_gradually",
    "recover",
    "solvers",
    "stream",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "solvers":
        return import_module("sparselab.solvers")
    if name not in _HOME:
        raise AttributeError(f"module 'sparselab' has no attribute {name!r}")
    value = getattr(import_module(f"sparselab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
