"""The page: what it holds, and how it behaves in a browser."""

import re
from pathlib import Path

import pytest
from made_runs import record_of, right_share, write_arm, write_run

import peftkit
from peftkit import yaml_source
from peftkit.recipe import load_recipe
from peftkit.reporting.comparison import compare, write_comparison
from peftkit.reporting.page import page
from peftkit.reporting.repeating import recipe_yaml

CHROMIUM = Path("/usr/bin/chromium")
SCRIPT = "<script>alert(1)</script>"


def arms(folder):
    write_arm(folder, "lora_sst2", 0.90)
    write_arm(folder, "qlora_sst2", 0.89)
    write_arm(folder, "full_sst2", 0.95)
    failed = {"status": "out_of_memory", "error": "no memory left", "metrics": {}}
    write_run(folder / "huge", record_of("huge_sst2", 0, **failed))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of four arms, as a file."""
    folder = arms(tmp_path_factory.mktemp("runs"))
    return write_comparison(compare([folder]), folder / "out")[3]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, written):
    """The page, opened; it may neither complain nor ask for anything but itself."""
    said, asked = [], []
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written.as_uri())
    yield tab
    tab.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]


def column(tab, name):
    """Texts of a column of the results, top to bottom."""
    place = tab.locator("table.results thead th").all_inner_texts().index(name) + 1
    return tab.locator(f"table.results tbody tr > :nth-child({place})").all_inner_texts()


def header(tab, name):
    return tab.locator("table.results thead th", has=tab.get_by_text(name, exact=True))


def test_a_click_sorts_and_a_second_one_turns_it_round(opened):
    scores = [text for text in column(opened, "accuracy") if text != "–"]
    assert scores == sorted(scores, reverse=True)
    header(opened, "accuracy").get_by_role("button").click()
    assert column(opened, "accuracy") == [*sorted(scores), "–"]
    assert header(opened, "accuracy").get_attribute("aria-sort") == "ascending"
    header(opened, "accuracy").get_by_role("button").click()
    assert column(opened, "accuracy") == [*sorted(scores, reverse=True), "–"]
    assert header(opened, "accuracy").get_attribute("aria-sort") == "descending"


def test_the_keyboard_sorts(opened):
    header(opened, "method").get_by_role("button").focus()
    opened.keyboard.press("Enter")
    names = column(opened, "method")
    assert names == sorted(names)
    opened.keyboard.press("Space")
    assert column(opened, "method") == sorted(names, reverse=True)


def test_hovering_and_focusing_a_point_show_its_figures(opened):
    point = opened.locator("figure.pareto a").first
    tip = opened.locator("#tip")
    assert not tip.is_visible()
    point.hover()
    assert tip.is_visible()
    assert re.match(r"full_sst2: accuracy 0\.9\d+ \(.+\) at ", tip.inner_text())
    opened.mouse.move(0, 0)
    assert not tip.is_visible()
    point.focus()
    assert tip.is_visible()
    opened.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_point_leads_to_its_recipe_and_command(opened):
    opened.locator("figure.pareto a").first.click()
    article = opened.locator("article:target")
    assert article.locator("h4").inner_text() == "full_sst2"
    assert "peftkit run full_sst2.yaml seed=0" in article.inner_text()
    assert "learning_rate: 0.0001" in article.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, written, scheme):
    tab = browser.new_page(viewport={"width": 360, "height": 780}, color_scheme=scheme)
    tab.goto(written.as_uri())
    for details in tab.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.close()


def test_all_can_be_read_without_scripts(browser, written):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(written.as_uri())
    text = tab.locator("main").inner_text()
    assert "0.9" in text
    assert "no memory left" in text
    assert tab.locator("figure svg title").count() > 3
    context.close()


def contrast(tab, selector):
    """Of the text of an element against the page's panel, as WCAG defines it."""
    return tab.evaluate(
        """selector => {
          const element = document.querySelector(selector);
          const style = getComputedStyle(element);
          const parse = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const box = element.closest("figure, .scroll, article") || document.body;
          const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
          const both = [light(parse(colour)), light(parse(getComputedStyle(box).backgroundColor))];
          return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, written, scheme):
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(written.as_uri())
    for selector in (".lead", ".note", "thead button", ".results td", "tbody a", ".axes text"):
        assert contrast(tab, selector) >= 4.5, selector
    for place in range(8):
        tab.evaluate(
            "n => { document.querySelector('.name').setAttribute('class', `name c${n}`); }", place
        )
        assert contrast(tab, ".name") >= 4.4, f"c{place}"
    tab.close()


def test_labels_do_not_cover_one_another(opened):
    boxes = opened.evaluate(
        """() => [...document.querySelectorAll("figure.pareto svg")].map(svg =>
          [...svg.querySelectorAll("text.name")].map(text => {
            const box = text.getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom];
          }))"""
    )
    assert sum(map(len, boxes)) >= 9
    for chart in boxes:
        for i, (left, top, right, bottom) in enumerate(chart):
            for other in chart[i + 1 :]:
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] + 3
                assert apart or other[3] <= top + 3


def test_names_and_errors_cannot_become_markup(tmp_path):
    write_arm(tmp_path, "lora", 0.9)
    evil = record_of("lora", 5).model_copy(update={"name": SCRIPT, "delta": SCRIPT})
    write_run(tmp_path / "evil", evil, right_share(0.9, 9))
    bad = record_of("lora", 6, status="failed", error=f"{SCRIPT} & more", metrics={})
    write_run(tmp_path / "bad", bad)
    text = page(compare([tmp_path]))
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_a_sample_is_said_in_the_first_line(tmp_path):
    write_arm(tmp_path, "lora", 0.9, stand_in=True)
    main = page(compare([tmp_path])).partition("<main>")[2]
    assert re.search(r"<p[^>]*>([^<]+)", main)[1].startswith("Sample data")


def test_a_page_of_nothing_says_so(tmp_path):
    text = page(compare([tmp_path]))
    assert "No run could be read." in text
    assert f"{tmp_path}: no record.json at or below it" in text


def test_the_recipe_on_the_page_is_the_one_that_ran():
    """Every shipped recipe, written as the page writes it, reads back as it was."""
    root = Path(peftkit.__file__).parent.parent / "recipes"
    for path in sorted(root.glob("*.yaml")):
        resolved = load_recipe(path).resolved()
        text = recipe_yaml(resolved)
        kept = {k: v for k, v in resolved.items() if k not in ("seed", "output_dir")}
        assert yaml_source.parse(text, path.name).value == kept
