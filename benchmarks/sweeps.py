"""What sweeps of the bundled model take, and that they survive being killed.

    python benchmarks/sweeps.py                 # all four, and writes `benchmarks/sweeps.md`
    python benchmarks/sweeps.py damping kills   # some of them, and only prints

workers: a grid of 60 runs by one process of one thread beside two, in turns. damping: layer errors at 30 dampings of
SparseGPT, which share the statistics of one pass, beside a single damping, in turns. kills: a sweep ended by SIGKILL at
random moments and begun again until it is done. dask: a cluster of two processes over TCP, one of which is killed.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from ranks import table

from sparselab.experiment import RESULT
from sparselab.results import read_sweep

HERE = Path(__file__).resolve().parent
METHODS = ["wanda", "ria", "sparsegpt"]  # all of which read text, so that every seed is a run of its own
CURVES = {"method": METHODS, "sparsity": ["40%", "50%", "60%", "70%", "80%"], "seed": [0, 1, 2, 3]}
PERCDAMPS = [float(f"{10 ** (-4 + 5 * step / 29):.3g}") for step in range(30)]
DAMPING = {"propagate": "dense", "measure": "errors"}
QUICK = {"nsamples": 16, "eval_nsamples": 40, "measure": "perplexity+errors"}
SETTINGS = ["method", "pattern", "percdamp", "seed"]
MEASURED = ["sparsity", "perplexity", "relative_error"]


def begin(grid: Mapping[str, Any], out: Path, *more: str) -> subprocess.Popen[str]:
    """`sparselab sweep` in a process group of its own, with one thread a process."""
    described = out.with_suffix(".yaml")
    described.write_text(json.dumps(grid), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "sparselab", "sweep", str(described), "--out", str(out), "--no-notebooks", *more]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=alone, start_new_session=True
    )


def seconds(grid: Mapping[str, Any], out: Path, *more: str) -> float:
    """Of the whole command."""
    began = time.monotonic()
    process = begin(grid, out, *more)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return time.monotonic() - began


def in_turns(what: str, cases: Mapping[str, Callable[[Path], float]], about: str, rounds: int) -> str:
    """Two cases, round by round, each in a new folder: a table of seconds, and the second over the first."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                taken[name].append(case(Path(folder, "runs")))
    first, second = (median(each) for each in taken.values())
    return (
        f"{about}, the whole command; medians of {rounds} in turns\n\n{table(taken, what)}\n\n"
        f"The second takes {second / first:.2f} times as long as the first."
    )


def workers(options: argparse.Namespace) -> str:
    """One process beside two."""
    grid = CURVES | QUICK | {"measure": "perplexity"}
    cases = {str(count): lambda out, count=count: seconds(grid, out, "--workers", str(count)) for count in (1, 2)}
    windows = f"{grid['nsamples']} calibration and {grid['eval_nsamples']} evaluation windows"
    about = f"60 runs ({', '.join(METHODS)} × 5 sparsities × 4 seeds; {windows})"
    return in_turns("processes of one thread", cases, f"{about}, perplexity measured", options.rounds)


def damping(options: argparse.Namespace) -> str:
    """Thirty dampings beside one."""
    cases = {
        str(len(values)): lambda out, values=values: seconds(DAMPING | {"percdamp": values}, out)
        for values in ([0.01], PERCDAMPS)
    }
    about = "Layer errors of SparseGPT at 50% on the dense model's inputs, one process of one thread"
    return in_turns("dampings", cases, about, options.rounds)


def finished(out: Path) -> dict[Path, int]:
    """Results, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob(RESULT)}


def numbers(out: Path) -> pd.DataFrame:
    """What was measured, in one order."""
    return read_sweep(out)[[*SETTINGS, *MEASURED]].sort_values(SETTINGS, ignore_index=True)


def kills(options: argparse.Namespace) -> str:
    """Kill the sweep, with all its processes or alone, and begin it again; once it is done, in a new folder."""
    draw, grid = random.Random(options.seed), CURVES | QUICK | {"nsamples": 4, "eval_nsamples": 8}
    with tempfile.TemporaryDirectory() as folder:
        quiet = Path(folder, "quiet")
        usual = seconds(grid, quiet, "--workers", "2")
        found: list[list[int]] = [[]]  # of each folder, the results that were there after each kill
        before: dict[Path, int] = {}
        while True:
            out = Path(folder, f"runs-{len(found)}")
            process, last = begin(grid, out, "--workers", "2"), sum(map(len, found)) >= options.kills
            try:
                said, _ = process.communicate(timeout=None if last else draw.uniform(0.2, 0.5) * usual)
                assert process.returncode == 0, said
            except subprocess.TimeoutExpired:
                end = os.killpg if draw.random() < 0.5 else os.kill
                end(process.pid, signal.SIGKILL)
                process.communicate()
            now = finished(out)
            assert before.items() <= now.items(), "a finished run was repeated"
            before = now
            if process.returncode != 0:
                found[-1].append(len(now))
                continue
            pd.testing.assert_frame_equal(numbers(out), numbers(quiet))
            if last:
                break
            found.append([])
            before = {}
    done = "; then in a new folder: ".join(", ".join(map(str, each)) for each in found)
    return (
        f"{sum(map(len, found))} kills (seed {options.seed}) of a sweep of {len(now)} runs with two processes, which "
        f"takes {usual:.0f} s undisturbed; finished runs found after each: {done}. In the end every result is there "
        "once and equal to the undisturbed sweep's, and none was written a second time."
    )


def dask(_: argparse.Namespace) -> str:
    """Kill one of two workers of a cluster."""
    grid = CURVES | QUICK | {"seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        alone, out, described = Path(folder, "alone"), Path(folder, "dask"), Path(folder, "grid.yaml")
        seconds(grid, alone)
        described.write_text(json.dumps(grid), encoding="utf-8")
        command = [sys.executable, str(HERE.parent / "tests" / "on_dask.py"), str(described), str(out)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.startswith("killed one of tcp://"), done.stdout
        pd.testing.assert_frame_equal(numbers(out), numbers(alone))
        count = len(finished(out))
    return (
        f"A Dask cluster of two worker processes over TCP on loopback, one killed after the second of {count} runs: "
        f"{done.stdout.splitlines()[-1]}, every result there once and equal to those of one process."
    )


BARS = {bar.__name__: bar for bar in (workers, damping, kills, dask)}


def main() -> None:
    """Measure, and write if it was everything."""
    parser = argparse.ArgumentParser(description="Measure sweeps.")
    parser.add_argument(
        "bars", nargs="*", metavar="BAR", choices=[*BARS, []], help=f"some of {', '.join(BARS)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    said = [BARS[name](options) for name in options.bars or BARS]
    where = f"{os.cpu_count()} cores, {platform.machine()}"
    text = f"{time.strftime('%Y-%m-%d')}, `python benchmarks/sweeps.py`, {where}\n\n" + "\n\n".join(said) + "\n"
    print(text)
    if not options.bars:
        (HERE / "sweeps.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
