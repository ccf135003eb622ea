import copy
import os
import random

import pytest
import torch
from conftest import TEXTS

from sparselab import corpora, files
from sparselab.corpora import calibration_tokens, evaluation_tokens


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


def test_seeds_are_whole_numbers_from_0(tokenizer):
    with pytest.raises(ValueError, match="seed: expected a whole number from 0, received -1"):
        calibration_tokens(tokenizer, TEXTS, 2, 16, seed=-1)


@pytest.mark.usefixtures("untyped")
def test_no_seed(tokenizer):
    with pytest.raises(ValueError, match="received None"):
        calibration_tokens(tokenizer, TEXTS, 2, 16, seed=None)


@pytest.mark.parametrize(("name", "joiner"), [("wikitext2", "\n\n"), ("ptb", " ")])
def test_crops_are_those_of_the_published_loaders(tokenizer, hub_copies, name, joiner):
    ids = tokenizer(joiner.join(hub_copies[name]["train"]))["input_ids"]
    rng, expected = random.Random(3), []
    for _ in range(5):
        start = rng.randint(0, len(ids) - 32 - 1)
        expected.append(ids[start : start + 32])
    assert calibration_tokens(tokenizer, name, 5, 32, seed=3).tolist() == expected


def test_c4_is_crops_of_long_documents(tokenizer, hub_copies):
    texts = hub_copies["c4"]["train"]
    rng, expected = random.Random(0), []
    for _ in range(6):
        while True:
            ids = tokenizer(texts[rng.randint(0, len(texts) - 1)])["input_ids"]
            if len(ids) > 40:
                break
        start = rng.randint(0, len(ids) - 40 - 1)
        expected.append(ids[start : start + 40])
    assert calibration_tokens(tokenizer, "c4", 6, 40).tolist() == expected


def test_where_no_document_is_long_enough_they_are_packed(tokenizer, hub_copies):
    longest = max(len(tokenizer(text)["input_ids"]) for text in hub_copies["c4"]["train"])
    packed = calibration_tokens(tokenizer, "c4", 2, longest + 1)
    assert packed.shape == (2, longest + 1)
    assert (packed == tokenizer.bos_token_id).any()


