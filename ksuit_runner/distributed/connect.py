"""How a process finds the other ranks of its run: by the environment that torchrun or the runner itself gives it."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import msgspec
import torch
import torch.distributed as dist

from ksuit_runner.distributed.environment import STORE_SOCKET, Place, place
from ksuit_runner.distributed.notes import Notes
from ksuit_runner.distributed.ranks import Ranks
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError, PeerError

TIMEOUT_S = 600.0
"""How long ranks wait for each other by default, in seconds."""

_POLL_S, _ANSWER_S = 0.2, 10.0
_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class _Door:
    """Where the ranks of a run meet.

    Attributes:
        host: Where the store is.
        port: Its port.
        holder: The rank that holds the store; None if something else does.
        socket: File descriptor of the socket that listens there already, in the holder, if there is one.
    """

    host: str
    port: int
    holder: int | None
    socket: int | None = None


def _find_door(environment: Mapping[str, str]) -> _Door:
    try:
        # An agent of torchrun has a store of its own, and so may what starts the ranks.
        holder = None if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        socket = environment.get(STORE_SOCKET)
        port = int(environment["MASTER_PORT"])
        return _Door(environment["MASTER_ADDR"], port, holder, None if socket is None else int(socket))
    except (KeyError, ValueError):
        raise ConfigError(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT, where the ranks find each other: "
            "torchrun sets them all; unset RANK and WORLD_SIZE for a run of one process"
        ) from None


class _Hello(msgspec.Struct):
    """What a rank says about itself before the ranks begin.

    Attributes:
        id: Tells it from the ranks of an earlier attempt, which have used the same store.
        agreed: What has to be the same on all ranks, by name.
    """

    id: str
    agreed: dict[str, str]


class _Welcome(msgspec.Struct):
    """The answer of rank 0: the ids of all ranks, and why they cannot begin, if so."""

    ids: list[str]
    error: str | None


def connect(
    agreed: Mapping[str, str],
    timeout_s: float = TIMEOUT_S,
    device: str = "auto",
    environment: Mapping[str, str] = os.environ,
) -> World:
    """Return the world of this process, once all its ranks are there.

    Args:
        agreed: What has to be the same on all ranks, by name: versions, and the values of the config.
        timeout_s: How long ranks wait for each other, in seconds.
        device: Device of the run, see ``choose_device``.
        environment: Says which rank this is, of how many, and where the others are found.

    Raises:
        ConfigError: The ranks do not agree; on rank 0.
        PeerError: The same on the others; or not all ranks are there in time.
    """
    found = place(environment)
    if found is None or found.size == 1:
        return World()
    door = _find_door(environment)
    store, own_store = _open_stores(door, found.rank, timeout_s)
    notes = Notes(own_store, found.rank, found.size)
    try:
        scope = _shake_hands(notes, found, agreed, timeout_s)
        notes.enter(scope)
        with _loopback(found.local_size == found.size):
            return Ranks(
                dist.PrefixStore(scope, store),  # type: ignore[attr-defined]
                notes,
                found.rank,
                found.size,
                int(environment.get("LOCAL_RANK", found.rank)),
                timeout_s,
                backend="cpu:gloo,cuda:nccl" if _uses_cuda(device) else "gloo",
                holder=door.holder,
            )
    except BaseException:
        notes.close()
        raise


def _open_stores(door: _Door, rank: int, timeout_s: float) -> list[Any]:
    """Return two connections to the store: one for the groups of torch, and one for notes.

    Raises:
        ConfigError: The port is in use.
        PeerError: The store cannot be reached.
    """
    stores, limit = [], timedelta(seconds=timeout_s)
    for is_holder in (door.holder == rank, False):
        try:
            stores.append(
                dist.TCPStore(  # type: ignore[attr-defined]
                    *(door.host, door.port),
                    is_master=is_holder,
                    timeout=limit,
                    wait_for_workers=False,
                    master_listen_fd=door.socket if is_holder else None,
                )
            )
        except RuntimeError as error:
            where = f"{door.host}:{door.port} (MASTER_ADDR, MASTER_PORT)"
            reason = str(error).splitlines()[0]
            if is_holder:
                raise ConfigError(f"rank 0 cannot listen at {where}: {reason}") from None
            raise PeerError(f"rank {rank} does not reach the others at {where}: {reason}") from None
    return stores


def _shake_hands(notes: Notes, own: Place, agreed: Mapping[str, str], timeout_s: float) -> str:
    """Wait until all ranks of this attempt are there, and return a name that only they have in the store.

    The store may be that of an agent, with the notes of earlier attempts in it: these have other ids.

    Raises:
        ConfigError: The ranks differ in what has to be the same; on rank 0.
        PeerError: The same on the others; or not all ranks are there in time.
    """
    hello = _Hello(uuid4().hex, dict(agreed))
    if own.rank == 0:
        return _welcome(notes, own, hello, timeout_s)
    deadline, said = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        with suppress(TimeoutError):
            scope = notes.read("meeting", _POLL_S).decode()
            if said != scope:
                notes.post(f"{scope}/hello/{own.rank}", msgspec.msgpack.encode(hello))
                said = scope
            welcome = msgspec.msgpack.decode(notes.read(f"{scope}/welcome", _POLL_S), type=_Welcome)
            if hello.id in welcome.ids:
                notes.post(f"{scope}/welcomed/{own.rank}", b"")
                if welcome.error is not None:
                    error = PeerError(welcome.error)
                    error.is_reported = True  # by rank 0
                    raise error
                return scope
            time.sleep(_POLL_S)
    raise PeerError(f"rank 0 has not let rank {own.rank} begin within {timeout_s:g} s")


def _welcome(notes: Notes, own: Place, hello: _Hello, timeout_s: float) -> str:
    scope, deadline = hello.id, time.monotonic() + timeout_s
    notes.post("meeting", scope.encode())
    hellos = [hello]
    for rank in range(1, own.size):
        try:
            answer = notes.read(f"{scope}/hello/{rank}", max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise PeerError(f"rank {rank} has not connected within {timeout_s:g} s") from None
        hellos.append(msgspec.msgpack.decode(answer, type=_Hello))
    error = _difference(hellos)
    ids = [each.id for each in hellos]
    notes.post(f"{scope}/welcome", msgspec.msgpack.encode(_Welcome(ids, error)))
    if error is None:
        return scope
    for rank in range(1, own.size):  # they read it in the store of this process
        with suppress(TimeoutError):
            notes.read(f"{scope}/welcomed/{rank}", max(0.0, min(deadline - time.monotonic(), _ANSWER_S)))
    raise ConfigError(error)


def _difference(hellos: Sequence[_Hello]) -> str | None:
    first = hellos[0].agreed
    for rank, hello in enumerate(hellos):
        for name in sorted({*first, *hello.agreed}):
            here, there = first.get(name, "nothing"), hello.agreed.get(name, "nothing")
            if here != there:
                return f"rank {rank} has {name} {there}, and rank 0 has {here}: all ranks need the same"
    return None


def _uses_cuda(device: str) -> bool:
    return torch.cuda.is_available() and device.startswith(("auto", "cuda"))


@contextmanager
def _loopback(is_local: bool) -> Iterator[None]:
    """Let gloo use the loopback device while the block runs, if all ranks are on this machine.

    It would look up the name of the machine, which firewalls and laptops without a network make fail.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not is_local or not names or _INTERFACE in os.environ:
        yield
        return
    os.environ[_INTERFACE] = names[0]
    try:
        yield
    finally:
        del os.environ[_INTERFACE]
