import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from sparselab import files
from sparselab.errors import OutputError
from sparselab.files import STAMP, check_output, finished_output, read_stamp, write_stamp, write_text

ROOT = Path(__file__).parents[1]


def tree(folder: Path) -> dict[str, str | None]:
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def an_output(folder: Path) -> Path:
    """What a run has left behind."""
    with finished_output(folder) as partial:
        (partial / "old").write_text("x")
        write_stamp(partial, "prune", {"method": "wanda"})
    return folder


def test_absent_empty_and_nested_folders_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c", "a/b/d"):
        with finished_output(tmp_path / name) as partial:
            (partial / "result").write_text(name)
        assert tree(tmp_path / name) == {"result": name}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", ["c/d", "c/../e", "full/new/..", "file", "file/below", "n" * 300])
def test_the_check_leaves_everything_as_it_was(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    before = tree(tmp_path)
    if name in ("c/d", "c/../e"):
        assert check_output(tmp_path / name) == (tmp_path / name).resolve()
    else:
        with pytest.raises(OutputError, match=r"choose another --out"):
            check_output(tmp_path / name, overwrite=True)
    assert tree(tmp_path) == before


def test_a_way_back_up_does_not_lead_past_the_checks(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(OutputError, match="did not write them"):
        with finished_output(tmp_path / "new" / "..") as partial:
            (partial / "result").write_text("y")
    assert tree(tmp_path) == {"precious": "x"}


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    out = an_output(tmp_path / "out")
    with pytest.raises(OutputError, match="pass --overwrite or another --out"):
        check_output(out)
    (out / "notes").write_text("mine")
    with pytest.raises(OutputError, match="did not write, first notes; move them"):
        check_output(out, overwrite=True)
    (out / STAMP).write_text("{")
    with pytest.raises(OutputError, match=f"no {STAMP}"):
        check_output(out, overwrite=True)
    assert (out / "notes").read_text() == "mine"


def test_an_earlier_output_may_be_replaced(tmp_path):
    out = an_output(tmp_path / "out")
    with finished_output(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
        assert (out / "old").exists(), "the old one stands until the new one is done"
    assert tree(tmp_path) == {"out": None, "out/new": "y"}
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_stamp_that_lists_no_files_still_counts(tmp_path):
    out = an_output(tmp_path / "out")
    stamp = read_stamp(out)
    del stamp["files"]
    (out / STAMP).write_text(json.dumps(stamp))
    assert check_output(out, overwrite=True) == out


@pytest.mark.parametrize("stamped", [False, True])
def test_a_failure_leaves_what_is_finished_and_nothing_else(tmp_path, stamped):
    with pytest.raises(RuntimeError, match="half way") as caught, finished_output(tmp_path / "a" / "out") as partial:
        (partial / "half").write_text("x")
        if stamped:
            write_stamp(partial, "compare", {})
        raise RuntimeError("half way")
    if stamped:
        assert caught.value.__notes__ == [f"what was finished is kept in {partial}"]
        assert tree(partial).keys() == {"half", STAMP}
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("how", ["a file inside", "a file in its place", "a link in its place"])
def test_what_somebody_writes_there_meanwhile_is_kept_and_so_is_the_work(tmp_path, earlier, how):
    out = an_output(tmp_path / "out") if earlier else tmp_path / "out"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("x")
    with pytest.raises(OutputError, match="meanwhile") as caught, finished_output(out, overwrite=True) as partial:
        (partial / "result").write_text("y")
        if how == "a file inside":
            out.mkdir(exist_ok=True)
            (out / "precious").write_text("x")
        else:
            shutil.rmtree(out, ignore_errors=True)
            out.symlink_to(tmp_path / "theirs") if "link" in how else out.write_text("x")
    kept = out if out.is_file() else out / "precious"
    assert kept.read_text() == "x"
    assert (out / "old").exists() == (earlier and how == "a file inside")
    assert caught.value.__notes__ == [f"what was finished is kept in {partial}"]
    assert tree(partial) == {"result": "y"}


@pytest.mark.parametrize("where", [".", "below", "..", "link", "link/below"])
def test_what_is_read_is_not_written_to(tmp_path, where):
    model = an_output(tmp_path / "around" / "model")
    (tmp_path / "around" / "link").symlink_to(model)
    write_stamp(tmp_path / "around", "prune", {})
    before = tree(tmp_path)
    out = tmp_path / "around" / where if "link" in where else model / where
    with pytest.raises(OutputError, match=r"model, which is read; choose another --out"):
        check_output(out, overwrite=True, inputs=["no/such", model])
    assert tree(tmp_path) == before


def test_the_current_folder_and_links(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("", ".", tmp_path / "here"):
        with pytest.raises(OutputError, match="current folder, which cannot be replaced; choose a folder inside"):
            check_output(path)
    Path("dangling").symlink_to("there")
    for _ in range(2):
        with finished_output("dangling", overwrite=True) as partial:
            write_stamp(partial, "prune", {})
        assert Path("dangling").is_symlink()
        assert tree(Path("there")).keys() == {STAMP}
    Path("loop").symlink_to("loop")
    with pytest.raises(OutputError, match="loop: cannot be written"):
        check_output("loop")


def test_a_read_only_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tempfile.TemporaryDirectory", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(OutputError, match=r"out: cannot be written \(Read-only file system\); choose another --out"):
        check_output(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system on a folder."""
    mounts = []

    def mount(options: str) -> Path:
        (folder := tmp_path / "mount").mkdir()
        if os.geteuid() != 0:
            pytest.skip("needs root to mount a file system")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("this machine allows no mounts")
        mounts.append(folder)
        return folder

    yield mount
    for folder in mounts:
        subprocess.run(["umount", folder], check=True)


def test_a_truly_read_only_file_system(mounted):
    with pytest.raises(OutputError, match="Read-only file system"):
        check_output(mounted("ro") / "deep" / "out")


def test_a_mount_point_is_refused_before_the_work(mounted):
    folder = mounted("rw")
    with pytest.raises(OutputError, match="mount point"):
        check_output(folder)
    an_output(folder / "out")


def test_a_name_that_is_a_mount_point(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(OutputError, match="mount point"):
        check_output(tmp_path)


def test_stamp_and_text(tmp_path):
    write_stamp(tmp_path, "compare", {"sparsities": ("50%",)})
    stamp = read_stamp(tmp_path)
    assert stamp["command"] == "compare"
    assert stamp["settings"] == {"sparsities": ["50%"]}
    assert "torch" in stamp["versions"]
    write_text(tmp_path / "t", "λ")
    write_text(tmp_path / "t", "μ")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "μ"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "t", "\ud800")
    assert sorted(file.name for file in tmp_path.iterdir()) == [STAMP, "t"]
    write_stamp(tmp_path, "compare", {})
    assert read_stamp(tmp_path)["files"] == [STAMP, "t"]


def test_what_comes_with_the_package_is_found_in_a_checkout_and_in_an_installed_one(tmp_path, monkeypatch):
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert included["force-include"] == {
        name: f"sparselab/{name}" for name in ("data/tiny", "benchmarks/published.csv", "notebooks/sweep_run.ipynb")
    }
    for name in included["force-include"]:
        assert files.bundled(name) == ROOT / name
        assert files.bundled(name).exists()
    installed = tmp_path / "sparselab" / "data" / "tiny"
    installed.mkdir(parents=True)
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "sparselab")
    assert files.bundled("data/tiny") == installed
