import json
import re

import pandas as pd
import pytest
from conftest import chrome

from sparselab import page, sweep
from sparselab.cli import main
from sparselab.experiment import FAILURE, RESULT
from sparselab.figures.cost import trade_offs
from sparselab.figures.found import found
from sparselab.page import report
from sparselab.parameters import ParameterError
from sparselab.results import read_sweep


@pytest.fixture(scope="module")
def swept(small, tmp_path_factory):
    """Of twelve runs, one of which has failed with an error that looks like markup."""
    folder = tmp_path_factory.mktemp("sweep") / "swept"
    grid = {"method": ["magnitude", "wanda", "sparsegpt"], "sparsity": [0.5, "2:4", "0=dense,*=60%"], "seed": [0, 1]}
    sweep(small | grid, folder, progress=False)
    failed = next(path for path in sorted(folder.rglob(RESULT)) if '"method": "wanda"' in path.read_text())
    kept = json.loads(failed.read_text())
    kept["row"]["failure"] = "MemoryError: <script>alert(1)</script>"
    failed.with_name(FAILURE).write_text(json.dumps(kept))
    failed.unlink()
    page.write_report(folder)
    return folder


def test_the_page_has_all_runs_figures_failures_and_how_it_was_made(swept, small):
    text = (swept / "report.html").read_text(encoding="utf-8")
    assert "15 runs, 1 of them failed" in text
    assert text.count("<figure>") == 2, "curves, and cost beside quality"
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    assert len(re.findall(r"<tr>", text.split("<tbody>")[1].split("</tbody>")[0])) == 15
    assert "const seconds = 0;" in text, "it is the last"
    assert "http://" not in text
    assert "https://" not in text
    about = json.loads((swept / "sweep.json").read_text())
    assert about["grid"]["method"] == ["magnitude", "wanda", "sparsegpt"]
    assert about["runs"] == 15
    assert about["versions"].keys() >= {"torch", "sparselab"}


def test_layer_errors_are_drawn_where_there_is_no_perplexity_and_not_against_two_values_beside_more(small, tmp_path):
    grid = small | {"percdamp": [0.01, 0.1, 1], "sparsity": [0.5, 0.6], "propagate": "dense", "measure": "errors"}
    runs = sweep(grid, tmp_path, progress=False)
    figures = list(found(runs))
    assert [figure.axes[0].get_ylabel() for figure in figures] == ["relative layer error, mean over layers"] * 2
    assert ["percdamp" in figure.axes[0].get_xlabel() for figure in figures] == [True, True]
    [line] = [line for line in figures[0].axes[0].lines if line.get_label() == "sparsegpt"]
    assert line.get_ydata() == pytest.approx(runs[runs.pattern == "50%"].relative_error)
    two = list(found(runs[runs.percdamp < 1]))
    assert len(two) == 4, "each against each"
    page.write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<figure>") == 2


def test_tables_are_the_results(swept):
    runs = read_sweep(swept)
    for table in (pd.read_csv(swept / "results.csv"), pd.read_parquet(swept / "results.parquet")):
        assert table.perplexity.to_numpy() == pytest.approx(runs.perplexity.to_numpy(), nan_ok=True)
        assert list(table) == list(runs)


def test_without_pyarrow_there_is_no_parquet(swept, monkeypatch):
    def lacking(*given, **how):
        raise ImportError("no pyarrow")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", lacking)
    assert [path.name for path in page.write_report(swept)] == ["report.html", "results.csv"]


def test_the_command_and_a_filter(swept, capsys):
    assert main(["report", str(swept), "--where", 'method == "magnitude"']) == 0
    assert capsys.readouterr().out.startswith(f"Written: {swept / 'report.html'}, ")
    text = (swept / "report.html").read_text(encoding="utf-8")
    assert "3 runs, 0 of them failed; those of method == &quot;magnitude&quot;" in text
    page.write_report(swept)
    with pytest.raises(ParameterError, match="expected a pandas query"):
        page.write_report(swept, "meth > 1")
    assert main(["report", str(swept / "none")]) == 1
    assert "expected results of runs" in capsys.readouterr().err


