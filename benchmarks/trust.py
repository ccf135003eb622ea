"""How far SparseGPT is from the best, what closes the gap, and what statistics that are shared save.

    python benchmarks/trust.py

The bundled model, 128 × 256 calibration tokens in two draws, 400 held-out windows. Writes
`benchmarks/trust.md`. Finished runs are kept in the cache folder, so that it goes on where it was interrupted.
"""

import time
from pathlib import Path
from statistics import median

import pandas as pd

import sparselab
from sparselab.analysis import LayerStudy, Question
from sparselab.experiment import RunConfig, TextConfig, Workbench
from sparselab.files import cache_folder, markdown_table

HERE = Path(__file__).resolve().parent
PATTERNS, SEEDS, ROUNDS = ("50%", "60%", "70%", "2:4"), (0, 1), 5
METHODS = ("sparsegpt", "sparsegpt+cg", "admm")


def better_answers(bench: Workbench, measured: Workbench) -> pd.DataFrame:
    """Every method beside SparseGPT: perplexity, paired difference, layer error, and how much of the gap it closes."""
    rows = []
    for pattern in PATTERNS:
        runs = {method: RunConfig(method, pattern) for method in METHODS}
        found = {
            method: pd.DataFrame([bench.run(each).row for each in run.replicates(SEEDS)]).mean(numeric_only=True)
            for method, run in runs.items()
        }
        quality = {method: measured.run(run).row for method, run in runs.items()}
        room = found["sparsegpt"].perplexity - float(bench.dense)
        for method, row in found.items():
            closed = (found["sparsegpt"].perplexity - row.perplexity) / room
            interval = bench.difference(runs[method], runs["sparsegpt"], SEEDS)
            rows.append(
                {
                    "pattern": pattern,
                    "method": method,
                    "perplexity": f"{row.perplexity:.2f}",
                    "log_perplexity_minus_sparsegpt's": "" if method == "sparsegpt" else interval.in_words,
                    "relative_layer_error": f"{quality[method]['relative_error']:.4f}",
                    "on_calibration_tokens": f"{quality[method]['calibration_error']:.4f}",
                    "optimality_gap": f"{quality[method]['optimality_gap']:.3f}",
                    "gap_to_dense_closed": "" if method == "sparsegpt" else f"{closed:.0%}",
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def gaps(measured: Workbench) -> pd.DataFrame:
    """SparseGPT's layer error over the least for its masks, by projection: medians over blocks."""
    layers = pd.DataFrame([row for pattern in PATTERNS for row in measured.run(RunConfig("sparsegpt", pattern)).layers])
    layers["projection"] = layers.layer.str.rpartition(".")[2]
    table = layers.pivot_table("optimality_gap", "projection", "pattern", "median", sort=False)
    return table.map("{:.2f}".format).reset_index()


def seconds(model, calib) -> dict[str, list[float]]:
    """Of calibration and solve, in turns; the first round does not count."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_ in range(ROUNDS + 1):
        for method, times in taken.items():
            model.load_state_dict(state)
            report = sparselab.prune(model, calib, method, "70%", measure_error=False, progress=False)
            if round_:
                times.append(report.seconds)
    model.load_state_dict(state)
    return taken


def study(model, tokenizer, questions: int) -> float:
    """Seconds of a per-layer study of all layers: statistics once, then every question to every layer."""
    settings = [
        ("sparsegpt", "50%", 0.01, 128), ("sparsegpt", "70%", 0.01, 128), ("sparsegpt", "2:4", 0.01, 128),
        ("sparsegpt", "50%", 0.1, 128), ("sparsegpt", "50%", 0.001, 128), ("sparsegpt", "50%", 0.01, 64),
        ("sparsegpt", "50%", 0.01, 16), ("wanda", "50%", 0.01, 128), ("wanda", "50%", 0.01, 16),
        ("magnitude", "50%", 0.01, 128),
    ]  # fmt: skip
    started = time.perf_counter()
    layers = LayerStudy(model, tokenizer, "tiny", sizes=(16, 64, 128), progress=False)
    for method, sparsity, percdamp, nsamples in settings[:questions]:
        for layer in layers.layers:
            layers.ask(Question(layer, method, sparsity, percdamp, nsamples))
    return time.perf_counter() - started


def main() -> None:
    """Measure and write."""
    model, tokenizer = sparselab.load("tiny", device="cpu")
    calib = sparselab.calibration_tokens(tokenizer)
    runs = cache_folder() / "benchmarks"
    bench = Workbench(model, tokenizer, "tiny", TextConfig(), runs / "perplexity", measure="perplexity")
    measured = Workbench(model, tokenizer, "tiny", TextConfig(), runs / "layers")
    parts = [
        f"{time.strftime('%Y-%m-%d')}, `python benchmarks/trust.py`: `tiny`, 128 × 256 calibration tokens, 400 × 256 "
        f"held-out ones; dense {bench.dense}",
        f"Means over {len(SEEDS)} calibration draws; differences with 95% intervals over windows and draws; layers of "
        "the first draw, on held-out and on calibration tokens.",
        markdown_table(better_answers(bench, measured)),
        "SparseGPT's layer error over the least for the same mask, on its own calibration inputs; medians of "
        "six blocks, one draw (the paper: about 1.2, 1.1 for later second linears):",
        markdown_table(gaps(measured)),
    ]
    taken = seconds(model, calib)
    one = median(taken["sparsegpt"])
    lines = [
        {
            "method": method,
            "s": f"{median(times):.2f}",
            "lowest–highest": f"{min(times):.2f}–{max(times):.2f}",
            "times SparseGPT's": f"{median(times) / one:.2f}",
        }
        for method, times in taken.items()
    ]
    parts += [f"Calibration and solve at 70%, medians of {ROUNDS} runs in turns:", markdown_table(pd.DataFrame(lines))]
    rounds = [(study(model, tokenizer, 1), study(model, tokenizer, 10)) for _ in range(ROUNDS)]
    single, ten = (median(times) for times in zip(*rounds, strict=True))
    parts.append(
        f"A study of all layers, statistics collected once: one configuration {single:.1f} s, ten (patterns, "
        f"dampings, methods, numbers of windows) {ten:.1f} s, {ten / single:.2f} times as long; medians of {ROUNDS}."
    )
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (HERE / "trust.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
