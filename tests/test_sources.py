import gzip
import hashlib
import sys
import sysconfig
from pathlib import Path

import pandas as pd
import pytest

from sparselab import sources
from sparselab.models import loading
from sparselab.sources import source, stdlib_files


def documents(dataset, split="train"):
    return list(source(dataset, split).documents)


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
        assert sources.is_heldout(name) == expected


@pytest.mark.usefixtures("untyped")
def test_the_order_mixes_modules():
    first = [path.parent.name + path.name for path in stdlib_files("train")[:20]]
    assert first != sorted(first)
    assert stdlib_files("train") == stdlib_files("train")
    with pytest.raises(ValueError, match="split"):
        source("stdlib", "test")


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
    assert sources.describe(tmp_path / "b.txt") == "b.txt"


def test_an_empty_folder_has_no_documents(tmp_path):
    assert documents(tmp_path) == []
    with pytest.raises(ValueError, match="expected files of split 'dev', found those of none"):
        documents(f"{tmp_path}::dev")


@pytest.mark.usefixtures("untyped")
def test_bad_datasets(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.txt: expected UTF-8"):
        documents(tmp_path / "binary.txt")
    with pytest.raises(TypeError, match="a int in it"):
        documents(["x", 3])
    for name, shown in (("", "''"), ("word " * 2000, r"'word .*\[\.\.\.\]'"), ("a:b:c:d:e", "'a:b:c:d:e'")):
        with pytest.raises(
            ValueError, match=f"dataset {shown}: expected 'stdlib', 'wikitext2', 'ptb', 'c4', an existing file"
        ):
            documents(name)


@pytest.mark.parametrize("name", ["wikitext2", "somebody/something:english:train:body"])
def test_without_the_hub_one_line_says_what_can_be_used(name):
    with pytest.raises(ValueError, match="the hub cannot be reached; without it 'stdlib', text") as caught:
        documents(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'sparselab\[data\]'"):
        documents("wikitext2")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json.gz"])
def test_a_record_a_line(tmp_path, name):
    path = tmp_path / name
    with gzip.open(path, "wt") if name.endswith(".gz") else path.open("w") as file:
        file.write('{"text": "one", "url": "a"}\n{"text": "two", "url": "b"}\n')
    assert documents(path) == ["one", "two"]
    assert documents(f"{path}:::url") == ["a", "b"]
    with pytest.raises(ValueError, match="expected a column of texts or conversations, received body of text, url"):
        documents(f"{path}:::body")


def test_parquet_and_its_columns(tmp_path):
    talk = [{"role": "user", "content": "hello"}]
    pd.DataFrame({"messages": [talk, talk], "n": [1, 2]}).to_parquet(tmp_path / "talks.parquet")
    assert documents(tmp_path / "talks.parquet") == [talk, talk]
    pd.DataFrame({"sentence": ["a", "b"], "n": [1, 2]}).to_parquet(tmp_path / "lines.parquet")
    assert documents(tmp_path / "lines.parquet") == ["a", "b"], "the only column of strings"
    pd.DataFrame({"n": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="received none named of n; name it as name:config:split:column"):
        documents(tmp_path / "numbers.parquet")


@pytest.mark.parametrize("content", [b"not json", b"[1]\n", b"\xff\xfe"])
def test_damaged_records(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jsonl: expected one JSON record a line"):
        documents(tmp_path / "x.jsonl")
    (tmp_path / "x.json.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json\.gz: expected one JSON record a line"):
        documents(tmp_path / "x.json.gz")
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet: expected a parquet file"):
        documents(tmp_path / "x.parquet")


def test_a_folder_of_splits(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / "english").mkdir(exist_ok=True)
        pd.DataFrame({"text": [split]}).to_parquet(tmp_path / "english" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("no text of the dataset")
    assert documents(tmp_path) == ["train"]
    assert documents(tmp_path, "heldout") == ["test"]
    assert documents(f"{tmp_path}:english:validation") == ["validation"]
    with pytest.raises(ValueError, match="expected files of split 'dev', found those of test, train, validation"):
        documents(f"{tmp_path}:english:dev")


def test_copies_of_the_papers_corpora(hub_copies):
    for name, texts in hub_copies.items():
        for split in ("train", "heldout"):
            assert documents(name, split) == texts[split]


@pytest.mark.usefixtures("hub_copies")
def test_a_copy_without_the_files(tmp_path):
    (tmp_path / "allenai/c4/en/c4-train.00000-of-01024.json.gz").unlink()
    with pytest.raises(ValueError, match=r"dataset 'c4': expected en/c4-train\.00000-of-01024\.json\.gz in"):
        documents("c4")


def test_other_datasets_of_the_hub(monkeypatch):
    """The library's own calls, on a hub that this test plays."""
    import datasets

    asked = []

    def load(name, config, **how):
        asked.append((name, config, how))
        return iter([{"body": "x", "text": "y"}] * 3)

    monkeypatch.setattr(loading, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    assert documents("who/what:english::body", "heldout") == ["x"] * 3
    assert documents("who/what") == ["y"] * 3
    assert documents("c4")[:1] == ["y"]
    assert asked == [
        ("who/what", "english", {"split": "validation", "streaming": False}),
        ("who/what", None, {"split": "train", "streaming": False}),
        (
            "allenai/c4",
            None,
            {
                "split": "all",
                "streaming": True,
                "data_files": {"all": "en/c4-train.00000-of-01024.json.gz"},
                "revision": None,
            },
        ),
    ]


def test_the_library_reads_local_datasets_laid_out_as_the_hubs(tmp_path, monkeypatch):
    """`datasets` itself on a folder with configurations: what a name of the hub would go through."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        pd.DataFrame({"text": [f"{split} {n}" for n in range(3)]}).to_parquet(folder / f"{split}-0.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files:\n  - split: train\n    path: train-*\n"
        "  - split: test\n    path: test-*\n---\n"
    )
    wanted = sources._Wanted("name", str(folder), "english")
    assert [each["text"] for each in wanted._of_hub("heldout", None)] == ["test 0", "test 1", "test 2"]
    assert [each["text"] for each in wanted._of_hub("train", 2)] == ["train 0", "train 1"]
