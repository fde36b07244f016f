"""Write small checkpoints in DeepSpeed's layout without DeepSpeed."""

import json
from pathlib import Path

import torch
from torch import Tensor

from asrllm.training.checkpoint.zero_files import file_digest


def write_checkpoint(
    folder: Path,
    state: dict[str, Tensor],
    *,
    ranks: int = 0,
    step: int | None = None,
    averaged: bool = False,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: the checkpoint's directory.
        state: weights by name.
        ranks: world size of a ZeRO-3 checkpoint; 0: a ZeRO-0 checkpoint in float32.
        step: optimizer step; default: the number in the directory's name.
        averaged: add a running average, which equals the weights (ZeRO-0 only).
    """
    folder.mkdir(parents=True)
    number = int(folder.name.rpartition("-")[2])
    if ranks == 0:
        torch.save({"module": state, "optimizer": {}}, folder / "mp_rank_00_model_states.pt")
    else:
        shapes = [{name: tensor.shape for name, tensor in state.items()}]
        torch.save({"param_shapes": shapes}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    if averaged:
        torch.save(
            {"average": [tensor.double() for tensor in state.values()]},
            folder / "average_rank_0.pt",
        )
    for rank in range(ranks):
        parts = []
        for tensor in state.values():
            size = -(-tensor.numel() // ranks)
            padded = torch.nn.functional.pad(tensor.flatten(), (0, size * ranks - tensor.numel()))
            parts.append(padded[rank * size : (rank + 1) * size])
        saved = {"optimizer_state_dict": {"fp32_flat_groups": [torch.cat(parts)]}}
        torch.save(saved, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    manifest = {
        "step": number if step is None else step,
        "position": {"epoch": number},
        "zero_stage": 3 if ranks else 0,
        "world_size": ranks or 1,
        "trainable": {
            name: {"shape": list(tensor.shape), "dtype": "float32"}
            for name, tensor in state.items()
        },
        "param_groups": [list(state)],
        "running_average": averaged,
        "base_models": {},
        "settings": {},
        "prompts": [],
        "files": {path.name: file_digest(path) for path in folder.glob("*.pt")},
    }
    (folder / "asrllm.json").write_text(json.dumps(manifest))
    return folder
