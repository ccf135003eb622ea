import getpass
import hashlib
import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS, tiny_llama
from transformers import PreTrainedTokenizerFast

import sparselab
from sparselab import manifest
from sparselab.cli import main
from sparselab.comparison import CompareConfig, compare
from sparselab.methods import Settings
from sparselab.models.loading import hub_revision

SMALL = ["--dataset", "text.txt", "--seqlen", "16", "--nsamples"]
COMPARE = ["compare", "model", "--out", "out", "--sparsity", "50%", "2:4", "--methods", "magnitude", "wanda"]


@pytest.fixture(autouse=True)
def here(tmp_path, tokenizer, monkeypatch):
    """The current folder, with a model and a text."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("text.txt").write_text("".join(TEXTS))
    return tmp_path


def run(*arguments):
    """Run a command, and say what its manifest says."""
    words = list(map(str, arguments))
    assert main(words) == 0
    return words, said(words[words.index("--out") + 1])


def said(folder):
    def strict(constant):
        pytest.fail(f"{constant} is no JSON")

    return json.loads((Path(folder) / "sparselab.json").read_text(), parse_constant=strict)


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_what_compare_states():
    words, made = run(*COMPARE, *SMALL, 4, "--eval-nsamples", 5, "--seed", 0, 3)
    assert made["line"] == shlex.join(["sparselab", *words])
    assert made["command"] == "compare"
    settings = {name: made["settings"][name] for name in ("model", "sparsity", "methods", "nsamples", "out", "seed")}
    assert settings == {
        "model": "model", "sparsity": ["50%", "2:4"], "methods": ["magnitude", "wanda"], "nsamples": 4, "out": "out",
        "seed": [0, 3],
    }  # fmt: skip
    model, tokenizer = sparselab.load("model")
    inputs = made["inputs"]
    assert inputs.keys() == {"model", "calibration, seed 0", "calibration, seed 3", "evaluation"}
    assert inputs["model"]["weights"] == manifest.weights_hash(model)
    assert (inputs["model"]["name"], inputs["model"]["revision"]) == ("model", None)
    calib = sparselab.calibration_tokens(tokenizer, "text.txt", 4, 16, seed=3)
    stated = inputs["calibration, seed 3"]
    assert stated["sha256"] == hashlib.sha256(calib.numpy().tobytes()).hexdigest()
    assert (stated["windows"], stated["seqlen"], stated["dataset"]) == (4, 16, "text.txt")
    assert inputs["evaluation"]["dataset"] == "stdlib"
    written = pd.read_csv("out/runs.csv").fillna({"pattern": ""})
    rows = made["results"]["runs"]
    assert [row["perplexity"] for row in rows] == written.perplexity.tolist()
    assert [row["method"] for row in rows] == written.method.tolist()
    assert rows[0]["relative_error"] is None, "of the dense model, nothing is measured"
    assert not {name for row in rows for name in row if "seconds" in name or "memory" in name}
    assert made["results"]["tables"] == {name: sha(f"out/{name}") for name in ("runs.csv", "layers.csv")}
    assert made["results"]["finished"]
    assert set(made["files"]) == {path.name for path in Path("out").iterdir()}


def test_what_prune_states():
    _, made = run("prune", "model", "--out", "out", "--sparsity", "2:4", *SMALL, 4)
    assert made["inputs"]["model"]["weights"] == {
        name: sha(f"model/{name}") for name in ("config.json", "model.safetensors")
    }
    assert made["inputs"].keys() == {"model", "calibration"}
    assert made["settings"]["seed"] == 0
    assert made["settings"]["sparsity"] == "2:4"
    report = pd.read_csv("out/report.csv")
    rows = pd.DataFrame(made["results"]["layers"])
    assert set(report) - set(rows) == {"seconds"}
    pd.testing.assert_frame_equal(rows.astype(report.dtypes[list(rows)]), report[list(rows)])
    shards = list(Path("out").glob("*.safetensors"))
    assert len(shards) == 6
    assert made["results"]["checksums"] == {path.name: sha(path) for path in shards}
    assert made["results"]["tables"] == {"report.csv": sha("out/report.csv")}


def test_what_eval_states(capsys):
    _, made = run("eval", "model", "--out", "out", *SMALL, 5)
    printed = capsys.readouterr().out
    assert "(5 windows of 16 tokens of text.txt)\nWritten to out\n" in printed
    model, tokenizer = sparselab.load("model")
    tokens = sparselab.evaluation_tokens(tokenizer, "text.txt", 5, 16)
    expected = sparselab.perplexity(model, tokens, progress=False)
    results = made["results"]
    assert (results["perplexity"], results["stderr"]) == (float(expected), expected.stderr)
    assert results["nll of window"] == expected.nll.tolist()
    assert f"{results['bits_per_byte']:.3f} bits per byte" in printed
    assert made["inputs"]["evaluation"]["sha256"] == manifest.tokens_hash(tokens)
    assert {path.name for path in Path("out").iterdir()} == {"sparselab.json"}
    arguments = ["eval", "model", "--out", "out", *SMALL, "5"]
    assert main(arguments) == 1
    assert "pass --overwrite or another --out" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_where_it_was_made():
    _, made = run("eval", "model", "--out", "out", "--dtype", "bfloat16", *SMALL, 5)
    machine = made["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processes"] == 1
    assert machine["dtype"] == "bfloat16"
    assert (machine["device"], bool(machine["device_name"])) == (sparselab.load("model")[0].device.type, True)
    assert made["versions"].keys() == {
        "sparselab", "torch", "transformers", "tokenizers", "numpy", "safetensors", "numba",
    }  # fmt: skip
    assert made["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("command", ["compare", "prune", "eval"])
def test_nothing_of_the_user_but_what_was_typed(here, command, monkeypatch):
    monkeypatch.setenv("SPARSELAB_SECRET", "s3cr3t")
    monkeypatch.setattr("pathlib.Path.home", lambda: here.parent)
    words = {"compare": COMPARE, "prune": ["prune", "model", "--out", "out"], "eval": ["eval", "model", "--out", "out"]}
    run(*words[command], *SMALL, 4)
    text = Path("out/sparselab.json").read_text()
    for secret in ("s3cr3t", str(here.parent), str(Path(sparselab.__file__).parent), f'"{getpass.getuser()}"'):
        assert secret not in text
    assert '"model": "model"' in text


def test_python_states_the_same_without_a_command_line(llama, tokenizer):
    Path("compared").mkdir()
    config = CompareConfig(
        methods=("wanda",), sparsities=("50%",), dataset=TEXTS, eval_dataset="text.txt", nsamples=4, eval_nsamples=5,
        seqlen=16,
    )  # fmt: skip
    result = compare(llama, tokenizer, config, "mine", Path("compared"), progress=False)
    made = said("compared")
    assert made["line"] is None
    assert made["settings"]["model"] == "mine"
    assert made["settings"]["dataset"] is None, "texts are not copied"
    assert "def f" not in Path("compared/sparselab.json").read_text()
    assert made["inputs"]["calibration"]["dataset"] == "60 given texts"
    assert made["results"]["runs"][1]["perplexity"] == result.runs.perplexity[1]

    calib = sparselab.calibration_tokens(tokenizer, "text.txt", 4, 16)
    opened = sparselab.stream("model", "cpu")
    sparselab.prune_checkpoint(*opened, calib, "pruned", Settings("wanda"), progress=False)
    made = said("pruned")
    assert made["line"] is None
    assert (made["settings"]["model"], made["settings"]["nsamples"]) == ("model", 4)
    assert made["inputs"]["calibration"]["bos"] == "not known: windows were given, not made from text"
    assert made["inputs"]["calibration"]["sha256"] == manifest.tokens_hash(calib)


def test_a_report_of_pruning_in_memory_can_be_kept(llama, tokenizer):
    calib = sparselab.calibration_tokens(tokenizer, "text.txt", 4, 16)
    report = sparselab.prune(llama, calib, "wanda", "2:4", progress=False)
    report.save("kept", calib, model="model", dataset="text.txt", seed=0)
    assert {path.name for path in Path("kept").iterdir()} == {"report.csv", "sparselab.json"}
    made = said("kept")
    stated = {name: made["settings"][name] for name in ("method", "sparsity", "nsamples", "seqlen", "model", "seed")}
    assert stated == {
        "method": "wanda", "sparsity": "2:4", "nsamples": 4, "seqlen": 16, "model": "model", "seed": 0,
    }  # fmt: skip
    assert made["inputs"]["calibration"]["sha256"] == manifest.tokens_hash(calib)
    assert [row["relative_error"] for row in made["results"]["layers"]] == report.layers.relative_error.tolist()
    with pytest.raises(TypeError, match="model: expected a name or a number, received LlamaForCausalLM"):
        report.save("other", model=llama)
    assert not Path("other").exists()
    report.save("bare")
    assert said("bare")["inputs"] == {}


def test_a_run_that_was_killed_and_went_on_states_everything(tokens):
    def killed(done, _):
        if done > 7:
            raise KeyboardInterrupt

    opened = sparselab.stream("model", "cpu")
    with pytest.raises(KeyboardInterrupt):
        sparselab.prune_checkpoint(*opened, tokens, "out", progress=killed)
    sparselab.prune_checkpoint(*opened, tokens, "out", progress=False, resume=True)
    sparselab.prune_checkpoint(*opened, tokens, "quiet", progress=False)
    resumed, quiet = said("out"), said("quiet")
    assert resumed["results"]["checksums"] == quiet["results"]["checksums"]
    assert len(resumed["results"]["checksums"]) == 6
    assert resumed["results"]["layers"] == quiet["results"]["layers"]
    assert resumed["inputs"] == quiet["inputs"]
    assert resumed["machine"] == quiet["machine"] | {"resumed_after_blocks": 1}


def test_one_bit_makes_another_hash(llama):
    before = manifest.weights_hash(llama)
    assert before == manifest.weights_hash(tiny_llama())
    weight = llama.model.layers[1].mlp.up_proj.weight.data
    weight.view(torch.int32)[-1, -1] ^= 1
    assert manifest.weights_hash(llama) != before
    weight.view(torch.int32)[-1, -1] ^= 1
    assert manifest.weights_hash(llama) == before
    assert manifest.weights_hash(llama.double()) != before
    half = tiny_llama().bfloat16()
    assert manifest.weights_hash(half) == manifest.weights_hash(tiny_llama().bfloat16())


def test_the_configuration_counts_but_not_who_wrote_it(llama, monkeypatch):
    record = manifest.model_record("m", llama.config, "")
    llama.config._name_or_path = "/home/me/model"
    monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9")
    assert manifest.model_record("m", llama.config, "") == record
    llama.config.rms_norm_eps = 0.5
    assert manifest.model_record("m", llama.config, "")["config"] != record["config"]


def test_other_tokens_have_another_hash(tokens):
    assert manifest.tokens_hash(tokens) == manifest.tokens_hash(tokens.clone())
    assert manifest.tokens_hash(tokens) != manifest.tokens_hash(tokens.flip(0))
    other = tokens.clone()
    other[-1, -1] += 1
    assert manifest.tokens_hash(tokens) != manifest.tokens_hash(other)


def test_where_begin_of_sequence_tokens_stand(tokenizer):
    windows = sparselab.evaluation_tokens(tokenizer, TEXTS, 8, 16)
    record = manifest.windows_record(windows, tokenizer, TEXTS)
    assert record["bos"].startswith("one before each document;")
    assert record["bos_id"] == tokenizer.bos_token_id == 0
    assert record["windows_that_begin_with_bos"] == sum(row[0] == 0 for row in windows.tolist()) >= 1
    assert record["bos_in_all_windows"] == windows.flatten().tolist().count(0)
    assert "bos" not in manifest.windows_record(windows), "without a tokenizer nothing is known of it"
    each = sparselab.evaluation_tokens(tokenizer, TEXTS, 3, 16, bos="window")
    assert manifest.windows_record(each, tokenizer, "ptb")["bos"] == "one at the beginning of each window"
    assert manifest.windows_record(windows, tokenizer, "ptb")["bos"].startswith("as in the papers: one before all")


def test_tokenizers_that_add_no_token(tokenizer):
    windows = sparselab.evaluation_tokens(tokenizer, TEXTS, 8, 16)
    bare = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None})
    ))  # fmt: skip
    record = manifest.windows_record(windows, bare, TEXTS)
    assert record["bos"] == "none: the tokenizer has no such token"
    assert (record["bos_id"], record["bos_in_all_windows"]) == (None, 0)
    bare.bos_token = tokenizer.bos_token
    assert manifest.windows_record(windows, bare, TEXTS)["bos"] == "none: the tokenizer adds none"


def test_the_commit_of_a_model_from_the_hub(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    commit = "0123456789" * 4
    cached = here / "hub" / "models--me--mine"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert hub_revision("me/mine") == commit
    for name in ("me/another", "tiny", "model", "no/such/id", "a name", "x" * 300):
        assert hub_revision(name) is None


def test_a_manifest_is_read_from_its_file_or_folder():
    run("eval", "model", "--out", "out", *SMALL, 5)
    assert manifest.read("out") == manifest.read("out/sparselab.json") == said("out")
    Path("moved.json").write_text(Path("out/sparselab.json").read_text())
    assert manifest.read("moved.json")["command"] == "eval"


OLD = {"command": "compare", "settings": {"model": "tiny"}, "versions": {}, "python": "3.11.7", "files": []}
WHOLE = {**OLD, "settings": {"model": "m", "dataset": "d", "eval_dataset": "e"}, "inputs": {}, "machine": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read it (No such file or directory)"),
        ("", "found a damaged file"),
        ('{"command": "prune", ', "found a damaged file"),
        (b"\xff\xfe", "found a damaged file"),
        ("[" * 100_000, "found a damaged file"),
        ("[1, 2]", "found something else"),
        ('{"a": 1}', "found something else"),
        ({"command": "train"}, "found what `train` made, which is not replayed"),
        ({"command": ["prune"]}, "found something else"),
        (OLD, "found one of an earlier version, without results to compare; make it again"),
        ({**WHOLE, "results": []}, "found a damaged file (results is missing or no table)"),
        ({**WHOLE, "results": {}, "inputs": None}, "found a damaged file (inputs is missing or no table)"),
        ({**WHOLE, "results": {}, "settings": {"model": "m"}}, "cannot be replayed, as it does not name the dataset"),
        ({**WHOLE, "results": {}, "settings": {"model": ""}}, "cannot be replayed, as it does not name the model"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_said_in_one_line(content, message):
    path = Path("given.json")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        manifest.read(path)
    assert str(caught.value).startswith("given.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_one():
    with pytest.raises(
        ValueError, match=r"model: expected an output of compare, table, prune or eval with its sparselab.json"
    ):
        manifest.read("model")
