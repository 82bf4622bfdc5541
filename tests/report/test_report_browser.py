"""The report in a real browser: it draws, answers, follows the colour scheme, and asks nothing of the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser


class Visit:
    """A page with everything it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".chart .main-svg", timeout=60_000)

    def draw_all(self) -> None:
        for chart in self.page.query_selector_all(".chart"):
            chart.scroll_into_view_if_needed()
            self.page.wait_for_function("chart => chart.querySelector('.main-svg')", arg=chart)


@pytest.fixture
def visit(browser: Any, finished: Any) -> Iterator[Visit]:
    made = Visit(browser, finished.path)
    yield made
    made.context.close()


def test_all_charts_draw_without_complaint_and_without_the_network(visit, finished):
    visit.draw_all()
    assert len(visit.page.query_selector_all(".chart .main-svg")) >= 10
    assert visit.complaints == []
    assert visit.requests == [finished.path.as_uri()]
    assert visit.page.evaluate("window.pwned") is None
    assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_heat_map_has_its_cells_and_answers(visit):
    visit.draw_all()
    heat = visit.page.locator("#toy--alpha-heat")
    assert heat.evaluate("el => [el.data[0].z.length, el.data[0].z[0].length]") == [3, 4]
    assert heat.evaluate("el => el.layout.shapes.length") == 1
    before = heat.evaluate("el => el.data[0].z")
    visit.page.locator("select.metric[data-for='toy--alpha-heat']").select_option("effect_size_d")
    assert heat.evaluate("el => el.data[0].z") != before
    assert "effect size" in heat.evaluate("el => el.data[0].hovertemplate")
    # a click in the middle of the first cell
    heat.scroll_into_view_if_needed()
    box = heat.locator(".nsewdrag").first.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] / 6)
    visit.page.wait_for_selector(".hoverlayer .hovertext")
    visit.page.mouse.click(box["x"] + box["width"] / 8, box["y"] + box["height"] / 6)
    answer = visit.page.locator("#toy--alpha-heat-answer")
    assert answer.inner_text().startswith("mean_diff, layer 0: held-out accuracy")


def test_the_slider_changes_the_text_by_keyboard(visit):
    box = visit.page.locator(".samples[data-trait='toy--alpha']")
    slider, steered = box.locator("input.dose"), box.locator(".steered.text")
    # it begins at the chosen vector and dose
    assert steered.inner_text().startswith("vector mean_diff at 0.2, question 0: </script>")
    assert box.locator(".plain.text").inner_text().startswith("baseline None at None, question 0")
    slider.focus()
    visit.page.keyboard.press("ArrowRight")
    assert steered.inner_text().startswith("vector mean_diff at 0.4, question 0")
    assert slider.get_attribute("aria-valuetext") == "0.40"
    visit.page.keyboard.press("Home")
    assert steered.inner_text() == box.locator(".plain.text").inner_text()
    assert slider.get_attribute("aria-valuetext") == "0, unsteered"
    visit.page.keyboard.press("End")
    box.locator("select.arm").select_option(label="probe, layer 1")
    assert steered.inner_text().startswith("vector probe at 0.4, question 0")
    assert "trait 28" in box.locator(".steered-scores").inner_text()
    box.locator("select.question").select_option(index=2)
    assert "judge abstained: refusal" in box.locator(".steered-scores").inner_text()
    assert steered.inner_text().startswith("vector probe at 0.4, question 2")
    box.locator("select.question").select_option(index=3)
    box.locator("select.arm").select_option(label="system prompt, no vector")
    assert slider.is_disabled()
    assert steered.inner_text().startswith("prompting None at None, question 0")
    assert visit.page.evaluate("window.pwned") is None
    assert visit.complaints == []


def test_dark_mode_is_dark_and_charts_follow_a_switch(browser, finished):
    made = Visit(browser, finished.path, color_scheme="dark")
    made.draw_all()
    dark = brightness(made.page)
    ink = made.page.locator("#toy--alpha-heat").evaluate("el => el.layout.font.color")
    made.page.emulate_media(color_scheme="light")
    made.page.wait_for_function(
        "ink => document.getElementById('toy--alpha-heat').layout.font.color !== ink", arg=ink
    )
    assert dark < 60
    assert brightness(made.page) > 200
    assert made.complaints == []
    made.context.close()


def brightness(page: Any) -> float:
    return page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b / 3, 0)"
    )


def test_a_source_link_opens_the_lineage_it_points_to(visit):
    target = visit.page.locator("#toy--alpha--vector_evaluation")
    assert not target.is_visible()
    visit.page.locator("a.source[href='#toy--alpha--vector_evaluation']").first.click()
    target.wait_for(state="visible")
    assert "fingerprint" in target.inner_text()


