"""Which of the other ranks are lost or late, by their signs of life."""

import time

from ksuit_runner.distributed.notes import Failure, Notes


class PeerWatch:
    """Judges the other ranks of a run by their signs of life.

    Args:
        notes: The notes of this rank.
        rank: Number of this rank.
        holder: The rank that holds the store of the notes; None if none does.
    """

    def __init__(self, notes: Notes, rank: int, holder: int | None) -> None:
        self._notes = notes
        self._rank = rank
        self._holder = holder

    def lost(self, silent_s: float) -> Failure | None:
        """Return that the store, or another rank, gives no signs of life, if so.

        Args:
            silent_s: How long they may be silent, in seconds.
        """
        now = time.monotonic()
        silence_of_store = now - self._notes.answered_at
        if self._notes.is_cut_off or silence_of_store > silent_s + self._notes.beat_s:
            holder = "the store of the ranks" if self._holder is None else f"rank {self._holder}"
            return _not_answering(self._holder or 0, holder, silence_of_store)
        for rank, sign in self._notes.signs().items():
            if self.is_silent(rank, silent_s):
                return _not_answering(rank, f"rank {rank}", now - sign.at)
        return None

    def is_silent(self, rank: int, silent_s: float) -> bool:
        """Whether another rank has given its last sign of life longer ago than this, in seconds."""
        sign = self._notes.signs().get(rank)
        return rank != self._rank and sign is not None and time.monotonic() - sign.at > silent_s

    def late(self, waited_s: float) -> Failure:
        """Return who has not come to the exchange in which this rank has waited for so many seconds."""
        signs = self._notes.signs()
        late = [rank for rank, sign in sorted(signs.items()) if sign.exchanges < self._notes.exchanges]
        if not late:
            return Failure(self._rank, f"an exchange between the ranks has not ended within {waited_s:.0f} s")
        names = f"rank {late[0]} has" if len(late) == 1 else f"ranks {', '.join(map(str, late))} have"
        return Failure(late[0], f"{names} not reached an exchange within {waited_s:.0f} s", was_late=True)


def _not_answering(rank: int, name: str, silence_s: float) -> Failure:
    return Failure(rank, f"{name} does not answer, last sign of life {silence_s:.0f} s ago")
