import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselab import sources, training
from sparselab.errors import OutputError
from sparselab.training import TrainConfig, learning_rate, train, train_tokenizer

SMALL = TrainConfig(
    vocab_size=280, hidden_size=16, intermediate_size=24, blocks=2, heads=2, seqlen=32, steps=8, batch_size=2, warmup=2,
    packages=("jinja2",), learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Training reads what is given here instead of the whole library."""
    for module in (sources, training):
        monkeypatch.setattr(module, "stdlib_documents", lambda split: TEXTS if split == "train" else TEXTS[::-1])
    monkeypatch.setattr(training, "_package_documents", lambda _: iter(TEXTS[:5] * 4))


def test_a_trained_folder_is_a_model(tmp_path):
    result = train(tmp_path / "m", SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 2
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"], skip_special_tokens=True) == "def f(x):"
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"| held-out perplexity | {result} (" in card
    assert "bits per byte" in card
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "sparselab.json", "tokenizer.json",
        "tokenizer_config.json", "training.jsonl",
    ]  # fmt: skip
    last = json.loads((tmp_path / "m" / "training.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8


def test_training_learns(tmp_path):
    few, many = (TrainConfig(**vars(SMALL) | {"steps": steps}) for steps in (1, 60))
    assert float(train(tmp_path / "many", many)) < 0.7 * float(train(tmp_path / "few", few))


def test_resumed_weights_equal_uninterrupted_ones(tmp_path, unfinished, monkeypatch):
    with pytest.raises(OutputError, match="pass --resume"):
        train(unfinished, SMALL)
    with pytest.raises(OutputError, match="other settings of steps"):
        train(unfinished, TrainConfig(**vars(SMALL) | {"steps": 9}), resume=True)
    train(unfinished, SMALL, resume=True)
    monkeypatch.setattr(training, "_MINUTES_BETWEEN_CHECKPOINTS", math.inf)
    train(tmp_path / "whole", SMALL)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (unfinished / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_schedule():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_tokenizer_takes_any_text():
    tokenizer = train_tokenizer(TEXTS, TrainConfig(vocab_size=280))
    text = "naïve 猫\t\r\n  x"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 280
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="package 'not_there' is not installed"):
        list(training._package_documents(["not_there"]))


def test_copies_of_held_out_modules_are_left_out(monkeypatch, tmp_path):
    monkeypatch.undo()
    root = tmp_path / "copycat"
    (root / "tests").mkdir(parents=True)
    held_out = sources.stdlib_files("heldout")[0].read_text(encoding="utf-8")
    own = "".join(f"this_is_a_line_of_its_own_and_long_enough = {i}\n" for i in range(50))
    for name, text in {"__init__.py": own, "copied.py": held_out, "tests/test_x.py": own}.items():
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(training._package_documents(["copycat"])) == [own]


def test_loss_of_a_fresh_model_is_that_of_guessing(tmp_path):
    stream = torch.randint(0, 280, (500,))
    run = training._Run(SMALL, tmp_path, torch.device("cpu"), [stream], stream.view(-1, 50)[:2])
    assert run._loss(run._batch()).item() == pytest.approx(math.log(280), rel=0.05)


def test_resuming_touches_no_folder_that_holds_something_else(tmp_path):
    for name in ("README.md", "checkpoint.pt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match=r"did not write them"):
            train(tmp_path, SMALL, resume=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "checkpoint.pt"]


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A folder with the checkpoint of a training that was interrupted after five steps."""
    real = training._Run._one_step

    def interrupted(self, compute_loss):
        if self.step == 5:
            raise KeyboardInterrupt
        return real(self, compute_loss)

    monkeypatch.setattr(training, "_MINUTES_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(training._Run, "_one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m", SMALL)
    monkeypatch.setattr(training._Run, "_one_step", real)
    return tmp_path / "m"


def test_an_unfinished_training_is_a_checkpoint_and_a_stamp(unfinished):
    assert sorted(file.name for file in unfinished.iterdir()) == ["checkpoint.pt", "sparselab.json"]
    (unfinished / "notes").write_text("mine")
    with pytest.raises(OutputError, match="did not write, first notes; move them"):
        train(unfinished, SMALL, resume=True)
    assert len(list(unfinished.iterdir())) == 3


def test_what_others_put_beside_the_checkpoint_stays_theirs(unfinished, monkeypatch):
    real = training._Run._save

    def somebody_comes(self):
        real(self)
        (unfinished / "notes").write_text("mine")

    monkeypatch.setattr(training._Run, "_save", somebody_comes)
    with pytest.raises(OutputError, match="did not write, first notes; move them"):
        train(unfinished, SMALL, resume=True)
    (unfinished / "notes").unlink()
    monkeypatch.setattr(training._Run, "_save", real)
    train(unfinished, SMALL, resume=True)
    assert (unfinished / "model.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "foreign"])
def test_damaged_checkpoints(unfinished, content):
    path = unfinished / "checkpoint.pt"
    torch.save({"step": 3}, path) if content is None else path.write_bytes(content)
    with pytest.raises(OutputError, match=r"checkpoint\.pt: cannot be read as a checkpoint"):
        train(unfinished, SMALL, resume=True)


def test_files_put_beside_the_checkpoint_meanwhile_stop_the_end_and_lose_nothing(unfinished, monkeypatch):
    real = training._write_model

    def somebody_comes(model, folder):
        (unfinished / "notes").write_text("mine")
        real(model, folder)

    monkeypatch.setattr(training, "_write_model", somebody_comes)
    with pytest.raises(OutputError, match="meanwhile") as caught:
        train(unfinished, SMALL, resume=True)
    assert sorted(file.name for file in unfinished.iterdir()) == ["checkpoint.pt", "notes", "sparselab.json"]
    kept = caught.value.__notes__[0].rpartition(" ")[2]
    AutoModelForCausalLM.from_pretrained(kept)


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        ({"packages": ("no.such.package",)}, "cpu", "'no.such.package' is not installed"),
        ({"seqlen": 10**8}, "cpu", r"seqlen: expected at most the \d+ tokens"),
        ({}, "abacus", "device: expected one of cpu"),
    ],
)
def test_what_fails_before_the_first_step_writes_nothing(tmp_path, changes, device, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "deep" / "m", replace(SMALL, **changes), device=device)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", 0, "expected at least 1"), ("batch_size", 0, "at least 1"), ("heads", 0, "at least 1"),
        ("heads", 3, "hidden_size: expected a multiple"), ("vocab_size", 0, "at least 258"), ("seed", -1, "at least 0"),
        ("warmup", -1, "at least 0"), ("stdlib_share", 5.0, "from 0 to 1"), ("learning_rate", math.nan, "from 0 to 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(name, value, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **{name: value})


def test_a_full_disk_shows_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="MB free; make room or write elsewhere"):
        train(tmp_path / "deep" / "m", SMALL)
    assert list(tmp_path.iterdir()) == []
