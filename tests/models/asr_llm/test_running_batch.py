"""Chats that join a batch while others are decoded have the texts that they have alone."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from asrllm.evaluation.engine import TorchEngine, WholeBatch
from asrllm.models.asr_llm import generation
from asrllm.models.asr_llm.greedy_search import AnswerRow, greedy
from asrllm.testing import tiny_llm
from tests.models.asr_llm.test_generation import FAMILIES, llm_of, make_model, waves_of

PROMPTS = ("Transcribe.", "Say so so so so.", "Write down in English what is said.")


def prompt_of(i):
    return PROMPTS[i % len(PROMPTS)]


def engine_of(model, **options):
    return TorchEngine(model, {"max_new_tokens": 24} | options)


def alone(engine, waves):
    """Return the answer to each waveform by itself."""
    answers = []
    for i, wave in enumerate(waves):
        answers += engine.answer([wave], [prompt_of(i)])
    return answers


def decode_in_turns(engine, waves, most=4, every=3):
    """Return the answers to waveforms that join a batch one by one.

    Args:
        engine: the engine.
        waves: the waveforms.
        most: maximum number in the batch.
        every: steps between two of them.
    """
    batch = engine.open_batch()
    waiting = list(range(len(waves)))
    numbers = {}
    answers = {}
    together = 0
    step = 0
    while waiting or numbers:
        if waiting and step % every == 0 and len(numbers) < most and batch.can_join:
            i = waiting.pop(0)
            (row,) = batch.join([waves[i]], [prompt_of(i)])
            numbers[row] = i
        together = max(together, len(numbers))
        if numbers:
            for row, answer in batch.step():
                answers[numbers.pop(row)] = answer
        step += 1
    return [answers[i] for i in range(len(waves))], together


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    return make_model(world, tiny_llm(tmp_path_factory.mktemp("running") / "llm", tied=False))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", *FAMILIES])
def test_texts_do_not_depend_on_who_joins(world, tmp_path, model_type):
    llm = llm_of(tmp_path / "llm", model_type)
    model = make_model(world, llm, model_type=model_type)
    waves = waves_of(14)
    first = engine_of(model)
    seen = [answer.text for answer in alone(first, waves)]
    stops = model.processor.tokenizer(seen[0])["input_ids"][5:7]  # some answers end early
    engine = engine_of(model, generation_config=GenerationConfig(eos_token_id=stops))
    answers, together = decode_in_turns(engine, waves)
    assert answers == alone(engine, waves)
    assert len({answer.text for answer in answers}) > len(waves) // 2
    assert together == 4


def test_limits_hold_for_each_chat_from_when_it_joins(model):
    engine = engine_of(model, max_tokens_per_second=2, repetition_guard=4)
    waves = waves_of(6)
    answers, _ = decode_in_turns(engine, waves, every=2)
    assert answers == alone(engine, waves)
    assert "limit" in {answer.end for answer in answers}


def test_cache_does_not_grow_while_chats_come_and_go(model):
    engine = engine_of(model)
    batch = engine.open_batch()
    wave = waves_of(1)[0]
    rows = []
    widths = []
    for step in range(120):
        if step % 8 == 0:
            rows += batch.join([wave], [PROMPTS[0]])
            widths.append(batch.batch.decoder.mask.shape[1])
        batch.step()
    longest = batch.batch.decoder.mask.sum(1).max()
    assert widths[-1] <= longest + 8
    assert sum(not row.is_done for row in rows) <= 3


def test_chat_that_is_removed_leaves_the_others_alone(model):
    engine = engine_of(model)
    waves = waves_of(3)
    batch = engine.open_batch()
    rows = batch.join(waves, [prompt_of(i) for i in range(3)])
    batch.step()
    rows[1].is_done = True
    answers = {}
    while len(answers) < 2:
        answers |= dict(batch.step())
    expected = alone(engine, waves)
    assert answers == {rows[0]: expected[0], rows[2]: expected[2]}
    assert len(batch.batch.rows) == 0


def test_batch_of_beams_admits_nobody_while_it_is_decoded(model):
    engine = engine_of(model, num_beams=2)
    batch = engine.open_batch()
    assert isinstance(batch, WholeBatch)
    waves = waves_of(3)
    rows = batch.join(waves, [prompt_of(i) for i in range(3)])
    assert not batch.can_join
    rows[1].is_done = True
    expected = engine.answer([waves[0], waves[2]], [prompt_of(0), prompt_of(2)])
    assert [answer for _, answer in batch.step()] == expected
    assert batch.can_join


def test_logprobs_match_transformers(model):
    engine = engine_of(model)
    waves = waves_of(4)
    answers, _ = decode_in_turns(engine, waves)
    for i, answer in enumerate(answers):
        config = generation.decoding_config(None, 24, model.processor.renderer.stop_ids)
        config.output_logits = config.return_dict_in_generate = True
        chats = [model.processor.renderer.user_messages(prompt_of(i))]
        samples = torch.tensor([len(waves[i])])
        requests = generation.make_requests(model, chats, samples, config, None)
        features = generation.make_features(model, [waves[i]], [waves[i]], [0])
        embeddings, mask = generation.embed_prompts(model, features, requests)
        theirs = model.llm.generate(
            inputs_embeds=embeddings, attention_mask=mask, generation_config=config
        )
        scores = model.causal_lm.compute_transition_scores(
            theirs.sequences, theirs.logits, normalize_logits=True
        )
        assert answer.tokens == theirs.sequences[0, : len(answer.tokens)].tolist() != []
        np.testing.assert_allclose(answer.logprob, scores.mean(), rtol=1e-4)


class FixedLogits:
    """A decoder whose logits are always the same."""

    def prompt(self, embeddings, mask):
        return torch.tensor([[15.0, 10.0]], dtype=torch.bfloat16)

    def with_empty_cache(self):
        return self


def test_logprobs_are_not_rounded_to_bfloat16():
    row = AnswerRow(limit=1, guard=None)
    greedy(FixedLogits(), torch.zeros(1, 1, 1), torch.ones(1, 1), [9], [row], lambda _: None)
    np.testing.assert_allclose(row.logprobs, [-np.log1p(np.exp(-5))], rtol=1e-3)
