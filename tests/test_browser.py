"""The labs as a student uses them: a real JupyterLab on a free port, a real browser, a mouse and a keyboard."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from conftest import chrome
from handed_in import answered, reference, released
from problem_sets import COURSE, EXERCISES, SOURCES

from sparselab.course.grader.handout import make_assignment

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[1]
SECONDS = 120

# A command sent before the kernel has answered is lost.
_CONNECTED = """() => {
    const session = window.jupyterapp?.shell?.currentWidget?.sessionContext?.session;
    return session?.kernel?.connectionStatus === 'connected' && session.kernel.status === 'idle';
}"""
# Running all cells answers before a cell that may fail has ended.
_RUN_TO_THE_END = """() => window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model)
    .every(cell => cell.type !== 'code' || cell.executionCount && cell.executionState !== 'running')"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab with a token, and the folder it serves."""
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": folder,
        "IdentityProvider.token": token, "LabApp.expose_app_in_browser": True, "LabApp.news_url": "",
        "ServerApp.open_browser": False, "ServerApp.allow_root": True,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    environment = {
        "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        **{name: value for name, value in os.environ.items() if name.startswith("OMP_")},  # see conftest
    }
    with (
        (home / "server.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], stdout=log, stderr=log, env=environment
        ) as server,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "server.log")
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset", folder
        finally:
            server.terminate()
            server.wait(SECONDS)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(2 * SECONDS):
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
    raise TimeoutError(log.read_text())


@pytest.fixture
def page(tmp_path):
    """A page in a new browser, photographed at the end; errors that scripts raise in it fail the test."""
    from playwright.sync_api import sync_playwright

    errors = []
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chrome(), args=flags)
        page = browser.new_page(viewport={"width": 1500, "height": 1400})
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        page.screenshot(path=tmp_path / "end.png")
        browser.close()
    assert errors == []


@pytest.fixture
def opened(lab, page):
    """Opens a notebook with other parameters and no outputs, runs it as far as its widget, and gives the page."""
    address, folder = lab

    def open_and_run(name: str, widget: str, parameters: str):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                if "parameters" in cell.metadata.get("tags", []):
                    cell.source += "\n" + parameters
        shows = next(number for number, cell in enumerate(notebook.cells) if f"= {widget}(" in cell.source)
        del notebook.cells[shows + 1 :]
        nbformat.write(notebook, folder / f"{name}.ipynb")
        page.goto(address.format(f"{name}.ipynb"))
        page.wait_for_function(_CONNECTED)
        ran = page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        assert ran, page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        return page

    return open_and_run