@pytest.mark.parametrize(("name", "joiner"), [("wikitext2", "\n\n"), ("ptb", " "), ("c4", " ")])
def test_evaluation_text_is_joined_and_begins_once(tokenizer, hub_copies, name, joiner):
    ids = tokenizer(joiner.join(hub_copies[name]["heldout"]))["input_ids"]
    windows = evaluation_tokens(tokenizer, name, seqlen=32)
    most = 256 if name == "c4" else len(ids)
    assert windows.flatten().tolist() == ids[: min(len(ids) // 32, most) * 32]
    assert (windows == tokenizer.bos_token_id).sum() == 1


def test_of_c4_there_are_256_windows_at_most(tokenizer, hub_copies):
    assert len(evaluation_tokens(tokenizer, "c4", seqlen=8)) == 256
    with pytest.raises(ValueError, match="at most 256 windows of c4, received 257"):
        evaluation_tokens(tokenizer, "c4", 257, seqlen=8)


def test_a_text_shorter_than_a_crop(tokenizer, hub_copies):
    with pytest.raises(ValueError, match="too little text in ptb: 1 windows of 100000 tokens"):
        calibration_tokens(tokenizer, "ptb", 2, 100_000)


def test_conversations_are_written_by_the_chat_template(tokenizer, tmp_path):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        written = corpora.token_stream(tokenizer, [talk, "z"])
        assert written.tolist() == [
            *tokenizer("<user>x<assistant>y", add_special_tokens=False)["input_ids"],
            *tokenizer("z")["input_ids"],
        ]
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer no chat template"):
        corpora.token_stream(tokenizer, [talk])


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of kept tokens, empty, and even short texts worth it."""
    monkeypatch.setenv("SPARSELAB_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora, "_WORTH_KEEPING", 1)
    return tmp_path / "tokens"


@pytest.fixture
def tokenised(monkeypatch):
    """Which texts were really tokenised."""
    seen, really = [], corpora._tokenised
    monkeypatch.setattr(corpora, "_tokenised", lambda *given: seen.append(given) or really(*given))
    return seen


def test_a_text_is_tokenised_once_by_each_tokenizer(tokenizer, cache, tokenised):
    first = corpora.token_stream(tokenizer, TEXTS)
    again = corpora.token_stream(copy.deepcopy(tokenizer), list(TEXTS))
    assert torch.equal(first, again)
    assert first.dtype == again.dtype == torch.long
    assert (len(tokenised), len(list(cache.iterdir()))) == (1, 1)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["return"])
    others = [(other, TEXTS), (tokenizer, [*TEXTS, "one more"]), (tokenizer, ["".join(TEXTS)])]
    for number, (which, texts) in enumerate(others, 2):
        assert not torch.equal(corpora.token_stream(which, texts), first)
        assert len(tokenised) == len(list(cache.iterdir())) == number


def test_short_texts_are_not_kept(tokenizer, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_WORTH_KEEPING", 100)
    corpora.token_stream(tokenizer, ["short"])
    assert not cache.exists()


def test_tokens_that_were_damaged_on_disk_are_made_again(tokenizer, cache, tokenised):
    first = corpora.token_stream(tokenizer, TEXTS)
    (file,) = cache.iterdir()
    for damaged in (file.read_bytes()[:-1] + b"\x7f", b"no safetensors"):
        file.write_bytes(damaged)
        assert torch.equal(corpora.token_stream(tokenizer, TEXTS), first)
    assert len(tokenised) == 3


def test_only_the_last_used_are_kept(tokenizer, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_MOST_KEPT", 2)
    names = []
    for text in ("aaaa", "bbbb", "cccc"):
        corpora.token_stream(tokenizer, ["aaaa"])  # used again, and so younger than the others
        corpora.token_stream(tokenizer, [text])
        names.append({file.name for file in cache.iterdir()})
        for age, file in enumerate(sorted(cache.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)):
            os.utime(file, (1e9 - age, 1e9 - age))  # clocks are coarse
    assert len(names[0]) == 1
    assert len(names[2]) == 2
    assert names[0] < names[2]


def test_a_cache_that_cannot_be_written_is_no_error(tokenizer, cache, monkeypatch):
    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "written_whole", full)
    assert len(corpora.token_stream(tokenizer, TEXTS)) > 100


@pytest.mark.parametrize("make", [calibration_tokens, evaluation_tokens])
def test_each_window_begins_with_bos_if_one_says_so(tokenizer, make):
    windows = make(tokenizer, TEXTS, 8, 16, bos="window")
    assert windows.shape == (8, 16)
    assert (windows == tokenizer.bos_token_id).nonzero().tolist() == [[row, 0] for row in range(8)]
    bare = [row for text in TEXTS for row in tokenizer(text, add_special_tokens=False)["input_ids"]]
    cut = {tuple(bare[start : start + 15]) for start in range(0, len(bare) - 14, 15)}
    assert {tuple(row[1:]) for row in windows.tolist()} <= cut


def test_bos_of_the_papers_corpora(tokenizer, hub_copies):
    for name in ("wikitext2", "c4"):
        windows = calibration_tokens(tokenizer, name, 4, 16, bos="window")
        assert (windows == tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * 4
        assert (windows[:, 0] == tokenizer.bos_token_id).all()


def test_bos_that_cannot_be(tokenizer):
    with pytest.raises(ValueError, match="seqlen: expected at least 1"):
        evaluation_tokens(tokenizer, TEXTS, 2, 1, bos="window")
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="bos: expected 'document', as the model's tokenizer has no"):
        calibration_tokens(without, TEXTS, 2, 16, bos="window")


@pytest.mark.usefixtures("untyped")
def test_bos_is_one_of_two(tokenizer):
    with pytest.raises(ValueError, match="bos: expected 'document' or 'window', received 'all'"):
        calibration_tokens(tokenizer, TEXTS, 2, 16, bos="all")
