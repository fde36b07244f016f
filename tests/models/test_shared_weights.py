"""Models that adapt one LLM hold its weights once."""

import torch

from asrllm.models.shared_weights import share_weights
from asrllm.models.state_dict import is_adapter
from tests.models.asr_llm.test_modeling import batch_of, make_model, samples


@torch.no_grad()
def losses(model):
    return model(**batch_of(model, samples(2))).losses


def adapted(world, scale):
    """Return a model whose adapters have their own values."""
    model = make_model(world)
    for name, weight in model.named_parameters():
        if is_adapter(name):
            weight.data *= scale
    return model


def test_equal_weights_are_held_once_and_outputs_stay(world):
    first = adapted(world, 1.0)
    second = adapted(world, -3.0)
    expected = [losses(model) for model in (first, second)]
    assert not torch.equal(*expected)
    size = sum(weight.nbytes for name, weight in second.named_parameters() if not is_adapter(name))
    assert share_weights(second, [first]) == size
    for name, weight in second.named_parameters():
        is_shared = weight.data_ptr() == dict(first.named_parameters())[name].data_ptr()
        assert is_shared != is_adapter(name)
    assert all(map(torch.equal, map(losses, (first, second)), expected))
    assert share_weights(second, [first]) == 0


def test_different_weights_are_not_shared(world):
    first, second, third = (make_model(world) for _ in range(3))
    with torch.no_grad():
        name, weight = next(iter(second.projector.named_parameters()))
        weight.view(-1)[-1] *= -1
        third.to(torch.bfloat16)
    expected = weight.clone()
    share_weights(second, [first])
    assert torch.equal(second.projector.get_parameter(name), expected)
    assert share_weights(third, [first, second]) == 0
