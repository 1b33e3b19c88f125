"""Checkpoints that are written and committed without a run."""

from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.format import write_ready


def store_checkpoint(paths, name, files, document, config_hash="hash", keep_last=99, tags=()):
    """Write and commit the content of a checkpoint, as ``pack_state`` returns it."""
    write_ready(paths.checkpoints_dir / name, files, document, config_hash, keep_last, tags)
    Committer(paths).commit(name)
    return paths.checkpoints_dir / name
