"""One layer under the lens: which weights went, how far the outputs are off, and on which tokens."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab import corpora
from sparselab.calibration import collect, collect_nested
from sparselab.errors import SingularHessianError
from sparselab.experiment import TextConfig
from sparselab.methods import METHODS, UPDATES, Settings, find
from sparselab.models.blocks import Decoder, read_weight
from sparselab.progress import Progress
from sparselab.solvers import InputStatistics, layer_error, parse_sparsity
from sparselab.solvers.hessian import full_precision


def mask_agreement(first: Bool[Tensor, "d_out d_in"], second: Bool[Tensor, "d_out d_in"]) -> float:
    """Intersection over union of the weights that two masks keep: 1 if they are the same, 0 if they share none.

    Two masks that keep nothing agree. At random, masks of sparsity s agree to (1−s)/(1+s).

    Args:
        first, second: True where a weight survives.
    """
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


@full_precision()
def error_by_output(
    weight: Float[Tensor, "d_out d_in"], pruned: Float[Tensor, "d_out d_in"], hessian: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, " d_out"]:
    """Each output's part of the layer error: (ΔHΔᵀ)_ii with Δ = W − Ŵ; the parts sum to `solvers.layer_error`.

    Args:
        weight, pruned: the dense weight W and the pruned one Ŵ.
        hessian: undamped XᵀX over the tokens in question.
    """
    delta = weight.to(hessian.dtype) - pruned.to(hessian.dtype)
    parts: Tensor = ((delta @ hessian) * delta).sum(dim=1)
    return parts


def effective_boundary(weight: Float[Tensor, "d_out d_in"], keep: Bool[Tensor, "d_out d_in"]) -> Float[Tensor, " d_in"]:
    """For each input, the magnitude below which as many of its weights lie as were pruned.

    Had the method pruned each input's weights by magnitude, it would have cut here; so the boundary shows what a
    method makes of an input, in one unit for all methods: flat for magnitude, falling with the feature norm for Wanda.
    Zero where nothing was pruned.

    Args:
        weight: the dense weight.
        keep: True where a weight survived.
    """
    ordered = weight.abs().float().sort(dim=0).values
    pruned = (~keep).sum(dim=0)
    last = ordered.gather(0, (pruned - 1).clamp(min=0)[None])[0]
    return torch.where(pruned > 0, last, 0.0)


def spectrum(hessian: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of a Hessian from the largest down, in float64; tiny negative ones are rounding, and are zero."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(hessian.double())
    return eigenvalues.flip(0).clamp(min=0)


@dataclass(frozen=True)
class Question:
    """What is done to one layer.

    Args:
        layer: full name of the layer.
        method, sparsity, percdamp, blocksize: see `sparselab.prune`.
        nsamples: calibration windows; one of the study's sizes.
    """

    layer: str
    method: str = "sparsegpt"
    sparsity: str = "50%"
    percdamp: float = 0.01
    nsamples: int = 128
    blocksize: int = 128


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Args:
        weight: the dense weight, [d_out, d_in].
        pruned: what took its place.
        calibration_error: relative layer error on the calibration tokens.
        heldout_by_output: each output's share of the relative layer error on tokens that were not calibrated on.
    """

    weight: Float[Tensor, "d_out d_in"]
    pruned: Float[Tensor, "d_out d_in"]
    calibration_error: float
    heldout_by_output: Float[Tensor, " d_out"]

    @property
    def heldout_error(self) -> float:
        """Relative layer error on held-out tokens."""
        return float(self.heldout_by_output.sum(dtype=torch.float64))

    @property
    def keep(self) -> Bool[Tensor, "d_out d_in"]:
        """True where a weight survived."""
        return self.pruned != 0


