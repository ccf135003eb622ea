"""Several processes at one model: started by torchrun, over gloo on the CPU."""

import os
import socket
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pytest
import torch
from conftest import TEXTS, tiny_llama

from sparselab.ranks import Ranks, joined, own_device

ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(TEXTS) * 8)
    return tmp_path / "text.txt"


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_llama(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(folder, text, out, *extra, ranks=1, windows=9, seqlen=32):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    prune = ["-m", "sparselab", "prune", str(folder), "--out", str(out), "--dataset", str(text)]
    size = ["--nsamples", str(windows), "--seqlen", str(seqlen), "--device", "cpu"]
    return [sys.executable, *several, *prune, *size, *extra]


def run(*arguments, **how):
    return subprocess.run(command(*arguments, **how), capture_output=True, text=True, check=False, env=ALONE)


def report(out):
    return pd.read_csv(out / "report.csv")


def test_alone_nothing_is_shared():
    windows = torch.arange(10).view(5, 2)
    alone = Ranks()
    assert alone.leads
    assert torch.equal(alone.part(windows), windows)
    alone.add_up(windows)
    alone.broadcast(windows, 0)
    assert alone.any(True, torch.device("cpu"))
    assert not alone.any(False, torch.device("cpu"))
    assert torch.equal(windows, torch.arange(10).view(5, 2))
    with joined() as ranks:
        assert ranks == alone
    assert own_device(None) is None
    assert own_device("cpu") == "cpu"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_window_and_every_piece_of_work_has_one_owner(world):
    windows = torch.arange(14).view(7, 2)
    everyone = [Ranks(rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([ranks.part(windows) for ranks in everyone]), windows)
    costs = [5.0, 1.0, 1.0, 3.0, 2.0, 2.0]
    owners = [ranks.owners(costs) for ranks in everyone]
    assert all(each == owners[0] for each in owners)
    loads = Counter()
    for owner, cost in zip(owners[0], costs, strict=True):
        loads[owner] += cost
    assert max(loads.values()) <= max(5.0, sum(costs) / world + 1)


def test_fewer_windows_than_processes_are_refused():
    with pytest.raises(ValueError, match="expected a window for each of 3 processes, received 2"):
        Ranks(0, 3).part(torch.ones(2, 4, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--spill", "--propagate", "dense", "--sparsity", "2:4", "--batch-size", "2"]])
def test_two_processes_do_what_one_does(folder, text, tmp_path, extra):
    """Nine windows: four for one, five for the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    done = run(folder, text, one, *extra)
    assert done.returncode == 0, done.stderr
    done = run(folder, text, two, *extra, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned by sparsegpt") == 1, "one speaks for all"
    expected, got = report(one), report(two)
    assert got[["block", "layer", "sparsity", "tokens"]].equals(expected[["block", "layer", "sparsity", "tokens"]])
    assert (got.relative_error - expected.relative_error).abs().max() < 1e-4
    assert not list(tmp_path.glob(".*"))
    again = run(folder, text, two, *extra, "--resume", ranks=2)
    assert again.returncode == 0, again.stderr
    assert "0.0 s ()" in again.stdout, "all was done, and nothing is done again"


@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_another_number_goes_on(folder, text, tmp_path):
    """Without torchrun, which would end the others itself."""
    out, work = tmp_path / "out", tmp_path / ".out.unfinished"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    line = command(folder, text, out, windows=256, seqlen=64)
    first, second = (
        subprocess.Popen(
            line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=meeting | {"RANK": rank}
        )
        for rank in "01"
    )
    with first, second:
        try:
            until = time.monotonic() + 120
            while not list(work.glob("model-*.safetensors")) and first.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            second.kill()
            _, printed = first.communicate(timeout=60)
        finally:
            first.kill()
            second.kill()
    assert first.returncode == 1
    assert "error: another process of this run has ended" in printed
    assert "its own message says why; what was finished is kept in" in printed
    assert "pass --resume to go on" in printed
    assert not out.exists()
    done = subprocess.run([*line, "--resume"], capture_output=True, text=True, check=False, env=ALONE)
    assert done.returncode == 0, done.stderr
    assert " of 6 blocks are done" in done.stdout
    assert "0 of 6 blocks are done" not in done.stdout
    assert len(report(out)) == 42
