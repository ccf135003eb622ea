import json

import pytest

from sparselab.errors import OutputError
from sparselab.journal import Journal, read_journal

WORK = {"percdamp": 0.01, "method": "wanda", "sizes": [1, 2]}


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", WORK, False)
    for block in range(3):
        journal.append({"block": block, "error": 0.1 + block, "none": float("nan") if block else None})
    return tmp_path / "journal.jsonl"


def test_it_remembers(path):
    journal = Journal(path, WORK, True)
    assert [entry["block"] for entry in journal.entries] == [0, 1, 2]
    assert journal.entries[1]["error"] == 1.1
    assert not journal.damage
    journal.append({"block": 3})
    assert len(Journal(path, WORK, True).entries) == 4
    assert read_journal(path) == (WORK, journal.entries)
    assert read_journal(path.with_name("absent")) == (None, [])


def test_going_on_has_to_be_wanted_and_of_the_same_work(path):
    before = path.read_bytes()
    with pytest.raises(OutputError, match="pass --resume to go on with it, or delete that folder"):
        Journal(path, WORK, False)
    with pytest.raises(OutputError, match=r"percdamp was 0.01 and is 0.1; seed was None and is 3; go on with what"):
        Journal(path, WORK | {"percdamp": 0.1, "seed": 3}, True)
    assert path.read_bytes() == before


def test_what_has_only_begun_begins_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"other": "work"}, False)
    for resume in (False, True):
        assert not Journal(path, WORK, resume).entries
        assert read_journal(path) == (WORK, [])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty line", "no newline"])
def test_damage_ends_what_counts(path, damage):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = {
        "cut": lines[2][:20],
        "flipped": lines[2].replace(b'"error": 1.1', b'"error": 1.2'),
        "empty line": b"\n",
        "no newline": lines[2].rstrip(),
    }[damage]
    path.write_bytes(b"".join(lines))
    held = path.read_bytes()
    assert read_journal(path) == (WORK, [{"block": 0, "error": 0.1, "none": None}])
    assert path.read_bytes() == held
    journal = Journal(path, WORK, True)
    assert "line 3 is damaged" in journal.damage
    assert [entry["block"] for entry in journal.entries] == [0]
    journal.append({"block": 1})
    again = Journal(path, WORK, True)
    assert (len(again.entries), again.damage) == (2, "")


def test_a_damaged_beginning_leaves_nothing(path):
    path.write_bytes(b"?" + path.read_bytes())
    journal = Journal(path, WORK, True)
    assert "line 1 is damaged" in journal.damage
    assert not journal.entries
    assert read_journal(path) == (WORK, [])


def test_dropped_entries_are_gone(path):
    journal = Journal(path, WORK, True)
    journal.drop(1, "shard 1: is missing")
    assert journal.damage == "shard 1: is missing; it and what came after it is done again"
    assert [entry["block"] for entry in Journal(path, WORK, True).entries] == [0]


def test_every_line_can_be_read_by_others(path):
    assert [json.loads(line)["entry"].get("block") for line in path.read_text().splitlines()] == [None, 0, 1, 2]
