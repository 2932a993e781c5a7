"""How the machines of a job find each other: torchrun's rendezvous at `--rdzv-endpoint`.

With node ranks (`static`), machine 0 serves the store. Without (`c10d`), the machine that has the endpoint's address does, and torchrun
numbers the machines. torchrun finds out by host names which machine that is, and at which address the others reach it. Names do not tell
with several interfaces, in containers and in network namespaces, where the machines would wait for each other. Routes do.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from launch.logs.startup import STARTUP

_WAIT_SECONDS = 1800  # for the other machines: they may have to pull a container image
_JOB = "tim"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_STOPPED, _INTERRUPTED = 75, 130  # exit codes


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """`"node0:29500"` → ("node0", 29500); an IPv6 address stands in brackets. Raises ValueError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})", endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"--rdzv-endpoint {endpoint}: give HOST:PORT")
    return match[1].strip("[]"), int(match[2])


def rendezvous_arguments(endpoint: str | None, *, nnodes: int, node_rank: int | None) -> list[str]:
    """Arguments of torchrun for the rendezvous. Raises ValueError for an invalid layout or an unknown host."""
    if node_rank is not None and not 0 <= node_rank < nnodes:
        raise ValueError(f"--node-rank {node_rank}: must be between 0 and {nnodes - 1} with --nnodes {nnodes}")
    if nnodes == 1:
        return ["--standalone"]
    if not endpoint:
        raise ValueError(f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, the machine of node rank 0 and a free port")
    host, port = parse_endpoint(endpoint)
    if node_rank is not None:
        place = [f"--master-addr={host}", f"--master-port={port}", f"--node-rank={node_rank}"]
        return ["--rdzv-backend=static", *place, f"--rdzv-conf=timeout={_WAIT_SECONDS}"]
    is_host = _is_own(_resolve(host, endpoint))
    conf = f"--rdzv-conf=is_host={int(is_host)},timeout={_WAIT_SECONDS},join_timeout={_WAIT_SECONDS}"
    address = host if is_host else _source_address(_resolve(host, endpoint))  # the host's own view of its name may be 127.0.1.1
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={_JOB}", conf, f"--local-addr={address}"]


def socket_environment(endpoint: str | None, *, nnodes: int) -> dict[str, str]:
    """Environment variables by which gloo takes the interface that leads to the endpoint, not the one that the host name stands for."""
    if nnodes == 1 or endpoint is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    interface = _interface_of(_source_address(_resolve(parse_endpoint(endpoint)[0], endpoint)))
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}


@contextmanager
def exit_on_signals(is_waiting: Callable[[], bool]) -> Iterator[None]:
    """Exit on a signal while `is_waiting()`: torchrun waits for other machines in native code, which Python's handlers do not interrupt."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def receive() -> None:
        while numbers := os.read(readable, 64):
            for number in numbers:
                if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) and is_waiting():
                    STARTUP.line(f"{signal.Signals(number).name}: stopped while waiting for the other machines")
                    os._exit(_INTERRUPTED if number == signal.SIGINT else _STOPPED)

    previous = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writable)  # ends the thread
        thread.join()
        os.close(readable)


def _resolve(host: str, endpoint: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
    except OSError as error:
        raise ValueError(f"--rdzv-endpoint {endpoint}: this machine cannot resolve {host} ({error}): give its address") from None


def _is_own(address: str) -> bool:
    """Whether an interface of this machine has the address."""
    with closing(socket.socket(_family(address))) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _source_address(address: str) -> str:
    """This machine's address on the way to another one; that address itself if there is no way. Nothing is sent."""
    with closing(socket.socket(_family(address), socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return address
        return str(probe.getsockname()[0])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address.partition("%")[0]).version == 6 else socket.AF_INET


def _interface_of(address: str) -> str | None:
    """Name of the interface with an IPv4 address; None for loopback and where it cannot be told."""
    if sys.platform != "linux" or ":" in address or ipaddress.ip_address(address).is_loopback:
        return None
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
