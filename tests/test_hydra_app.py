"""Hydra's features work as its users know them."""

import json
import re
import sys

import pytest
import yaml

from asrllm.commands.dispatch import parse
from asrllm.commands.train import last_validation_loss
from asrllm.config import as_yaml
from asrllm.config_keys import NAMES_ELSEWHERE, meanings
from asrllm.errors import UserError, error_chain
from asrllm.evaluation.config import EvaluationRun
from asrllm.hydra_app import run_app
from asrllm.schema import all_keys
from asrllm.training.run_config import PlanRun, TrainRun
from tests.processes import assert_done, both_cores, run_script
from tests.test_config import GIVEN, load

pytestmark = pytest.mark.usefixtures("empty_directory")


@pytest.fixture
def empty_directory(tmp_path, monkeypatch):
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def jobs(*words):
    """Return the configurations of the jobs of a command line."""
    found = []
    argv = ["train", *words]
    run_app("train", parse(argv), TrainRun, found.append, own_exp_dirs=True)
    return found


def job(*words):
    (found,) = jobs(*words)
    return found


@pytest.mark.slow
def test_app_composes_like_the_compose_api_and_writes_nothing(empty_directory):
    assert job(*GIVEN, "trainer.lr=3", "model.audio_token=<|A B|>") == load(
        "trainer.lr=3", "model.audio_token=<|A B|>"
    )
    assert list(empty_directory.iterdir()) == []


@pytest.mark.slow
def test_config_dir_adds_groups_and_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "big.yaml").write_text(
        "# @package _global_\ntrainer: {lr: 0.5}\nmodel: {llm: {lora: {r: 99}}}\n"
    )
    found = job("--config-dir", str(tmp_path), *GIVEN, "+experiment=big", "trainer.num_steps=7")
    assert found == load("trainer.lr=0.5", "model.llm.lora.r=99", "trainer.num_steps=7")


