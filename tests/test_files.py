import json
import os
import subprocess

import pytest

from sparselab.errors import OutputError
from sparselab.files import STAMP, check_output, finished_output, prepare_output, write_stamp, write_text


def test_absent_empty_and_nested_folders_will_do(tmp_path):
    assert prepare_output(tmp_path / "a" / "b").is_dir()
    assert prepare_output(tmp_path / "a" / "b").is_dir()
    assert not check_output(tmp_path / "c" / "d").exists()


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=STAMP if overwrite else "--overwrite"):
            prepare_output(tmp_path, overwrite)
    assert (tmp_path / "precious").read_text() == "x"
    with pytest.raises(OutputError, match="found a file"):
        prepare_output(tmp_path / "precious")


def test_an_earlier_output_may_be_replaced(tmp_path):
    out = prepare_output(tmp_path / "out")
    write_stamp(out, "prune", {"method": "wanda"})
    (out / "old").write_text("x")
    with finished_output(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
        assert (out / "old").exists(), "the old one stands until the new one is done"
    assert [file.name for file in out.iterdir()] == ["new"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), finished_output(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(OutputError, match=r"out: cannot be written \(Read-only file system\); choose another --out"):
        check_output(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a read-only file system")
def test_a_truly_read_only_file_system(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("this machine allows no mounts")
    try:
        with pytest.raises(OutputError, match="Read-only file system"):
            check_output(tmp_path / "deep" / "out")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_stamp_and_text(tmp_path):
    write_stamp(tmp_path, "compare", {"sparsities": ("50%",)})
    stamp = json.loads((tmp_path / STAMP).read_text())
    assert stamp["command"] == "compare"
    assert stamp["settings"] == {"sparsities": ["50%"]}
    assert "torch" in stamp["versions"]
    write_text(tmp_path / "t", "λ")
    write_text(tmp_path / "t", "μ")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "μ"
    assert sorted(file.name for file in tmp_path.iterdir()) == [STAMP, "t"]
