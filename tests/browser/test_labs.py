"""The labs as a student uses them: in JupyterLab, with a mouse and a keyboard."""

import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]

SMALL_02 = "blocks, sizes, eval_nsamples, seqlen = [3], [4, 16], 8, 128"
SMALL_03 = 'patterns, seeds, nsamples, eval_nsamples, seqlen = ["30%", "60%", "2:4"], 1, 4, 8, 64'


def status(page):
    return page.locator("[role=status]").first


def control(page, name: str):
    """The box of a widget by its label."""
    return page.locator(".widget-inline-hbox", has=page.locator(f"label.widget-label >> text=/^{name}$/")).first


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
    page = opened("02_layer_lab", SMALL_02)
    first = shown(page)
    assert "sparsegpt at 60%" in first[1]
    slider = control(page, "sparsity")
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
    page = opened("03_sparsity_perplexity", SMALL_03)
    first = shown(page)
    assert first[1].startswith("9 points; dense")
    seeds = control(page, "seeds").locator("input")
    seeds.fill("20")
    seeds.press("Tab")
    page.get_by_role("button", name="Run", exact=True).last.click()
    page.wait_for_function(
        "() => /running .*: (1[1-9]|[2-9]\\d) of 123/.test(document.querySelector('[role=status]').innerText)"
    )
    page.screenshot(path=tmp_path / "03_running.png", full_page=True)
    page.get_by_role("button", name="Cancel", exact=True).click()
    wait_for_words(page, "^cancelled")
    cancelled = shown(page)
    kept = int(re.fullmatch(r"cancelled: (\d+) of 123 points, all kept", cancelled[1])[1])
    assert 11 <= kept < 123
    assert cancelled[0] != first[0], "the finished points are drawn"
    page.screenshot(path=tmp_path / "03_cancelled.png", full_page=True)
    seeds.fill("1")
    seeds.press("Tab")
    page.get_by_role("button", name="Run", exact=True).last.click()
    wait_for_words(page, "^done: 9 of 9 points$")
    assert shown(page)[0] == cancelled[0], "nothing new was computed"
