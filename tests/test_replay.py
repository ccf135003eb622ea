import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, tiny_llama

import sparselab
from sparselab.cli import main
from sparselab.errors import ReplayError
from sparselab.methods import Settings
from sparselab.replay import Deviation, Replay, Verdict

SMALL = ["--dataset", "text.txt", "--seqlen", "16", "--nsamples", "4"]
COMMANDS = {
    "compare": ["compare", "model", "--sparsity", "50%", "2:4", "--methods", "sparsegpt", "--seed", "0", "1"],
    "prune": ["prune", "model", "--sparsity", "2:4", "--spill"],
    "eval": ["eval", "model"],
}
BUSY = {"compare": "sparselab.experiment.prune", "prune": "sparselab.streaming.walk_all"}


@pytest.fixture(scope="session")
def made(tmp_path_factory, tokenizer):
    """A folder with a model, a text, and an output of each command."""
    folder = tmp_path_factory.mktemp("made")
    tiny_llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command, words in COMMANDS.items():
            size = ["--eval-nsamples", "5"] if command == "compare" else []
            assert main([*words, "--out", command, *SMALL, *size]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, made, monkeypatch):
    """The current folder, with a model and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "model", "model")
    shutil.copy(made / "text.txt", "text.txt")
    return tmp_path


@pytest.fixture
def make(made):
    """Puts a command's output to `out`."""
    return lambda command: shutil.copytree(made / command, "out")


@pytest.fixture
def replay(capsys):
    """Replays `out`, and gives exit code, what is printed, and the complaint."""

    def run(*options, manifest="out"):
        capsys.readouterr()
        try:
            code = main(["replay", manifest, *options])
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        complaints = [line for line in err.splitlines() if "error:" in line]
        assert "Traceback" not in err
        assert len(complaints) == (code != 0), err
        return code, out.splitlines(), "".join(complaints)

    return run


def changed(**parts):
    """Change values in the manifest of `out`: parts=dict of paths, joined by dots, to values."""
    path = Path("out/sparselab.json")
    content = json.loads(path.read_text())
    for dotted, value in parts.pop("to").items():
        *outer, last = dotted.split("/")
        place = content
        for name in outer:
            place = place[int(name)] if isinstance(place, list) else place[name]
        place[int(last) if isinstance(place, list) else last] = value
    path.write_text(json.dumps(content))


