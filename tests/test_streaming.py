import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS, tiny_llama
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import sparselab
from sparselab import prune, prune_checkpoint, streaming
from sparselab.errors import NonFiniteError, NotEnoughMemoryError, OutputError
from sparselab.methods import Settings
from sparselab.models.checkpoint import write_index
from sparselab.solvers import parse_sparsity

ROOT = Path(__file__).parent.parent
UNFINISHED = ".out.unfinished"


@pytest.fixture
def save(tmp_path, tokenizer):
    """Writes a model's checkpoint and says where."""

    def write(model, **how):
        model.save_pretrained(tmp_path / "model", **how)
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


@pytest.fixture
def folder(save):
    return save(tiny_llama())


def pruned(folder, tokens, settings=None, **how):
    """Prune to `out` beside the model; its weights and the report."""
    model, tokenizer = sparselab.stream(folder, "cpu")
    report = prune_checkpoint(model, tokenizer, tokens, folder.parent / "out", settings, progress=False, **how)
    return weights(folder.parent / "out"), report


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def in_memory(model, tokens, settings=None):
    settings = settings or Settings()
    report = prune(
        model, tokens, settings.method, settings.pattern, propagate=settings.propagate,
        measure_error=settings.measure_error, progress=False,
    )  # fmt: skip
    return model.state_dict(), report


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stopped(after):
    """A progress function that ends the work after so many layers, as a kill does."""

    def tell(done, _):
        if done > after:
            raise KeyboardInterrupt

    return tell


def interrupt(folder, tokens, after=7, **how):
    """Prune until some layers are done; seven are a block."""
    model, tokenizer = sparselab.stream(folder, "cpu")
    with pytest.raises(KeyboardInterrupt) as caught:
        prune_checkpoint(model, tokenizer, tokens, folder.parent / "out", progress=stopped(after), **how)
    return getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    ("method", "pattern", "propagate"),
    [
        ("sparsegpt", "50%", "pruned"),
        ("sparsegpt", "2:4", "dense"),
        ("wanda", "60%", "pruned"),
        ("magnitude", "2:4", "pruned"),
    ],
)
def test_the_same_bits_as_in_memory(save, family, tokens, method, pattern, propagate):
    settings = Settings(method, parse_sparsity(pattern), propagate=propagate)
    streamed, report = pruned(save(family()), tokens, settings)
    whole, expected = in_memory(family(), tokens, settings)
    assert same(streamed, whole)
    pd.testing.assert_frame_equal(report.layers.drop(columns="seconds"), expected.layers.drop(columns="seconds"))
    assert report.sparsity == expected.sparsity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shards_tied_embeddings_and_hidden_states_on_disk(save, tokens, dtype):
    folder = save(tiny_llama(tie_word_embeddings=True).to(dtype), max_shard_size="20KB")
    streamed, _ = pruned(folder, tokens, spill=True)
    whole, _ = in_memory(sparselab.load(folder, "cpu")[0], tokens)
    assert same(streamed, whole)
    assert {weight.dtype for weight in streamed.values()} == {dtype}


def test_magnitude_needs_no_tokens(folder):
    streamed, report = pruned(folder, None, Settings("magnitude", measure_error=False))
    assert same(streamed, in_memory(tiny_llama(), None, Settings("magnitude", measure_error=False))[0])
    assert report.layers.relative_error.isna().all()
    with pytest.raises(ValueError, match="calib: wanda needs calibration windows"):
        pruned(folder, None, Settings("wanda"))


