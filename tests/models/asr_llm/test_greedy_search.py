"""Compare our greedy search with that of transformers."""

import pytest
import torch
from transformers import GenerationConfig

from asrllm.models.asr_llm import generation
from asrllm.models.asr_llm.greedy_search import DynamicCacheDecoder
from asrllm.testing import tiny_llm
from tests.models.asr_llm.test_generation import FAMILIES, chats_of, llm_of, make_model, waves_of


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    return make_model(world, tiny_llm(tmp_path_factory.mktemp("greedy") / "llm", tied=False))


def both_ways(model, monkeypatch, count=12, **options):
    """Return our texts, those of transformers, and the rows of each of our forward passes."""
    waves, chats = waves_of(count), chats_of(model, count)
    rows = []
    hook = model.llm.register_forward_hook(
        lambda _, __, output: rows.append(output.logits[..., 0].numel())
    )
    ours = model.generate(waves, chats, **options)
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(generation, "is_greedy", lambda _: False)
        theirs = model.generate(waves, chats, **options)
    return ours, theirs, rows


def ends_early(model, count=12):
    """Return token ids that end some answers early and others late."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.processor.tokenizer, "decode", lambda row, **_: seen.append(row) or "")
        model.generate(waves_of(count), chats_of(model, count), 24)
    return GenerationConfig(
        eos_token_id=[row[2 * i] for i, row in enumerate(seen[:10]) if len(row) > 2 * i]
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", *FAMILIES])
def test_texts_match_transformers_while_rows_are_removed(world, tmp_path, monkeypatch, model_type):
    llm = llm_of(tmp_path / "llm", model_type)
    model = make_model(world, llm, model_type=model_type)
    ours, theirs, rows = both_ways(
        model, monkeypatch, max_new_tokens=24, generation_config=ends_early(model)
    )
    assert ours == theirs
    assert rows[0] == 12
    assert sorted(rows, reverse=True) == rows
    assert len(set(rows)) > 1 or len(set(ours)) == 1, "no finished row has left the batch"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", *FAMILIES])
def test_packed_prompts_fill_the_cache_as_padded_ones(world, tmp_path, model_type):
    llm = llm_of(tmp_path / "llm", model_type)
    model = make_model(world, llm, model_type=model_type)
    lengths = torch.tensor([5, 31, 18])
    mask = (torch.arange(31) >= 31 - lengths[:, None]).long()
    width = model.llm.get_input_embeddings().embedding_dim
    embeddings = torch.randn(3, 31, width, generator=torch.Generator().manual_seed(0))
    packed, padded = (DynamicCacheDecoder(model.llm, model.causal_lm) for _ in range(2))
    assert packed.can_pack
    padded.can_pack = False
    with torch.no_grad():
        torch.testing.assert_close(packed.prompt(embeddings, mask), padded.prompt(embeddings, mask))
        for ours, theirs in zip(packed.cache.layers, padded.cache.layers, strict=True):
            is_token = mask[:, -ours.keys.shape[2] :].bool()
            for name in ("keys", "values"):
                found, expected = (
                    getattr(c, name).transpose(1, 2)[is_token] for c in (ours, theirs)
                )
                torch.testing.assert_close(found, expected)
        token = torch.tensor([3, 4, 5])
        torch.testing.assert_close(packed.step(token), padded.step(token))


def test_limits_and_loops_stop_rows_as_in_transformers(model, monkeypatch):
    for options in (
        {"max_tokens_per_second": 3},
        {"repetition_guard": 4},
        {"max_tokens_per_second": 8, "repetition_guard": 4},
    ):
        ours, theirs, _ = both_ways(model, monkeypatch, max_new_tokens=40, **options)
        assert ours == theirs


def test_end_reasons_of_answers(model):
    waves, chats = waves_of(6), chats_of(model, 6)
    limits = {"generation_config": None, "max_tokens_per_second": None, "repetition_guard": None}
    cut_off = generation.generate(model, waves, chats, 1, **limits)
    early = generation.generate(
        model, waves, chats, 24, **limits | {"generation_config": ends_early(model)}
    )
    assert "limit" in {answer.end for answer in cut_off}
    assert "stop" in {answer.end for answer in early}
    looping = generation.make_answer(model.processor.tokenizer, [7] * 40, [2], 32)
    assert looping.end == "loop"
    assert generation.make_answer(model.processor.tokenizer, [7, 8, 2, 7], [2], 32).end == "stop"


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"do_sample": True}, {"min_new_tokens": 2}, {"suppress_tokens": [5]}],
)
def test_other_decoding_methods_use_transformers(model, monkeypatch, options):
    monkeypatch.setattr(
        generation, "greedy", lambda *_: pytest.fail("this is not plain greedy search")
    )
    assert len(model.generate(waves_of(2), chats_of(model, 2), 4, **options)) == 2


def test_nan_logits_are_reported_by_greedy_search(model):
    def spoil(_, __, output):
        output.logits.fill_(torch.nan)

    hook = model.llm.register_forward_hook(spoil)
    with pytest.raises(generation.UserError, match=r"chat 0 .*NaN"):
        model.generate(waves_of(2), chats_of(model, 2), 4)
    hook.remove()
