"""The page of the server in Chromium, with a fake microphone."""

import base64
import io
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
from tests.models.asr_llm.test_modeling import make_model
from tests.processes import wait_for
from tests.serving.test_api import audio, engine, running, send  # noqa: F401 (a fixture)
from tests.serving.test_realtime import PCM_RATE, CountingEngine, completed, live, of

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
    second = page.find_elements("css selector", "#segments button")[1]
    start = expected["segments"][1]["start"]
    assert second.accessible_name.split()[0] == f"00:00:{int(start):02}"
    second.click()
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


def test_page_fits_a_phone(page):
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_script("document.querySelector('details').open = true")
    code = """
        const edge = (part) => part.getBoundingClientRect().right;
        const inputs = [...document.querySelectorAll("input")];
        return [edge(document.querySelector("form")), inputs.map(edge)];
    """
    try:
        width, inputs = page.execute_script(code)
        assert max(inputs) <= width < 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def keep_recording(page):
    """Keep the file of the recording, which the policy of the page does not let one fetch."""
    page.execute_script("""
        const create = URL.createObjectURL;
        URL.createObjectURL = (file) => create.call(URL, window.recorded = file);
    """)


def recording(page):
    """Return the samples of the recording."""
    code = """
        const reader = new FileReader();
        reader.onload = () => arguments[0](reader.result.split(",")[1]);
        reader.readAsDataURL(window.recorded);
    """
    content = base64.b64decode(page.execute_async_script(code))
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == PCM_RATE
    return samples


def test_text_of_the_microphone_appears_during_speech(page, url):
    keep_recording(page)
    button = page.find_element("id", "record")
    button.click()
    wait_for(lambda: status(page) == "Recording", 20)
    assert button.get_attribute("aria-pressed") == "true"
    # the second segment has a text, so that both are in the recording
    wait_for(lambda: len(shown(page)) > 1 and shown(page)[1].strip(), 20)
    assert status(page) == "Recording"
    button.click()
    wait_for(lambda: status(page) == "Done", 30)
    samples = recording(page)
    assert len(samples) > PCM_RATE
    with live(url) as session:
        session.append(samples.tobytes())
        session.commit()
        session.send("input_audio_buffer.clear")
        events = session.until("input_audio_buffer.cleared")
        committed = len(of(events, "input_audio_buffer.committed"))
        while len(completed(events)) < committed:
            events.append(session.receive())
    assert [text.strip() for text in completed(events)] == shown(page)
    times = [event["audio_start_ms"] for event in of(events, "input_audio_buffer.speech_started")]
    code = "return [...document.querySelectorAll('#segments time')].map((time) => time.textContent)"
    assert len(page.execute_script(code)) == len(times) > 1
    player = page.find_element("id", "player")
    page.find_elements("css selector", "#segments button")[1].click()
    wait_for(lambda: float(player.get_property("currentTime")) >= times[1] / 1000, 20)


def test_wrong_settings_of_the_microphone_are_shown(page):
    page.execute_script("document.querySelector('details').open = true")
    page.find_element("id", "language").send_keys("../x")
    page.find_element("id", "record").click()
    wait_for(lambda: "language" in status(page) and "error" in classes(page), 20)
    assert page.find_element("id", "record").get_attribute("aria-pressed") == "false"
    page.find_element("id", "language").clear()
    page.find_element("id", "record").click()
    wait_for(lambda: status(page) == "Recording", 20)
    page.find_element("id", "record").click()
    # the microphone may not have had a sound yet
    wait_for(lambda: status(page) in ("Done", "No speech was found"), 30)


def test_fields_that_the_model_cannot_use_are_disabled(browser, world):
    with running(CountingEngine(), make_model(world).config) as (address, _):
        browser.get(address)
        fields = [browser.find_element("id", name) for name in ("language", "hotwords", "prompt")]
        wait_for(lambda: [field.is_enabled() for field in fields] == [False, False, True], 20)


@pytest.mark.parametrize("key", ["secret", "wrong"])
def test_key_is_used_for_the_microphone(browser, engine, key):  # noqa: F811
    with running(engine, engine.model.config, api_key="secret") as (address, _):
        browser.get(address)
        browser.execute_script("document.querySelector('details').open = true")
        browser.find_element("id", "key").send_keys(key)
        browser.find_element("id", "record").click()
        if key == "secret":
            wait_for(lambda: "".join(shown(browser)).strip(), 20)
            browser.find_element("id", "record").click()
            wait_for(lambda: status(browser) == "Done", 30)
        else:
            wait_for(lambda: "API key" in status(browser), 20)
        browser.get_log("browser")  # the browser logs the status 401


def test_transcript_as_text_has_spaces_where_the_script_has_them(page):
    code = """
        const {asFile} = await import('/page/formats.js');
        return asFile(arguments[0].map((text) => ({text, start: 0, end: 1})), "txt");
    """
    texts = ["one", " two", "", "今天", "天气", "three"]
    script = f"return (async function() {{ {code} }}).apply(null, arguments)"
    assert page.execute_script(script, texts) == "one two 今天天气 three\n"


def test_problem_of_a_file_is_shown(page, tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio")
    page.find_element("id", "file").send_keys(str(tmp_path / "text.wav"))
    wait_for(lambda: "text.wav" in status(page) and "error" in classes(page), 20)
    page.get_log("browser")  # the browser logs the status 400


def classes(page):
    return page.find_element("id", "status").get_attribute("class")


def test_model_is_chosen_if_there_are_several(browser, engine, tmp_path):  # noqa: F811
    (tmp_path / "a.wav").write_bytes(audio(1))
    other = CountingEngine()
    with running(engine, engine.model.config, others={"other": other}) as (address, _):
        browser.get(address)
        choice = browser.find_element("id", "model")
        wait_for(choice.is_displayed, 20)
        assert choice.text.split() == ["tiny", "other"]
        choice.send_keys("other")
        browser.find_element("id", "file").send_keys(str(tmp_path / "a.wav"))
        wait_for(lambda: status(browser) == "Done", 30)
        assert shown(browser) == [other.text(wave) for wave in other.waves]
