"""Small models, a small tokenizer, and shapes checked at run time in everything that handles tensors."""

import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

from jaxtyping import config, install_import_hook

_PACKAGE = Path(__file__).parent.parent / "sparselab"
_UNCHECKED = {"arguments", "cli", "course", "errors", "files", "journal", "misprints", "parameters"}
_CHECKED = {path.stem for path in _PACKAGE.glob("[!_]*")} - _UNCHECKED - {"solvers"}
# Module by module: a checked function is wrapped, and Triton's compiler has to see kernels as they are written.
_CHECKED |= {f"solvers.{path.stem}" for path in _PACKAGE.glob("solvers/*.py")}
install_import_hook([f"sparselab.{name}" for name in sorted(_CHECKED)], "runtime_types.check")

os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory(prefix="sparselab-cache-")  # nothing that an earlier version has measured
os.environ["SPARSELAB_CACHE"] = _cache.name
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make small work crawl on a busy machine
if jobs := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

import pandas as pd
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

import sparselab
from sparselab.training import TrainConfig, train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n\n\nclass C{i}:\n    value = {i}\n" * 3 for i in range(60)]


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


def tiny_opt(**changes) -> OPTForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    }  # fmt: skip
    return OPTForCausalLM(OPTConfig(**shape | changes)).eval()


FAMILIES = {
    "llama": tiny_llama,
    "opt": tiny_opt,
    "opt-projected": lambda: tiny_opt(word_embed_proj_dim=16, do_layer_norm_before=False),
}


def chrome() -> str | None:
    """Where a browser is, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what this machine cannot run."""
    cannot = {"gpu": not torch.cuda.is_available(), "network": os.environ["HF_HUB_OFFLINE"] == "1"}
    needs = {name: f"a {name}" for name, lacking in cannot.items() if lacking}
    if chrome() is None:
        needs["browser"] = "a browser: install Debian's chromium (apt-get install chromium), or Chrome"
    for item in items:
        for name, what in needs.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))


@pytest.fixture(params=FAMILIES)
def family(request):
    """Makes the same model anew at every call."""
    return FAMILIES[request.param]


@pytest.fixture
def model(family) -> PreTrainedModel:
    return family()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (10, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, TrainConfig(vocab_size=300))


@pytest.fixture(scope="session")
def bundled():
    """The bundled model, its tokenizer and its windows; tests put back what they change."""
    model, tokenizer = sparselab.load("tiny", device="cpu")
    calib = sparselab.calibration_tokens(tokenizer, nsamples=64)
    held_out = sparselab.evaluation_tokens(tokenizer, nsamples=200)
    return model, tokenizer, calib, held_out


@pytest.fixture(scope="session")
def small(tmp_path_factory, tokenizer):
    """A folder with a small model and two texts, as parameters of a run that takes no time."""
    folder = tmp_path_factory.mktemp("small")
    tiny_llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "calibration.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (folder / "evaluation.txt").write_text("\n".join(TEXTS[:20]), encoding="utf-8")
    texts = {"dataset": str(folder / "calibration.txt"), "eval_dataset": str(folder / "evaluation.txt")}
    sizes = {"seqlen": 16, "eval_nsamples": 5, "nsamples": 8, "blocksize": 16}
    return {"model": str(folder / "model")} | texts | sizes


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """The table that problem set 3 asks for, as a sweep makes it."""
    from sparselab.course.handed_in import FIXED, METHODS, SEEDS
    from sparselab.experiment import RunConfig, TextConfig, Workbench
    from sparselab.results import read_sweep

    model, tokenizer = sparselab.load("tiny", "cpu")
    folder = tmp_path_factory.mktemp("runs")
    text = TextConfig(eval_nsamples=FIXED["eval_nsamples"])
    bench = Workbench(model, tokenizer, "tiny", text, folder, measure="perplexity")
    for method in METHODS:
        for seed in range(SEEDS):
            bench.run(RunConfig(method, FIXED["pattern"], nsamples=FIXED["nsamples"], seed=seed))
    return read_sweep(folder)


@pytest.fixture
def hub_copies(tmp_path, monkeypatch):
    """Copies of the papers' corpora, laid out as on the hub; the texts by corpus and side."""
    lines = {name: [f"{name} {text}" for text in TEXTS] for name in ("wikitext2", "ptb", "c4")}
    texts = {name: {"train": some, "heldout": [f"held out {text}" for text in some]} for name, some in lines.items()}
    for name, (folder, column) in {
        "wikitext2": ("Salesforce/wikitext/wikitext-2-raw-v1/{}-00000-of-00001.parquet", "text"),
        "ptb": ("ptb-text-only/ptb_text_only/penn_treebank/{}/0000.parquet", "sentence"),
    }.items():
        for split, side in (("train", "train"), ("test", "heldout")):
            path = tmp_path / folder.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame({column: texts[name][side]}).to_parquet(path)
    (tmp_path / "allenai/c4/en").mkdir(parents=True)
    for shard, side in (("train.00000-of-01024", "train"), ("validation.00000-of-00008", "heldout")):
        with gzip.open(tmp_path / f"allenai/c4/en/c4-{shard}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "url": ""}) + "\n" for text in texts["c4"][side])
    monkeypatch.setenv("SPARSELAB_DATASETS", str(tmp_path))
    return texts


@pytest.fixture
def untyped():
    """No run-time types inside: what a user sees who passes something wrong."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
