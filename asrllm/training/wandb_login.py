"""Check that Weights & Biases can be reached before a run spends time on anything else."""

import contextlib
import netrc
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from asrllm.errors import UserError
from asrllm.text_files import first_words
from asrllm.training.run_config import WandbConfig

if TYPE_CHECKING:
    import wandb

DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the second one is that of wandb 0.31
LOGIN_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
LOG_IN = "Run 'wandb login', set WANDB_API_KEY, or choose the mode offline."


def check_wandb_login(config: WandbConfig, key: str) -> None:
    """Check that credentials exist if a run logs to W&B online.

    Args:
        config: W&B options of the run.
        key: configuration key of these options.

    Raises:
        UserError: no credentials were found.
    """
    if config.mode == "online":
        check_login(f"{key}.mode=online", LOG_IN)


def check_login(what: str, fix: str) -> None:
    """Check that credentials of W&B exist.

    Args:
        what: what needs them, for the error message.
        fix: how to log in.

    Raises:
        UserError: no credentials were found.
    """
    if any(os.environ.get(name) for name in LOGIN_VARIABLES):
        return
    hosts = login_hosts()
    for file in netrc_files():
        # wandb reads files that Python's parser rejects, so such a file counts as credentials
        with contextlib.suppress(OSError):
            try:
                found = netrc.netrc(file).hosts
            except netrc.NetrcParseError:
                return
            if found.keys() & hosts or has_other_server():
                return
    raise UserError(f"{what} needs a login for W&B at {hosts[0]!r}, but none was found. {fix}")


def login_hosts() -> Sequence[str]:
    """Return the names under which `wandb login` may have stored the credentials."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", ""))
    if url.hostname is None or url.hostname in DEFAULT_HOSTS:
        return DEFAULT_HOSTS
    return (url.netloc, url.hostname)  # newer versions of wandb store the port


def netrc_files() -> list[Path]:
    """Return the files in which wandb looks for credentials."""
    path = os.environ.get("NETRC")
    if path:
        return [Path(path)]
    return [Path.home() / ".netrc", Path.home() / "_netrc"]


def has_other_server() -> bool:
    """Return whether wandb's own settings may name a different server than WANDB_BASE_URL."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    try:
        return "base_url" in (folder / "settings").read_text()
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def explained_wandb(key: str) -> Iterator[None]:
    """Raise UserError if wandb cannot start a run.

    Args:
        key: configuration key of the W&B options.
    """
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise UserError(
            f"{key}: W&B could not start a run: {first_words(error)}. {LOG_IN}"
        ) from error


def print_sync_command(run: "wandb.Run") -> None:
    """Print the command that uploads a finished run of mode=offline, with its resumed parts."""
    if not run.offline:
        return
    folder = shlex.quote(str(Path(run.dir).parents[1]))  # DIR/wandb/offline-run-*/files
    print(
        f"Upload the W&B run with: wandb sync {folder}/offline-run-*-{run.id}",
        file=sys.stderr,
        flush=True,
    )
