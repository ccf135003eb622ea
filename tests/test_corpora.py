import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import TEXTS

from sparselab import corpora
from sparselab.corpora import calibration_tokens, documents, evaluation_tokens, stdlib_files


def names(split):
    root = Path(sysconfig.get_path("stdlib"))
    return {path.relative_to(root).parts[0].removesuffix(".py") for path in stdlib_files(split)}


def test_the_split_is_by_whole_modules_and_the_same_everywhere():
    train, held_out = names("train"), names("heldout")
    assert not train & held_out
    assert {"argparse", "asyncio", "json"} <= train
    assert {"dataclasses", "textwrap", "importlib"} <= held_out
    assert not {"test", "idlelib", "site-packages", "encodings", "tkinter"} & (train | held_out)
    for name in ("json", "textwrap"):
        expected = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 8 == 0
        assert corpora.is_heldout(name) == expected


@pytest.mark.usefixtures("untyped")
def test_the_order_mixes_modules():
    first = [path.parent.name + path.name for path in stdlib_files("train")[:20]]
    assert first != sorted(first)
    assert stdlib_files("train") == stdlib_files("train")
    with pytest.raises(ValueError, match="split"):
        stdlib_files("test")


def test_a_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'stdlib' needs a Python with its library"):
        stdlib_files("train")


def test_files_folders_and_strings(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / ".hidden").write_bytes(b"\xff\xfe")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("λ")
    assert documents(tmp_path) == ["one", "two", "λ"]
    assert documents(str(tmp_path / "b.txt")) == ["two"]
    assert documents(["x", "y"]) == ["x", "y"]


@pytest.mark.usefixtures("untyped")
def test_bad_datasets(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="dataset 'wikitext2': expected 'stdlib', an existing text file"):
        documents("wikitext2")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.txt: expected UTF-8"):
        documents(tmp_path / "binary.txt")
    with pytest.raises(TypeError, match="a int in it"):
        documents(["x", 3])
    with pytest.raises(ValueError, match="too little text in 0 given texts"):
        calibration_tokens(tokenizer, [], 1, 8)


def test_windows_are_drawn_by_seed_and_nested(tokenizer):
    draw = calibration_tokens(tokenizer, TEXTS, 12, 16, seed=3)
    assert draw.shape == (12, 16)
    assert draw.dtype == torch.long
    assert torch.equal(draw, calibration_tokens(tokenizer, TEXTS, 12, 16, seed=3))
    assert torch.equal(draw[:5], calibration_tokens(tokenizer, TEXTS, 5, 16, seed=3))
    assert not torch.equal(draw, calibration_tokens(tokenizer, TEXTS, 12, 16, seed=4))


def test_evaluation_is_in_order_and_drops_the_remainder(tokenizer):
    stream = corpora.token_stream(tokenizer, TEXTS)
    windows = evaluation_tokens(tokenizer, TEXTS, seqlen=50)
    assert torch.equal(windows.flatten(), stream[: len(stream) // 50 * 50])
    assert torch.equal(evaluation_tokens(tokenizer, TEXTS, 3, 50), windows[:3])


def test_special_tokens_once_a_document(tokenizer):
    stream = corpora.token_stream(tokenizer, ["a", "b"])
    assert (stream == tokenizer.bos_token_id).sum() == 2
    assert stream[0] == tokenizer.bos_token_id


def test_too_little_text_says_how_many_tokens(tokenizer):
    found = len(corpora.token_stream(tokenizer, ["short"]))
    with pytest.raises(ValueError, match=rf"3 windows of 8 tokens need 24, found {found}"):
        calibration_tokens(tokenizer, ["short"], 3, 8)
    for wrong in ({"nsamples": 0}, {"seqlen": 0}, {"nsamples": -1}):
        with pytest.raises(ValueError, match="expected at least 1"):
            calibration_tokens(tokenizer, TEXTS, **{"nsamples": 2, "seqlen": 8} | wrong)


def test_stdlib_calibration_and_evaluation_share_nothing(tokenizer):
    calib = calibration_tokens(tokenizer, nsamples=50, seqlen=64)
    held_out = evaluation_tokens(tokenizer, nsamples=50, seqlen=64)
    assert not {tuple(row) for row in calib.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_an_empty_name_is_not_the_current_folder_and_seeds_are_not_negative(tokenizer):
    with pytest.raises(ValueError, match="dataset '': expected 'stdlib'"):
        documents("")
    with pytest.raises(ValueError, match="seed: expected a whole number from 0, received -1"):
        calibration_tokens(tokenizer, TEXTS, 2, 16, seed=-1)


@pytest.mark.usefixtures("untyped")
def test_a_text_in_place_of_a_name_and_no_seed(tokenizer):
    with pytest.raises(ValueError, match=r"dataset 'word .*\[\.\.\.\]': expected 'stdlib'"):
        documents("word " * 2000)
    with pytest.raises(ValueError, match="received None"):
        calibration_tokens(tokenizer, TEXTS, 2, 16, seed=None)
