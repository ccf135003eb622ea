"""The three methods as classes over a model, with the published code's argument names."""

from typing import Any, ClassVar

from transformers import PreTrainedModel

from sparselab.pruning import Report, prune
from sparselab.solvers import Pattern, pattern_from_counts


class _Pruner:
    """Holds a model; `prune` changes it in place and returns it.

    Args:
        model: a `transformers` causal language model.
    """

    method: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.report: Report | None = None

    def prune(
        self,
        calib_data: Any = None,
        sparsity: float | str | Pattern = 0.5,
        prunen: int = 0,
        prunem: int = 0,
        percdamp: float = 0.01,
        use_zero: bool = False,
        **settings: Any,
    ) -> PreTrainedModel:
        """Prune the model in place and return it, ready for `save_pretrained`; the report is kept in `self.report`.

        Args:
            calib_data: see `sparselab.prune`; magnitude can do without.
            sparsity: 0.5, "50%", "2:4" or a pattern, where `prunen` and `prunem` are 0.
            prunen: weights *pruned* of every `prunem`, as in the published code (2 of 4 is "2:4", 3 of 4 is "1:4").
            prunem: size of a group; 0 is unstructured.
            percdamp: of SparseGPT.
            use_zero: the model is partitioned by DeepSpeed ZeRO-3.
            settings: further arguments of `sparselab.prune`.

        Raises:
            ValueError, TypeError, SparselabError: see `sparselab.prune`.
        """
        pattern = pattern_from_counts(sparsity, prunen, prunem)
        self.report = prune(self.model, calib_data, self.method, pattern, percdamp, use_zero=use_zero, **settings)
        return self.model


class SparseGPT(_Pruner):
    """Prune by second-order scores, compensating in the weights that stay (Frantar & Alistarh 2023)."""

    method = "sparsegpt"


class Wanda(_Pruner):
    """Prune by weight times input norm, row by row (Sun et al. 2023)."""

    method = "wanda"


class Magnitude(_Pruner):
    """Prune the smallest weights of each layer."""

    method = "magnitude"
