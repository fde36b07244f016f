"""Where somebody speaks: a probability for every frame of 32 ms, from Silero's network or from the loudness."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from asrllm.errors import UserError

FRAME = 512  # samples at 16 kHz
CONTEXT = 64  # samples before a frame, which Silero's network hears too
GROUP = 256  # frames that the network takes at once
QUIETEST = -90.0  # dB below full scale


class Detector(Protocol):
    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The next (samples,) float32 at 16 kHz -> (frames,) probabilities, of those frames that are complete and not yet told."""

    def finish(self) -> np.ndarray:
        """The rest; a last frame that is not whole is filled with zeros."""


class SileroNetwork(nn.Module):
    """Silero VAD 6 at 16 kHz. It is written anew because importing `silero_vad` takes torch down to one thread, and its TorchScript goes
    through the audio frame by frame; the weights are the package's own. https://github.com/snakers4/silero-vad
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(
        self, frames: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """frames (T, CONTEXT + FRAME), each with the end of the one before; state of the frames before -> (T,), state"""
        padded = nn.functional.pad(frames[:, None], (0, CONTEXT), mode="reflect")
        x = self.stft_conv(padded)
        x = (
            x[:, :129] ** 2 + x[:, 129:] ** 2
        ).sqrt()  # (T, 129, 4): real and imaginary part -> magnitude
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        x, state = self.lstm(x.transpose(1, 2), state)  # (T, 1, 128): a step for each frame
        return self.final_conv(x.relu().transpose(1, 2)).sigmoid()[:, 0, 0], state


# of the network's parts in the package's TorchScript
PARTS = {
    "stft_conv.weight": "stft.forward_basis_buffer",
    **{
        f"conv{i + 1}.{kind}": f"encoder.{i}.reparam_conv.{kind}"
        for i in range(4)
        for kind in ("weight", "bias")
    },
    **{
        f"lstm.{kind}_l0": f"decoder.rnn.{kind}"
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    },
    **{f"final_conv.{kind}": f"decoder.decoder.2.{kind}" for kind in ("weight", "bias")},
}


def load_silero() -> SileroNetwork:
    """With the weights that the package silero-vad brings. Raises UserError where it is not installed, or is another version."""
    path = silero_file()
    if path is None:
        raise UserError(
            "finding speech needs the package silero-vad: pip install 'silero-vad>=6.2.3,<7', or give --no-vad"
        )
    weights, network = torch.jit.load(path, map_location="cpu").state_dict(), SileroNetwork()
    try:
        network.load_state_dict({name: weights[f"_model.{part}"] for name, part in PARTS.items()})
    except (KeyError, RuntimeError) as error:
        raise UserError(
            "the package silero-vad has another network: pip install 'silero-vad>=6.2.3,<7', or give --no-vad"
        ) from error
    return network.eval()


def silero_file() -> Path | None:
    found = importlib.util.find_spec("silero_vad")  # which imports nothing
    path = Path(found.origin).parent / "data" / "silero_vad.jit" if found and found.origin else None
    return path if path and path.is_file() else None


class _Frames:
    """Cuts a stream into frames; complete ones are told in groups of a fixed size, so that how the stream is cut changes no bit."""

    def __init__(self) -> None:
        self._rest: np.ndarray = np.zeros(0, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        self._rest = np.concatenate([self._rest, samples])
        size = GROUP * FRAME
        whole = len(self._rest) // size * size
        groups, self._rest = self._rest[:whole], self._rest[whole:]
        return self._join(
            [self._probabilities(group.reshape(GROUP, FRAME)) for group in groups.reshape(-1, size)]
        )

    def finish(self) -> np.ndarray:
        rest, self._rest = self._rest, self._rest[:0]
        filled = np.pad(rest, (0, -len(rest) % FRAME))
        return self._probabilities(filled.reshape(-1, FRAME)) if len(rest) else rest

    @staticmethod
    def _join(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        """(T, FRAME) -> (T,)"""
        raise NotImplementedError


class Silero(_Frames):
    """Silero's probability of speech. One for each file: it remembers what it has heard."""

    def __init__(self, network: SileroNetwork) -> None:
        super().__init__()
        self.network = network
        self._context: np.ndarray = np.zeros(CONTEXT, np.float32)
        self._state: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        before = np.vstack([self._context[None], frames[:-1, -CONTEXT:]])
        self._context = frames[-1, -CONTEXT:].copy()
        with one_thread():
            probabilities, self._state = self.network(
                torch.from_numpy(np.hstack([before, frames])), self._state
            )
        return probabilities.numpy()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A step of the LSTM is too small to be shared out: on a busy machine, threads that wait for one another take 90 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Loudness(_Frames):
    """All is speech, from 0.5 for silence to 1 for full scale: segments are cut where it is quiet, and nothing is left out."""

    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        power = (frames.astype(np.float64) ** 2).mean(1)
        decibels = 10 * np.log10(np.maximum(power, 10 ** (QUIETEST / 10)))
        return (1 - 0.5 * np.clip(decibels / QUIETEST, 0, 1)).astype(np.float32)
