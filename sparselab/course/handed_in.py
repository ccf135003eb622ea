"""A sweep handed in as a table: whether these are the runs that were asked for, and whether they come out again."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from sparselab.course.answers import CheckError
from sparselab.experiment import RunConfig, TextConfig, Workbench
from sparselab.models.loading import load

METHODS = ("wanda", "sparsegpt")
FIXED = {"model": "tiny", "seqlen": 256, "eval_nsamples": 16, "pattern": "60%", "nsamples": 8}
SEEDS = 3  # at least
_MEASURED = ("sparsity", "perplexity", "ratio")
_COLUMNS = (*FIXED, "method", "seed", "percdamp", "blocksize", "propagate", *_MEASURED, "failure")
_SPARSITY, _NEAR = 0.6, 0.005  # asked for, and how near a pattern comes to it
_AGAIN = 0.01  # another Python has another standard library: ratios differ by less, perplexities by more
_NAME = "results"


def results(path: str | Path, seed: int = 0) -> str:
    """`results.csv`: SparseGPT and Wanda at 60%, three seeds or more each; the run that the seed draws is run again.

    Raises:
        CheckError: no such table, runs that are missing, made twice or failed, or a ratio that does not come out again.
    """
    if not Path(path).is_file():
        raise CheckError(f"{_NAME} is not written yet")
    try:
        table = pd.read_csv(path)
    except ValueError as error:  # pandas' own are such
        raise CheckError(f"{_NAME}: {path} is not a CSV: {error}") from error
    _check_columns(table)
    _check_runs(table)
    _check_numbers(table)
    row = table.iloc[seed % len(table)]
    config = RunConfig(
        str(row.method), str(row.pattern), float(row.percdamp), int(row.blocksize), int(row.nsamples), int(row.seed),
        row.propagate,
    )  # fmt: skip
    again = float(_bench().run(config).row["ratio"])
    if abs(row.ratio / again - 1) > _AGAIN:
        raise CheckError(
            f"{_NAME}: {row.method} with seed {row.seed} has ratio {row.ratio:.4f}; run again it has {again:.4f}"
        )
    return f"{_NAME}: {len(table)} runs; {row.method} with seed {row.seed} comes out again at ratio {again:.4f}."


def _check_columns(table: pd.DataFrame) -> None:
    if missing := [name for name in _COLUMNS if name not in table]:
        raise CheckError(f"{_NAME} has no column {', '.join(missing)}; write down all that sweep gives")
    for name, value in FIXED.items():
        if other := [found for found in table[name].unique().tolist() if found != value]:
            raise CheckError(f"{_NAME}: expected {name} {value} in every run, received {other[0]}")


def _check_runs(table: pd.DataFrame) -> None:
    if failed := table.failure.dropna().tolist():
        raise CheckError(f"{_NAME}: a run failed: {failed[0]}")
    if other := sorted(set(table.method) - set(METHODS)):
        raise CheckError(f"{_NAME}: expected runs of {' and '.join(METHODS)}, received {other[0]}")
    seeds = {method: sorted(table.seed[table.method == method].tolist()) for method in METHODS}
    for method, found in seeds.items():
        if twice := sorted({seed for seed in found if found.count(seed) > 1}):
            raise CheckError(f"{_NAME}: {method} with seed {twice[0]} is there {found.count(twice[0])} times")
        if len(found) < SEEDS:
            raise CheckError(f"{_NAME}: {method} has seeds {found}, expected at least {SEEDS}")
    if len({tuple(found) for found in seeds.values()}) > 1:
        said = ", ".join(f"{method} {found}" for method, found in seeds.items())
        raise CheckError(f"{_NAME}: runs cannot be paired, seeds differ: {said}; is one left out?")


def _check_numbers(table: pd.DataFrame) -> None:
    numbers = table[list(_MEASURED)].apply(pd.to_numeric, errors="coerce")
    for name in _MEASURED:
        if not np.isfinite(numbers[name]).all():
            raise CheckError(f"{_NAME}: {name} is not a number in every row")
    for method, runs in table.groupby("method"):
        if runs.perplexity.nunique() < len(runs):
            raise CheckError(
                f"{_NAME}: seeds of {method} have the same perplexity to the last digit: is it one run, copied?"
            )
    away = (table.sparsity - _SPARSITY).abs()
    if away.max() > _NEAR:
        hint = "; a fraction, not percent" if away.max() > 1 else ""
        raise CheckError(f"{_NAME}: sparsity {table.sparsity.iloc[away.argmax()]:g}, expected {_SPARSITY}{hint}")
    dense = table.perplexity / table.ratio
    if dense.max() > dense.min() * (1 + 1e-6):
        raise CheckError(
            f"{_NAME}: perplexity / ratio is the dense perplexity and one number; it goes from {dense.min():.4f} to "
            f"{dense.max():.4f}"
        )


@cache
def _bench() -> Workbench:
    model, tokenizer = load("tiny", "cpu")
    text = TextConfig(seqlen=256, eval_nsamples=16)
    return Workbench(model, tokenizer, "tiny", text, measure="perplexity")
