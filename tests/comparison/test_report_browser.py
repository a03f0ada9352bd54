"""The report in a real browser: charts drawn, tables sorted, dark and light, and a phone's width."""

import dataclasses
import shutil

import pytest

from formix.comparison.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="Chromium or its driver is not installed")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def report(browser, images, text, tmp_path):
    """Opens the report of two tasks at a width and in a colour scheme; returns the browser."""
    write_report([images, text], tmp_path / "report.html")

    def open_page(width=1280, scheme="light"):
        set_scheme(browser, scheme)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "report.html").as_uri())
        wait(browser, "return document.documentElement.dataset.drawn === 'true'")
        return browser

    return open_page


def set_scheme(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(browser, script, seconds=30):
    WebDriverWait(browser, seconds).until(lambda driver: driver.execute_script(script))


def column(browser, index):
    script = (
        "return [...document.querySelectorAll('#task1 .summary tbody tr')].map(r => r.cells[arguments[0]].innerText)"
    )
    return [text.split("\n")[0] for text in browser.execute_script(script, index)]


def choose(browser, selector, value):
    script = (
        "const s = document.querySelector(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    )
    browser.execute_script(script, selector, value)


def test_loads_without_errors_and_draws_every_chart(report, images, text):
    browser = report()
    for identifier, results in (("task1", images), ("task2", text)):
        ran = [record.design for record in results.designs if record.refused is None]
        points = f"return document.querySelectorAll('#{identifier} .tradeoff .scatterlayer .trace .points path').length"
        assert browser.execute_script(points) == len(ran)
        bars = f"return document.querySelectorAll('#{identifier} .tradeoff .errorbar').length"
        assert browser.execute_script(bars) == len(ran)
        lines = f"return document.querySelectorAll('#{identifier} .curves .scatterlayer .trace path.js-line').length"
        assert browser.execute_script(lines) >= len(ran)
        bands = f"return document.querySelectorAll('#{identifier} .curves path.js-fill').length"
        assert browser.execute_script(bands) == len(ran)
        body = browser.execute_script(f"return document.getElementById('{identifier}').innerText")
        assert all(record.design in body for record in results.designs)
        assert "On the Pareto front: " in body
    text_in_chart = browser.execute_script("return document.querySelector('#task2 .curves').textContent")
    assert "byte bigram 3.52" in text_in_chart
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_makes_no_request(report):
    browser = report()
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_sorts_by_a_click_both_ways_and_by_keyboard(report, images):
    browser = report()
    given = column(browser, 0)
    assert given == [record.design for record in images.designs]
    heads = browser.find_elements("css selector", "#task1 .summary thead tr:last-child th")
    buttons = [head.find_element("css selector", "button") for head in heads]

    def numbers():
        return [float(cell.split(" ")[0]) for cell in column(browser, 1)]

    buttons[1].click()
    assert heads[1].get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(numbers())
    assert column(browser, 0) != given
    buttons[1].click()
    assert heads[1].get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(numbers(), reverse=True)
    buttons[0].send_keys(Keys.ENTER)
    assert [head.get_attribute("aria-sort") for head in heads[:2]] == ["ascending", "none"]
    assert column(browser, 0) == sorted(given)
    buttons[2].click()  # the baseline has no difference to itself: last in both directions
    assert column(browser, 0)[-1] == "softmax"
    buttons[2].click()
    assert column(browser, 0)[-1] == "softmax"


def test_charts_follow_the_selects(report):
    browser = report()
    axis = "return document.querySelector('#task1 .{}').layout.xaxis.{}"
    before = browser.execute_script(axis.format("tradeoff", "range"))
    choose(browser, "#task1 [name=precision]", "bfloat16")
    choose(browser, "#task1 [name=batch]", "32")
    assert browser.execute_script(axis.format("tradeoff", "range")) != before
    choose(browser, "#task1 [name=quantity]", "train_loss")
    choose(browser, "#task1 [name=along]", "seconds")
    assert browser.execute_script(axis.format("curves", "title.text")) == "Training time, s"
    choose(browser, "#task1 [name=range]", "end")
    assert browser.execute_script(axis.format("curves", "range"))[0] > 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_latency_that_was_not_measured_is_said_and_the_chart_comes_back(browser, images, tmp_path):
    runs = tuple(
        dataclasses.replace(run, latency_ms=run.latency_ms | {"bfloat16": {"1": 2.0, "32": None}})
        for run in images.runs
    )
    write_report(dataclasses.replace(images, runs=runs), tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    wait(browser, "return document.documentElement.dataset.drawn === 'true'")
    choose(browser, "[name=precision]", "bfloat16")
    choose(browser, "[name=batch]", "32")
    assert "No latency was measured" in browser.execute_script("return document.querySelector('.tradeoff').innerText")
    choose(browser, "[name=batch]", "1")
    points = "return document.querySelectorAll('.tradeoff .scatterlayer .trace .points path').length"
    assert browser.execute_script(points) == len(images.designs)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_dark_and_light_differ_and_change_live(report):
    browser = report(scheme="light")

    def colours():
        return browser.execute_script(
            """const fill = s => getComputedStyle(document.querySelector(s)).fill;
            return [getComputedStyle(document.body).backgroundColor, fill('#task1 .tradeoff .points path'),
                    fill('#task1 .tradeoff .xtick text'), fill('#task1 .summary .mark')]"""
        )

    def changed(before):
        WebDriverWait(browser, 30).until(lambda _: all(a != b for a, b in zip(before, colours(), strict=True)))
        return colours()

    light = colours()
    set_scheme(browser, "dark")
    dark = changed(light)
    assert light[1] == light[3]  # the chart and the table name a design in the same colour
    assert dark[1] == dark[3]
    set_scheme(browser, "light")
    assert changed(dark) == light


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_page_does_not_overflow(width, report):
    browser = report(width=width)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    chart = browser.execute_script("return document.querySelector('.tradeoff .main-svg').getBoundingClientRect().width")
    assert chart <= width


def test_unsafe_text_stays_text(browser, images, tmp_path):
    evil = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    task = dataclasses.replace(images.task, data=evil, baselines={evil: 0.5})
    write_report(dataclasses.replace(images, task=task, command=evil), tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    wait(browser, "return document.documentElement.dataset.drawn === 'true'")
    assert browser.execute_script("return window.broken") is None