def said(folder="out"):
    return json.loads((Path(folder) / "sparselab.json").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_machine_gives_the_same_bits(here, command, replay, make):
    make(command)
    before = sorted(path.name for path in here.iterdir())
    code, lines, _ = replay("--tolerance", "0")
    assert code == 0
    groups = [line.removesuffix(" the same").strip() for line in lines if line.endswith(" the same")]
    draws = ["calibration, seed 0", "calibration, seed 1"] if command == "compare" else ["calibration"]
    texts = {"compare": [*draws, "evaluation"], "prune": draws, "eval": ["evaluation"]}[command]
    weights = ["weights"] if command == "prune" else []
    assert groups == ["model", *texts, "settings", "versions", "machine", "numbers", *weights]
    assert len(lines) == len(groups) + 3
    assert lines[0].startswith(f"sparselab {command} model ")
    assert lines[-1].startswith("Agrees to the last bit: ")
    assert lines[-1].endswith(" and 6 files." if command == "prune" else " numbers.")
    assert sorted(path.name for path in here.iterdir()) == before, "what was made again is gone"


@pytest.mark.parametrize(
    ("command", "place", "where", "count"),
    [
        ("compare", "results/runs/1/perplexity", "sparsegpt 50%, perplexity", 1),
        ("prune", "results/layers/20/relative_error", "block 2 mlp.down_proj, relative_error", 1),
        ("eval", "results/nll of window/2", "nll of window 2", 1),
    ],
)
def test_a_number_that_was_changed_is_found(command, place, where, count, replay, make):
    make(command)
    changed(to={place: 1.0})
    code, lines, complaint = replay()
    assert code == 1
    assert f"disagrees: {count} of " in complaint
    assert f"numbers differ by more than 0.01, most of all {where} (was 1" in complaint
    table = lines[[line.split() for line in lines].index(["relative", "was", "is", "of"]) :]
    assert table[1].endswith(where)
    assert table[1].split()[1] == "1"
    assert "Inputs, settings, versions and machine are the same, so the results should be, too" in lines[-1]


def test_a_small_difference_agrees_within_the_tolerance(replay, make):
    make("prune")
    error = said()["results"]["layers"][3]["relative_error"]
    changed(to={"results/layers/3/relative_error": error * 1.001})
    code, lines, _ = replay()
    assert code == 0
    assert lines[-1] == "Agrees within 0.01, not to the last bit."
    assert "the largest relative difference is 0.001: block 0 self_attn.o_proj, relative_error (was" in lines[-3]
    code, lines, complaint = replay("--tolerance", "1e-4")
    assert code == 1
    assert "numbers differ by more than 0.0001" in complaint
    assert replay("--tolerance", "0.002")[0] == 0


def test_weights_that_differ_though_no_number_does_are_no_rounding(replay, make):
    make("prune")
    changed(to={"results/checksums/model-00002-of-00006.safetensors": "0" * 64})
    code, lines, complaint = replay()
    assert code == 1
    assert "weights      other bytes in model-00002-of-00006.safetensors" in lines
    assert complaint.endswith("all numbers are equal, but not the bytes of model-00002-of-00006.safetensors")


def test_other_threads_are_told(replay, make):
    make("compare")
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        code, lines, _ = replay()
    finally:
        torch.set_num_threads(before)
    assert code == 0
    assert f"machine      threads was {before}, is {3 - min(before, 2)}" in lines


def test_other_versions_are_told_and_named_as_a_reason(replay, make):
    make("eval")
    changed(to={"versions/torch": "1.0", "python": "3.9", "results/perplexity": 1.0})
    code, lines, _ = replay()
    assert code == 1
    assert f"versions     torch was 1.0, is {torch.__version__}; python was 3.9, is " in "\n".join(lines)
    assert lines[-3] == "What differs besides, and may be why:"
    assert lines[-2].startswith("  versions: torch was 1.0")


def another_model():
    model = tiny_llama()
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained("model")


def another_text():
    Path("text.txt").write_text("".join(TEXTS[1:]))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", [another_model, another_text])
def test_other_inputs_are_told_before_the_work(here, command, change, replay, monkeypatch, make):
    make(command)
    change()
    with monkeypatch.context() as patch:
        patch.setattr(BUSY.get(command, "sparselab.evaluation.perplexity"), lambda *_, **__: pytest.fail("begun"))
        code, lines, complaint = replay("--out", "again")
    assert code == 1
    what = "model: weights" if change is another_model else ("evaluation" if command == "eval" else "calibration")
    assert f"other things would go in: {what}" in complaint
    assert complaint.endswith("nothing was run, --force does it anyway")
    assert " was " in complaint
    assert not any(line.startswith("Running") for line in lines)
    assert not Path("again").exists()
    assert not list(here.glob(".*"))


def test_other_inputs_by_force(replay, make):
    make("prune")
    another_text()
    code, lines, complaint = replay("--force", "--tolerance", "1e-6")
    assert code == 1
    assert "disagrees: " in complaint
    assert any(line.startswith("  calibration: sha256 was ") for line in lines[-3:])
    assert sum(" was " in line and line.startswith("calibration") for line in lines) == 1


def test_another_begin_of_sequence_policy_is_told(replay, make):
    make("eval")
    changed(to={"inputs/evaluation/bos": "none: the tokenizer adds none", "inputs/model/revision": "0123"})
    code, lines, _ = replay()
    assert code == 0, "the same tokens and weights go in"
    assert "evaluation   bos was none: the tokenizer adds none, is one before each document; windows are" in lines[2]
    assert lines[1] == "model        revision was 0123, is none"
    changed(to={"results/perplexity": 1.0})
    assert "  model: revision was 0123, is none" in replay()[1], "it may be why"


def test_what_is_made_again_can_be_kept(replay, make):
    make("prune")
    code, _, _ = replay("--out", "again")
    assert code == 0
    assert said("again")["results"] == said()["results"] | {"tables": said("again")["results"]["tables"]}
    code, _, complaint = replay("--out", "again")
    assert code == 1
    assert "again: expected an empty folder" in complaint
    assert replay("--out", "again", "--overwrite")[0] == 0
    code, _, complaint = replay("--out", "out", "--overwrite")
    assert code == 1
    assert "out: is, holds or lies in out, which is read" in complaint


def test_the_file_alone_will_do(replay, make):
    make("eval")
    Path("out/sparselab.json").rename("moved.json")
    Path("out").rmdir()
    assert replay(manifest="moved.json")[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "nowhere: expected an output of compare, table, prune or eval with its sparselab.json, or that file; "
            "cannot read",
        ),
        ('{"command": "prune", "re', "found a damaged file"),
        ('{"command": "train", "settings": {}}', "found what `train` made, which is not replayed"),
        ('{"command": "prune", "settings": {}, "versions": {}}', "found one of an earlier version, without results"),
    ],
)
def test_wrong_usage_is_2(content, message, replay):
    if content is not None:
        Path("nowhere").write_text(content)
    code, lines, complaint = replay(manifest="nowhere")
    assert (code, lines) == (2, [])
    assert message in complaint


