"""Weights that are not dense tensors are rejected wherever a file of torch.save is read."""

import pytest
import torch

from asrllm.checkpoints.llm_files import LazyTensors
from asrllm.errors import UserError
from asrllm.models.auto import read_state
from asrllm.models.encoders.whisper_weights import DIMS, read_openai
from asrllm.models.encoders.zipformer.weights import load_tensors
from asrllm.models.hub_files import check_stored_dtypes

NAME = "encoder.conv1.weight"
READERS = {
    "run": read_state,
    "merge": lambda file: LazyTensors().add_file(file, str),
    "Zipformer": load_tensors,
    "OpenAI": read_openai,
    "LLM": check_stored_dtypes,
}


def write(file, tensor, reader):
    content = {"other": torch.ones(2), NAME: tensor}
    if reader == "OpenAI":
        content = {"dims": dict.fromkeys(DIMS.values(), 1), "model_state_dict": content}
    torch.save(content, file)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("reader", READERS)
def test_sparse_and_nested_weights_are_named(tmp_path, reader):
    tensors = {
        "sparse_coo": torch.eye(3).to_sparse(),
        "sparse_csr": torch.eye(3).to_sparse_csr(),
    }
    if reader != "LLM":  # torch cannot load nested tensors to the meta device
        tensors["nested"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for layout, tensor in tensors.items():
        file = tmp_path / f"{layout}.bin"
        write(file, tensor, reader)
        with pytest.raises(UserError) as caught:
            READERS[reader](file)
        for part in (repr(NAME), repr(str(file)), layout):
            assert part in str(caught.value)


@pytest.mark.parametrize("reader", [name for name in READERS if name != "LLM"])
def test_weights_saved_from_the_meta_device_are_named(tmp_path, reader):
    file = tmp_path / "w.bin"
    write(file, torch.empty(3, device="meta"), reader)
    with pytest.raises(UserError) as caught:
        READERS[reader](file)
    assert repr(NAME) in str(caught.value)
    assert repr(str(file)) in str(caught.value)
