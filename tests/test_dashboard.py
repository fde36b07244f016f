"""The workspace of `asrllm dashboard`, offline, against the metrics that the code logs."""

import contextlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from asrllm.commands.dashboard import metric_sections, other_than
from asrllm.commands.dispatch import main
from asrllm.evaluation.metric_names import EVALUATION_METRICS
from asrllm.training.callbacks.metric_names import METRICS, full_name
from asrllm.training.wandb_login import LOGIN_VARIABLES
from tests.conftest import run_script
from tests.test_cli import does, fails

LINE_PLOT = "Run History Line Plot"
UNITS = {re.sub(r"{\w+}", "dev-clean", full_name(n)): unit for n, (unit, _) in METRICS.items()}
UNITS |= {f"dev-clean/{name}": unit for name, (unit, _) in EVALUATION_METRICS.items()}


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in (*LOGIN_VARIABLES, "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def sections(capsys, no_login):
    """Return the panels of the dry run by section."""
    pytest.importorskip("wandb_workspaces")
    view = json.loads(does(capsys, "dashboard", "speech", "--entity", "team", "--dry-run"))
    assert (view["project"], view["entity"]) == ("speech", "team")
    bank = view["spec"]["section"]["panelBankConfig"]
    return {section["name"]: section["panels"] for section in bank["sections"]}


def shows(panel, name):
    config = panel["config"]
    pattern = config.get("metricRegex")
    return name in config["metrics"] or bool(pattern and re.search(pattern, name))


def test_every_logged_value_has_one_panel_with_its_unit(sections):
    plots = []
    for panels in sections.values():
        plots += [panel for panel in panels if panel["viewType"] == LINE_PLOT]
    for name, unit in UNITS.items():
        found = [panel["config"]["yAxisTitle"] for panel in plots if shows(panel, name)]
        assert unit, name
        assert found == [unit], name
    for panel in plots:
        assert any(shows(panel, name) for name in UNITS), panel


def test_sections_have_samples_and_a_comparison(sections):
    assert [*sections] == [
        "Training",
        "Data",
        "Speed",
        "Validation",
        "Evaluation",
        "Comparison of runs",
    ]
    assert all(sections.values())
    for name, table in (("Validation", "valid/samples"), ("Evaluation", "evaluation/samples")):
        panels = [panel for panel in sections[name] if panel["viewType"] == "Weave"]
        assert f'"val": "{table}"' in json.dumps(panels)
    kinds = [panel["viewType"] for panel in sections["Comparison of runs"]]
    assert kinds == ["Run Comparer", "Parallel Coordinates Plot"]


def test_test_set_may_have_any_name():
    plots = metric_sections()["Evaluation"]
    for name in ("t", "tr", "trains", "test", "training", "retrain", "写"):
        assert sum(bool(re.search(plot.pattern, f"{name}/utterances")) for plot in plots) == 1
    assert not any(re.search(plot.pattern, "train/utterances") for plot in plots)
    assert not re.fullmatch(other_than("train"), "train")
    assert not re.fullmatch(other_than("train"), "")


def test_dashboard_without_a_login_is_rejected(capsys, no_login):
    pytest.importorskip("wandb_workspaces")
    assert "wandb login" in fails(capsys, "dashboard", "speech")


def test_missing_package_of_the_dashboard_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert "pip install 'asrllm[dashboard]'" in fails(capsys, "dashboard", "speech", "--dry-run")


@pytest.mark.parametrize("arguments", [[], [""], ["speech", "--entity", ""]])
def test_empty_arguments_of_the_dashboard_are_rejected(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["dashboard", *arguments])
    assert stopped.value.code == 2


@contextlib.contextmanager
def wandb_server(answer):
    """Yield the address of a server with W&B's GraphQL API, and the views that are saved to it.

    Args:
        answer: the answer to the request that saves a view.
    """
    views = []
    viewer = {"id": "1", "entity": "team", "username": "me", "teams": {"edges": []}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/graphql":  # usage statistics
                self.send_error(404)
                return
            request = json.loads(body)
            content = {"data": {"viewer": viewer, "serverInfo": {}}}
            if "upsertView" in request["query"]:
                views.append(request["variables"])
                content = answer
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", views
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"data": {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}}}}, 0),
        ({"data": None, "errors": [{"message": "permission denied"}]}, 2),
    ],
)
def test_dashboard_is_saved_as_a_view_of_the_project(answer, status, tmp_path):
    pytest.importorskip("wandb_workspaces")
    with wandb_server(answer) as (address, views):
        login = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        folders = {"WANDB_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
        done = run_script("dashboard", "speech", **login, **folders)
    assert done.returncode == status, done.stderr
    (view,) = views
    assert (view["projectName"], view["entityName"]) == ("speech", "team")
    assert "train/loss" in view["spec"]
    if status:
        assert "permission denied" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert done.stdout == f"{address}/team/speech?nw=abc\n"