def test_what_cannot_be_opened_is_1(replay, make):
    make("eval")
    changed(to={"settings/model": "gone"})
    code, _, complaint = replay()
    assert code == 1
    assert "gone: expected 'tiny', a model folder or a hub id; there is no such folder" in complaint
    changed(to={"settings/model": "model", "settings/seqlen": "many"})
    code, _, complaint = replay()
    assert code == 2
    assert "argument --seqlen: invalid int value: 'many'" in complaint


def test_unfinished_work_is_compared_as_far_as_it_went(replay, monkeypatch, make):
    make("compare")
    runs = said()["results"]["runs"]
    changed(to={"results/runs": runs[:2], "results/finished": False})
    code, lines, _ = replay()
    assert code == 0
    assert "The manifest is of unfinished work; what it has is compared." in lines
    assert lines[-1].startswith("Agrees to the last bit: ")
    changed(to={"results/finished": True})
    code, lines, complaint = replay()
    assert code == 1
    assert "most of all runs, rows (was 2, is 3)" in complaint


def test_code_is_trusted_by_who_replays_and_not_by_the_manifest(replay, monkeypatch, make):
    make("eval")
    changed(to={"settings/trust_remote_code": True, "settings/trust-remote-code": True})
    trusted = []

    def stream(*_, trust_remote_code, **__):
        trusted.append(trust_remote_code)
        raise ValueError("enough")

    monkeypatch.setattr("sparselab.models.stream", stream)
    assert replay()[0] == 1
    assert replay("--trust-remote-code")[0] == 1
    changed(to={"settings/model": "--trust-remote-code"})
    assert replay()[0] == 1
    assert trusted == [False, True, False]


def test_nothing_in_a_manifest_steers_the_terminal(replay, make):
    make("eval")
    changed(to={"line": "sparselab\x1b[2J", "python": "\x1b]0;x\x07", "settings/batch_size": 3, "inputs/\x1b": 1})
    code, lines, complaint = replay()
    assert code == 1
    assert "\x1b" not in "".join(lines) + complaint
    assert lines[0].startswith("sparselab?[2J")


def test_work_that_python_asked_for(replay, tokenizer):
    calib = sparselab.calibration_tokens(tokenizer, "text.txt", 4, 16, seed=3)
    opened = sparselab.stream("model", "cpu")
    how = Settings("wanda", measure_error=False)
    sparselab.prune_checkpoint(*opened, calib, "out", how, progress=False, record={"dataset": "text.txt", "seed": 3})
    code, lines, _ = replay()
    assert code == 0
    assert lines[0].startswith("called from Python (")
    assert lines[-1].endswith(" and 6 files.")
    sparselab.prune_checkpoint(*opened, calib, "given", how, progress=False)
    code, _, complaint = replay(manifest="given")
    assert code == 2
    assert "given: cannot be replayed, as it does not name the dataset: Python code had that at hand" in complaint


