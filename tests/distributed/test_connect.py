"""Tests for how the ranks of a run find each other."""

import pytest
import torch.distributed as dist
from ranks import Ranks, on_ranks, surroundings

from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError, KsuitError, PeerError


def meet(agreed: dict[int, dict[str, str]], timeout_s: float) -> str:
    import os

    try:
        world = connect(agreed[int(os.environ["RANK"])], timeout_s)
    except KsuitError as error:
        return f"{type(error).__name__}: {error}"
    world.close()
    return "met"


def test_ranks_with_other_settings_are_named() -> None:
    agreed = {rank: {"torch": "2.13", "optimizer.lr": "0.1"} for rank in range(3)}
    agreed[2] = {"torch": "2.13", "optimizer.lr": "0.2"}
    text = "rank 2 has optimizer.lr 0.2, and rank 0 has 0.1: all ranks need the same"
    assert on_ranks(3, meet, agreed, 30.0) == [f"ConfigError: {text}", *2 * [f"PeerError: {text}"]]


def test_a_rank_that_is_not_there_is_named() -> None:
    with Ranks() as ranks:
        first = ranks.start(2, meet, {0: {}, 1: {}}, 1.0, only=[0])
        assert first[0].result() == "PeerError: rank 1 has not connected within 1 s"


def gather_ranks() -> list[int]:
    world = connect({})
    try:
        return world.gather(world.rank)
    finally:
        world.close()


def test_notes_of_an_earlier_attempt_in_the_store_of_an_agent_do_no_harm() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    change = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with Ranks() as ranks:
        for _ in range(3):
            begun = ranks.start(2, gather_ranks, change=change)
            assert [rank.result() for rank in begun] == [[0, 1], [0, 1]]
            killed = ranks.start(2, gather_ranks, change=change, only=[1])[0]  # has said who it is, and no more
            killed.process.join(0.5)
            killed.process.kill()


def test_a_process_alone_is_the_plain_world() -> None:
    for environment in ({}, surroundings(0, 1, 1)):
        assert type(connect({}, environment=environment)) is World


def test_an_environment_without_an_address_is_refused() -> None:
    environment = surroundings(0, 2, 1)
    del environment["MASTER_PORT"]
    with pytest.raises(ConfigError, match="but not MASTER_ADDR and MASTER_PORT"):
        connect({}, environment=environment)


def test_a_port_in_use_and_a_store_out_of_reach_are_clear_errors() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"rank 0 cannot listen at 127.0.0.1:{port}"):
            connect({}, 1.0, environment=surroundings(0, 2, port))
    with pytest.raises(PeerError, match=f"rank 1 does not reach the others at 127.0.0.1:{port}"):
        connect({}, 1.0, environment=surroundings(1, 2, port))
