import pytest
import torch
from conftest import TEXTS, tiny_llama

from sparselab import completions, evaluation_tokens, load, prune
from sparselab.cli import main
from sparselab.samples import as_text, held_out_prompts


@pytest.fixture
def folders(tokenizer, tmp_path):
    """A dense model and what is left of it."""
    model = tiny_llama()
    for name in ("dense", "pruned"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        prune(model, None, "magnitude", "80%", progress=False)
    return [str(tmp_path / name) for name in ("dense", "pruned")]


def greedy(folder, prompt, count):
    """The likeliest token, one after the other."""
    model, tokenizer = load(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids], device=model.device)).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_completions_are_greedy_and_those_of_each_model(folders):
    prompts = ["def f1(x):", "class C2:\n    value"]
    table = completions(folders, prompts, 6)
    assert list(table) == ["prompt", *folders]
    assert table.prompt.tolist() == prompts
    for folder in folders:
        assert table[folder].tolist() == [greedy(folder, prompt, 6) for prompt in prompts]
    assert (table[folders[0]] != table[folders[1]]).any()


def test_prompts_lie_evenly_over_the_text_and_are_followed_by_it(tokenizer):
    found = held_out_prompts(tokenizer, TEXTS, 3, 10, 6)
    windows = evaluation_tokens(tokenizer, TEXTS, None, 16)
    for row, start in zip(found.itertuples(), range(0, len(windows), len(windows) // 3), strict=False):
        both = tokenizer.decode(windows[start].tolist(), skip_special_tokens=True)
        assert row.prompt + row.text == both
    assert len(found) == 3
    with pytest.raises(ValueError, match=rf"nsamples: expected from 1 to {len(windows)} prompts"):
        held_out_prompts(tokenizer, TEXTS, len(windows) + 1, 10, 6)


def test_what_makes_no_sense(folders):
    for models in ([], [folders[0], folders[0]]):
        with pytest.raises(ValueError, match="models: expected different ones, received"):
            completions(models, ["a"])
    for prompts in ([], ["a", ""]):
        with pytest.raises(ValueError, match="prompts: expected texts, received none or an empty one"):
            completions(folders, prompts)


def test_the_command_shows_them_one_under_another(folders, capsys):
    assert main(["samples", *folders, "--prompt", "def f1(x):", "--max-new-tokens", "5"]) == 0
    table = completions(folders, ["def f1(x):"], 5)
    assert capsys.readouterr().out == as_text(table) + "\n"
    assert main(["samples", *folders, "--nsamples", "2", "--prompt-tokens", "8", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("=====") == 2
    assert shown.count("----- what follows in the text") == shown.count(f"----- {folders[1]}") == 2