def outputs(page) -> list[dict]:
    """What the cells of the open notebook have put out, in order; those that are scrolled away are not on the page."""
    return page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets
        .filter(cell => cell.model.type === 'code').flatMap(cell => cell.model.outputs.toJSON())""")


SMALL_02 = "blocks, sizes, eval_nsamples = [3], [4, 16], 8"
SMALL_03 = 'patterns, seeds, nsamples, eval_nsamples, seqlen = ["30%", "60%", "2:4"], 1, 4, 8, 64'

SMALL_08 = 'methods, patterns, seeds, nsamples, eval_nsamples = ["magnitude"], ["30%", "50%", "60%"], 1, 4, 8'


def status(page):
    return page.locator("[role=status]").first


def control(page, name: str):
    """The box of a widget by its label."""
    return page.locator(".widget-inline-hbox", has=page.locator(f"label.widget-label >> text=/^{name}$/")).first


def button(page, words: str):
    return page.locator("button.widget-button", has_text=words)


def shown(page) -> tuple[str, str]:
    return page.locator("img.widget-image").first.get_attribute("src"), status(page).inner_text()


def wait_for_words(page, pattern: str) -> None:
    page.wait_for_function(
        "pattern => new RegExp(pattern).test(document.querySelector('[role=status]').innerText)", arg=pattern
    )


def wait_for_news(page, before: tuple[str, str]) -> tuple[str, str]:
    page.wait_for_function("before => document.querySelector('[role=status]').innerText !== before", arg=before[1])
    page.wait_for_function("before => document.querySelector('img.widget-image').src !== before", arg=before[0])
    return shown(page)


def test_layer_lab_answers_mouse_and_keyboard(opened, tmp_path):
    page = opened("02_layer_lab", "LayerLab", SMALL_02)
    first = shown(page)
    assert "sparsegpt at 60%" in first[1]
    slider = control(page, "sparsity")
    slider.scroll_into_view_if_needed()
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + 0.85 * track["width"], handle["y"] + handle["height"] / 2, steps=8)
    page.mouse.up()
    dragged = wait_for_news(page, first)
    readout = slider.locator(".widget-readout").inner_text()
    assert readout in ("75%", "80%", "85%")
    assert f"sparsegpt at {readout}" in dragged[1]
    numbers = [float(re.search(r"([\d.]+) on held-out", text)[1]) for text in (first[1], dragged[1])]
    assert numbers[1] > numbers[0], "more sparsity, more error"
    slider.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    pressed = wait_for_news(page, dragged)
    assert pressed[1] != dragged[1]
    page.locator("button.widget-toggle-button >> text=/^wanda$/").click()
    by_wanda = wait_for_news(page, pressed)
    assert "wanda at" in by_wanda[1]
    assert "mask agreement with SparseGPT" in page.locator("table.sparselab-numbers").first.inner_text()
    page.screenshot(path=tmp_path / "02_layer_lab.png", full_page=True)


def test_curve_lab_runs_and_cancels(opened, tmp_path):
    page = opened("03_sparsity_perplexity", "CurveLab", SMALL_03)
    first = shown(page)
    assert first[1].startswith("9 points; dense")
    seeds = control(page, "seeds").locator("input")
    seeds.fill("20")
    seeds.press("Tab")
    button(page, "Run").click()
    wait_for_words(page, r"^running .*: (1[1-9]|[2-9]\d) of 123 points")
    page.screenshot(path=tmp_path / "03_running.png", full_page=True)
    button(page, "Cancel").click()
    wait_for_words(page, "^cancelled")
    cancelled = shown(page)
    kept = int(re.fullmatch(r"cancelled: (\d+) of 123 points, all kept", cancelled[1])[1])
    assert 11 <= kept < 123
    assert cancelled[0] != first[0], "the finished points are drawn"
    page.screenshot(path=tmp_path / "03_cancelled.png", full_page=True)
    seeds.fill("1")
    seeds.press("Tab")
    button(page, "Run").click()
    wait_for_words(page, "^done: 9 of 9 points$")
    assert shown(page)[0] == cancelled[0], "nothing new was computed"


def test_a_form_of_a_grid_is_filled_in_runs_and_cancels(opened, tmp_path):
    page = opened("08_sweeps", "SweepForm", SMALL_08)
    first = shown(page)
    assert first[1].startswith("3 runs (3 × sparsity")

    def fill(name: str, values: str, says: str) -> None:
        box = control(page, name).locator("input")
        box.fill(values)
        box.press("Tab")
        wait_for_words(page, says)

    fill("sparsity", "50%, sixty", "^⚠ grid: sparsity: expected .*sixty")
    fill("sparsity", "50%, 60%", r"^2 runs \(2 × sparsity\)$")
    fill("method", "wanda", "^2 runs")
    assert "sparsity: [50%, 60%]" in page.locator(".jp-OutputArea pre >> text=/^model/").first.inner_text()
    button(page, "Dry run").click()
    wait_for_words(page, r"^done: 2 runs .*: 0 done, 2 to do; about .* minutes of one worker; .* GB for each worker$")
    run = page.locator("button.widget-button >> text=/^Run$/")
    run.click()
    wait_for_words(page, "^done: 2 runs in runs, 0 of them failed$")
    second = shown(page)[0]
    assert second != first[0], "what is new is drawn beside what was there"
    table = page.locator("table.sparselab-numbers").first.inner_text()
    assert "magnitude" in table and "wanda" in table
    page.screenshot(path=tmp_path / "08_done.png", full_page=True)
    fill("method", "ria", "^2 runs")
    fill("seed", ", ".join(map(str, range(60))), "^120 runs")
    run.click()
    wait_for_words(page, r"^running: [1-9]\d* of 120 runs, about .* left$")
    button(page, "Cancel").click()
    wait_for_words(page, "^cancelled: .* of 120 runs, all kept$")
    assert shown(page)[0] != second
    page.screenshot(path=tmp_path / "08_cancelled.png", full_page=True)


@pytest.mark.parametrize("problem_set", [path.stem for path in SOURCES])
def test_a_problem_set_runs_to_its_end_and_says_what_is_missing(lab, page, problem_set, tmp_path):
    """As students get it, with the first exercise done."""
    address, folder = lab
    names = make_assignment(COURSE, problem_set, tmp_path / problem_set)
    for name in names:
        shutil.copy(tmp_path / problem_set / name, folder)
    first, *others = [exercise for owner, exercise in EXERCISES if owner == problem_set]
    done = {f"{first}-answer": reference(problem_set)[f"{first}-answer"]}
    nbformat.write(answered(released(tmp_path / problem_set, problem_set), done), folder / f"{problem_set}.ipynb")
    page.goto(address.format(f"{problem_set}.ipynb"))
    page.wait_for_function(_CONNECTED)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(_RUN_TO_THE_END)
    shown = outputs(page)
    assert [each for each in shown if each.get("text", "").startswith(f"{first}: ")], "what a check says if all is well"
    said = [each["traceback"] for each in shown if each.get("ename") == "CheckError"]
    assert said[: len(others)] == [[f"CheckError: {exercise} is not written yet"] for exercise in others]
    page.screenshot(path=tmp_path / f"{problem_set}.png")
