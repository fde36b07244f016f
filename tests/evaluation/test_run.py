"""Evaluation of tiny models: results, reports, baselines, resuming after a kill, and errors."""

import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from asrllm import distributed
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import read_corpora
from asrllm.data.index import open_index
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.data.tars import BLOCK
from asrllm.errors import UserError
from asrllm.evaluation.config import EvaluationRun
from asrllm.evaluation.engine import TorchEngine
from asrllm.evaluation.journal import DecodedUtterance, Journal
from asrllm.evaluation.references import check_references, choose_normalizer
from asrllm.evaluation.run import Evaluation, free_suffix
from asrllm.evaluation.whisper import WhisperEngine, find_whisper
from asrllm.testing import data_config, kaldi_directory, tiny_tokenizer, tone_sentences
from tests.composing import load_config
from tests.conftest import REPOSITORY, assert_done, run_script
from tests.models.asr_llm.test_generation import make_model, waves_of
from tests.processes import started, wait_for
from tests.test_cli import fails


def whole_whisper(folder: Path) -> Path:
    """A tiny Whisper with its decoder and a tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    size = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "vocab_size": len(tokenizer),
        "num_mel_bins": 80,
    }
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**size, **heads, **tokens, init_std=0.3))
    model.generation_config.update(
        no_timestamps_token_id=0,
        is_multilingual=False,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exp(world, tmp_path_factory):
    """A run with random weights, in the form that training writes."""
    root = tmp_path_factory.mktemp("evaluated")
    model = make_model(SimpleNamespace(whisper=whole_whisper(root / "whisper")), world.llm)
    run = root / "run"
    model.config.save_pretrained(run)
    model.processor.save_pretrained(run)
    torch.save(model.weights(), run / "pretrained.pt")
    return run


@pytest.fixture(scope="module")
def model(exp):
    from asrllm import AutoModel

    return AutoModel.from_pretrained(exp)


def evaluation(world, exp, *overrides, tests="train.yaml", whisper=False, weights="pretrained.pt"):
    config = load_config(
        "evaluate",
        [
            f"exp_dir={exp}",
            f"data.test_data_config={world.root / tests}",
            "max_new_tokens=12",
            f"whisper_baseline={str(whisper).lower()}",
            "precision=fp32",
            "data.max_batch_duration=4",
            "report_audio=3",
            *overrides,
        ],
        EvaluationRun,
    )
    cache = ShardCache.from_config(config.data.cache)
    corpora = read_corpora(
        config.data.test_data_config, filters=None, shards_dir=exp / "shards", cache=cache
    )
    return Evaluation(config, corpora, cache, weights=exp / weights, device=torch.device("cpu"))


class CountingEngine(TorchEngine):
    """Counts the utterances, and raises KeyboardInterrupt after some of them."""

    def __init__(self, model, options, killed_after=None):
        super().__init__(model, options)
        self.answered = 0
        self.killed_after = killed_after

    def answer(self, waves, prompts):
        if self.killed_after is not None and self.answered >= self.killed_after:
            raise KeyboardInterrupt
        self.answered += len(waves)
        return super().answer(waves, prompts)


def generations(folder):
    return [
        json.loads(line)
        for line in next(folder.glob("generations-train-*.jsonl")).read_text().splitlines()
    ]


@pytest.mark.slow
def test_killed_evaluation_resumes_where_it_stopped(world, exp, model):
    run = evaluation(world, exp)
    whole = CountingEngine(model, run.config.generation)
    run.decode(whole)
    run.report()
    expected, results = generations(run.folder), run.results["train"]
    assert whole.answered == 60 == results["utterances"]
    killed = CountingEngine(model, run.config.generation, killed_after=20)
    with pytest.raises(KeyboardInterrupt):
        evaluation(world, exp).decode(killed)
    (journal,) = run.folder.glob(".decoding-train.rank0.jsonl")
    with journal.open("ab") as file:
        file.write('{"row": 3, "key": "写'.encode()[:-1])  # a kill in the middle of a character
    rest = CountingEngine(model, run.config.generation)
    again = evaluation(world, exp)
    again.decode(rest)
    assert killed.answered >= 20
    assert rest.answered == 60 - killed.answered
    assert generations(run.folder) == expected
    again.report()
    varying = ("rtfx", "weights")
    assert {k: v for k, v in again.results["train"].items() if k not in varying} == {
        k: v for k, v in results.items() if k not in varying
    }
    assert not list(run.folder.glob(".decoding-*"))


@pytest.mark.slow
def test_decoded_sets_are_not_decoded_again_before_the_report_is_written(world, exp, model):
    tests = exp.parent / "two.yaml"
    data_config(
        tests,
        [{"name": name, "shards": str(world.root / "shards" / name)} for name in ("test", "train")],
    )
    with pytest.raises(KeyboardInterrupt):
        evaluation(world, exp, tests=tests).decode(
            CountingEngine(model, evaluation(world, exp).config.generation, killed_after=20)
        )
    run = evaluation(world, exp, tests=tests)
    rest = CountingEngine(model, run.config.generation)
    run.decode(rest)
    assert rest.answered < 60 + 9 - 20 + 1
    again = evaluation(world, exp, tests=tests)
    nothing = CountingEngine(model, run.config.generation)
    again.decode(nothing)
    again.report()
    assert nothing.answered == 0
    assert not list(again.folder.glob(".decoding-*"))


@pytest.mark.slow
def test_other_options_decode_everything_again(world, exp, model):
    killed = CountingEngine(model, evaluation(world, exp).config.generation, killed_after=20)
    with pytest.raises(KeyboardInterrupt):
        evaluation(world, exp).decode(killed)
    other = evaluation(world, exp, "max_new_tokens=3")
    engine = CountingEngine(model, other.config.generation)
    other.decode(engine)
    assert engine.answered == 60


@pytest.mark.slow
def test_texts_do_not_depend_on_the_batch_size(world, exp, model):
    texts = []
    for seconds in ("0.1", "4", "100"):
        run = evaluation(world, exp, f"data.max_batch_duration={seconds}")
        run.decode(TorchEngine(model, run.config.generation))
        run.report()
        texts.append(generations(run.folder))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_report_is_the_newest_and_those_of_other_weights_are_kept(world, exp, model, tmp_path):
    run = shutil.copytree(exp, tmp_path / "run", ignore=shutil.ignore_patterns("*_search"))
    shutil.copyfile(run / "pretrained.pt", run / "other.pt")
    pages = {}
    for name in ("pretrained", "other"):
        each = evaluation(world, run, tests="test.yaml", weights=f"{name}.pt")
        each.decode(TorchEngine(model, each.config.generation))
        each.report()
        pages[name] = (each.folder / f"report-{name}.html").read_text()
        assert (each.folder / "report.html").read_text() == pages[name]
    assert (each.folder / "report-pretrained.html").read_text() == pages["pretrained"]
    assert "run, other" in pages["other"]
    assert "run, other" not in pages["pretrained"]


@pytest.mark.slow
def test_whisper_baseline_is_reported_and_decoded_once(world, exp, model, capsys, monkeypatch):
    for _ in range(2):
        run = evaluation(world, exp, whisper=True)
        run.check()
        run.decode(TorchEngine(model, run.config.generation))
        run.decode_baseline()
        run.report()
        monkeypatch.setattr(
            WhisperEngine, "answer", lambda *_: pytest.fail("the baseline is decoded again")
        )
    printed = capsys.readouterr().out
    assert printed.count("Whisper: train: WER") == 2
    results = json.loads((run.folder / "results.json").read_text())["train"]
    paired = results["baseline"]["paired"]
    assert (paired["a"], paired["b"]) == (results["baseline"]["wer"], results["wer"])
    assert results["normalizer"] == "basic"
    page = (run.folder / "report.html").read_text()
    assert page.count("SUQz") >= 3 or page.count('"audio":"') == 3  # MP3 files in base64
    assert "Whisper" in page


@pytest.mark.slow
def test_damaged_utterance_is_logged_and_counted_and_not_scored(world, exp, tmp_path):
    def evaluate(tests, *overrides):
        return run_script(
            "evaluate",
            f"exp_dir={exp}",
            f"data.test_data_config={tests}",
            "precision=fp32",
            "max_new_tokens=12",
            *overrides,
            launcher="ranks",
        )

    assert_done(evaluate(world.root / "train.yaml"))
    folder = exp / "greedy_search"
    expected = generations(folder)
    shutil.copytree(world.root / "shards" / "train", tmp_path / "train")
    index = open_index(tmp_path / "train")
    row = index.rows[7]
    with open(index.shards[row["shard"]], "r+b") as file:
        file.seek((int(row["offset"]) + 1) * BLOCK + 700)
        damaged = bytes(byte ^ 1 for byte in file.read(1))
        file.seek(-1, 1)
        file.write(damaged)
    data_config(tmp_path / "tests.yaml", [{"name": "train", "shards": str(tmp_path / "train")}])
    done = assert_done(evaluate(tmp_path / "tests.yaml"))
    lost = expected.pop(7)
    assert generations(folder) == expected
    results = json.loads((folder / "results.json").read_text())["train"]
    assert (results["utterances"], results["unreadable"]) == (59, 1)
    assert "1 unreadable" in done.stdout
    assert f"unreadable: utterance 7 of train in {index.shards[row['shard']]}" in done.stderr
    assert '"unreadable":1' in (folder / "report.html").read_text()
    assert lost["key"] not in (folder / "recogs-train-pretrained.txt").read_text()
    refused = evaluate(tmp_path / "tests.yaml", "data.max_bad_share=0")
    assert refused.returncode == 2
    assert "1 of 60 utterances of the test set 'train'" in refused.stderr


def test_second_evaluation_of_a_directory_is_rejected(world, exp):
    first, second = evaluation(world, exp), evaluation(world, exp)
    first.check()
    with pytest.raises(UserError, match=re.escape(repr(str(second.folder)))):
        second.check()
    first.lock.release()
    second.check()
    second.lock.release()


@pytest.mark.slow
def test_speed_is_that_of_the_slowest_rank(world, exp, model, monkeypatch):
    """The journal has two ranks, one of which did nearly all the work."""
    run = evaluation(world, exp)
    engine = TorchEngine(model, run.config.generation)
    journal = Journal(run.folder, "train", settings="x")
    run.folder.mkdir(exist_ok=True)
    decoded = run._decode(engine, run.corpora[0], journal)
    rows = journal.read()
    path = run.folder / ".decoding-train.rank0.jsonl"
    path.unlink()
    with journal:
        journal.write([replace(each, took=1.0, rank=int(i == 0)) for i, each in enumerate(rows)])
    again = run._decode(engine, run.corpora[0], journal)
    assert again.rtfx == pytest.approx(
        sum(t.duration for t in decoded.transcripts) / (len(rows) - 1)
    )
    journal.remove()


def test_text_with_a_line_separator_is_recorded_completely(world, exp, tmp_path):
    stored = {
        "key": "k",
        "reference": "a\u2028b\u0085c",
        "hypothesis": "a",
        "end": "stop",
        "duration": 1.0,
        "speaker": "",
        "recording": "",
        "corpus": "",
        "took": 1.0,
        "rank": 0,
        "row": 0,
    }
    journal = Journal(tmp_path, "s", settings=1)
    with journal:
        journal.write([DecodedUtterance(**stored)])
    assert [asdict(each) for each in journal.read()] == [stored]


@pytest.mark.slow
def test_only_the_corrupted_line_of_a_journal_is_decoded_again(tmp_path):
    stored = DecodedUtterance(
        key="k",
        reference="a",
        hypothesis="b",
        end="stop",
        duration=1.0,
        speaker="",
        recording="",
        corpus="",
        took=1.0,
        rank=0,
        row=0,
    )
    journal = Journal(tmp_path, "s", settings=1)
    with journal:
        journal.write([replace(stored, row=row) for row in range(5)])
    (path,) = journal.files()
    content = path.read_bytes()
    length = len(content) // 5
    for place in range(2 * length, 3 * length):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        rows = [each.row for each in journal.read()]
        assert set(rows) >= {0, 1, 4}, place  # a changed line break joins two lines
        assert 2 not in rows or place == 3 * length - 1, place
    assert Journal(tmp_path, "s", settings=2).read() == []


@pytest.mark.slow
def test_whisper_texts_do_not_depend_on_the_batch(exp, model):
    folder = find_whisper(model.config.base_models["audio_encoder"]["path"])
    engine = WhisperEngine(
        folder, dtype=torch.float32, device=torch.device("cpu"), max_new_tokens=9
    )
    waves = waves_of(3)
    texts = [answer.text for answer in engine.answer(waves, [])]
    alone = [engine.answer([wave], [])[0].text for wave in waves]
    assert texts == alone
    assert any(texts)


@pytest.mark.parametrize(
    ("lang", "language"),
    [
        ("en-US", "en"),
        ("Chinese", "zh"),
        ("zh_CN", "zh"),
        ("cmn", "zh"),
        ("yue", None),
        ("x", None),
        (None, None),
    ],
)
def test_whisper_gets_a_language_that_it_supports(exp, model, lang, language):
    folder = find_whisper(model.config.base_models["audio_encoder"]["path"])
    engine = WhisperEngine(
        folder, dtype=torch.float32, device=torch.device("cpu"), max_new_tokens=9
    )
    generation_config = engine.model.generation_config
    generation_config.is_multilingual = True
    generation_config.lang_to_id = {"<|en|>": 3, "<|zh|>": 4}
    assert engine.with_language(lang).options.get("language") == language


def test_missing_baseline_is_reported_with_its_path(world, tmp_path):
    for path, message in (
        (None, "audio encoder"),
        (world.whisper, rf"'{world.whisper}' .*tokenizer"),
        (world.llm, rf"'{world.llm}' .*Whisper"),
        (tmp_path / "no", f"{tmp_path / 'no'}"),
        (tmp_path, rf"'{tmp_path}' .*Hugging Face"),
    ):
        with pytest.raises(UserError, match=message):
            find_whisper(path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((world.whisper / "config.json").read_text())
    with pytest.raises(UserError, match=rf"'{tmp_path}' .*model\.safetensors"):
        WhisperEngine(tmp_path, dtype=torch.float32, device=torch.device("cpu"), max_new_tokens=9)


def test_normalizer_is_chosen_by_language(world):
    corpora = {
        name: SimpleNamespace(lang=None, index=SimpleNamespace(about={"languages": tags}))
        for name, tags in (
            ("english", {"en-GB": {}}),
            ("both", {"en": {}, "zh": {}}),
            ("none", {"": {}}),
            ("known", {"zh": {}, "": {}}),
        )
    }
    assert {name: choose_normalizer("auto", corpus) for name, corpus in corpora.items()} == {
        "english": "en",
        "both": "basic",
        "none": "basic",
        "known": "zh",
    }
    assert (
        choose_normalizer("auto", SimpleNamespace(lang="yue", index=corpora["english"].index))
        == "zh"
    )
    assert choose_normalizer("none", corpora["english"]) == "none"


@pytest.mark.parametrize(
    ("references", "name", "message"),
    [
        (["", "  "], "basic", r" 2 .*'dev' .*'basic'.*normalizer="),
        (["...", "!"], "basic", r" 2 .*'dev' .*'basic'.*normalizer="),
        (["你好", "世界", "hello"], "en", "2 of 3 .*'dev' .*'en', .*'你好'"),
        (["hello there", "42"], "zh", "1 of 1 .*'dev' .*'zh', .*'hello there'"),
    ],
)
def test_references_that_cannot_be_scored_are_rejected(references, name, message):
    from asrllm.data.text import normalizer

    with pytest.raises(UserError, match=message):
        check_references("dev", references, name, normalizer(name))


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (["hello", "", "12"], "en"),
        (["你好", "open 门"], "zh"),
        (["12", "7"], "zh"),
        (["привет"], "basic"),
    ],
)
def test_references_that_can_be_scored_are_accepted(references, name):
    from asrllm.data.text import normalizer

    check_references("dev", references, name, normalizer(name))


@pytest.mark.slow
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    "name",
    ["results.json", "report.html", "recogs-train-pretrained.txt", "results-pretrained.json"],
)
def test_result_file_that_cannot_be_replaced_is_reported_before_decoding(
    world, exp, tmp_path, name, make
):
    run = tmp_path / "run"
    shutil.copytree(exp, run, ignore=shutil.ignore_patterns("greedy_search"))
    (run / "greedy_search").mkdir()
    make(run / "greedy_search" / name)
    with pytest.raises(UserError, match=f"'{run}/greedy_search/{name}'"):
        evaluation(world, run).check()


@pytest.mark.slow
def test_result_directory_that_is_a_file_is_reported_before_decoding(world, exp, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exp, run, ignore=shutil.ignore_patterns("greedy_search"))
    (run / "greedy_search").touch()
    with pytest.raises(UserError, match=f"'{run}/greedy_search'"):
        evaluation(world, run).check()


@pytest.mark.slow
def test_unusable_test_set_is_reported_before_the_model_loads(world, exp, tmp_path, capsys):
    sentences = tone_sentences(3)
    write_shards(tmp_path / "one", read_kaldi(kaldi_directory(tmp_path / "kaldi", sentences)))
    (tar,) = (tmp_path / "one").glob("*.tar")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.tar", "b.tar"):
        (twice / name).write_bytes(tar.read_bytes())
    from asrllm.data.index import scan_shard, write_index

    write_index(twice, [scan_shard(twice / name, name=name)[0] for name in ("a.tar", "b.tar")])
    data_config(tmp_path / "twice.yaml", [{"name": "twice", "shards": str(twice)}])
    arguments = (f"exp_dir={exp}", f"data.test_data_config={tmp_path / 'twice.yaml'}")
    before = sorted(path.name for path in exp.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            # set first, so that monkeypatch undoes what start() sets
            patch.setenv(name, "0" if "RANK" in name else "1")
            patch.delenv(name)
        patch.setattr("asrllm.distributed.start", lambda: torch.device("cpu"))
        assert re.search("'twice' .* 3 .*'utt0000'", fails(capsys, "evaluate", *arguments))
        data_config(
            tmp_path / "zh.yaml", [{"name": "one", "shards": str(tmp_path / "one"), "lang": "zh"}]
        )
        zh = f"data.test_data_config={tmp_path / 'zh.yaml'}"
        assert re.search("3 of 3 .*'one' .*'zh'", fails(capsys, "evaluate", arguments[0], zh))
        data_config(tmp_path / "all.yaml", [{"name": "all", "shards": str(tmp_path / "one")}])
        everything = f"data.test_data_config={tmp_path / 'all.yaml'}"
        assert "'all'" in fails(capsys, "evaluate", arguments[0], everything)
    assert sorted(path.name for path in exp.iterdir()) == before


@pytest.mark.parametrize(
    ("tests", "overrides", "setting"),
    [
        ("test.yaml", [], "test sets"),
        ("train.yaml", ["decoding_method=beam_search"], "decoding_method"),
        ("train.yaml", ["repetition_guard=7"], "options.repetition_guard"),
        ("train.yaml", ["normalizer=none"], "normalizers.train"),
    ],
)
def test_ranks_with_different_settings_are_reported(
    world, exp, monkeypatch, tests, overrides, setting
):
    other = evaluation(world, exp, *overrides, tests=tests).shared_settings()
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, other])
    with pytest.raises(UserError, match=rf"{re.escape(setting)}.* on rank 1"):
        evaluation(world, exp).check()


def written(folder):
    """Return the number of utterances that the ranks have decoded so far."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob(".decoding-*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_killed_ranks_resume_where_they_stopped(world, exp, tmp_path):
    """What either rank had decoded is not decoded again, and the results do not change."""
    arguments = [
        f"exp_dir={exp}",
        f"data.test_data_config={world.root / 'train.yaml'}",
        "whisper_baseline=false",
        "data.max_batch_duration=0.3",
        "precision=fp32",
        "max_new_tokens=12",
        "max_tokens_per_second=200",
        "repetition_guard=null",
        "decoding_method=beam_search",
        "num_beams=2",
    ]
    folder = exp / "beam_search"
    assert_done(run_script("evaluate", *arguments))
    expected = generations(folder)
    command = [REPOSITORY / "launch" / "evaluate.py", *arguments]
    with started(tmp_path / "logs", command, command) as ranks:  # kills both at the end
        wait_for(lambda: written(folder) >= 5 or ranks[0].poll() is not None, 120)
    kept = written(folder)
    assert 5 <= kept < 60
    done = assert_done(run_script("evaluate", *arguments, launcher="ranks"))
    assert f"decoding train: {(60 - kept + 1) // 2}/{(60 - kept + 1) // 2}" in done.stderr
    assert generations(folder) == expected
    assert not list(folder.glob(".decoding-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_evaluation_stops_if_a_rank_hangs_or_dies(world, exp, tmp_path, number):
    run = shutil.copytree(exp, tmp_path / "run", ignore=shutil.ignore_patterns("*_search"))
    test_set = f"data.test_data_config={world.root / 'train.yaml'}"
    options = [
        "whisper_baseline=false",
        "data.max_batch_duration=0.3",
        "precision=fp32",
        "step_timeout=4",
    ]
    command = [REPOSITORY / "launch" / "evaluate.py", f"exp_dir={run}", test_set, *options]
    folder = run / "greedy_search"
    with started(tmp_path / "logs", command, command) as ranks:
        wait_for(lambda: list(folder.glob(".decoding-*")))
        ranks[1].send_signal(number)
        assert ranks[0].wait(30) == 75
        ranks[1].kill()
    stored = (tmp_path / "logs" / "0").read_text()
    assert "Traceback" not in stored
    if number == signal.SIGKILL:
        assert "rank 1" in stored
    else:
        stacks = (folder / "hang-rank0.txt").read_text()
        assert re.search(r"rank 0: .* 4 s \(step_timeout\)", stacks)
        assert "decode" in stacks  # the function that waits


def test_negative_step_timeout_is_rejected(world, exp):
    with pytest.raises(UserError, match=r"step_timeout=-1 "):
        evaluation(world, exp, "step_timeout=-1")


def test_results_of_other_weights_with_the_same_name_are_kept(tmp_path):
    first = tmp_path / "a" / "w.pt"
    second = tmp_path / "b" / "w.pt"
    assert free_suffix(tmp_path, "w", first) == "w"
    (tmp_path / "results-w.json").write_text(json.dumps({"test": {"weights": str(first)}}))
    assert free_suffix(tmp_path, "w", first) == "w"
    other = free_suffix(tmp_path, "w", second)
    assert other.startswith("w-")
    assert free_suffix(tmp_path, "w", second) == other
    (tmp_path / "results-w.json").write_text("[")
    assert free_suffix(tmp_path, "w", second) == "w"


def test_the_same_weights_by_another_path_keep_their_results(tmp_path, monkeypatch):
    folder = tmp_path / "exp" / "greedy_search"
    folder.mkdir(parents=True)
    weights = tmp_path / "exp" / "w.pt"
    weights.touch()
    monkeypatch.chdir(tmp_path)
    for stored in ("exp/w.pt", "/before/the/run/moved/w.pt"):
        (folder / "results-w.json").write_text(json.dumps({"test": {"weights": stored}}))
        assert free_suffix(folder, "w", weights) == "w"