def test_a_run_stopped_after_its_last_block_has_only_the_rest_to_write(folder, tokens, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sparselab.streaming.write_index", interrupting)
        pruned(folder, tokens)
    resumed, report = pruned(folder, tokens, resume=True)
    assert set(report.stages) == set(), "no block is read or run again"
    whole, expected = in_memory(tiny_llama(), tokens)
    assert same(resumed, whole)
    assert report.layers.drop(columns="seconds").equals(expected.layers.drop(columns="seconds"))


def interrupting(*_):
    raise KeyboardInterrupt


def test_a_streamed_model_is_not_pruned_in_place(folder, tokens, untyped):
    with pytest.raises(ValueError, match="expected one that can be changed in place, received one that is streamed"):
        prune(sparselab.stream(folder, "cpu")[0], tokens, progress=False)


def test_the_output_is_a_checkpoint_like_any_other(folder, tokens, tmp_path, tokenizer):
    pruned(folder, tokens, record={"dataset": "stdlib"})
    out = tmp_path / "out"
    tiny_llama().save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert (out / name).read_text() == (tmp_path / "saved" / name).read_text()
    model, same_tokenizer = sparselab.load(out)
    assert same_tokenizer("def f")["input_ids"] == tokenizer("def f")["input_ids"]
    assert model.dtype == torch.float32
    card = (out / "README.md").read_text()
    assert "50.00% of the weights of 21 linear layers are zero, by sparsegpt at 50%" in card
    assert "10 × 24 tokens of stdlib" in card
    assert len(pd.read_csv(out / "report.csv")) == 21
    stamp = json.loads((out / "sparselab.json").read_text())
    assert stamp["inputs"]["model"]["weights"].keys() == {"config.json", "model.safetensors"}
    assert stamp["settings"]["percdamp"] == 0.01
    assert not list(tmp_path.glob(".out*"))
    assert {path.suffix for path in out.iterdir()} == {".json", ".jsonl", ".md", ".csv", ".safetensors"}


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("after", [7, 9, 20])
def test_it_goes_on_where_it_was_interrupted(folder, tokens, after, propagate):
    settings = Settings(propagate=propagate)
    expected = in_memory(tiny_llama(), tokens, settings)[0]
    notes = interrupt(folder, tokens, after, settings=settings)
    assert notes == [f"what was finished is kept in {folder.parent / UNFINISHED}; pass --resume to go on"]
    told = []
    streamed, report = pruned(folder, tokens, settings, resume=True, tell=told.append)
    assert same(streamed, expected)
    assert len(report.layers) == 21
    assert f"{after // 7} of 3 blocks are done" in told[-1]


def test_nothing_is_left_where_nothing_was_finished(folder, tokens, tmp_path):
    assert interrupt(folder, tokens, 3) == []
    assert not (tmp_path / UNFINISHED).exists()
    streamed, _ = pruned(folder, tokens, resume=True)
    assert same(streamed, in_memory(tiny_llama(), tokens)[0])


def test_a_killed_run_without_a_finished_block_is_no_obstacle(folder, tokens, tmp_path):
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "journal.jsonl").write_text('{"entry": {}, "check": "44136fa355b3678a"}\n')
    (tmp_path / UNFINISHED / ".model-00001-of-00004.safetensors.partial").write_text("half")
    pruned(folder, tokens)
    assert not list((tmp_path / "out").glob(".*"))


def test_going_on_has_to_be_asked_for_and_of_the_same_work(folder, tokens):
    interrupt(folder, tokens)
    with pytest.raises(OutputError, match="pass --resume to go on with it, or delete that folder") as caught:
        pruned(folder, tokens)
    assert "pass --resume" in caught.value.__notes__[0]
    with pytest.raises(OutputError, match=r"settings was .*'percdamp': '0.01'.* and is .*'percdamp': '0.1'"):
        pruned(folder, tokens, Settings(percdamp=0.1), resume=True)
    with pytest.raises(OutputError, match=r"windows was \[10, 24\] and is \[9, 24\]; tokens was "):
        pruned(folder, tokens[1:], resume=True)
    other = tiny_llama()
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(folder)
    with pytest.raises(OutputError, match=r"inputs was .*model.safetensors.* and is"):
        pruned(folder, tokens, resume=True)


def test_what_is_finished_is_not_done_again(folder, tokens, tmp_path):
    streamed, report = pruned(folder, tokens)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again, same_report = pruned(folder, tokens, resume=True)
    assert same(streamed, again)
    assert same_report.relative_error == report.relative_error
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="pass --overwrite or another --out"):
        pruned(folder, tokens)
    with pytest.raises(OutputError, match="pass --overwrite or another --out"):
        pruned(folder, tokens, Settings(percdamp=1.0), resume=True)
    changed, _ = pruned(folder, tokens, Settings(percdamp=1.0), overwrite=True)
    assert not same(streamed, changed)


