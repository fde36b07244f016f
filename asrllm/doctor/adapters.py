"""Whether adapters change the logits, and whether gradients reach them and the projector."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from asrllm.collator.batch import PackedBatch
from asrllm.doctor.findings import Finding, ok, problem
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.state_dict import counted, is_adapter
from asrllm.training.trainer import MODEL_INPUTS

CHANGE = 0.02  # standard deviation of the noise that is added to the adapters' weights
FIX = "Compare the base models' files with the originals, or adapt other layers."


def check_adapters(model: AsrLlmModel, batch: PackedBatch) -> Finding:
    """Compare the logits before and after a change of the adapters, and compute gradients.

    The LLM and the encoder themselves get no gradient even if they are trained, because it would
    need as much memory as their weights.

    Args:
        model: the model, frozen as it will be trained; the trained adapters are changed.
        batch: a small batch.
    """
    model.eval()
    inputs = {name: getattr(batch, name) for name in MODEL_INPUTS}
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (is_adapter(name) or name.startswith("projector.")):
            trained[name] = parameter
        else:
            parameter.requires_grad_(False)
    adapters = {name: parameter for name, parameter in trained.items() if is_adapter(name)}
    with torch.no_grad():
        before = model(**inputs).losses  # of each token, therefore other logits change them
    # PEFT's factor B begins as zero, so that the factor A would have no gradient
    add_noise(adapters.values())
    output = model(**inputs)
    fault = ""
    if not output.losses.isfinite().all():
        fault = "the loss is not finite"
    elif adapters and torch.equal(before, output.losses):
        fault = "changed adapters do not change the logits"
    elif trained:
        output.loss.backward()
        fault = fault_of_gradients({name: weight.grad for name, weight in trained.items()})
    if fault:
        return problem("adapters", f"{batch.keys[0]!r}: {fault}", FIX)
    if not trained:
        return ok("adapters", "the loss is finite; no adapters and no projector are trained")
    if not adapters:
        return ok("adapters", "gradients reach the projector; no adapters are trained")
    reached = "them" if len(adapters) == len(trained) else "them and the projector"
    changed = f"{len(adapters)} weights of adapters change the logits"
    return ok("adapters", f"{changed}, and gradients reach {reached}")


def add_noise(weights: Iterable[Tensor]) -> None:
    """Add the same normal noise in every call."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += CHANGE * noise.to(weight.dtype)


def fault_of_gradients(gradients: Mapping[str, Tensor | None]) -> str:
    """Return what is wrong with the gradients of weights by name, or ""."""
    infinite = []
    unreached = []
    for name, gradient in gradients.items():
        if gradient is None or not gradient.any():
            unreached.append(name)
        elif not gradient.isfinite().all():
            infinite.append(name)
    if infinite:
        return f"the gradient is not finite at {counted('weight', infinite)}"
    # single weights of a projector may have none, for example behind a ReLU
    lost = [name for name in unreached if is_adapter(name)]
    if lost:
        return f"no gradient reaches {counted('weight', lost)} of the adapters"
    projector = [name for name in gradients if not is_adapter(name)]
    if projector and all(name in unreached for name in projector):
        return "no gradient reaches the projector"
    return ""
