"""Checkpoints that are written and committed without a run."""

from ksuit_runner.checkpoint.commit import Committer, hand_over
from ksuit_runner.checkpoint.format import write_partial


def store_checkpoint(paths, name, content, config_hash="hash", keep_last=99, tags=()):
    """Write and commit the content of a checkpoint, as ``pack_state`` returns it."""
    hand_over_checkpoint(paths, name, content, config_hash, keep_last, tags)
    Committer(paths).commit(name)
    return paths.checkpoints_dir / name


def hand_over_checkpoint(paths, name, content, config_hash="hash", keep_last=99, tags=(), is_packed=False):
    """Write the content of a checkpoint, and hand it over to be committed."""
    write_partial(paths.checkpoints_dir / name, content, config_hash, keep_last, tags, is_packed)
    hand_over(paths, name)
