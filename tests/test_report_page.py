"""The report in a browser: what a reader clicks does what it says, without errors, on a phone and on a wide screen."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_cases import EIGHT, HUNDRED, make_run, make_sweep, write_metrics

from diffusion.report import build

WIDE, PHONE = (1400, 1000), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    names = ("chromium", "chromium-browser", "google-chrome")
    programs = [next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    with Browser(*programs) as found:
        yield found


class Browser:
    """A headless Chromium that opens pages from disk, without any network."""

    def __init__(self, chromium: str, driver: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (
            "headless=new",
            "no-sandbox",
            "disable-dev-shm-usage",
            "disable-gpu",
            "host-resolver-rules=MAP * ~NOTFOUND",
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def open(self, page: Path, size: tuple[int, int] = WIDE, *, dark: bool = False) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())
        self.until("return document.documentElement.dataset.ready")

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, seconds: float = 30) -> object:
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"never: {script}"
            time.sleep(0.02)
        return found

    def click(self, selector: str, number: int = 0) -> None:
        self.run("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)

    def choose(self, name: str, value: str) -> None:
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        self.run(script + " for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind));", name, value)

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.trim())", selector
        )

    def draw(self, name: str) -> None:
        """Scroll to a figure and wait until it is drawn."""
        self.run("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant', block: 'center'})", name)
        self.until(f"return document.getElementById('{name}').dataset.drawn")

    def curves(self, name: str = "figure-curves") -> list[str]:
        return self.run("return document.getElementById(arguments[0]).data.map((trace) => trace.name)", name)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    special = {"job_2": {"state": "failed", "error": "no memory", "reached": 0.4}, "job_5": {"hint": True}}
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder, EIGHT | {"seed": [0, 1, 2]}, **special)
    return build([folder])


def test_a_click_sorts_the_table_and_another_one_turns_it_round(browser, page):
    browser.open(page)
    column = "#table-results tbody tr:not([hidden]) td[data-col='0']"
    header = browser.run(
        "return [...document.querySelectorAll('#table-results th')].findIndex((th) => th.dataset.col === '0')"
    )

    def values() -> list[float]:
        return [float(value) for value in browser.run(
            "return [...document.querySelectorAll(arguments[0])].map((td) => td.dataset.sort)", column)]  # fmt: skip

    before = values()
    browser.click(f"#table-results th:nth-child({header + 1}) button")
    assert values() == sorted(before) != before
    browser.click(f"#table-results th:nth-child({header + 1}) button")
    assert values() == sorted(before, reverse=True)
    browser.click("#table-results th:nth-child(2) button")
    assert browser.texts("#table-results tbody td:nth-child(2)") == ["cosine", "cosine", "linear", "linear"]
    assert browser.complaints() == []


def test_differences_are_shown_from_the_row_that_is_chosen(browser, page):
    browser.open(page)
    cells = "#table-results tbody tr .delta"
    first = browser.texts(cells)
    browser.choose("baseline", "3")
    second = browser.texts(cells)
    columns = len(first) // 4
    assert first[0] == "" and second[3 * columns] == ""
    there, back = first[3 * columns].split(" ")[0], second[0].split(" ")[0]
    assert there[0] == "−" and back == there.replace("−", "+")
    browser.choose("baseline", "")
    assert set(browser.texts(cells)) == {""}


def test_metrics_can_be_taken_in_and_out_of_the_tables(browser, page):
    browser.open(page)
    visible = "return [...document.querySelectorAll('#table-results th[data-col]')].filter((th) => !th.hidden).length"
    before = browser.run(visible)
    browser.click("#columns input", 0)
    assert browser.run(visible) == before - 1
    assert browser.run("return document.querySelector('#table-effects th[data-col=\"0\"]').hidden")


def test_a_name_in_the_legend_hides_its_curves_and_shows_them_again(browser, page):
    browser.open(page)
    browser.draw("figure-curves")
    assert len(browser.curves()) == 12
    browser.click("#curves .legend button", 1)
    shown = browser.curves()
    assert len(shown) == 9 and not any("linear, parameterization=v" in name for name in shown)
    browser.draw("figure-timesteps")
    assert len(browser.curves("figure-timesteps")) == 9
    browser.click("#curves .legend button", 1)
    assert len(browser.curves()) == 12
    browser.run("document.querySelectorAll('#curves .legend button')[0].dispatchEvent(new MouseEvent('dblclick'))")
    assert len(browser.curves()) == 3
    assert browser.complaints() == []


def test_curves_follow_metric_axis_colour_seeds_and_smoothing(browser, page):
    browser.open(page)
    browser.draw("figure-curves")
    figure = "document.getElementById('figure-curves')"
    browser.choose("metric", "train/loss")
    raw = browser.run(f"return {figure}.data[0].y")
    assert browser.run(f"return {figure}.layout.yaxis.title.text") == "train/loss" and len(raw) == 100
    browser.choose("smooth", "0.9")
    smooth = browser.run(f"return {figure}.data[0].y")
    weights = [0.9**age for age in range(99, -1, -1)]
    assert smooth[99] == pytest.approx(sum(map(lambda w, y: w * y, weights, raw)) / sum(weights))
    browser.choose("x", "time")
    assert browser.run(f"return {figure}.data[0].x[99]") == pytest.approx(2000 * 128 / 900 / 60, rel=0.02)
    browser.click("#log")
    assert browser.run(f"return {figure}.layout.yaxis.type") == "log"
    browser.choose("seeds", "mean")
    assert len([name for name in browser.curves() if name]) == 4
    browser.run("document.querySelector('#curves .colour').value = 'schedule'")
    browser.run("document.querySelector('#curves .colour').dispatchEvent(new Event('change'))")
    assert browser.texts("#curves .legend button") == ["linear", "cosine"]
    assert browser.complaints() == []


def test_two_runs_are_compared(browser, page):
    browser.open(page)
    browser.choose("run-a", "0")
    browser.choose("run-b", "1")
    assert "part at step 20" in browser.texts("#parting")[0]
    rows = browser.texts("#compared td")
    assert "seed" in rows and "uncommitted: train.py" in rows and "data.seed" in rows
    assert "task.parameterization" not in rows  # what differs in other runs only
    assert "… 1 equal line\n+seed 0" in rows and "… 1 equal line\n+seed 1" in rows
    assert "The same in both: environment." in browser.texts("#compared p.note")
    browser.choose("run-b", "3")
    assert "task.parameterization" in browser.texts("#compared td")
    browser.choose("run-b", "0")
    assert "one run" in browser.texts("#compared")[0]


def test_samples_are_shown_by_weights_seed_and_step(browser, page):
    browser.open(page)
    browser.run("document.getElementById('samples').scrollIntoView({behavior: 'instant'})")
    browser.until("return document.querySelectorAll('#grids img').length")
    pictures = "return [...document.querySelectorAll('#grids img')].map((image) => image.src)"
    last = browser.run(pictures)
    assert len(last) == 4 and all("step 2,000" in text for text in browser.texts("#grids figcaption"))
    browser.choose("step", "0")
    assert all(one != other for one, other in zip(browser.run(pictures), last, strict=True))
    browser.choose("step", "3")
    assert browser.run(pictures) == last
    browser.choose("kind", "1")
    browser.choose("which", "")
    assert len(browser.run(pictures)) == 12  # the one that failed has an earlier last one
    browser.click("#grids img")
    assert browser.run("return document.getElementById('large').open")
    assert browser.complaints() == []


@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_nothing_complains(browser, page, size, dark):
    browser.open(page, size, dark=dark)
    for figure in ("figure-curves", "figure-timesteps"):
        browser.draw(figure)
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark
    assert browser.complaints() == []


def test_reports_of_little_open_too(browser, tmp_path):
    make_sweep(tmp_path / "none", {"seed": [0, 1]}, job_0={"state": "waiting"}, job_1={"state": "waiting"})
    make_run(tmp_path / "one" / "run", overrides={}, level=0.2, seed=0)
    write_metrics(tmp_path / "few" / "a", [{"step": 1, "train/loss": 1.0}])
    write_metrics(tmp_path / "few" / "b", [{"step": 1, "other": 1.0}])
    for name in ("none", "one", "few"):
        browser.open(build([tmp_path / name]))
        if name != "none":
            browser.draw("figure-curves")
        assert browser.complaints() == []


@pytest.mark.slow
def test_a_hundred_runs_open_and_draw(browser, tmp_path):
    make_sweep(tmp_path, HUNDRED)
    page = build([tmp_path])
    assert page.stat().st_size < 6_000_000
    browser.open(page)
    browser.draw("figure-curves")
    assert len([name for name in browser.curves() if name]) == 20
    browser.choose("seeds", "each")
    assert len(browser.curves()) == 100 and browser.complaints() == []