def test_a_report_of_pruning_in_memory(replay, llama, tokenizer):
    calib = sparselab.calibration_tokens(tokenizer, "text.txt", 4, 16)
    report = sparselab.prune(llama, calib, "sparsegpt", "2:4", progress=False)
    report.save("out", calib, model="model", dataset="text.txt", seed=0)
    code, lines, _ = replay()
    assert code == 0
    assert lines[1] == "model        the same (weights not recorded)"
    assert lines[-1].startswith("Agrees to the last bit: ")


@pytest.mark.slow
def test_several_processes_replay_together(replay, make):
    make("prune")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "sparselab", "replay", "out", "--out", "again"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Running it again") == 1, "one speaks for all"
    assert "processes was 1, is 2" in done.stdout
    assert said("again")["machine"]["processes"] == 2
    failed = subprocess.run(command[:-2], capture_output=True, text=True, check=False, env=alone)
    assert failed.returncode == 1
    assert "--out: expected a folder that all processes share, received none" in failed.stderr


@pytest.mark.parametrize(
    ("was", "now", "relative"),
    [
        (2.0, 1.0, 0.5),
        (-1.0, 1.0, 2.0),
        (0.0, 1e-9, 1.0),
        (1.0, None, math.inf),
        (1.0, "1", 0.0),
        ("a", "b", math.inf),
        (math.inf, 1.0, math.inf),
        (10**400, 1.0, math.inf),
        ([1], 1.0, math.inf),
    ],
)
def test_relative_differences(was, now, relative):
    assert Deviation("x", was, now).relative == relative


def test_numbers_that_hardly_differ_are_told_apart():
    assert str(Deviation("x", 0.1 + 0.2, 0.3)) == "x (was 0.30000000000000004, is 0.3)"


def verdict(was, now, tolerance=0.01):
    blank = {"settings": {}, "inputs": {}, "machine": {}, "versions": {}}
    before, after = (blank | {"results": results} for results in (was, now))
    return Replay(before, False, lambda _: None).verdict(after, tolerance)


def test_what_was_not_measured_then_is_not_compared():
    rows = [{"block": 0, "layer": "q", "relative_error": None}]
    found = verdict({"layers": rows}, {"layers": [rows[0] | {"relative_error": 0.5, "new_column": 1}]})
    assert found.exact
    assert found.numbers == 1, "how many rows there are"
    assert verdict({"layers": [rows[0] | {"relative_error": 0.5}]}, {"layers": rows}).beyond[0].now is None


def test_costs_and_what_is_known_but_roughly_are_not_compared():
    row = {"method": "wanda", "perplexity": 2.0}
    costs = {"seconds": 1.0, "peak_memory_mb": 3.0, "optimality_gap": 1e-9}
    assert verdict({"runs": [row | costs]}, {"runs": [row | {"seconds": 9.0, "optimality_gap": 2e-9}]}).exact


def test_a_long_table_is_cut():
    found = verdict({"nll": [1.0] * 30}, {"nll": [2.0] * 10 + [3.0] * 20})
    lines = str(found).splitlines()
    assert "and 20 more" in lines
    assert sum(line.split()[:1] == ["0.67"] for line in lines) == 10, "those that differ most"
    assert "disagrees: 30 of 31 numbers differ" in found.complaint()


def test_rows_of_the_same_name_are_told_apart():
    rows = [{"method": "wanda", "perplexity": 1.0}, {"method": "wanda", "perplexity": 2.0}]
    found = verdict({"runs": rows}, {"runs": [rows[0], rows[1] | {"perplexity": 4.0}]})
    assert [each.where for each in found.beyond] == ["wanda (2), perplexity"]


def test_rounding_may_move_weights():
    number = Deviation("x", 1.0, 1.001)
    assert Verdict(5, [number], 3, ["model-1"], 0.01, []).agrees
    assert not Verdict(5, [number], 3, ["model-1"], 0.0, []).agrees
    assert not Verdict(5, [], 3, ["model-1"], 0.01, []).agrees
    assert not Verdict(5, [], 3, ["model-1"], 0.01, []).exact


def test_the_error_is_one_of_ours():
    assert issubclass(ReplayError, sparselab.errors.SparselabError)
