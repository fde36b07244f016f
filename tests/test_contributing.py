"""The examples of CONTRIBUTING.md are components that work."""

import json
import re
import typing
from types import ModuleType, SimpleNamespace

import pytest
import soundfile
import torch
import yaml

import asrllm
from asrllm.commands.dispatch import main
from asrllm.data import sources
from asrllm.data.index import open_index
from asrllm.models import projectors
from asrllm.models.encoders import registry
from asrllm.models.model_args import EncoderPart, ModelConfig
from asrllm.testing import tone
from asrllm.training.callbacks import meters
from asrllm.training.callbacks.metric_names import METRICS
from asrllm.training.trainer import StepSums
from tests.conftest import REPOSITORY
from tests.models.asr_llm.test_modeling import batch_of, make_model, samples

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def example(title, **names):
    """Run the code of an example, and return its namespace and the entry of its table.

    Args:
        title: heading of the example.
        names: what the module in which the code belongs has imported.
    """
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"### {title}\n")[2].partition("\n##")[0]
    code, entry = BLOCK.findall(section)
    module = ModuleType("example")
    vars(module).update(names)
    exec(compile(code, f"CONTRIBUTING.md, {title}", "exec"), vars(module))
    return module, eval(entry, vars(module))


def test_source_makes_shards_and_rejects_a_row(tmp_path, monkeypatch):
    _, entry = example("A source", Source=sources.Source)
    for name, source in entry.items():
        monkeypatch.setitem(sources.SOURCES, name, source)
    soundfile.write(tmp_path / "a.wav", tone("one", 0.5), 16000)
    (tmp_path / "list.tsv").write_text("a.wav\tone\nb.wav two\n")
    out = tmp_path / "shards"
    command = ["shards", "make", str(out), "--pairs", str(tmp_path / "list.tsv")]
    assert main([*command, "--workers", "1"]) == 0
    assert len(open_index(out)) == 1
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "bad_row"


@pytest.mark.slow
def test_encoder_trains_and_is_saved(world, tmp_path, monkeypatch):
    module, entry = example("An encoder")
    for name, encoder in entry.items():
        monkeypatch.setitem(registry.ENCODERS, name, encoder)
    weights = tmp_path / "averages.pt"
    torch.save(module.AveragesEncoder(width=12).state_dict(), weights)
    part = EncoderPart(model_type="averages", pretrained_model=str(weights), frozen=True)
    model = make_model(world, audio_encoder=part)
    model(**batch_of(model, samples())).loss.backward()
    assert model.projector.mlp.linear1.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "saved")
    waves = [sample.wave for sample in samples()]
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert loaded.transcribe(waves, 6) == model.transcribe(waves, 6)


def test_encoder_has_the_whole_interface():
    module, _ = example("An encoder")
    names = set(vars(registry.AudioEncoder)) | set(typing.get_type_hints(registry.AudioEncoder))
    names = {name for name in names if not name.startswith("_")}
    assert {"frame_lengths", "make_features", "output_dim"} <= names
    encoder = module.AveragesEncoder(width=4)
    assert [name for name in names if not hasattr(encoder, name)] == []


def test_projector_maps_frames_to_embeddings(monkeypatch):
    _, entry = example("A projector")
    for name, projector in entry.items():
        monkeypatch.setitem(projectors.PROJECTORS, name, projector)
    projector = projectors.AudioProjector(
        "gated", input_size=6, output_size=5, rate=3, hidden_size=8, tag_boundary=False
    )
    tokens = projector(torch.randn(2, 7, 6), torch.tensor([7, 4]))
    assert tokens.shape == (3 + 2, 5)
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())


def test_every_projector_can_be_configured():
    choices = typing.get_args(typing.get_type_hints(ModelConfig)["projector"])
    assert set(choices) == projectors.PROJECTORS.keys()


def test_meter_records_the_metric_that_it_describes():
    module, entry = example("A metric", **vars(meters), RATE=16000)
    meter = module.LongestUtterance()
    batches = [SimpleNamespace(wave_lengths=torch.tensor(n)) for n in ([8000, 32000], [16000])]
    meter.after_step(None, SimpleNamespace(micro_batches=batches), StepSums())
    own = meter.take()
    assert meter.take() == 0
    assert meter.record([own, 8000], 1.0) == dict.fromkeys(entry, 2.0)
    assert entry.keys() - METRICS.keys() == entry.keys()
    (about,) = entry.values()
    assert all(isinstance(text, str) and text for text in about)


def test_workflow_runs_the_steps_of_ci():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    commands = []
    for job in workflow["jobs"].values():
        commands += [step["run"] for step in job["steps"] if "run" in step]
    steps = re.findall(r"^make ([\w-]+)", (REPOSITORY / ".ci/run").read_text(), re.MULTILINE)
    assert len(steps) > 3
    assert [command for command in commands if command.startswith("make ")] == [
        f"make {step}" for step in steps
    ]


def test_citation_names_the_version_and_the_license():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == asrllm.__version__
    assert citation["license"] in (REPOSITORY / "pyproject.toml").read_text()
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_fields_with_labels(name):
    form = yaml.safe_load((REPOSITORY / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {"name", "description"} <= form.keys()
    assert all(field["id"] and field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
