"""`tim serve`: check the options, load the model, serve until a signal."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.console import Console
from launch.sampling.model_source import ModelOptions, open_generator
from launch.sampling.recorded import ModelFacts
from launch.serving.http.clients import is_address
from launch.serving.http.guard import LOOPBACK_NAMES
from launch.serving.http.password import Password
from launch.serving.limits import Limits
from pipeline.errors import one_line
from tim.pretrained import hub
from tim.pretrained.hub import HUB

if TYPE_CHECKING:
    from launch.serving.studio import Studio

PASSWORD = "TIM_PASSWORD"  # environment variable
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLOSE_SECONDS = 3  # for answers in progress, and for the step in hand
_POLL_SECONDS = 0.1
_PORTS_TRIED = 100


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen, and who may ask.

    host: a name or an address; port: 0 for any free one; password: as typed, password_file: its first line; names: further host names by
    which clients may call the server; is_open: listen beyond this machine without a password.
    """

    host: str
    port: int
    password: str | None
    password_file: Path | None
    names: Sequence[str]
    is_open: bool
    proxies: Sequence[str]
    limits: Limits

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def run(options: ServeOptions, *, model: ModelOptions, console: Console) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises ValueError for options that cannot be used, before the model is loaded."""
    if find_spec("gradio") is None:
        raise ValueError('tim serve needs gradio: pip install "tim[serve]"')
    _check_proxies(options.proxies)
    password = _password(options, console=console)
    with _listening(options) as listener:
        generator, digest = open_generator(model, state=None, log=console.line)
        facts = _without_paths(ModelFacts.of(generator, path=model.path, digest=digest, loras=model.loras), model=model)
        with tempfile.TemporaryDirectory(prefix="tim-serve-", ignore_cleanup_errors=True) as folder, _signals() as stopped:
            os.environ["GRADIO_TEMP_DIR"] = folder
            from launch.serving.studio import Studio

            studio = Studio(generator, facts, limits=options.limits, say=partial(_say, console))
            has_ended = _serve(options, studio=studio, password=password, listener=listener, stopped=stopped, console=console)
        if not has_ended:
            _leave()


def _serve(
    options: ServeOptions,
    *,
    studio: Studio,
    password: Password | None,
    listener: socket.socket,
    stopped: threading.Event,
    console: Console,
) -> bool:
    """Serve until `stopped` is set. Returns whether all threads have ended. Raises RuntimeError if the server does not start."""
    import uvicorn

    from launch.serving.app import application
    from launch.serving.http.connections import MOST, OF_A_CLIENT, Connection

    protocol: Any = partial(Connection, most_of_a_client=MOST if options.proxies else OF_A_CLIENT)
    hosts = [*options.names, *(() if options.is_local else (options.host, socket.gethostname()))]
    settings = uvicorn.Config(
        application(studio, hosts=hosts, password=password, proxies=options.proxies),
        http=protocol,
        ws="none",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server = uvicorn.Server(settings)
    # Signals belong to the main thread, which only waits for them: a step that takes minutes does not delay them.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
    thread.start()
    while not server.started and thread.is_alive() and not stopped.is_set():
        time.sleep(_POLL_SECONDS)
    has_started = server.started
    if has_started and not stopped.is_set():
        url = _url(options, listener)
        data = {"url": url, "model": studio.facts.name, "pid": os.getpid()}
        console.result(f"serving {studio.facts.name} at {url} (Ctrl-C stops it)", data=data)
        while thread.is_alive() and studio.status().is_working and not stopped.wait(timeout=_POLL_SECONDS):
            pass
    has_failed = has_started and not stopped.is_set()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would name every page that is still open
    server.should_exit = True
    has_ended = studio.close(seconds=_CLOSE_SECONDS)
    thread.join(timeout=2 * _CLOSE_SECONDS)
    if has_failed:
        raise RuntimeError("the server cannot draw any more: see the lines above, and start it again")
    if not has_started and not stopped.is_set():
        raise RuntimeError("the server did not start: see the lines above")
    return has_ended and not thread.is_alive()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that signals set, in place of what they did before."""
    stopped = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopped.set()) for number in SIGNALS}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(console: Console, line: str) -> None:
    """Print a line of the log. The server goes on where nobody reads it."""
    with suppress(OSError):
        console.line(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}")


def _leave() -> None:
    """End this process, while a thread is still in a step."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _password(options: ServeOptions, *, console: Console) -> Password | None:
    """The password of the options or the environment. Raises ValueError for an empty one, and if one is needed."""
    if options.password is not None and options.password_file is not None:
        raise ValueError("--password and --password-file: give one of them")
    in_environment = os.environ.pop(PASSWORD, None)  # processes that decode uploads do not need it
    typed = options.password if options.password is not None else in_environment
    if options.password_file is not None:
        typed = _first_line(options.password_file)
    if typed is not None and not typed:
        raise ValueError("the password is empty: give another one, or none")
    if typed is None and not options.is_local and not options.is_open:
        raise ValueError(
            f"--host {options.host}: other machines could draw without a password; set {PASSWORD} or give --password-file FILE "
            "(--no-password allows it)"
        )
    if typed is None and not options.is_local:
        console.line(f"--no-password: whoever can reach {options.host} can draw")
    if options.password is not None:
        console.line(f"the command line shows the password to users of this machine: {PASSWORD} and --password-file do not")
    return None if typed is None else Password(typed)


def _check_proxies(proxies: Sequence[str]) -> None:
    for proxy in proxies:
        if not is_address(proxy):
            raise ValueError(f"--proxy {proxy}: is no address; give that of the proxy, for example --proxy 127.0.0.1")


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--password-file {path}: cannot be read ({one_line(error)})") from error


def _listening(options: ServeOptions) -> socket.socket:
    """A socket at the host and port. Raises ValueError if the host is unknown, or the port is taken or not allowed."""
    host, port = options.host, options.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: unknown ({error.strerror})") from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port {port}: is taken; give another one, for example --port {_free_port(address[0], port, family)}"
            ) from None
        if error.errno == errno.EACCES:
            raise ValueError(f"--port {port}: needs more rights; give one from 1024, for example --port 7860") from None
        raise ValueError(f"--host {host}: cannot listen there ({error.strerror}); give an address of this machine") from error


def _free_port(host: str | int, taken: int, family: int) -> int:
    """The next free port, or 0 for any if there is none near."""
    for port in range(taken + 1, min(taken + _PORTS_TRIED, 65_536)):
        try:
            socket.create_server((host, port), family=family).close()
        except OSError:
            continue
        return port
    return 0


def _url(options: ServeOptions, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    elif options.host in LOOPBACK_NAMES:
        host = options.host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _without_paths(facts: ModelFacts, *, model: ModelOptions) -> ModelFacts:
    """What the files of images may say to others: names of files, not their folders."""
    if str(model.path).startswith(HUB):
        name = hub.parse(str(model.path)).repository
    else:
        path = Path(model.path).resolve()
        name = path.parent.name if path.name == "model" and path.parent.name else path.name
    loras = tuple(replace(merged, name=Path(merged.name).name) for merged in facts.loras)
    return replace(facts, name=name, loras=loras)
