"""The page about compatibility."""

import numpy as np
import pytest

from tests.models.asr_llm.test_generation import waves_of
from tests.models.asr_llm.test_serialization import lora_model
from tests.models.portable.compatibility import DOCS, WAYS, newest, page, texts_of


def test_page_shows_the_newest_results_of_all_ways():
    results = newest()
    assert set(results["same"]) == set(WAYS)
    assert DOCS.read_text() == page(results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["PEFT, `--separate-adapter`", "transformers 5.24, `transformers serve`"]
)
def test_texts_of_a_saved_model_are_those_of_the_package(world, tmp_path, name):
    """The ways that need no other environment."""
    way = WAYS[name]
    model = lora_model(world)
    separate = way.separate
    model.save_pretrained(tmp_path / "model", merge_adapter=not separate, separate_adapter=separate)
    waves = waves_of(3)
    np.savez(tmp_path / "waves.npz", *waves)
    found = texts_of(way, "float32", tmp_path / "model", tmp_path / "waves.npz", [])
    assert found == model.transcribe(waves)
