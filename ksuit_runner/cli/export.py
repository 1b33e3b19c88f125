"""Writes the model of a run for those who use it elsewhere: ``export=RUN[@CHECKPOINT][/WEIGHTS]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from ksuit_runner.config.check.whole_config import check_config, resolve
from ksuit_runner.config.compose import compose_locations
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import allow_only, bare_name, value_of
from ksuit_runner.config.stored_config import format_config
from ksuit_runner.errors import ConfigError, did_you_mean, files_explained
from ksuit_runner.record.mode import Mode
from ksuit_runner.reports.target_file import target_file
from ksuit_runner.resume.changes import Composed, compose_stored
from ksuit_runner.resume.request import find_stored
from ksuit_runner.resume.starting_point import StartingPoint, weights_named
from ksuit_runner.security.masking import mask_config
from ksuit_runner.system.atomic_files import new_file, new_folder
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.ui.terminal import make_console

if TYPE_CHECKING:
    from torch import Tensor

    from ksuit_runner.distributed.pieces import StoredTensor

_KEYS = ("export", "export_to", "export_as")
_TAKES = ("output_dir", "tracker", "trust", "data")
_ENDINGS = {"safetensors": ".safetensors", "mlflow": "", "onnx": ".onnx", "torch_export": ".pt2"}
_PRIVATE = ("output_dir", "tracker", "parent_run_id")  # where the run is, which nobody needs who gets the file
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_SAMPLES = 2  # in a batch: with a single one, the dimension of the samples could not be told from others
_BATCHES = 8  # the first one is the example, and the others show which sizes vary, such as the length of texts


def export(query: str, overrides: Sequence[str]) -> int:
    """Write the model to ``export_to``, by default ``RUN_ID_CHECKPOINT_WEIGHTS`` in the current folder.

    ``export_as`` says how; by default the ending of ``export_to`` does, or else it is ``safetensors``:

    - ``safetensors``: the weights, for the module that the run has trained, with the config in the file's metadata.
      They have the names of the module's ``state_dict``. Those that several ranks hold pieces of are put together.
    - ``torch_export``: a program that ``torch.export.load`` loads without the module's code.
    - ``mlflow``: a folder with that program, which MLflow loads and serves.
    - ``onnx``: a file of ONNX; the extra ``onnx`` has what is needed.

    What is no file of weights is traced with the first samples of the dataset that the run is evaluated on, takes any
    number of samples, and is read back and compared with the module before it gets its name. The weights are those that
    evaluations have seen, see ``load_model``.

    Args:
        query: The run, or one of its checkpoints, with or without the name of other weights.
        overrides: The command line; besides the run it may say where it and its data are, how and where to write.

    Returns:
        The exit status, 0: the file is on the disk.

    Raises:
        ResumeError: There is no such run, or several match.
        ConfigError: It has no such checkpoint or weights, the file exists, or the model cannot be written so.
        CheckpointError: The checkpoint is damaged, or holds what no such file can.
    """
    allow_only(overrides, "export", *_KEYS[1:], *_TAKES)
    form = _form(value_of("export_as", overrides), value_of("export_to", overrides))
    found = weights_named(find_stored("export", query, overrides), "export")
    assert found.checkpoint is not None
    ending = _ENDINGS[form]
    target = target_file(
        value_of("export_to", overrides), found.text.replace("@", "_").replace("/", "_") + ending, ending
    )
    given = [item for item in overrides if bare_name(item) not in _KEYS]
    stored = compose_stored(Mode.EVALUATE, found.checkpoint, given)
    if form == "safetensors":
        what = _write_weights(target, found, stored, list(compose_locations(overrides).trust))
    else:
        what = _write_model(target, form, found, stored)
    make_console().print(f"{what} of {found.text}, {decimal(_size(target))}: {target}", soft_wrap=True)
    return 0


def _form(export_as: str | None, export_to: str | None) -> str:
    """Return what to write, and check that what is needed for it is installed."""
    endings = {ending: form for form, ending in _ENDINGS.items() if ending}
    form = export_as or endings.get(Path(export_to or "").suffix, "safetensors")
    if form not in _ENDINGS:
        raise ConfigError(f"there is no '{form}'. {did_you_mean(form, _ENDINGS)}", path="export_as")
    for package in _NEEDED if form == "onnx" else ():
        require_package(package, "export_as=onnx")
    return form


def _size(target: Path) -> int:
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


# The weights alone


def _write_weights(target: Path, found: StartingPoint, stored: Composed, trust: Sequence[str]) -> str:
    from ksuit_runner.checkpoint.tensor_file import write_tensors

    config = resolve(stored.config)
    tensors = _tensors(found, Factory(config, stored.trust), str(config["output_dir"]), trust)
    told = {key: value for key, value in config.items() if key not in _PRIVATE}
    with files_explained(target):
        write_tensors(target, tensors, {"model": found.text, "config": format_config(mask_config(told))})
    return f"{len(tensors)} tensors"


def _tensors(
    found: StartingPoint, factory: Factory, output_dir: str, trust: Sequence[str]
) -> Mapping[str, Tensor | StoredTensor]:
    from ksuit_runner.checkpoint.format import held_elsewhere, read_weights
    from ksuit_runner.engine.stored_model import TRAINED, evaluates_others
    from ksuit_runner.errors import CheckpointError

    folder = found.file.parent
    is_partial, others = held_elsewhere(folder)
    if others:
        problem = f"'{min(others)}' is not a dense tensor, and a safetensors file can hold nothing else"
        raise CheckpointError(f"{found.text}: {problem}; in Python, ksuit_runner.load_model returns the model")
    # What it refers to, and what evaluations see instead of the weights in the file, the model of the run knows.
    if is_partial or (found.file.stem == TRAINED and evaluates_others(factory)):
        from ksuit_runner.results import load_model

        module: Any = load_model(found.text, output_dir=output_dir, trust=trust)
        weights: dict[str, Tensor] = module.state_dict()
        return weights
    return {
        **read_weights(folder, TRAINED),
        **read_weights(folder, found.file.stem),
    }  # what has no average is the model's


# What runs without the code of the model


def _write_model(target: Path, form: str, found: StartingPoint, stored: Composed) -> str:
    from ksuit_runner.models import export_files
    from ksuit_runner.models.mlflow_model import PROGRAM, export_program, write_mlflow_model

    module, example, *others = _module_and_inputs(found, stored)
    program = export_program(module, example, others)
    check = partial(export_files.check_outputs, module=module, example=example, others=others)
    if form == "mlflow":
        assert found.checkpoint is not None
        with new_folder(target) as folder:
            write_mlflow_model(folder, program, example, found.checkpoint.run_id)
            check(export_files.read_program(folder / PROGRAM))
        return "model for MLflow"
    try:
        with new_file(target) as file:
            if form == "onnx":
                export_files.write_onnx(file, program, example)
                check(export_files.read_onnx(file))
            else:
                export_files.write_program(file, program)
                check(export_files.read_program(file))
    except FileExistsError as error:  # a file that ONNX puts its weights into
        raise ConfigError(
            f"{error.filename} exists, and is not overwritten. Remove it, or name another file", path="export_to"
        ) from error
    return "model of ONNX" if form == "onnx" else "program of torch.export"


def _module_and_inputs(found: StartingPoint, stored: Composed) -> list[Any]:
    """Return the module of a run, on the CPU, and inputs for it: the first batches that the run is evaluated on."""
    from ksuit_runner.checkpoint.format import read_newest
    from ksuit_runner.engine.stored_model import inputs_and_targets, stored_trainer
    from ksuit_runner.models.mlflow_model import plain_inputs

    assert found.checkpoint is not None
    config = check_config(stored.config, trust=stored.trust, is_stored=True)
    plain = {"device": "cpu", "compile": False, "activation_checkpointing": None}
    config["trainer"] |= {key: value for key, value in plain.items() if key in config["trainer"]}
    checkpoint = read_newest(found.checkpoint, found.checkpoint.checkpoint_dir.name, holds=True)
    trainer = stored_trainer(Factory(config, stored.trust), config, checkpoint, found.file.stem)
    batches = trainer.data_container.evaluation_batches(str(config["evaluation"]["dataset"]), _SAMPLES, _BATCHES)
    return [trainer.model.module, *(plain_inputs(inputs_and_targets(trainer, batch)[0]) for batch in batches)]