def test_print_draws_everything_on_light_and_fits_the_paper(browser, finished):
    # the width of A4 less its margins, at 96 pixels an inch
    made = Visit(browser, finished.path, color_scheme="dark", viewport={"width": 703, "height": 1000})
    made.page.emulate_media(media="print", color_scheme="dark")
    made.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert made.page.evaluate(
        "[...document.querySelectorAll('.chart')].every(el => el.querySelector('.main-svg'))"
    )
    assert made.page.locator("#toy--alpha--vectors").is_visible()
    assert brightness(made.page) > 240
    assert made.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    made.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not made.page.locator("#toy--alpha--vectors").is_visible()
    assert made.complaints == []
    made.context.close()


def test_without_scripts_the_numbers_are_there(browser, finished):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(finished.path.as_uri())
    assert page.locator("table.overview tbody tr").count() == 3
    assert page.locator("#toy--alpha .numbers table").count() >= 4
    context.close()


def test_every_control_is_reached_by_tab_and_shows_its_focus(browser, finished):
    made = Visit(browser, finished.path)
    wanted = made.page.evaluate(
        "[...document.querySelectorAll('a[href], select, input, summary')].filter((e) => e.checkVisibility() && !e.disabled).length"
    )
    reached = 0
    for _ in range(wanted + 50):
        made.page.keyboard.press("Tab")
        tag, outline, visible = made.page.evaluate(
            """() => {
              const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
              return [e.tagName, parseFloat(style.outlineWidth) * (style.outlineStyle !== 'none'), box.bottom > 0 && box.top < innerHeight];
            }"""
        )
        if tag == "BODY":
            break
        assert outline >= 2, tag
        assert visible, tag
        reached += tag in ("A", "SELECT", "INPUT", "SUMMARY")
    assert reached == wanted
    made.context.close()


# the contrast of every text with what it stands on, by WCAG 2; cells of heat maps are coloured by the chart and left out
CONTRAST = """() => {
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const over = (c, below) => below.map((v, i) => v * (1 - (c[3] ?? 1)) + c[i] * (c[3] ?? 1));
  const ground = (element) => {
    const parents = [];
    for (let e = element; e; e = e.parentElement) parents.unshift(parse(getComputedStyle(e).backgroundColor));
    return parents.filter((c) => c.length).reduce((below, c) => over(c, below), [255, 255, 255]);
  };
  const faint = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, style = getComputedStyle(element);
    if (!walk.currentNode.textContent.trim() || !element.getClientRects().length || element.closest('.heatmaplayer, script, option')) continue;
    const below = ground(element), ink = parse(element.closest('svg') ? style.fill : style.color);
    const pair = [light(over(ink, below)), light(below)].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) faint.push([ratio.toFixed(2), walk.currentNode.textContent.trim().slice(0, 40)]);
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_it_stands_on(browser, finished, scheme):
    made = Visit(browser, finished.path, color_scheme=scheme)
    made.draw_all()
    made.page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    assert made.page.evaluate(CONTRAST) == []
    made.context.close()


# words of one chart that lie over each other
OVERLAPS = """() => [...document.querySelectorAll('.chart')].flatMap((chart) => {
  const words = [...chart.querySelectorAll('.xtick text, .ytick text, .x2tick text, .y2tick text, .g-xtitle, .g-ytitle, .g-x2title, .g-y2title')]
    .filter((word) => word.textContent.trim());
  const straight = words.filter((word) => !/rotate\\(-?30/.test(word.getAttribute('transform') || ''));
  const boxes = straight.map((word) => [word.textContent, word.getBoundingClientRect()]);
  const outer = chart.getBoundingClientRect();
  const cut = boxes.filter(([, b]) => b.left < outer.left - 1 || b.right > outer.right + 1).map(([text]) => ['cut', text]);
  const over = boxes.flatMap(([text, a], i) => boxes.slice(i + 1)
    .filter(([, b]) => a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([other]) => [chart.dataset.chart, text, other]));
  return [...cut, ...over];
})"""


def test_no_words_lie_over_each_other_on_a_phone_and_on_paper(browser, finished):
    phone = Visit(browser, finished.path, viewport={"width": 390, "height": 844})
    phone.draw_all()
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    assert phone.page.evaluate(OVERLAPS) == []
    phone.context.close()
    paper = Visit(browser, finished.path, viewport={"width": 703, "height": 1000})
    paper.page.emulate_media(media="print")
    paper.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert paper.page.evaluate(OVERLAPS) == []
    paper.context.close()
