"""asrllm serve: speech to text over HTTP."""

import argparse
import asyncio
import contextlib
import functools
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asrllm.atomic import Terminated, sigterm_raises
from asrllm.commands.transcribe import load_engine, make_segmentation
from asrllm.defaults import RATE
from asrllm.distributed import default_device
from asrllm.errors import UserError
from asrllm.evaluation.engine import BatchEngine, Engine, TorchEngine
from asrllm.evaluation.prompt import inference_prompt
from asrllm.models.auto import load_model_config
from asrllm.models.shared_weights import share_weights
from asrllm.processes import release_freed_memory
from asrllm.progress import waiting
from asrllm.text_files import read_text

if TYPE_CHECKING:
    from asrllm.serving.app import ServerOptions
    from asrllm.serving.models import Models
    from asrllm.serving.transcriber import Queue, Transcriber

MEBIBYTE = 1 << 20
HEADER_SECONDS = 20.0  # how long a client may take to send a request's headers
UPLOAD_SECONDS = 120.0  # a slow client must not hold a connection longer
SHUTDOWN_SECONDS = 600  # how long requests in progress may take after SIGTERM
API_KEY = "ASRLLM_API_KEY"  # environment variable


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm serve` until SIGINT or SIGTERM."""
    try:
        from asrllm.serving.app import create_app
        from asrllm.serving.connections import (
            ConnectionLimits,
            LimitedConfig,
            connections_by_open_files,
        )
        from asrllm.serving.realtime.route import LiveServer
    except ImportError as error:
        raise UserError(
            f"the server needs a package that is not installed ({error.name}). "
            "Run: pip install 'asrllm[serve]'"
        ) from error
    paths = model_paths(arguments.models)
    if arguments.weights and len(paths) > 1:
        raise UserError("--weights is for one model. Export the runs, and serve the exports.")
    if arguments.log_texts and not arguments.access_log:
        raise UserError("--log-texts has no effect without --access-log. Add it.")
    options = server_options(arguments)
    with open_listener(arguments.host, arguments.port) as listener:
        models = load_models(arguments, paths)
        app = create_app(models, options)
        limits = ConnectionLimits(
            count=connections_by_open_files(),
            header_seconds=HEADER_SECONDS,
            upload_seconds=UPLOAD_SECONDS,
        )
        config = LimitedConfig(
            app,
            limits,
            models.metrics,
            root_path=arguments.root_path,
            log_config=None,
            access_log=False,
            server_header=False,
        )
        print_address(listener, arguments, list(paths))
        # uvicorn raises the signal again after it has answered the requests in progress
        with contextlib.closing(models), contextlib.suppress(Terminated), sigterm_raises():
            server = LiveServer(config, app.state.sessions, SHUTDOWN_SECONDS)
            asyncio.run(server.serve(sockets=[listener]))


def server_options(arguments: argparse.Namespace) -> "ServerOptions":
    """Return the options of the HTTP interface."""
    from asrllm.serving.app import ServerOptions

    return ServerOptions(
        api_key=read_api_key(arguments.api_key, arguments.api_key_file),
        max_bytes=arguments.max_megabytes * MEBIBYTE,
        upload_seconds=UPLOAD_SECONDS,
        origins=arguments.cors,
        access_log=functools.partial(print, flush=True) if arguments.access_log else None,
        logs_texts=arguments.log_texts,
    )


def model_paths(words: Sequence[str]) -> dict[str, str]:
    """Return the directories of models by the names that clients use.

    Args:
        words: NAME=DIR or DIR each. A directory whose path contains "=" needs no name.

    Raises:
        UserError: two models have the same name.
    """
    paths: dict[str, str] = {}
    for word in words:
        name, is_named, path = word.partition("=")
        if not is_named or Path(word).exists():
            name = Path(word).resolve().name
            path = word
        if name in paths:
            raise UserError(
                f"the models {paths[name]!r} and {path!r} are both named {name!r}. Give one of "
                f"them another name: NAME={path}"
            )
        paths[name] = path
    return paths


def load_models(arguments: argparse.Namespace, paths: Mapping[str, str]) -> "Models":
    """Load all models."""
    from asrllm.serving.metrics import ServerMetrics
    from asrllm.serving.models import Models
    from asrllm.serving.transcriber import Queue

    requests = Queue(arguments.max_queued_minutes * 60.0, ServerMetrics())
    transcribers: list[Transcriber] = []
    for name, path in paths.items():
        engines = [transcriber.batcher.engine for transcriber in transcribers]
        transcribers.append(load_transcriber(name, path, arguments, requests, engines))
    return Models(transcribers)


def load_transcriber(
    name: str,
    path: str,
    arguments: argparse.Namespace,
    requests: "Queue",
    engines: Sequence[BatchEngine],
) -> "Transcriber":
    """Load a model, and decode once, so that the first request is as fast as others.

    Args:
        name: name of the model for clients.
        path: its directory.
        arguments: options of the command line.
        requests: the requests in progress.
        engines: engines of other models, whose weights the model shares.
    """
    from asrllm.serving.transcriber import Transcriber

    config = load_model_config(path, arguments.base_models)
    segmentation = make_segmentation(arguments, config)
    engine = load_engine(path, arguments)
    if isinstance(engine, TorchEngine):
        share_weights(engine.model, [e.model for e in engines if isinstance(e, TorchEngine)])
        release_freed_memory()
    prompt = inference_prompt(config, prompt=None, language=None, hotwords=None)
    with waiting("warming up"):
        warm_up(engine, prompt)
    return Transcriber(
        name,
        engine,
        config,
        segmentation,
        requests,
        batch_size=arguments.batch_size,
        max_seconds=arguments.max_minutes * 60.0,
        max_decoding_seconds=arguments.max_decoding_minutes * 60.0,
    )


def print_address(
    listener: socket.socket, arguments: argparse.Namespace, names: Sequence[str]
) -> None:
    """Print the URL, the models, the engine and the limits."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    served = ", ".join(map(repr, names))
    print(
        f"asrllm serve: http://{shown}:{port} serves {served} with {arguments.engine} on "
        f"{default_device()}, batches of {arguments.batch_size}, files of at most "
        f"{arguments.max_megabytes} MiB and {arguments.max_minutes} minutes, a queue of "
        f"{arguments.max_queued_minutes} minutes",
        file=sys.stderr,
        flush=True,
    )


def read_api_key(key: str | None, path: str | None) -> str | None:
    """Return the key that clients must send, or None.

    Args:
        key: the key, or None.
        path: a file with the key. If both are None, the environment variable ASRLLM_API_KEY may
            have it.

    Raises:
        UserError: the file cannot be read, or the key is not one word of printable ASCII.
    """
    if key is not None:
        where = "--api-key"
    elif path is not None:
        where = f"--api-key-file {path!r}"
        key = read_text(path, "--api-key-file").strip()
    else:
        where = API_KEY
        key = os.environ.get(API_KEY, "").strip()
        if not key:
            return None
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"{where} is not a key. Use one word of printable ASCII characters without spaces."
        )
    return key


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket, before the model takes minutes to load.

    Raises:
        UserError: the address is unknown or in use.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # otherwise another server could bind the port too
    except (OSError, UnicodeError) as error:  # UnicodeError: the host is not a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be used ({reason}). Use another port, or an "
            "address of this machine."
        ) from error
    return listener


def warm_up(engine: Engine, prompt: str) -> None:
    """Decode a second of silence, so that the first request is not slower than others."""
    samples = min(max(RATE, engine.limits[0]), engine.limits[1])
    engine.answer([np.zeros(samples, np.float32)], [prompt])
