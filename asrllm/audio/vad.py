"""Voice activity detection: a speech probability for every frame of 32 ms."""

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
CONTEXT = 64  # samples before a frame that Silero's network also receives
FRAMES_AT_ONCE = 256  # frames in one forward pass
QUIETEST = -90.0  # dB relative to full scale
INSTALL_SILERO = "Run pip install 'silero-vad>=6.2.3,<7', or use --no-vad."


class Detector(Protocol):
    """Computes the speech probabilities of a stream, block by block."""

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Take the next samples of the stream.

        Args:
            samples: (samples,) float32 at 16 kHz.

        Returns:
            (frames,) probabilities of the frames that are complete and were not returned before.
        """

    def finish(self) -> np.ndarray:
        """Return the remaining probabilities; an incomplete last frame is padded with zeros."""


class SileroNetwork(nn.Module):
    """Silero VAD 6 at 16 kHz, with the weights of the package silero-vad.

    It is reimplemented for two reasons. Importing `silero_vad` limits torch to one thread. Its
    TorchScript processes the audio frame by frame, at 69x real time on one core instead of 480x.
    https://github.com/snakers4/silero-vad
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
        """Compute the speech probabilities of successive frames.

        Args:
            frames: (T, CONTEXT + FRAME), each beginning with the end of the previous frame.
            state: the LSTM's state after the previous frames, None at the beginning.

        Returns:
            (T,) probabilities and the new state.
        """
        padded = nn.functional.pad(frames[:, None], (0, CONTEXT), mode="reflect")
        x = self.stft_conv(padded)
        real = x[:, :129]
        imaginary = x[:, 129:]
        x = (real**2 + imaginary**2).sqrt()  # (T, 129, 4)
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        x, state = self.lstm(x.transpose(1, 2), state)  # (T, 1, 128): one step per frame
        logits = self.final_conv(x.relu().transpose(1, 2))  # (T, 1, 1)
        return logits.sigmoid()[:, 0, 0], state


def _silero_names() -> dict[str, str]:
    """Map the parameter names of SileroNetwork to those in the package's TorchScript."""
    names = {"stft_conv.weight": "stft.forward_basis_buffer"}
    for kind in ("weight", "bias"):
        for i in range(4):
            names[f"conv{i + 1}.{kind}"] = f"encoder.{i}.reparam_conv.{kind}"
        names[f"final_conv.{kind}"] = f"decoder.decoder.2.{kind}"
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names[f"lstm.{kind}_l0"] = f"decoder.rnn.{kind}"
    return names


def load_silero() -> SileroNetwork:
    """Load the network with the weights in the package silero-vad.

    Raises:
        UserError: the package is not installed, or its version has another network.
    """
    path = silero_file()
    if path is None:
        raise UserError(f"speech detection needs the package silero-vad. {INSTALL_SILERO}")
    weights = torch.jit.load(path, map_location="cpu").state_dict()
    network = SileroNetwork()
    try:
        state = {name: weights[f"_model.{theirs}"] for name, theirs in _silero_names().items()}
        network.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"the installed version of silero-vad has a different network. {INSTALL_SILERO}"
        ) from error
    return network.eval()


def silero_file() -> Path | None:
    """Return the TorchScript in the package silero-vad, or None if it is not installed."""
    package = importlib.util.find_spec("silero_vad")  # does not import it
    if package is None or not package.origin:
        return None
    path = Path(package.origin).parent / "data" / "silero_vad.jit"
    if not path.is_file():
        return None
    return path


class _FramewiseDetector:
    """Splits a stream into frames.

    Complete frames are evaluated in groups of a fixed size, so that the result does not depend on
    the sizes of the blocks.
    """

    def __init__(self, *, group: int = FRAMES_AT_ONCE) -> None:
        """
        Args:
            group: frames of a group. Small groups give results earlier, and are slower.
        """
        self._group = group
        self._rest: np.ndarray = np.zeros(0, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        self._rest = np.concatenate([self._rest, samples])
        size = self._group * FRAME
        complete = len(self._rest) // size * size
        groups = self._rest[:complete].reshape(-1, self._group, FRAME)
        self._rest = self._rest[complete:]
        if not len(groups):
            return np.zeros(0, np.float32)
        return np.concatenate([self._probabilities(group) for group in groups])

    def finish(self) -> np.ndarray:
        rest = self._rest
        self._rest = rest[:0]
        if not len(rest):
            return rest
        padded = np.pad(rest, (0, -len(rest) % FRAME))
        return self._probabilities(padded.reshape(-1, FRAME))

    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        """Map frames (T, FRAME) to probabilities (T,)."""
        raise NotImplementedError


class Silero(_FramewiseDetector):
    """Speech probabilities from Silero's network. Create one per file: it is stateful."""

    def __init__(self, network: SileroNetwork, *, group: int = FRAMES_AT_ONCE) -> None:
        super().__init__(group=group)
        self.network = network
        self._context: np.ndarray = np.zeros(CONTEXT, np.float32)
        self._state: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        contexts = np.vstack([self._context[None], frames[:-1, -CONTEXT:]])
        self._context = frames[-1, -CONTEXT:].copy()
        inputs = torch.from_numpy(np.hstack([contexts, frames]))
        with one_thread():
            probabilities, self._state = self.network(inputs, self._state)
        return probabilities.numpy()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread.

    A step of the LSTM is too small to parallelize: on a busy machine, threads that wait for each
    other take 90 times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Loudness(_FramewiseDetector):
    """Probabilities from 0.5 for silence to 1 for full scale, which count everything as speech.

    Segments are cut where the audio is quiet, and nothing is left out.
    """

    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        power = (frames.astype(np.float64) ** 2).mean(1)
        decibels = 10 * np.log10(np.maximum(power, 10 ** (QUIETEST / 10)))
        quietness = np.clip(decibels / QUIETEST, 0, 1)
        return (1 - 0.5 * quietness).astype(np.float32)
