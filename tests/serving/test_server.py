"""`asrllm serve` as a process."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from asrllm.commands.dispatch import build_parser
from asrllm.commands.serve import load_models, model_paths, read_api_key, server_options
from asrllm.models.state_dict import is_adapter
from tests.conftest import REPOSITORY
from tests.models.asr_llm.test_modeling import make_model
from tests.processes import started, wait_for
from tests.serving.test_api import audio, send
from tests.test_cli import fails


@pytest.fixture
def model(world, tmp_path):
    made = make_model(world)
    made.config.prompts = ["Transcribe."]
    made.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def address(log):
    """Return the URL in the line that the server prints when it is ready, or None."""
    text = log.read_text() if log.exists() else ""
    found = re.search(r"http://127\.0\.0\.1:\d+", text)
    return found[0] if found else None


@pytest.mark.slow
def test_sigterm_loses_no_request(model, tmp_path):
    script = REPOSITORY / "launch" / "serve.py"
    command = [script, model, "--port", 0, "--batch-size", 1, "--max-new-tokens", 40]
    with started(tmp_path / "logs", command) as (server,):
        log = tmp_path / "logs" / "0"
        wait_for(lambda: address(log) or server.poll() is not None)
        url = address(log)
        assert url, log.read_text()
        assert [row["id"] for row in httpx.get(f"{url}/v1/models").json()["data"]] == ["tiny"]
        with ThreadPoolExecutor(32) as threads:
            answers = [threads.submit(send, url, audio(3, seed=i)) for i in range(32)]
            wait_for(lambda: any(answer.done() for answer in answers), 30)  # others are not
            server.send_signal(signal.SIGTERM)
            found = [answer.exception(60) or answer.result().status_code for answer in answers]
        assert server.wait(timeout=60) == 0
    # a request may be rejected at its connection, but an accepted one is answered
    assert found.count(200) >= 4
    assert all(status == 200 or isinstance(status, httpx.ConnectError) for status in found)
    assert "Traceback" not in log.read_text()


def test_models_are_named_by_their_directory_or_as_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert model_paths(["exp/run", "other=exp/run/", "a=b"]) == {
        "run": "exp/run",
        "other": "exp/run/",
        "a=b": "a=b",
    }


def test_models_share_the_llm_and_keep_their_adapters(world, tmp_path):
    made = make_model(world)
    made.config.prompts = ["Transcribe."]
    name, adapter = next((n, w) for n, w in made.named_parameters() if is_adapter(n))
    for folder in ("a", "b"):
        made.save_pretrained(tmp_path / folder)
        adapter.data.mul_(2)
    command = ["serve", str(tmp_path / "a"), str(tmp_path / "b")]
    arguments = build_parser(command).parse_args(command)
    arguments.base_models = {}
    with contextlib.closing(load_models(arguments, model_paths(arguments.models))) as models:
        first, second = (dict(m.batcher.engine.model.named_parameters()) for m in models)
    own = [n for n in first if first[n].data_ptr() != second[n].data_ptr()]
    assert own == [name]


def test_models_of_one_name_are_reported(model, capsys):
    error = fails(capsys, "serve", model, f"{model.name}={model}")
    assert repr(model.name) in error
    assert "--weights" in fails(capsys, "serve", model, f"other={model}", "--weights", "a.pt")
    assert "--access-log" in fails(capsys, "serve", model, "--log-texts")


def test_port_in_use_is_reported_before_the_model_loads(model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in fails(capsys, "serve", model, "--port", port)


@pytest.mark.parametrize("content", ["", "two words", "schl\u00fcssel", "a\nb"])
def test_bad_key_is_reported(model, tmp_path, capsys, monkeypatch, content):
    (tmp_path / "key").write_text(content)
    error = fails(capsys, "serve", model, "--api-key-file", tmp_path / "key")
    assert str(tmp_path / "key") in error
    if content:
        assert "--api-key " in fails(capsys, "serve", model, "--api-key", content)
        monkeypatch.setenv("ASRLLM_API_KEY", content)
        assert "ASRLLM_API_KEY" in fails(capsys, "serve", model)


def test_spaces_around_a_key_are_ignored(monkeypatch):
    monkeypatch.setenv("ASRLLM_API_KEY", " secret\n")
    assert read_api_key(None, None) == "secret"


def test_key_of_the_command_is_used_before_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("ASRLLM_API_KEY", "other")
    command = ["serve", "model", "--api-key", "secret"]
    options = server_options(build_parser(command).parse_args(command))
    assert options.api_key == "secret"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 70])
def test_unknown_host_is_reported(model, capsys, host):
    assert host in fails(capsys, "serve", model, "--host", host)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["bash", "python", "js"])
def test_examples_of_the_documentation_run(model, tmp_path, language):
    """The examples of a language print the text of the recording."""
    program = {"bash": ["bash", "-c"], "python": [sys.executable, "-c"], "js": ["node", "-e"]}
    for needed in (program[language][0], "ffmpeg"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    code = "\n".join(re.findall(rf"```{language}\n(.*?)```", page, re.S))
    (tmp_path / "a.wav").write_bytes(audio(2))
    with started(tmp_path / "logs", [REPOSITORY / "launch" / "serve.py", model, "--port", 0]):
        log = tmp_path / "logs" / "0"
        wait_for(lambda: address(log))
        url = address(log)
        expected = send(url, audio(2)).json()["text"]
        code = code.replace("http://127.0.0.1:8000", url)
        if language == "js":
            code = f"(async () => {{ {code} }})();"
        done = subprocess.run(
            [*program[language], code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert expected
    assert done.stdout.startswith(expected)
