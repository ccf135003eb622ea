from sparselab.progress import tracked


def test_a_function_is_told_of_sums():
    told = []
    with tracked(lambda done, total: told.append((done, total)), 10, "work", "piece") as advance:
        for units in (3, 1, 6):
            advance(units)
    assert told == [(3, 10), (4, 10), (10, 10)]


def test_a_bar_names_the_work_and_silence_is_silent(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    for progress in (True, False):
        with tracked(progress, 2, "knitting", "row") as advance:
            advance(2)
    bars = capsys.readouterr().err
    assert bars.count("knitting: 100%") == 1
    assert "2/2" in bars
