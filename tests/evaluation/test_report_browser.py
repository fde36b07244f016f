"""report.html in Chromium."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from asrllm.evaluation.report import ReportSet, choose_audio, encode_audio, write_report
from asrllm.evaluation.score import Transcript
from asrllm.evaluation.summary import HALLUCINATION_FLAGS, score
from asrllm.testing import tone
from tests.evaluation.test_report import ATTACK, decoded, report_set, transcript

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
# as root, offline, without background activity
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = (
            "chromium and chromedriver are not on PATH: apt-get install chromium chromium-driver"
        )
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        started.set_page_load_timeout(30)
        started.set_script_timeout(20)
        yield started
    finally:
        started.quit()


def attacked() -> list[Transcript]:
    return [
        transcript(ATTACK, f"one {ATTACK}", "two", speaker=ATTACK),
        transcript("plain", "one two three", "one two"),
    ]


def sets() -> list[ReportSet]:
    """A set of 120 utterances with a baseline and five audios, and a set of two with markup."""
    ours, theirs = decoded(120), decoded(120, seed=1, error_rate=0.4)
    audio = {ours.transcripts[i].key: encode_audio(tone("two", 0.8)) for i in choose_audio(ours, 5)}
    other = score(attacked())
    return [
        report_set("first", ours, baseline=theirs, audio=audio),
        report_set(ATTACK, other, baseline=other),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, "greedy_search, iter-9-avg-2", sets())
    return path.as_uri()


@pytest.fixture
def page(browser, report):
    """The freshly loaded report. Afterwards it has logged no error and used no network."""
    browser.get("about:blank")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(report)
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"].partition(":")[0]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert "file" in asked
    assert asked <= {"file", "data"}


def wait(driver, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 20, poll_frequency=0.05).until(condition)


def find(driver, selector):
    from selenium.webdriver.common.by import By

    return driver.find_elements(By.CSS_SELECTOR, selector)


def column(driver, name: str) -> list[str]:
    """Return the texts of the cells of a column."""
    (at,) = [
        i
        for i, head in enumerate(find(driver, "#table thead tr > *"), start=1)
        if head.get_attribute("data-column") == name
    ]
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".map((cell) => cell.firstChild?.textContent ?? '')",
        f"#table .numbers > :nth-child({at})",
    )


def choose(driver, selector: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(find(driver, selector)[0]).select_by_value(value)


def test_utterances_are_paged_and_sorted_worst_first(page):
    errors = [int(n) for n in column(page, "errors")]
    assert len(errors) == 50
    assert errors == sorted(errors, reverse=True)
    assert find(page, "#place")[0].text == "1–50 of 122"
    for _ in range(2):
        find(page, "#next")[0].click()
    assert find(page, "#place")[0].text == "101–122 of 122"
    assert not find(page, "#next")[0].is_enabled()
    assert len(column(page, "errors")) == 22
    assert max(int(n) for n in column(page, "errors")) <= min(errors)


@pytest.mark.parametrize(
    ("name", "first"), [("seconds", "descending"), ("key", "ascending"), ("Whisper", "descending")]
)
def test_click_on_a_header_sorts_and_second_click_reverses(page, name, first):
    def number(text: str) -> float:
        return float(text.removesuffix(" %"))

    (head,) = find(page, f"#table th[data-column={name}]")
    (button,) = find(page, f"#table th[data-column={name}] button")
    assert find(page, "#table th[data-column=errors]")[0].get_attribute("aria-sort") == "descending"
    choose(page, "#set", "0")
    for way in (first, {"ascending": "descending", "descending": "ascending"}[first]):
        button.click()
        assert head.get_attribute("aria-sort") == way
        assert [h.get_attribute("aria-sort") for h in find(page, "#table th[data-column]")].count(
            "none"
        ) == 6
        cells = column(page, name)
        values = cells if name == "key" else [number(cell) for cell in cells]
        assert values == sorted(values, reverse=way == "descending")


def test_utterances_are_filtered_by_text_set_and_flag(page):
    find(page, "#find")[0].send_keys("utt007")
    wait(page, lambda driver: column(driver, "key") == ["utt007"])
    find(page, "#find")[0].clear()
    choose(page, "#set", "1")
    assert sorted(column(page, "key")) == sorted([ATTACK, "plain"])
    find(page, "#find")[0].send_keys("<img src=x")
    wait(page, lambda driver: column(driver, "key") == [ATTACK])
    find(page, "#find")[0].clear()
    choose(page, "#set", "2")
    choose(page, "#flag", "loop")
    assert find(page, "#place")[0].text == "no matching utterances"


def test_markup_in_the_data_is_shown_as_text(page):
    assert len(find(page, "script")) == 2
    assert not find(page, "img")
    choose(page, "#set", "1")
    (opener,) = find(page, "#table tbody:first-of-type .opener")
    opener.click()
    assert opener.get_attribute("aria-expanded") == "true"
    assert ATTACK.replace("\u2028", "") in find(page, ".more .raw")[0].get_attribute(
        "textContent"
    ).replace("\u2028", "")
    opener.click()
    assert not find(page, ".more")


def test_utterance_shows_its_alignment_and_expands(page):
    choose(page, "#set", "1")
    find(page, "#find")[0].send_keys("plain")
    wait(page, lambda driver: column(driver, "key") == ["plain"])
    (aligned,) = find(page, "#table .text .aligned")
    assert (aligned.text, [d.text for d in find(page, "#table .text del")]) == (
        "one two three",
        ["three"],
    )
    assert "line-through" in find(page, "#table .text del")[0].value_of_css_property(
        "text-decoration"
    )
    find(page, "#table .opener")[0].click()
    assert [e.text for e in find(page, ".more .raw")] == ["one two three", "one two", "one two"]
    assert "0 substitutions, 1 deletion, 0 insertions in 3 words" in find(page, ".more dl")[0].text


def test_audio_can_be_played(page):
    players = find(page, "audio")
    assert len(players) == 5
    page.execute_script("arguments[0].scrollIntoView()", players[0])
    duration = wait(
        page, lambda driver: driver.execute_script("return arguments[0].duration", players[0])
    )
    assert duration == pytest.approx(0.8, abs=0.15)


def test_figures_change_with_the_set(page):
    of_all = [svg.get_attribute("aria-label") for svg in find(page, "#figures svg")]
    choose(page, "#set", "0")
    of_one = [svg.get_attribute("aria-label") for svg in find(page, "#figures svg")]
    assert of_all[0] != of_one[0]
    assert of_one[0].startswith("substitutions: ")
    assert len(find(page, "#summary tbody")) == 3
    assert [row.text for row in find(page, "#flags tbody th")] == list(HALLUCINATION_FLAGS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_window_in_light_and_dark_mode(page, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    pixels = np.asarray(Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("L"))
    assert pixels.std() > 10
    assert (np.median(pixels) > 128) == (scheme == "light")
