"""lm-eval over a small model: its answers are those that the model's own logits say."""

import json
import sys

import pytest
import torch
from conftest import tiny_llama

from sparselab import evaluate_tasks
from sparselab.cli import main
from sparselab.models import loading

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, when lm-eval is imported

QUESTIONS = [
    {"question": "def f1(x):\n    return x *", "choices": [" 1", " 7", " x"], "answer": 0},
    {"question": "class C2:\n    value =", "choices": [" 2", " 3"], "answer": 0},
    {"question": "def f3(x):\n    return", "choices": [" x", " y", " class"], "answer": 0},
    {"question": "class C4:", "choices": ["\n    value", "\ndef"], "answer": 1},
    {"question": "value = 5", "choices": ["\nclass", "\nvalue", "\nreturn"], "answer": 2},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a task of one's own, whose data lie beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own").mkdir()
    data = tmp_path / "own" / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "own" / "own_questions.yaml").write_text(TASK.format(name="own_questions", data=data))
    return tmp_path / "own"


def chosen(model, tokenizer, question, choices):
    """The choice whose tokens are the likeliest, from the model's logits."""
    likelihoods = []
    for choice in choices:
        both = tokenizer(question + choice, add_special_tokens=False)["input_ids"]
        asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        first = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
        ids = torch.tensor([first + both])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(dim=-1)
        places = range(len(first) + asked - 1, ids.shape[1] - 1)
        likelihoods.append(sum(float(logs[place, ids[0, place + 1]]) for place in places))
    return likelihoods.index(max(likelihoods))


def test_accuracy_is_that_of_the_models_own_logits(tokenizer, folder):
    model = tiny_llama()
    table = evaluate_tasks(model, tokenizer, ["own_questions"], include_path=folder)
    right = [chosen(model, tokenizer, each["question"], each["choices"]) == each["answer"] for each in QUESTIONS]
    (row,) = table.to_dict("records")
    assert (row["task"], row["metric"], row["samples"]) == ("own_questions", "acc", len(QUESTIONS))
    assert row["value"] == sum(right) / len(right)
    assert 0 < row["value"] < 1, "else any answer would do"
    assert row["stderr"] > 0
    first = evaluate_tasks(model, tokenizer, ["own_*"], include_path=folder, limit=2, batch_size=2)
    assert (first.samples.item(), first.value.item()) == (2, sum(right[:2]) / 2)
    assert not model.training


def test_the_command_measures_tasks_and_texts_and_can_be_replayed(tokenizer, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} = 1\n" * 300)
    asked = ["--tasks", "own_questions", "--include-path", str(folder)]
    assert main(["eval", "model", *asked]) == 0
    shown = capsys.readouterr().out
    assert "own_questions    acc" in shown
    assert "perplexity" not in shown
    texts = ["--dataset", "one.txt", "two.txt", "--seqlen", "16", "--nsamples", "5"]
    assert main(["eval", "model", *texts, *asked, "--out", "out"]) == 0
    shown = capsys.readouterr().out
    for name in ("one", "two"):
        assert f"(5 windows of 16 tokens of {name}.txt)" in shown
    made = json.loads((tmp_path / "out" / "sparselab.json").read_text())
    assert set(made["inputs"]) == {"model", "evaluation, one.txt", "evaluation, two.txt"}
    assert made["results"]["two.txt, perplexity"] > 1
    assert made["results"]["tasks"][0]["metric"] == "acc"
    assert main(["replay", "out", "--tolerance", "0"]) == 0
    made["results"]["tasks"][0]["value"] += 0.2
    (tmp_path / "out" / "sparselab.json").write_text(json.dumps(made))
    capsys.readouterr()
    assert main(["replay", "out", "--tolerance", "0"]) == 1
    assert "own_questions acc, value" in capsys.readouterr().out


def test_what_cannot_be_had(tokenizer, folder, monkeypatch):
    model = tiny_llama()
    with pytest.raises(ValueError, match="tasks: 'no_such_task' is none of lm-eval's"):
        evaluate_tasks(model, tokenizer, ["no_such_task"], include_path=folder)
    with pytest.raises(ValueError, match="tasks: expected names in a list"):
        evaluate_tasks(model, tokenizer, [])
    monkeypatch.setattr(loading, "hub_answers", lambda: False)
    elsewhere = TASK.format(name="elsewhere", data="x").replace("path: json", "path: somebody/questions")
    (folder / "elsewhere.yaml").write_text(elsewhere.replace("dataset_kwargs: {data_files: {test: x}}\n", ""))
    with pytest.raises(
        ValueError, match="tasks: the data of elsewhere cannot be had: the hub cannot be reached; tasks"
    ):
        evaluate_tasks(model, tokenizer, ["elsewhere"], include_path=folder)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"tasks: need the package lm-eval .* pip install 'sparselab\[eval\]'"):
        evaluate_tasks(model, tokenizer, ["arc_easy"])