def test_while_the_sweep_runs_the_page_renews_itself_but_not_all_the_time(small, tmp_path, monkeypatch):
    written, said = [], []
    write = report.write_report
    monkeypatch.setattr(report, "write_report", lambda *given, **how: written.append(how) or write(*given, **how))
    sweep(
        small | {"method": "magnitude", "sparsity": [0.5, 0.6]},
        tmp_path,
        progress=False,
        watch=page.Renewed(tmp_path, said.append),
    )
    assert len(written) == 1, "once within ten seconds"
    assert re.fullmatch(r"under way, about \d+ s left", written[0]["under_way"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "const seconds = 5;" in text
    assert re.search(
        r"1 of 2 runs, 0 of them failed; under way, about \d+ s left; this page renews itself while ", text
    )
    assert said == []


def test_the_last_page_says_no_more_that_the_sweep_runs(small, tmp_path):
    def interrupt(done, total):
        watch(done, total)
        if done:
            raise KeyboardInterrupt

    grid = small | {"method": "magnitude", "sparsity": [0.5, 0.6]}
    with pytest.raises(KeyboardInterrupt), page.Renewed(tmp_path, print) as watch:
        sweep(grid, tmp_path, progress=False, watch=interrupt)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 of 2 runs, 0 of them failed</p>" in text
    assert "const seconds = 0;" in text
    with pytest.raises(KeyboardInterrupt), page.Renewed(tmp_path / "none", print):
        raise KeyboardInterrupt
    assert not (tmp_path / "none").exists()


def test_a_page_that_cannot_be_written_does_not_stop_the_sweep(small, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / RESULT).write_text("{")
    said = []
    watch = page.Renewed(tmp_path, said.append)
    assert len(sweep(small | {"method": "magnitude"}, tmp_path, progress=False, watch=watch)) == 1
    assert len(said) == 1
    assert said[0].startswith("report.html is not written: folder: ")
    assert said[0].endswith("damaged/result.json: expected a result of a run, found a damaged file; remove it")


def test_trade_offs_are_means_over_seeds():
    common = {"peak_memory_mb": 10.0, "pattern": "50%"}
    runs = pd.DataFrame([
        common | {"method": "wanda", "perplexity": 12.0, "seconds": 1.0},
        common | {"method": "wanda", "perplexity": 14.0, "seconds": 3.0},
        common | {"method": "sparsegpt", "perplexity": 10.0, "seconds": 4.0},
    ])  # fmt: skip
    figure = trade_offs(runs, "all of it")
    line, *markers = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[2, 13], [4, 10]]
    assert [marker.get_label() for marker in markers] == ["wanda", "sparsegpt"]
    assert figure.get_supxlabel() == "all of it"
    memory = figure.axes[1].xaxis
    low, high = memory.get_view_interval()
    assert [tick for tick in memory.get_majorticklocs() if low <= tick <= high] == [5, 10, 20], "all need the same"
    near = runs.assign(pattern="2:4", perplexity=[18.0, 18.0, 10.1])
    names = trade_offs(pd.concat([runs, near]), "").axes[0].texts
    assert [(name.get_text(), name.xy) for name in names] == [("50%", (4, 10)), ("2:4", (2, 18))], "at another end"


@pytest.mark.browser
@pytest.mark.slow
def test_a_browser_shows_it_without_asking_anybody(swept):
    from playwright.sync_api import sync_playwright

    asked, errors = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chrome(), args=["--no-sandbox"])
        opened = browser.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("console", lambda message: errors.append(message.text))
        opened.goto((swept / "report.html").as_uri())
        widths = opened.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        status = opened.get_by_role("status")
        said = [status.inner_text()]
        for name, wanted in {"method": "wanda", "pattern": "2:4", "seed": "= 1", "perplexity": "> 1e9"}.items():
            opened.get_by_label(f"filter {name}", exact=True).fill(wanted)
            said.append(status.inner_text())
        rows = opened.locator("#runs tbody tr:visible").count()
        for name in ("method", "seed", "perplexity"):
            opened.get_by_label(f"filter {name}", exact=True).fill("")
        compared = {}
        for asked_for in ("> 0.4", "<= 50%", "= 2", ">= 1e+9"):
            opened.get_by_label("filter pattern", exact=True).fill(asked_for)
            compared[asked_for] = opened.locator("#runs tbody tr:visible").all_inner_texts()
        browser.close()
    assert errors == []
    assert [url for url in asked if not url.startswith("data:")] == [(swept / "report.html").as_uri()]
    assert len(widths) == 2
    assert all(widths)
    assert [int(words.split()[0]) for words in said[:3]] == [15, 6, 2]
    assert said[0] == "15 of 15 shown."
    assert rows == 0
    patterns = {each: {text.split("\t")[1] for text in texts} for each, texts in compared.items()}
    assert patterns == {"> 0.4": {"50%"}, "<= 50%": {"50%"}, "= 2": set(), ">= 1e+9": set()}
