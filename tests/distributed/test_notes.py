"""Tests for what ranks tell each other through a store."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from ksuit_runner.distributed.notes import Notes


def test_a_rank_that_has_entered_first_need_not_be_waited_for() -> None:
    host = "127.0.0.1"
    holder = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    limit = timedelta(seconds=20)
    ranks = [
        Notes(dist.TCPStore(host, holder.port, is_master=False, wait_for_workers=False, timeout=limit), rank, 2)
        for rank in range(2)
    ]
    try:
        for notes in ranks:
            notes.enter("attempt")  # reads what the other one says about failures, which has not met anybody yet
        assert [set(notes.signs()) for notes in ranks] == [{0}, {0, 1}]
    finally:
        for notes in ranks:
            notes.close()


def test_what_is_wrong_with_the_store_is_named() -> None:
    class Broken:
        def set(self, key: str, value: bytes) -> None:
            raise RuntimeError("the disk of the store is full")

    notes = Notes(Broken(), 0, 1)
    try:
        with pytest.raises(TimeoutError, match="the disk of the store is full"):
            notes.post("name", b"")
    finally:
        notes.close()
