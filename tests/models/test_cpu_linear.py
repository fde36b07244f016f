"""Linear layers that oneDNN computes give the numbers of torch's, and are only used for float32."""

import copy
import io

import pytest
import torch
from torch import nn

from asrllm.models.cpu_linear import CpuLinear, use_onednn

LAYERS = [(96, 40, True), (96, 40, False), (1, 3, True), (64, 1, False)]


def twins(inputs, outputs, bias):
    """Return a layer of torch, and the same computed by oneDNN."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    return plain, fast


def onednn_calls(fast, x):
    """Return how often a call of the layer runs oneDNN's operator."""
    with torch.profiler.profile() as profile:
        fast(x)
    return sum(event.count for event in profile.key_averages() if "_linear_pointwise" in event.key)


@pytest.mark.parametrize(("inputs", "outputs", "bias"), LAYERS)
@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3), (4, 1, 7)])
@torch.no_grad()
def test_outputs_equal_those_of_torch(inputs, outputs, bias, shape):
    plain, fast = twins(inputs, outputs, bias)
    x = torch.randn(*shape, inputs)
    torch.testing.assert_close(fast(x), plain(x))
    assert onednn_calls(fast, x) == 1
    assert fast(x).shape == (*shape, outputs)
    rows = torch.randn(*shape[:-1], 2 * shape[-1], inputs)[..., ::2, :]  # not contiguous
    torch.testing.assert_close(fast(rows), plain(rows))
    columns = torch.randn(*shape[:-1], inputs, shape[-1]).transpose(-1, -2)
    torch.testing.assert_close(fast(columns), plain(columns))
    torch.testing.assert_close(fast(x[0]), plain(x[0]))
    assert fast(x[:0]).shape == (0, *shape[1:], outputs)


def test_other_calls_are_those_of_torch():
    plain, fast = twins(16, 8, True)
    x = torch.randn(3, 16)
    assert onednn_calls(fast, x) == 0
    frozen = copy.deepcopy(fast).requires_grad_(False)
    assert onednn_calls(frozen, x) == 1
    assert onednn_calls(frozen, x.clone().requires_grad_()) == 0
    fast(x).sum().backward()
    plain(x).sum().backward()
    assert fast.weight.grad.equal(plain.weight.grad)
    with torch.no_grad():
        assert fast(x.bfloat16().float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).equal(plain(x))
            assert fast(x).dtype == torch.bfloat16
        assert fast.double()(x.double()).equal(plain.double()(x.double()))
        assert onednn_calls(fast, x.double()) == 0


def test_bias_is_trained_beside_a_frozen_weight():
    plain, fast = twins(16, 8, True)
    x = torch.randn(3, 16)
    for layer in (plain, fast):
        layer.weight.requires_grad_(False)
        layer(x).sum().backward()
    assert fast.bias.grad.equal(plain.bias.grad)


class OtherTensor(torch.Tensor):
    """A tensor that only has the operators of torch, as quantized weights do."""


def test_other_kinds_of_tensors_are_computed_by_torch():
    plain, fast = twins(16, 8, True)
    x = torch.randn(3, 16)
    for layer in (plain, fast):
        layer.requires_grad_(False)
    assert fast(x.to_sparse()).equal(plain(x.to_sparse()))
    fast.weight = nn.Parameter(fast.weight.as_subclass(OtherTensor), requires_grad=False)
    assert onednn_calls(fast, x) == 0
    assert fast(x).equal(plain(x))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_exported_graphs_have_only_operators_of_torch():
    plain, fast = twins(16, 8, True)
    x = torch.randn(3, 16)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph

    assert torch.compile(fast, backend=keep)(x).equal(plain(x))
    graphs.append(str(torch.export.export(fast, (x,)).graph))
    traced = torch.jit.trace(fast, x)
    graphs.append(str(traced.inlined_graph))
    assert all("linear" in graph and "mkldnn" not in graph for graph in graphs)
    assert traced(x).equal(plain(x))


def test_layers_are_still_those_of_torch():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.MultiheadAttention(4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_onednn(model)
    assert isinstance(model[0], CpuLinear)
    assert isinstance(model[0], nn.Linear)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert made.state_dict().keys() == before.keys()
        assert all(value.equal(before[name]) for name, value in made.state_dict().items())
