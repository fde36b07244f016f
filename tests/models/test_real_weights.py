"""SmolLM2 with its real weights, from the package that the quickstart uses."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from asrllm import AutoModel
from asrllm.testing import tone_sentences
from tests.conftest import REPOSITORY, made_once
from tests.models.asr_llm.test_generation import assert_batch_invariant, make_model
from tests.models.asr_llm.test_modeling import batch_of, samples
from tests.models.test_llm_families import gradients, reference_loss

sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    from weights import write_smollm2

    folder = (
        made_once(tmp_path_factory, "smollm2", lambda folder: write_smollm2(folder / "llm")) / "llm"
    )
    return make_model(world, folder, model_type="llama")


@pytest.mark.longest(60, reason="loads real weights")
def test_llm_loads_as_in_transformers(model):
    plain = AutoModelForCausalLM.from_pretrained(
        model.config.base_models["llm"]["path"], dtype=torch.float32
    )
    prompt = model.processor.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        mine, theirs = (llm(**prompt).logits for llm in (model.llm, plain))
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)
    assert model.processor.tokenizer.decode(theirs[0, -1].argmax()).strip() == "Paris"
    assert len(model.llm.get_input_embeddings().weight) == len(
        plain.get_input_embeddings().weight
    )  # not resized for the audio token


@pytest.mark.longest(60, reason="loads real weights")
def test_packed_step_matches_transformers(model):
    chosen = samples(3)
    mine = model(**batch_of(model, chosen)).loss
    mine.backward()
    packed = gradients(model)
    theirs = 0
    for sample in chosen:
        batch = batch_of(model, [sample])
        labels = torch.full_like(batch["input_ids"][0], -100)
        labels[batch["target_positions"] + 1] = batch["targets"]
        theirs = theirs + reference_loss(model, batch["waves"][0], batch["input_ids"][0], labels)
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    for name, grad in gradients(model).items():
        largest = float(grad.abs().max())
        torch.testing.assert_close(
            packed[name],
            grad,
            rtol=1e-3,
            atol=1e-3 * largest,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.longest(60, reason="loads real weights")
@pytest.mark.soak
def test_texts_do_not_depend_on_the_rest_of_the_batch(model, soak):
    assert_batch_invariant(model, 6 if soak else 2)


@pytest.mark.longest(60, reason="loads real weights")
def test_saved_directory_gives_the_same_texts(model, tmp_path):
    model.save_pretrained(tmp_path)
    waves = [wave for _, wave in tone_sentences(3)]
    assert AutoModel.from_pretrained(tmp_path).transcribe(waves, 8) == model.transcribe(waves, 8)
