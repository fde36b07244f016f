"""Corrupted files and wrong environments exit with one message and status 2 before model load."""

import contextlib
import errno
import functools
import json
import os
import shutil
import socket

import filelock
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from asrllm import distributed
from asrllm.commands import dispatch
from asrllm.commands import train as train_verb
from asrllm.errors import UserError
from asrllm.hydra_app import resolved
from asrllm.launchers import adopt_launcher
from asrllm.locks import FileLock
from asrllm.schema import build
from asrllm.training.run_config import WandbConfig
from asrllm.training.wandb_login import check_login, check_wandb_login
from tests.composing import compose_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
GOOD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"})


class ReachedRanksError(Exception):
    """All checks before the start of the ranks and the model load have passed."""


def write(name, content):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def fifo(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def folder_at(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def mark(name):
    def change(folder):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())

    return change


def change_weight(name, change_tensor):
    def change(folder):
        path = folder / "model.safetensors"
        state = load_file(path)
        state[name] = change_tensor(state[name])
        save_file(state, path, metadata={"format": "pt"})

    return change


def quantize(name):
    return change_weight(name, lambda tensor: tensor.to(torch.int8))


def quantize_bin(name):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        state[name] = state[name].to(torch.int8)
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return change


def cut(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def fields(name, **values):
    def change(folder):
        content = json.loads((folder / name).read_text())
        write(name, json.dumps(content | values))(folder)

    return change


def without_token(token):
    def change(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        del content["model"]["vocab"][token]
        write("tokenizer.json", json.dumps(content))(folder)

    return change


def template(value):
    return fields("tokenizer_config.json", chat_template=value)


def only(**files):
    def change(folder):
        for file in folder.iterdir():
            file.unlink()
        for name, content in files.items():
            write(name.replace("__", "."), content)(folder)

    return change


@functools.cache
def composed():
    return OmegaConf.create(compose_config("train", []))


def train(world, tmp_path, monkeypatch, **more):
    """Run `asrllm train` up to the start of the ranks; Hydra composes once for all tests."""

    def reached():
        raise ReachedRanksError

    def run_app(name, arguments, cls, task, **options):
        overrides = OmegaConf.from_dotlist(arguments.overrides)
        task(build(cls, resolved(OmegaConf.merge(composed(), overrides))))

    monkeypatch.setattr(train_verb, "run_app", run_app)
    monkeypatch.setattr(distributed, "start", reached)
    return dispatch.main(["train", *world.overrides(tmp_path / "exp", **more)])


def copy_of(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


LLM = {
    "config missing": (
        remove("config.json"),
        "model.llm.pretrained_model='{model}'",
        "config.json",
        "*.safetensors",
    ),
    "config cut": (cut("config.json"), "{model}/config.json:"),
    "config list": (write("config.json", "[1]"), "'{model}/config.json'", "JSON"),
    "config pointer": (write("config.json", POINTER), "'{model}/config.json'", "git lfs pull"),
    "config type": (fields("config.json", hidden_size="x"), "hidden_size"),
    "config heads": (fields("config.json", num_attention_heads=0), "'{model}/config.json'"),
    "config unknown": (fields("config.json", model_type="nosuch"), "model_type='nosuch'"),
    "config quantized": (
        fields("config.json", quantization_config={"quant_method": "gptq"}),
        "quantization_config, 'gptq'",
    ),
    "config own code": (
        fields("config.json", model_type="own", auto_map={"AutoConfig": "x.Y"}),
        "'own'",
        "auto_map in config.json",
    ),
    "tokenizer cut": (cut("tokenizer.json"), "{model}/tokenizer.json:"),
    "tokenizer pointer": (
        write("tokenizer.json", POINTER),
        "'{model}/tokenizer.json'",
        "'git lfs pull' in '{model}'",
    ),
    "tokenizer_config list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json'"),
    "tokenizer_config type": (fields("tokenizer_config.json", eos_token=5), "eos_token"),
    "special token empty": (fields("tokenizer_config.json", unk_token=""), "empty 'unk_token'"),
    "token missing": (without_token("a"), "id 292 of 'Ġthree'"),
    "generation_config cut": (cut("generation_config.json"), "generation_config.json:"),
    "templates without default": (
        template([{"name": "a", "template": GOOD}]),
        " a, ",
        "'default'",
    ),
    "template number": (template(5), "'5'", "'chat_template' in tokenizer_config.json"),
    "template syntax": (template("{% for m in"), "line 1: ", "model.llm.chat_template=chatml"),
    "template raises": (template("{{ raise_exception('no') }}"), "user, assistant", " no."),
    "template fails": (template("{{ 1 / 0 }}"), "ZeroDivisionError"),
    "template huge": (template("{{ 'x' * 10000000000 }}"), " 5 s ", "1024 MiB"),
    "template long": (template("x" * 300_000), "200000"),
    "template jinja": (write("chat_template.jinja", "{% for"), "line 1: ", "chat_template=chatml"),
    "template json": (write("chat_template.json", "{"), "{model}/chat_template.json:1:2 "),
    "template folder": (
        write("additional_chat_templates/a.jinja", GOOD),
        " a, ",
        "'default'",
    ),
    "adapters": (only(adapter_config__json=ADAPTER), "adapter_config.json", "'base'"),
    "gguf": (only(model__gguf="GGUF"), "GGUF"),
    "onnx": (only(model__onnx="x", config__json="{}"), "ONNX"),
    "ctranslate2": (only(model__bin="x", shared_vocabulary__json="[]"), "CTranslate2"),
    "weights pointer": (
        write("model.safetensors", POINTER),
        "'{model}/model.safetensors'",
        "git lfs pull",
    ),
    "weights cut": (
        lambda folder: (folder / "model.safetensors").open("r+b").truncate(50_000),
        "'{model}/model.safetensors'",
        "header",
    ),
    "config fifo": (fifo("config.json"), "config.json'"),
    "tokenizer fifo": (fifo("vocab.json"), "vocab.json'"),
    "vocabulary fifo": (fifo("vocab.txt"), "vocab.txt'"),
    "weights fifo": (fifo("model.safetensors"), "model.safetensors'"),
    "weights folder": (folder_at("pytorch_model.bin"), "pytorch_model.bin'"),
    "config mark": (mark("config.json"), "config.json'"),
    "template mark": (
        lambda folder: (folder / "chat_template.jinja").write_text("\ufeff" + GOOD),
        "chat_template.jinja'",
    ),
    "bin junk": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
            and (folder / "pytorch_model.bin").write_bytes(b"junk")
        ),
        "pytorch_model.bin'",
    ),
    "weights int8": (quantize("model.norm.weight"), "'model.norm.weight'"),
    "bin int8": (quantize_bin("model.norm.weight"), "'model.norm.weight'"),
    "vocabulary mark": (write("vocab.txt", "\ufeffa"), "vocab.txt'"),
    "layers": (fields("config.json", num_hidden_layers=10**7), "num_hidden_layers", f"{10**7}"),
    "huge vocabulary": (fields("config.json", vocab_size=10**12), f"vocab_size={10**12}"),
    "no type": (fields("config.json", model_type=""), "model_type=''"),
    "vocabulary": (fields("config.json", vocab_size=292), " 292 ", "vocab_size", "'Ġthree'"),
}
WHISPER = {
    "config list": (write("config.json", "[1]"), "'{model}/config.json'", "JSON"),
    "config pointer": (write("config.json", POINTER), "'{model}/config.json'", "git lfs pull"),
    "config type": (fields("config.json", d_model="x"), "d_model='x'"),
    "config heads": (
        fields("config.json", encoder_attention_heads=3),
        "d_model=16 ",
        "encoder_attention_heads=3",
    ),
    "config quantized": (
        fields("config.json", quantization_config={}),
        "(quantization_config, None)",
    ),
    "shape": (fields("config.json", num_mel_bins=7), "'conv1.weight'", "(16, 80, 3)", "(16, 7, 3)"),
    "weights pointer": (
        write("model.safetensors", POINTER),
        "'{model}/model.safetensors'",
        "git lfs pull",
    ),
    "ctranslate2": (only(model__bin="x", vocabulary__json="[]"), "CTranslate2"),
    "config fifo": (fifo("config.json"), "config.json"),
    "weights fifo": (fifo("model.safetensors"), "model.safetensors'"),
    "weights folder": (folder_at("model.safetensors"), "model.safetensors'"),
    "config layers": (fields("config.json", encoder_layers=10**6), "encoder_layers=1000000"),
    "weights int8": (quantize("encoder.layer_norm.weight"), "'layer_norm.weight'"),
    "activation": (fields("config.json", activation_function="relu"), "activation_function='relu'"),
    "adapters": (write("adapter_config.json", ADAPTER), "adapter_config.json"),
    "bin junk": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
            and (folder / "pytorch_model.bin").write_bytes(b"junk")
        ),
        "pytorch_model.bin'",
    ),
    "nan": (
        change_weight("encoder.conv2.bias", lambda tensor: tensor / 0),
        "'conv2.bias'",
        "NaN",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", LLM)
def test_corrupted_llm_exits_before_the_ranks_start(fault, world, tmp_path, monkeypatch, capsys):
    change, *named = LLM[fault]
    llm = copy_of(world.llm, tmp_path, change)
    assert train(world, tmp_path, monkeypatch, model__llm__pretrained_model=llm) == 2
    error = capsys.readouterr().err
    assert str(llm) in error
    for name in named:
        assert name.format(model=llm) in error


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", WHISPER)
def test_corrupted_whisper_exits_before_the_ranks_start(
    fault, world, tmp_path, monkeypatch, capsys
):
    change, *named = WHISPER[fault]
    whisper = copy_of(world.whisper, tmp_path, change)
    more = {"model__audio_encoder__pretrained_model": whisper}
    assert train(world, tmp_path, monkeypatch, **more) == 2
    error = capsys.readouterr().err
    assert str(whisper) in error
    for name in named:
        assert name.format(model=whisper) in error


@pytest.mark.parametrize(
    "change",
    [
        template([{"name": "default", "template": GOOD}, {"name": "tool", "template": "x"}]),
        write("chat_template.jinja", GOOD),
        write("chat_template.json", json.dumps({"chat_template": GOOD})),
        write("README.txt", "\ufeffnotes that transformers does not read"),
    ],
)
def test_chat_templates_of_every_format_are_accepted(change, world, tmp_path, monkeypatch):
    llm = copy_of(world.llm, tmp_path, change)
    with pytest.raises(ReachedRanksError):
        train(world, tmp_path, monkeypatch, model__llm__pretrained_model=llm)


def test_chat_template_that_fails_for_one_prompt_exits_before_the_ranks_start(
    world, tmp_path, monkeypatch, capsys
):
    fault = "{% if 'bad' in m.content %}{{ raise_exception('no bad words') }}{% endif %}"
    llm = copy_of(
        world.llm, tmp_path, write("chat_template.jinja", GOOD.replace("{{", fault + "{{", 1))
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Transcribe.\nTranscribe the bad audio.\n")
    more = {"model__llm__pretrained_model": llm, "prompt_file": prompts}
    assert train(world, tmp_path, monkeypatch, **more) == 2
    assert "no bad words" in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "key",
    [
        "model__audio_encoder__pretrained_model",
        "model__llm__pretrained_model",
        "prompt_file",
        "data__hotwords__file",
        "data__augment__noise__source",
        "data__augment__reverb__source",
        "data__train_data_config",
        "trainer__deepspeed_config",
    ],
)
def test_pipe_is_rejected_with_its_path(key, world, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert train(world, tmp_path, monkeypatch, **{key: tmp_path / "pipe"}) == 2
    assert f"'{tmp_path}/pipe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 .* RANK "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"WORLD_SIZE=2 .* LOCAL_RANK "),
        ({"RANK": "2", "LOCAL_RANK": "0"}, r"^RANK=2 .*WORLD_SIZE=2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_contradictory_rank_variables_are_rejected(environment, named):
    if "LOCAL_RANK" in environment:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        environment = common | environment
    with pytest.raises(UserError, match=named):
        adopt_launcher(dict(environment))


def test_unresolvable_host_is_reported(monkeypatch):
    def fail(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(distributed, "RESOLVE_WITHIN", -1.0)
    with pytest.raises(UserError, match="MASTER_ADDR='nosuch' "):
        distributed.wait_for_address("nosuch")


def test_port_in_use_is_reported(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(UserError, match="MASTER_PORT=1234 "), distributed.explained_port():
        raise RuntimeError("failed to listen, code: -98, name: EADDRINUSE")


def test_wandb_without_login_is_rejected(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    online = WandbConfig(mode="online", project="x", name=None)
    with pytest.raises(
        UserError, match=r"trainer\.wandb\.mode=online .*'wandb login', .*WANDB_API_KEY"
    ):
        check_wandb_login(online, "trainer.wandb")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check_wandb_login(online, "trainer.wandb")


@pytest.mark.parametrize(
    ("server", "machine"),
    [
        (None, "api.wandb.ai"),
        (None, "api.forge.coreweave.com"),
        ("https://api.wandb.ai", "api.forge.coreweave.com"),
        ("http://own:8080", "own:8080"),
        ("http://own:8080", "own"),
    ],
)
def test_stored_login_of_wandb_is_found(monkeypatch, tmp_path, server, machine):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for stored, found in (("another.host", False), (machine, True)):
        (tmp_path / "netrc").write_text(f"machine {stored} login user password key")
        raised = contextlib.nullcontext() if found else pytest.raises(UserError, match="login")
        with raised:
            check_login("this", "Log in.")


def test_file_system_without_locks_is_reported_with_the_file(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(UserError, match=rf"'{tmp_path}/lock' .*-o flock"):
        FileLock(tmp_path / "lock").acquire()


def test_too_many_open_files_exit_with_the_command_that_raises_the_limit(
    world, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("worker: OSError: [Errno 24] Too many open files")

    monkeypatch.setattr("asrllm.training.prepare.read_prompts", fail)
    assert train(world, tmp_path, monkeypatch) == 2
    assert "ulimit -n" in capsys.readouterr().err


def test_low_limit_of_open_files_is_reported_with_the_command_that_raises_it(monkeypatch):
    monkeypatch.setattr(distributed.resource, "getrlimit", lambda _: (20, 4096))
    with pytest.raises(UserError, match=r" 20 .*'ulimit -n 4096'"):
        distributed.check_descriptors()


def test_exp_dir_that_is_a_file_is_rejected_and_kept(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "exp").touch()
    assert train(world, tmp_path, monkeypatch) == 2
    assert f"exp_dir='{tmp_path}/exp'" in capsys.readouterr().err
    assert (tmp_path / "exp").read_bytes() == b""


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("init_from", "{dir}/none", "'{dir}/none'"),
        ("model__llm__lora__target_modules", "[none_proj]", "none_proj"),
        ("model__frozen_parameters", "[none.*]", "'none.*'"),
    ],
)
def test_run_or_name_that_does_not_exist_is_reported_before_the_weights_load(
    key, value, named, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("asrllm.commands.train.build_model", None)  # would raise another error
    assert train(world, tmp_path, monkeypatch, **{key: value.format(dir=tmp_path)}) == 2
    error = capsys.readouterr().err
    assert key.replace("__", ".").removesuffix(".target_modules") in error
    assert named.format(dir=tmp_path) in error


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "latest", "pretrained.pt"])
def test_file_of_a_run_that_cannot_be_replaced_is_reported(
    name, make, world, tmp_path, monkeypatch, capsys
):
    (tmp_path / "exp").mkdir()
    make(tmp_path / "exp" / name)
    assert train(world, tmp_path, monkeypatch) == 2
    assert f"'{tmp_path}/exp/{name}'" in capsys.readouterr().err


def test_model_type_of_the_llm_may_be_its_directory(world, tmp_path, monkeypatch):
    with pytest.raises(ReachedRanksError):
        train(world, tmp_path, monkeypatch, model__llm__model_type=world.llm)
