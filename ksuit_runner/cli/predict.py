"""Writes what the model of a run predicts to a file: ``predict=RUN[@CHECKPOINT][/WEIGHTS]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ksuit_runner.config.check.whole_config import check_config, resolve
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import bare_name, root, value_of
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.record.mode import Mode
from ksuit_runner.reports.target_file import target_file
from ksuit_runner.resume.changes import compose_stored
from ksuit_runner.resume.request import find_stored
from ksuit_runner.system.atomic_files import write_bytes
from ksuit_runner.ui.terminal import make_console

if TYPE_CHECKING:
    from torch import Tensor

    from ksuit_runner.trainer.sgd import SgdTrainer

_KEYS = ("predict", "predict_on", "export_to")
_OTHER_DATA = ("data", "evaluation")
"""What may be other than in the run; the model and callbacks that a file of ``conf/data/`` brings are not meant."""
_UNUSED: Mapping[str, Any] = {
    "callbacks": {},
    "default_callbacks": {},
    "schedule": None,
    "weight_decay_schedule": None,
    "objective": None,
}
_TAKES = ("output_dir", "tracker", "trust", *_OTHER_DATA)


def predict(query: str, overrides: Sequence[str]) -> int:
    """Write outputs and targets, in the order of the dataset, to ``export_to``; nothing of the run changes.

    The file is numpy's: ``numpy.load(file)["outputs"]``, of shape (samples, ...), and ``["targets"]``. Where the model
    returns several tensors by name, or the batch has several targets, there are ``outputs/NAME`` and ``targets/NAME``;
    a dataset without labels has no targets. The weights are those that evaluations have seen, see ``load_model``.

    Args:
        query: The run, or one of its checkpoints, with or without the name of other weights.
        overrides: The command line: besides the run other data, ``predict_on`` (key of the dataset, by default that
            which the run is evaluated on), and ``export_to``, by default ``RUN_ID_DATASET.npz`` in the current folder.

    Returns:
        The exit status, 0: the file is on the disk.

    Raises:
        ResumeError: There is no such run, or several match.
        ConfigError: It has no such checkpoint, weights or dataset, the file exists, or something else is to be changed.
        CheckpointError: The checkpoint is damaged, or does not fit the model.
    """
    for item in overrides:
        if root(item) not in (*_KEYS, *_TAKES):
            raise ConfigError(f"{item}: with predict= only {', '.join((*_KEYS[1:], *_TAKES))} can be given")
    found = find_stored("predict", query, overrides)
    name, weights = found.checkpoint_and_weights()
    given = [item for item in overrides if bare_name(item) not in _KEYS]
    stored = compose_stored(Mode.EVALUATE, found.paths, given)
    own = compose_stored(Mode.EVALUATE, found.paths, [item for item in given if root(item) not in _OTHER_DATA])
    other = {key: value for key, value in resolve(stored.config).items() if key in _OTHER_DATA}
    config = check_config(
        OmegaConf.create({**resolve(own.config), **other, **_UNUSED}), trust=stored.trust, is_stored=True
    )
    dataset = value_of("predict_on", overrides) or str(config["evaluation"]["dataset"])
    if dataset not in (there := config["data"]["datasets"]):
        raise ConfigError(f"there is no dataset '{dataset}'. {did_you_mean(dataset, there)}", path="predict_on")
    target = target_file(value_of("export_to", overrides), f"{found.run_id}_{dataset}.npz", ".npz")

    from ksuit_runner.checkpoint.format import read_newest
    from ksuit_runner.engine.stored_model import stored_trainer

    checkpoint = read_newest(found.paths, name, holds=True)
    config = _only(dataset, config)
    columns = _columns(stored_trainer(Factory(config, stored.trust), config, checkpoint, weights), dataset)
    count = len(next(iter(columns.values())))
    _write(target, columns)
    make_console().print(f"{count} samples of {dataset}: {target}", soft_wrap=True, markup=False)
    return 0


def _only(dataset: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose only dataset is the one that is predicted: the others may be large, or not be there.

    A data container or a trainer of the user's own may need all of them.
    """
    data = config["data"]
    if not all(config[path]["_target_"].startswith("ksuit_runner.") for path in ("data", "trainer")):
        return dict(config)
    narrowed = {
        **data,
        "datasets": {dataset: data["datasets"][dataset]},
        "train": dataset,
        "eval_batch_size": data.get("eval_batch_size") or data["batch_size"],
        "drop_last": False,  # it may have fewer samples than a batch
        "order": None,
        "samples_per_epoch": None,
    }
    collate = data.get("collate_fn")
    if isinstance(collate, Mapping) and "_target_" not in collate:
        narrowed["collate_fn"] = {key: node for key, node in collate.items() if key == dataset}
    return {**config, "data": narrowed}


def _columns(trainer: SgdTrainer, dataset: str) -> dict[str, Tensor]:
    """Return what is in the file, by name."""
    import torch

    from ksuit_runner.engine.stored_model import inputs_and_targets

    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in trainer.data_container.evaluation_batches(dataset):
            inputs, targets = inputs_and_targets(trainer, trainer.to_device(batch))
            found = {"outputs": _outputs(trainer, inputs)} | ({} if targets is None else {"targets": targets})
            for name, values in found.items():
                for key, value in _tensors(name, values).items():
                    parts.setdefault(key, []).append(value.cpu())
    return {key: torch.cat(values) for key, values in parts.items()}


def _outputs(trainer: SgdTrainer, inputs: Any) -> Any:
    from ksuit_runner.trainer.tensor_note import as_text

    try:
        return trainer.predict(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the model of the run cannot take {as_text(inputs)}: {reason}", path="data") from error


def _tensors(name: str, values: Any) -> dict[str, Tensor]:
    from torch import Tensor

    if isinstance(values, Tensor):
        return {name: values}
    if isinstance(values, Mapping) and all(isinstance(value, Tensor) for value in values.values()):
        return {f"{name}/{key}": value for key, value in values.items()}
    raise ConfigError(f"the {name} are {type(values).__name__}; tensors, or tensors by name, can be written")


def _write(target: Path, columns: Mapping[str, Tensor]) -> None:
    import numpy as np
    import torch

    content = BytesIO()
    arrays = {
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for key, value in columns.items()
    }
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_bytes(target, content.getvalue())
