"""The page of the server in Chromium, with a fake microphone."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from asrllm.testing import vowels
from tests.evaluation.test_report_browser import FLAGS
from tests.processes import wait_for
from tests.serving.test_api import audio, engine, running, send  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
RATE = 16000


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "chromium and chromedriver are not on PATH"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("chromium")
    soundfile.write(folder / "voice.wav", np.tile(vowels(2, rate=RATE), 5), RATE)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    microphone = (
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={folder / 'voice.wav'}",
    )
    for flag in (*FLAGS, *microphone, f"--user-data-dir={folder / 'data'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        started.set_page_load_timeout(30)
        started.set_script_timeout(20)
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="module")
def url(engine):  # noqa: F811
    with running(engine, engine.model.config) as (address, _):
        yield address


@pytest.fixture
def page(browser, url):
    browser.get(url)
    yield browser
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def status(page):
    return page.find_element("id", "status").text


def shown(page):
    """Return the texts of the segments."""
    code = "return [...document.querySelectorAll('#segments button')].map(b => b.lastChild.data)"
    return page.execute_script(code)


def test_text_of_a_file_appears_and_its_segments_play(page, url, tmp_path):
    (tmp_path / "a.wav").write_bytes(audio(4))
    page.find_element("id", "file").send_keys(str(tmp_path / "a.wav"))
    wait_for(lambda: status(page) == "Done", 30)
    expected = send(url, audio(4), response_format="verbose_json").json()
    texts = [segment["text"] for segment in expected["segments"]]
    assert shown(page) == texts
    assert len(texts) > 1
    page.find_elements("css selector", "#segments button")[1].click()
    start = expected["segments"][1]["start"]
    player = page.find_element("id", "player")
    wait_for(lambda: float(player.get_property("currentTime")) >= start, 20)
    module = "const {asFile} = await import('/page/formats.js');"
    segments = json.dumps(expected["segments"])
    code = f"{module} return asFile({segments}, form);"
    for form in ("srt", "vtt"):
        made = page.execute_script(f"return (async (form) => {{ {code} }})(arguments[0])", form)
        answer = send(url, audio(4), response_format=form).text
        assert made.split("\n\n")[0].splitlines()[0] == answer.splitlines()[0]
        assert made.count("-->") == len([text for text in texts if text.strip()])


def test_recording_of_the_microphone_is_transcribed(page):
    button = page.find_element("id", "record")
    button.click()
    wait_for(lambda: status(page) == "Recording", 20)
    assert button.get_attribute("aria-pressed") == "true"
    page.execute_async_script("setTimeout(arguments[0], 2500)")  # the length of the recording
    button.click()
    wait_for(lambda: status(page) == "Done", 30)
    assert "".join(shown(page)).strip()
    player = page.find_element("id", "player")
    wait_for(lambda: float(player.get_property("duration") or 0) > 1.5, 20)


def test_problem_of_a_file_is_shown(page, tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio")
    page.find_element("id", "file").send_keys(str(tmp_path / "text.wav"))
    wait_for(lambda: "text.wav" in status(page) and "error" in classes(page), 20)
    page.get_log("browser")  # the browser logs the status 400


def classes(page):
    return page.find_element("id", "status").get_attribute("class")
