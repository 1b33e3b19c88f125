"""The modes of a run."""

from enum import StrEnum


class Mode(StrEnum):
    """What a run does; as text, it is the key on the command line and the value in files and tags."""

    TRAIN = "train"  # from the beginning
    RESUME = "resume"  # continue a stored run
    FORK = "fork"  # a new run from a checkpoint of a stored one
    EVALUATE = "evaluate"  # only evaluate a checkpoint of a stored run


OF_STORED_RUNS = (Mode.RESUME, Mode.FORK, Mode.EVALUATE)
"""Those that a command asks for with a stored run."""