@pytest.mark.parametrize("damage", ["truncated", "a bit", "missing", "journal"])
def test_what_was_damaged_meanwhile_is_named_and_done_again(folder, tokens, tmp_path, damage):
    interrupt(folder, tokens, after=14)
    shard = min((tmp_path / UNFINISHED).glob("model-*.safetensors"))
    if damage == "truncated":
        os.truncate(shard, 100)
    elif damage == "a bit":
        held = bytearray(shard.read_bytes())
        held[-1] ^= 1
        shard.write_bytes(held)
    elif damage == "missing":
        shard.unlink()
    else:
        journal = tmp_path / UNFINISHED / "journal.jsonl"
        journal.write_bytes(journal.read_bytes().replace(b'"block": 0', b'"block": 1'))
    told = []
    streamed, _ = pruned(folder, tokens, resume=True, tell=told.append)
    assert ("line 2 is damaged" if damage == "journal" else f"{shard.name}: is missing or damaged") in told[0]
    assert "0 of 3 blocks are done" in told[1]
    assert same(streamed, in_memory(tiny_llama(), tokens)[0])


def spoilt(tensors, path, **how):
    """Writes another last bit of the first value of every up_proj."""
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in changed.items():
        if "up_proj" in name:
            tensor.view(torch.int32).view(-1)[0] ^= 1
    save_file(changed, path, **how)


def less(tensors, path, **how):
    """Leaves a norm out."""
    save_file({name: tensor for name, tensor in tensors.items() if "post_attention" not in name}, path, **how)


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (spoilt, r"00001-of-00006.safetensors: model.layers.0.mlp.up_proj.weight read back is not what was written"),
        (less, r"has other tensors, model.layers.0.post_attention_layernorm.weight for one"),
    ],
)
def test_what_is_written_is_read_back(folder, tokens, tmp_path, monkeypatch, writer, message):
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=message):
        patch.setattr("sparselab.models.checkpoint.save_file", writer)
        pruned(folder, tokens)
    assert not (tmp_path / UNFINISHED).exists(), "no block was finished"
    assert same(pruned(folder, tokens)[0], in_memory(tiny_llama(), tokens)[0])


def test_a_bit_that_is_lost_after_it_was_read_back_is_found_before_the_end(folder, tokens, tmp_path, monkeypatch):
    def losing(work, *rest):
        shard = work / "model-00002-of-00006.safetensors"
        held = bytearray(shard.read_bytes())
        held[-1] ^= 1
        shard.write_bytes(held)
        write_index(work, *rest)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"00002-of-00006.* not what was written any"):
        patch.setattr("sparselab.streaming.write_index", losing)
        pruned(folder, tokens)
    assert not (tmp_path / "out").exists()
    told = []
    assert same(pruned(folder, tokens, resume=True, tell=told.append)[0], in_memory(tiny_llama(), tokens)[0])
    assert "1 of 3 blocks are done" in told[-1]


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("resume", [False, True])
def test_the_reopened_model_has_to_say_the_same(folder, tokens, monkeypatch, propagate, resume):
    """A configuration that has lost something: the weights are right, and the model is not."""
    describe, settings = streaming._describe, Settings(propagate=propagate)

    def forgetful(work, *rest):
        describe(work, *rest)
        config = json.loads((work / "config.json").read_text())
        (work / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))

    if resume:
        interrupt(folder, tokens, 9, settings=settings)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"gives other logits \(relative difference"):
        patch.setattr("sparselab.streaming._describe", forgetful)
        pruned(folder, tokens, settings, resume=resume)
    assert same(pruned(folder, tokens, settings, resume=True)[0], in_memory(tiny_llama(), tokens, settings)[0])