class LayerStudy:
    """The layers of one dense model with statistics of their inputs at hand, so that a question takes one solve.

    Args:
        model: a causal language model; never changed.
        tokenizer: its tokenizer.
        name: what to call the model.
        text: what it reads; the held-out statistics are of the first `text.eval_nsamples` windows.
        sizes: numbers of calibration windows that can be asked for.
        seed: of the calibration draw.
        blocks: indices of the blocks to study, to save memory; None is all.
        progress: told of the sizes collected; see `sparselab.progress`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        text: TextConfig | None = None,
        sizes: Sequence[int] = (1, 4, 16, 64, 128),
        seed: int = 0,
        blocks: Collection[int] | None = None,
        progress: Progress = True,
    ) -> None:
        self.name, self.text, self.seed, self.sizes = name, text or TextConfig(eval_nsamples=64), seed, sorted(sizes)
        decoder, to = Decoder(model), self.text
        decoder.check_whole()
        calib = corpora.calibration_tokens(tokenizer, to.dataset, max(sizes), to.seqlen, seed, to.bos)
        held_out = corpora.evaluation_tokens(tokenizer, to.eval_dataset, to.eval_nsamples, to.seqlen, to.bos)
        self._nested = collect_nested(model, calib, sizes, progress=progress, blocks=blocks)
        self._held_out = collect(model, held_out, progress=False, blocks=blocks)
        linears = decoder.linears()
        self._weights = {layer: read_weight(linears[layer]) for layer in self._held_out}
        self.ask = lru_cache(maxsize=64)(self._ask)
        self.spectrum = lru_cache(maxsize=64)(self._spectrum)
        self._energy = lru_cache(maxsize=256)(self._energy_of)

    @cached_property
    def layers(self) -> list[str]:
        """Full names of the layers that can be asked about."""
        return list(self._weights)

    def statistics(self, layer: str, nsamples: int) -> InputStatistics:
        """What entered a layer in the first windows of calibration text.

        Raises:
            ValueError: no such layer, or not one of the study's sizes.
        """
        if layer not in self._weights:
            raise ValueError(f"layer: expected one of {len(self.layers)} such as {self.layers[0]}, received {layer!r}")
        if nsamples not in self._nested:
            raise ValueError(f"nsamples: expected one of {self.sizes}, received {nsamples}")
        return self._nested[nsamples][layer]

    def _ask(self, question: Question) -> Answer:
        """Prune one layer on the dense model's inputs; the latest answers are remembered.

        Raises:
            ValueError, SparselabError: see `sparselab.prune`.
        """
        seen, weight = self.statistics(question.layer, question.nsamples), self._weights[question.layer]
        pattern = parse_sparsity(question.sparsity)
        settings = Settings(question.method, pattern, question.percdamp, question.blocksize)
        [pruned] = find(question.method).solve([weight], seen, pattern, settings)
        calibration = layer_error(weight, pruned, seen.hessian) / self._energy(question.layer, question.nsamples)
        heldout = error_by_output(weight, pruned, self._held_out[question.layer].hessian)
        return Answer(weight, pruned, calibration, heldout / self._energy(question.layer, None))

    def _energy_of(self, layer: str, nsamples: int | None) -> float:
        """tr(WHWᵀ), to which errors are relative, on calibration windows or (None) held-out ones; NaN if zero."""
        seen = self._held_out[layer] if nsamples is None else self._nested[nsamples][layer]
        weight = self._weights[layer]
        return layer_error(weight, torch.zeros_like(weight), seen.hessian) or math.nan

    def _spectrum(self, layer: str, nsamples: int) -> Float[Tensor, " d_in"]:
        """Eigenvalues of the Hessian that a question about this layer works with."""
        return spectrum(self.statistics(layer, nsamples).hessian)


def mask_update_grid(
    studies: Sequence[LayerStudy],
    layers: Sequence[str],
    sparsity: str = "60%",
    masks: Sequence[str] = tuple(METHODS),
    updates: Sequence[str] = tuple(UPDATES),
    progress: bool = True,
) -> pd.DataFrame:
    """Every method's mask with every update of the weights under it: whether a mask is bad, or what was made of it.

    Args:
        studies: of one model, one a seed.
        layers: their full names.
        sparsity: a pattern.
        masks: methods that choose them.
        updates: keys of `methods.UPDATES`; "exact" among them.
        progress: show a bar.

    Returns:
        A row a mask, update, layer and seed: calibration_error and heldout_error (relative), and gap, the calibration
        error divided by that of the exact update of the same mask. All at the largest number of windows.
    """
    questions = [
        Question(layer, f"{mask}+{update}", sparsity, nsamples=studies[0].sizes[-1])
        for layer in layers
        for mask in masks
        for update in updates
    ]
    table = ask_all(studies, questions, progress)
    table[["mask", "update"]] = table.method.str.split("+", expand=True).to_numpy()
    same = ["layer", "mask", "seed"]
    exact = table[table["update"] == "exact"].set_index(same).calibration_error.rename("exact")
    table = table.join(exact, on=same)
    columns = ["mask", "update", "layer", "pattern", "seed", "calibration_error", "heldout_error"]
    return table[columns].assign(gap=table.calibration_error / table.exact)


def ask_all(studies: Sequence[LayerStudy], questions: Sequence[Question], progress: bool = True) -> pd.DataFrame:
    """The same questions to studies of several seeds, as a table.

    Args:
        studies: of one model, one a seed.
        questions: what to ask each.
        progress: show a bar.

    Returns:
        A row a question and seed: method, pattern, percdamp, nsamples, seed, calibration_error, heldout_error, and
        failure: "" unless the Hessian could not be factored, and then no errors.
    """
    rows = []
    asked = [(study, question) for study in studies for question in questions]
    for study, question in tqdm(asked, desc="layer", unit="solve", disable=not progress):
        row = asdict(question) | {"pattern": question.sparsity, "seed": study.seed, "failure": ""}
        try:
            answer = study.ask(question)
            row |= {"calibration_error": answer.calibration_error, "heldout_error": answer.heldout_error}
        except SingularHessianError as error:
            row["failure"] = str(error)
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="sparsity")
