"""A real JupyterLab on a free port of this machine, and a real browser looking at it."""

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

ROOT = Path(__file__).parents[2]
CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120


def chrome() -> str | None:
    return next((path for path in map(shutil.which, CHROMES) if path), None)


def pytest_collection_modifyitems(items):
    if chrome() is None:
        reason = "needs a browser: install Debian's chromium, or Chrome"
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=reason))


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
    }
    with (
        (home / "server.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], stdout=log, stderr=log, env=environment
        ) as server,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "server.log")
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}", folder
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
def page():
    """A page in a new browser; errors that scripts raise in it fail the test."""
    from playwright.sync_api import sync_playwright

    errors = []
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chrome(), args=flags)
        page = browser.new_page(viewport={"width": 1500, "height": 1400})
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert errors == []


@pytest.fixture
def opened(lab, page):
    """Opens a notebook of the project with other parameters and no outputs, runs all of it, and gives the page."""
    address, folder = lab

    def open_and_run(name: str, parameters: str):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                if "parameters" in cell.metadata.get("tags", []):
                    cell.source += "\n" + parameters
        nbformat.write(notebook, folder / f"{name}.ipynb")
        page.goto(address.format(f"{name}.ipynb"))
        idle = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
        page.wait_for_selector(idle)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=busy]")
        page.wait_for_selector(idle)
        assert (
            page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] >> text=Error").count() == 0
        )
        return page

    return open_and_run
