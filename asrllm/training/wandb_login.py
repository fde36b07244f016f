"""Check that Weights & Biases can be reached before a run spends time on anything else."""

import contextlib
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from asrllm.errors import UserError
from asrllm.text_files import first_words
from asrllm.training.run_config import WandbConfig

DEFAULT_HOST = "api.wandb.ai"
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
LOG_IN = "Run 'wandb login', set WANDB_API_KEY, or choose the mode offline."


def check_wandb_login(config: WandbConfig, key: str) -> None:
    """Check that there are credentials if a run logs to W&B online.

    Args:
        config: the run's W&B options.
        key: the configuration key of these options.

    Raises:
        UserError: there are none.
    """
    if config.mode != "online" or any(os.environ.get(name) for name in CREDENTIALS):
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname or DEFAULT_HOST
    given = os.environ.get("NETRC")
    files = [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        # wandb reads a file that Python's parser refuses, so such a file counts as credentials
        with contextlib.suppress(OSError):
            try:
                hosts = netrc.netrc(file).hosts
            except netrc.NetrcParseError:
                return
            if host in hosts or has_other_server():
                return
    raise UserError(f"{key}.mode=online, but there is no login for W&B at {host!r}. {LOG_IN}")


def has_other_server() -> bool:
    """Return whether wandb's own settings may name another server than WANDB_BASE_URL does."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    try:
        return "base_url" in (folder / "settings").read_text()
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def explained_wandb(key: str) -> Iterator[None]:
    """Raise UserError if wandb cannot start a run.

    Args:
        key: the configuration key of the W&B options.
    """
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise UserError(f"{key}: W&B cannot start a run: {first_words(error)}. {LOG_IN}") from error