@pytest.mark.slow
def test_experiment_in_the_users_defaults_list_is_selected_without_a_plus_sign(tmp_path):
    (tmp_path / "experiment").mkdir()
    for name, lr in (("small", 0.5), ("big", 0.75)):
        text = f"# @package _global_\ntrainer: {{lr: {lr}}}\n"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    (tmp_path / "mine.yaml").write_text("defaults: [train, experiment: small, _self_]\n")
    mine = ("--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN)
    assert job(*mine).trainer.lr == 0.5
    assert job(*mine, "experiment=big").trainer.lr == 0.75


def test_experiment_is_found_on_the_search_path(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntrainer: {lr: 0.5}\n"
    (tmp_path / "experiment" / "big.yaml").write_text(text)
    found = job(*GIVEN, f"hydra.searchpath=[file://{tmp_path}]", "+experiment=big")
    assert found.trainer.lr == 0.5


@pytest.mark.slow
def test_config_name_selects_the_users_configuration(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\ntrainer: {lr: 0.25}\n")
    found = job("--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN)
    assert found == load("trainer.lr=0.25")


@pytest.mark.slow
def test_users_configuration_may_have_the_name_of_a_packaged_one(tmp_path):
    groups = "defaults: [model: default, data: default, trainer: default, _self_]"
    (tmp_path / "train.yaml").write_text(f"{groups}\ntrainer: {{lr: 0.25}}\n")
    found = job("--config-dir", str(tmp_path), "--config-name", "train", *GIVEN, "seed=7")
    assert found == load("trainer.lr=0.25", "seed=7")


def test_configuration_that_includes_itself_is_reported(tmp_path):
    (tmp_path / "train.yaml").write_text("defaults: [train, _self_]\n")
    with pytest.raises(UserError, match="data: default"):
        job("--config-dir", str(tmp_path), "--config-name", "train", *GIVEN)


def test_data_config_with_a_packaged_name_does_not_replace_that_one(tmp_path):
    (tmp_path / "train.yaml").write_text("- shards: s\n")
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\ntrainer: {lr: 0.25}\n")
    found = job("--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN)
    assert found == load("trainer.lr=0.25")


@pytest.mark.slow
def test_configuration_of_train_takes_the_keys_of_plan(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\ntrainer: {lr: 0.25}\n")
    mine = ["--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN]
    found = []
    run_app("plan", parse(["plan", *mine, "gpus=4"]), PlanRun, found.append)
    assert found[0].gpus == 4
    with pytest.raises(UserError, match="gpu_memry"):
        run_app("plan", parse(["plan", *mine, "gpu_memry=4"]), PlanRun, found.append)


@pytest.mark.parametrize("option", ["--config-path=x", "-cp=x", "--info", "--hydra-help"])
def test_other_options_of_hydra_say_what_to_use(option, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["train", option, *GIVEN])
    assert exit_.value.code == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: asrllm train ")
    assert option.partition("=")[0] in last
    assert re.search(r" --(config-dir|cfg|help)\b", last)


def test_unknown_options_are_reported_with_the_usage_of_the_verb(capsys):
    for argv in (["train", "--nope", "a=1"], ["average", "exp", "--iter=3", "--avg=2", "--nope"]):
        with pytest.raises(SystemExit) as exit_:
            parse(argv)
        assert exit_.value.code == 2
        *usage, last = capsys.readouterr().err.splitlines()
        assert usage[0].startswith(f"usage: asrllm {argv[0]} ")
        assert "--nope" in last


@pytest.mark.slow
def test_short_options_are_those_of_hydra(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\ntrainer: {lr: 0.25}\n")
    mine = ["-cd", str(tmp_path), "-cn", "mine", *GIVEN]
    assert job(*mine) == load("trainer.lr=0.25")
    assert jobs(*mine, "-c", "job", "-p", "trainer.optimizer") == []
    assert yaml.safe_load(capsys.readouterr().out) == {"name": "adamw"}


@pytest.mark.slow
def test_verbs_that_read_a_run_may_sweep_over_one():
    found = []
    argv = ["evaluate", "-m", "exp_dir=e", "checkpoint.model.iter=3", "checkpoint.model.avg=1,2"]
    argv.append("data.test_data_config=t.yaml")
    run_app("evaluate", parse(argv), EvaluationRun, found.append)
    assert [config.checkpoint.model.avg for config in found] == [1, 2]


@pytest.mark.slow
def test_configuration_of_a_training_is_named_by_other_verbs(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nexp_dir: e/x\n")
    (tmp_path / "config.yaml").write_text("exp_dir: e/x\ntrainer: {lr: 1}\n")  # as in a run
    for name in ("mine", "config"):
        argv = ["evaluate", "--config-dir", str(tmp_path), "--config-name", name]
        argv.append("checkpoint.model.avg=1")
        with pytest.raises(UserError, match=r"'asrllm evaluate exp_dir=e/x'"):
            run_app("evaluate", parse(argv), EvaluationRun, list)


def test_file_without_a_group_takes_its_keys_from_the_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer: {num_steps: 5}\n")
    mine = ["--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN]
    assert job(*mine, "trainer.lr=0.5") == load("trainer.num_steps=5", "trainer.lr=0.5")


def test_options_that_exclude_each_other_are_reported():
    for options in (["-m", "--cfg", "job"], ["--package", "trainer"]):
        with pytest.raises(UserError, match="--cfg"):
            jobs(*options, *GIVEN)


@pytest.mark.slow
def test_stored_configuration_can_be_used_again(tmp_path):
    stored = load("trainer.lr=0.125", "model.audio_token=<|X|>", "prompt_file=p.txt")
    (tmp_path / "config.yaml").write_text(as_yaml(stored))
    given_back = ("--config-dir", str(tmp_path), "--config-name", "config")
    assert job(*given_back) == stored
    assert job(*given_back, "trainer.lr=2").trainer.lr == 2


@pytest.mark.slow
def test_keys_can_be_forced_and_deleted():
    assert job(*GIVEN, "++trainer.lr=3") == load("trainer.lr=3")
    assert job(*GIVEN, "~trainer.lr") == load()


def test_cfg_prints_the_configuration_without_running(capsys):
    assert jobs("--cfg", "job", *GIVEN, "trainer.lr=3") == []
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["lr"] == 3
    assert jobs("--cfg", "job", "--package", "trainer.optimizer", *GIVEN) == []
    assert yaml.safe_load(capsys.readouterr().out) == {"name": "adamw"}


@pytest.mark.slow
def test_sweep_runs_a_job_for_each_value():
    found = jobs("-m", *GIVEN, "exp_dir='e/${hydra:job.num}'", "trainer.lr=1,2", "seed=3,4")
    assert [(config.trainer.lr, config.seed) for config in found] == [
        (1, 3),
        (1, 4),
        (2, 3),
        (2, 4),
    ]
    assert [config.exp_dir for config in found] == ["e/0", "e/1", "e/2", "e/3"]
    assert [config.exp_dir for config in jobs("-m", *GIVEN, "exp_dir=a,b")] == ["a", "b"]


@pytest.mark.slow
def test_sweep_into_one_directory_is_rejected_before_the_first_job(tmp_path, empty_directory):
    with pytest.raises(UserError, match="exp_dir"):
        jobs("-m", *GIVEN, "trainer.lr=1,2")
    with pytest.raises(UserError):
        jobs("-m", *GIVEN, "exp_dir='e/${'")
    assert list(empty_directory.iterdir()) == []
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nexp_dir: e\n")
    mine = ["--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN[1:]]
    with pytest.raises(UserError, match="exp_dir"):
        jobs("-m", *mine, "trainer.lr=1,2")


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("words", [["exp_dir='e/${'"], ["trainer.schedule.nam=cosine"]])
def test_errors_are_the_same_under_a_debugger(monkeypatch, words):
    """There, or with OC_CAUSE=1, OmegaConf raises errors that are their own causes."""

    def message():
        with pytest.raises(UserError) as raised:
            job(*GIVEN, *words)
        return str(raised.value)

    expected = message()
    monkeypatch.setenv("OC_CAUSE", "1")
    assert message() == expected
    monkeypatch.delenv("OC_CAUSE")
    tracer = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        assert message() == expected
    finally:
        sys.settrace(tracer)


def test_error_that_is_its_own_cause_is_yielded_once():
    error, other = ValueError(), KeyError()
    error.__cause__ = other
    other.__cause__ = error
    assert list(error_chain(error)) == [error, other]
    other.__cause__ = None
    other.__context__ = TypeError()
    assert list(error_chain(error, contexts=True)) == [error, other, other.__context__]


@pytest.mark.parametrize("value", ["${nope}", "${oc.env:NOPE_NOT_SET}", "${trainer.nope}"])
def test_reference_to_nothing_is_reported_with_its_key(value):
    with pytest.raises(UserError, match="prompt_file") as raised:
        job(*GIVEN, f"prompt_file='{value}'")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.longest(60, reason="trains twice in one process")
def test_sweep_trains_twice_in_one_process(world, tmp_path):
    keys = world.overrides(tmp_path / "unused", trainer__num_steps=1)
    keys = [key for key in keys if not key.startswith("exp_dir=")]
    folder = f"exp_dir='{tmp_path}/${{hydra:job.num}}'"
    done = run_script("train", "-m", *keys, folder, f"hydra.sweep.dir={tmp_path}", "seed=1,2")
    assert_done(done)
    for number in range(2):
        assert (tmp_path / str(number) / "pretrained.pt").is_file()


@pytest.mark.slow
def test_first_failure_stops_a_sweep():
    found = []

    def task(config):
        found.append(config.seed)
        raise UserError("seed")

    argv = ["train", "-m", *GIVEN, "exp_dir='e/${hydra:job.num}'", "seed=3,4"]
    with pytest.raises(UserError, match="seed"):
        run_app("train", parse(argv), TrainRun, task)
    assert found == [3]


@pytest.mark.slow
def test_sweeper_gets_the_number_of_each_job_and_writes_the_best(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = []

    def loss(config):
        found.append(config.trainer.lr)
        return (config.trainer.lr - 0.5) ** 2

    sweep = optuna_sweep(tmp_path, "trainer.lr=interval(0.1,1.0)")
    run_app("train", parse(sweep), TrainRun, loss, own_exp_dirs=True)
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert len(set(found)) == 3
    assert best["best_params"]["trainer.lr"] == min(found, key=lambda lr: abs(lr - 0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "result", "named"),
    [("-1,-2", 1.0, r"trainer\.lr=-[12]\b"), ("1,2", None, r"data\.valid_data_config")],
)
def test_job_without_a_number_stops_a_sweep_with_its_error(tmp_path, choices, result, named):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = []

    def task(config):
        found.append(config)
        return result

    sweep = optuna_sweep(tmp_path, f"trainer.lr=choice({choices})")
    with pytest.raises(UserError, match=named):
        run_app("train", parse(sweep), TrainRun, task, own_exp_dirs=True)
    assert len(found) <= 1


def optuna_sweep(folder, *words):
    """Return the command line of a sweep with three trials."""
    trials = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    folders = ["exp_dir='e/${hydra:job.num}'", f"hydra.sweep.dir={folder}"]
    return ["train", "-m", *GIVEN, *trials, *folders, *words]


def test_plugin_that_is_not_installed_is_named_with_its_extra():
    with pytest.raises(UserError, match=r"asrllm\[sweep\]"):
        jobs("-m", *GIVEN, "exp_dir='e/${hydra:job.num}'", "hydra/launcher=submitit_other")


@pytest.mark.slow
@pytest.mark.longest(60, reason="trains in two processes of a launcher")
def test_launcher_trains_in_processes_of_its_own(world, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    keys = world.overrides(tmp_path / "unused", trainer__num_steps=1)
    keys = [key for key in keys if not key.startswith("exp_dir=")]
    folder = f"exp_dir='{tmp_path}/${{hydra:job.num}}'"
    launcher = ["hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path / 'out'}"]
    with both_cores():  # both jobs run at once
        assert_done(run_script("train", "-m", *keys, folder, *launcher, "seed=1,2"))
    for number in range(2):
        assert (tmp_path / str(number) / "pretrained.pt").is_file()
    failed = run_script("train", "-m", *keys, folder, *launcher, "trainer.lr=-1")
    assert failed.returncode == 2
    assert "trainer.lr=-1" in failed.stderr.splitlines()[-1]


def test_hydra_keys_have_an_effect(tmp_path):
    job(*GIVEN, f"hydra.run.dir={tmp_path / 'out'}", "hydra.output_subdir=.hydra", "trainer.lr=3")
    stored = yaml.safe_load((tmp_path / "out" / ".hydra" / "config.yaml").read_text())
    assert stored["trainer"]["lr"] == 3


def test_parse_error_names_file_line_and_column(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train]\ntrainer: {lr: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"mine\.yaml:3:5"):
        job("--config-dir", str(tmp_path), "--config-name", "mine", *GIVEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["trainer.learning_rate=1"], ["trainer.learning_rate", "trainer.lr"]),
        (["per_device_train_batch_size=8"], ["data.sampler.max_tokens"]),
        (["++trainer.num_train_epochs=2"], ["trainer.num_epochs"]),
        (["trainer.learing_rate=1"], ["trainer.learing_rate", "Use trainer.lr"]),
        (["trainer.lrr=1"], ["trainer.lrr", "trainer.lr"]),
        (["trainer.tensorboard=false"], ["trainer.tensorboard", "Use trainer.sinks"]),
        (["+trainer.lrr=1"], ["trainer.lrr", "trainer.lr"]),
        (["--config-dir", "missing"], ["missing"]),
        (["--config-name", "missing"], ["missing"]),
        (["trainer=missing"], ["missing"]),
    ],
)
def test_unknown_key_is_named_with_the_nearest_key(words, names):
    with pytest.raises(UserError) as raised:
        job(*words, *GIVEN)
    for name in names:
        assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_of_other_frameworks_belong_to_existing_keys():
    assert set(NAMES_ELSEWHERE) <= {*all_keys(TrainRun), *all_keys(EvaluationRun)}


@pytest.mark.parametrize(
    ("name", "run"), [("train", TrainRun), ("plan", PlanRun), ("evaluate", EvaluationRun)]
)
def test_every_key_has_a_meaning(name, run):
    found = meanings(name)
    assert sorted(found) == sorted(all_keys(run))
    groups = {key.rpartition(".")[0] for key in found}
    assert not [key for key, meaning in found.items() if not meaning and key not in groups]
    assert not [meaning for meaning in found.values() if "#" in meaning or "  " in meaning]


def test_errors_of_the_task_are_raised_unchanged(capsys):
    def task(config):
        raise json.JSONDecodeError(
            "of the task", "", 0
        )  # a ValueError, like some of Hydra's errors

    argv = ["train", *GIVEN]
    with pytest.raises(json.JSONDecodeError):
        run_app("train", parse(argv), TrainRun, task)
    assert capsys.readouterr().err == ""


def test_a_sweeper_gets_the_mean_of_the_last_validation(tmp_path):
    assert last_validation_loss(tmp_path) is None  # interrupted before the first record
    records = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "valid/a/loss": 5.0, "valid/b/loss": 3.0},
        {"step": 4, "valid/a/loss": 4.0, "valid/b/loss": 1.0, "valid/a/acc": 0.5},
        {"step": 5, "loss": 8.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert last_validation_loss(tmp_path) == 2.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["+experiment=big"], ["experiment", "--config-dir"]),
        (["+trainer.lr=1"], ["+trainer.lr=1", "trainer.lr=1."]),
        (["+trainer=default"], ["+trainer=default", "trainer=default."]),
        (["lr=1"], ["trainer.lr"]),
        (["trainer.foo=1"], ["trainer.foo", "--help"]),
        (["+trainer.foo=1"], ["trainer.foo", "--help"]),
        (["--config-dir", "{dir}", "+experiment=lost"], ["experiment/lost.yaml"]),
        (["--config-dir", "{dir}", "trainer=lost"], ["trainer/lost.yaml", "default"]),
        (["--config-dir", "{dir}/none"], ["{dir}/none"]),
        (["--config-dir", "{dir}/list.yaml"], ["{dir}/list.yaml"]),
        (["--config-dir", "{dir}", "--config-name", "lost"], ["lost", "{dir}"]),
        (["--config-dir", "{dir}", "--config-name", "list"], ["{dir}/list.yaml"]),
        (["--config-dir", "{dir}", "--config-name", "latin"], ["{dir}/latin.yaml"]),
        (["--config-dir", "{dir}", "--config-name", "broken"], ["{dir}/broken.yaml:2:1"]),
        (["--config-dir", "{dir}", "trainer=broken"], ["{dir}/trainer/broken.yaml:2:1"]),
        (["trainer=null"], ["trainer=null"]),
        (["model=5"], ["model=5"]),
        (["trainer.schedule={{nam: cosine}}"], ["trainer.schedule.nam", "trainer.schedule.name"]),
        (["hydra.mod=RUN"], ["hydra.mod", "hydra.mode"]),
        (["hydra.run.dirr=x"], ["hydra.run.dirr", "hydra.run.dir"]),
        (["hydra.run.dir=x", "trainer.lrr=1"], ["trainer.lrr", "trainer.lr"]),
        (["--config-dir", "{dir}", "trainer=latin"], ["{dir}/trainer/latin.yaml"]),
        (["--config-dir", "{dir}", "trainer=control"], ["{dir}/trainer/control.yaml"]),
        (["experiment=big"], ["+experiment="]),
        (["+learning_rate=1"], ["learning_rate", "trainer.lr"]),
        (["~init_from"], ["~init_from", "no value"]),
        (["trainer.lr=2", "~trainer"], ["~trainer "]),
        (["seed=1,2"], ["seed=[1,2]", "--multirun"]),
        (["=3"], ["'=3'"]),
        (["trainer.lr=null"], ["trainer.lr=null"]),
        (["trainer.lr=true"], ["trainer.lr=true"]),
    ],
)
def test_configuration_that_cannot_be_composed_is_reported_with_its_file_or_key(
    tmp_path, words, names
):
    for folder in ("experiment", "trainer"):
        (tmp_path / folder).mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "latin.yaml").write_bytes(b"exp_dir: caf\xe9\n")
    (tmp_path / "trainer" / "latin.yaml").write_bytes(b"lr: caf\xe9\n")
    (tmp_path / "trainer" / "control.yaml").write_bytes(b"lr: \x01\n")
    for path in ("broken.yaml", "trainer/broken.yaml"):
        (tmp_path / path).write_text("lr: [\n")
    with pytest.raises(UserError) as error:
        jobs(*GIVEN, *(word.format(dir=tmp_path) for word in words))
    message = str(error.value)
    for name in names:
        assert name.format(dir=tmp_path) in message
    for internal in ("struct", "full_key", "pkg://", "unicode string", "Config group"):
        assert internal not in message


@pytest.mark.parametrize(
    ("part", "package", "expected"),
    [
        ("job", "trainer.lrr", "trainer.lr'"),
        ("all", "hydra.sweep.dri", "hydra.sweep.dir"),
        ("job", "trainer.deepspeed_config", "null"),
        ("job", "nope", "nope"),
    ],
)
def test_package_without_a_value_is_a_users_error(capsys, part, package, expected):
    with pytest.raises(UserError, match=re.escape(package)) as error:
        jobs(*GIVEN, "trainer.deepspeed_config=null", "-c", part, "-p", package)
    assert expected in str(error.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", ["train", "plan", "evaluate"])
def test_unknown_part_of_the_configuration_exits_with_status_2(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse([verb, "-c", "jop"])
    assert exit_.value.code == 2
    assert "'job'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("code", [0, 75])
def test_exit_status_of_the_task_is_kept(code):
    """A run that is preempted before its ranks start exits with status 0."""
    argv = ["train", *GIVEN]

    def exit_early(config):
        raise SystemExit(code)

    with pytest.raises(SystemExit) as exit_:
        run_app("train", parse(argv), TrainRun, exit_early)
    assert exit_.value.code == code