def test_the_window_sees_the_pruned_blocks_bit_for_bit(folder, tokens, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sparselab.saved._check_logits", lambda wanted, *_: seen.append(wanted))
    for propagate in ("pruned", "dense"):
        pruned(folder, tokens, Settings(propagate=propagate), overwrite=True)
        whole, _ = sparselab.load(tmp_path / "out", "cpu")
        window = torch.linspace(0, 299, 64, dtype=torch.float64).long()[None]
        with torch.no_grad():
            assert torch.equal(seen.pop(), whole(window).logits)


def test_one_process_at_a_time(folder, tokens, tmp_path):
    (tmp_path / UNFINISHED).mkdir()
    with FileLock(tmp_path / UNFINISHED / ".lock"):
        with pytest.raises(OutputError, match="another process writes to it"):
            pruned(folder, tokens)
        assert (tmp_path / UNFINISHED).exists()
    pruned(folder, tokens)  # what a dead process leaves of its lock holds nobody up


def test_trouble_names_the_layer_and_keeps_what_was_finished(folder, tokens, monkeypatch):
    damaged = tiny_llama()
    damaged.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    damaged.save_pretrained(folder)
    with pytest.raises(NonFiniteError, match=r"model.layers.2.mlp.up_proj"):
        pruned(folder, tokens)
    assert not (folder.parent / UNFINISHED).exists(), "seen before the first block"


def test_too_little_memory_is_refused_unless_forced(folder, tokens, monkeypatch):
    monkeypatch.setattr("sparselab.preflight.available_memory", lambda _: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"GB of memory, found 0.00 GB free; put hidden states on disk"):
        pruned(folder, tokens)
    pruned(folder, tokens, force=True)


def test_a_full_disk_loses_nothing(folder, tmp_path):
    """The limit on the size of a file stands in for it: both are an OSError of a write."""
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    command = [sys.executable, "-m", "sparselab", "prune", str(folder), "--out", str(tmp_path / "out")]
    command += ["--dataset", str(tmp_path / "text.txt"), "--nsamples", "4", "--seqlen", "16", "--force"]
    command += ["--method", "wanda"]

    def limited():  # the head, 300 × 32 floats with a name, is larger than a block's shard is allowed to be
        resource.setrlimit(resource.RLIMIT_FSIZE, (37_000, 37_000))

    shards = {path.stat().st_size for path in folder.glob("*.safetensors")}
    assert min(shards) > 37_000
    failed = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert failed.returncode == 1
    assert "cannot be written" in failed.stderr
    assert "make room, and go on with --resume" in failed.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "3 of 3 blocks are done" in done.stdout
    assert "50.00% zeros in 21 layers" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_25_times_at_any_moment(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "25", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "25 kills" in done.stdout


def test_a_damaged_finished_output_is_not_taken_for_finished(folder, tokens, tmp_path):
    pruned(folder, tokens)
    for number in (1, 4):  # a block, and what is in no block
        shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[number - 1]
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + b"?")
        with pytest.raises(OutputError, match=rf"{shard.name}: is missing or damaged; prune again, with --overwrite"):
            pruned(folder, tokens, resume=True)
        shard.write_bytes(whole)
    pruned(folder, tokens, resume=True)


@pytest.mark.parametrize("moment", ["before the new one is there", "after it"])
def test_a_kill_while_the_output_is_replaced(folder, tokens, tmp_path, moment):
    expected, _ = pruned(folder, tokens)
    aside = tmp_path / f"{UNFINISHED}.replaced"
    if moment == "after it":
        aside.mkdir()
        (aside / "old").write_text("x")
    else:
        (tmp_path / "out").rename(aside)
    again, _ = pruned(folder, tokens, overwrite=True)
    assert same(again, expected)
    assert not list(tmp_path.glob(".out*"))


def test_what_a_killed_run_has_left_does_not_reach_the_output(folder, tokens, tmp_path):
    interrupt(folder, tokens)
    (tmp_path / UNFINISHED / "hidden-7").mkdir()
    (tmp_path / UNFINISHED / "hidden-7" / "0.safetensors").write_text("x")
    (tmp_path / UNFINISHED / "model-00009-of-00009.safetensors").write_text("x")
    pruned(folder, tokens, resume=True)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not written & {"hidden-7", "model-00009-of-00009.safetensors", ".lock"}


def test_dense_hidden_states_on_disk(folder, tokens):
    settings = Settings(propagate="dense")
    streamed, _ = pruned(folder, tokens, settings, spill=True)
    assert same(streamed, in_memory(tiny_llama(), tokens, settings)[0])
