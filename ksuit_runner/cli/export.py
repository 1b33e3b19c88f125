"""Writes the weights of a run to one file, which the plain module loads: ``export=RUN[@CHECKPOINT][/WEIGHTS]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ksuit_runner.config.compose import compose_config, with_trackers_beside
from ksuit_runner.config.overrides import allow_only
from ksuit_runner.reports.target_file import target_file
from ksuit_runner.resume.request import find_stored
from ksuit_runner.resume.starting_point import StartingPoint, weights_named
from ksuit_runner.ui.terminal import make_console

if TYPE_CHECKING:
    from torch import Tensor

    from ksuit_runner.distributed.pieces import StoredTensor

_TAKES = ("output_dir", "export_to", "tracker", "trust")
_SUFFIX = ".safetensors"


def export(query: str, overrides: Sequence[str]) -> int:
    """Write the weights to ``export_to``, by default ``RUN_ID_CHECKPOINT_WEIGHTS.safetensors`` in the current folder.

    They have the names that they have in the ``state_dict`` of the run's module. Weights that several ranks hold pieces
    of are put together, and one tensor after the other is read and written.

    Args:
        query: The run, or one of its checkpoints, with or without the name of other weights.
        overrides: The command line; besides the run it may say where it is, and where to write.

    Returns:
        The exit status, 0: the file is on the disk.

    Raises:
        ResumeError: There is no such run, or several match.
        ConfigError: It has no such checkpoint or weights, or the file exists.
        CheckpointError: The checkpoint is damaged, or holds what no such file can.
    """
    allow_only(overrides, "export", *_TAKES)
    composed = compose_config(with_trackers_beside(overrides))
    found = weights_named(find_stored("export", query, overrides), "export")
    target = target_file(composed.export_to, found.text.replace("@", "_").replace("/", "_") + _SUFFIX, _SUFFIX)

    from ksuit_runner.checkpoint.tensor_file import write_tensors

    tensors = _tensors(found, str(composed.output_dir), list(composed.trust))
    write_tensors(target, tensors)
    size = f"{target.stat().st_size / 1e6:,.1f} MB"
    make_console().print(f"{len(tensors)} tensors of {found.text}, {size}: {target}", soft_wrap=True)
    return 0


def _tensors(found: StartingPoint, output_dir: str, trust: Sequence[str]) -> Mapping[str, Tensor | StoredTensor]:
    from ksuit_runner.checkpoint.format import held_elsewhere, read_weights
    from ksuit_runner.errors import CheckpointError

    folder = found.file.parent
    is_partial, others = held_elsewhere(folder)
    if others:
        problem = f"'{min(others)}' is not a dense tensor, and a safetensors file can hold nothing else"
        raise CheckpointError(f"{found.text}: {problem}; in Python, ksuit_runner.load_model returns the model")
    if is_partial:  # it refers to what the run began with, which the model of the run knows
        from ksuit_runner.results import load_model

        module: Any = load_model(found.text, output_dir=output_dir, trust=trust)
        weights: dict[str, Tensor] = module.state_dict()
        return weights
    return {
        **read_weights(folder, "model"),
        **read_weights(folder, found.file.stem),
    }  # what has no average is the model's
