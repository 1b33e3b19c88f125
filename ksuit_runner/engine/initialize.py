"""Gives the model of a new run the weights of a stored one, or of a file."""

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ksuit_runner.checkpoint.base_weights import with_base
from ksuit_runner.checkpoint.format import Checkpoint, read_newest, read_weights
from ksuit_runner.config.check.initialization import NODE, Initialization, initialization_of
from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.distributed.pieces import StoredTensor, local, whole
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import CheckpointError, ConfigError, did_you_mean
from ksuit_runner.models.base import ModelBase
from ksuit_runner.record.stored_run import read_config
from ksuit_runner.resume.starting_point import StartingPoint, check_checksum, find_starting_point

_LISTED = 4


@dataclass(frozen=True)
class Fit:
    """Which weights of a source fit a model.

    Attributes:
        given: Values by their names in the model.
        kept: Names in the model that keep the values that it was made with.
        unused: Names in the source that are not taken.
    """

    given: Mapping[str, Any]
    kept: Collection[str]
    unused: Collection[str]

    def report(self, source: str) -> str:
        """Return a line that says what was taken."""
        kept = f"; as the model makes them: {_listed(self.kept)}" if self.kept else ""
        unused = f"; not used: {_listed(self.unused)}" if self.unused else ""
        return f"{NODE}: {len(self.given)} of {len(self.given) + len(self.kept)} weights from {source}{kept}{unused}"


@dataclass(frozen=True)
class Beginning:
    """What the first weights of a run were taken from.

    Attributes:
        source: Id of a run, with the checkpoint and the weights, or path of a file.
        run_id: Id of the run.
        report: A line that says what was taken.
    """

    source: str
    run_id: str | None
    report: str


def initialize(model: ModelBase, config: Mapping[str, Any], world: World | None = None) -> Beginning | None:
    """Load the weights that a new run begins with, if its config names any.

    Args:
        model: The model.
        config: The config of the run.
        world: The ranks of the run, which all call this; by default there is one.

    Raises:
        KsuitError: They are gone, not those that are meant, or do not fit the model.
    """
    settings = initialization_of(config)
    if settings is None:
        return None
    found = find_starting_point(config, settings)
    check_checksum(settings, found)
    fit = fit_weights(_read(found, settings, config, model, world or World()), model, settings)
    try:
        model.load({**model.tensors(), **fit.given})
    except RuntimeError as error:
        raise ConfigError(f"the weights cannot be loaded: {str(error).splitlines()[-1].strip()}", path=NODE) from error
    run_id = found.checkpoint.run_id if found.checkpoint is not None else None
    return Beginning(found.text, run_id, fit.report(found.text))


def fit_weights(values: Mapping[str, Any], model: ModelBase, settings: Initialization) -> Fit:
    """Match the weights of a source with those of a model, by name.

    Args:
        values: The weights of the source by name.
        model: The model.
        settings: How the names are matched.

    Raises:
        ConfigError: A pattern matches nothing, a shape differs, nothing fits, or something does not and has to.
    """
    own = model.tensors()
    _check_patterns(settings, values, own)
    renamed = {name: settings.renamed(name) for name in values}
    dropped = {name for name, new in renamed.items() if settings.drops(name) or settings.drops(new)}
    sources: dict[str, str] = {}
    for name, new in renamed.items():
        if name in dropped:
            continue
        if new in sources:
            raise ConfigError(f"'{sources[new]}' and '{name}' both become '{new}'", path=f"{NODE}.rename")
        sources[new] = name
    free = {name for name in own if settings.drops(name)} | {renamed[name] for name in dropped}
    given = {new: values[name] for new, name in sources.items() if new in own and new not in free}
    _check_shapes(given, own)
    shared = {_memory(own[name]) for name in given} - {None}
    missing = [name for name in own if name not in given and _memory(own[name]) not in shared]
    unused = [name for new, name in sources.items() if new not in given]
    lacking = [name for name in missing if name not in free]
    if not given:
        raise ConfigError(f"no weight fits. {_hint(list(sources), lacking)}", path=NODE)
    if settings.strict and (lacking or unused):
        problems = [f"the model has no {_listed(unused)}"] if unused else []
        problems += [f"the source has no {_listed(lacking)}"] if lacking else []
        raise ConfigError(f"the weights do not fit: {'; '.join(problems)}. {_hint(unused, lacking)}", path=NODE)
    return Fit(given, missing, [*dropped, *unused])


def _check_patterns(settings: Initialization, values: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for pattern in settings.drop:
        if not any(Initialization("", (pattern,)).drops(name) for name in (*values, *own)):
            near = did_you_mean(pattern.strip("*."), _parts((*values, *own)), longest=12)
            raise ConfigError(f"'{pattern}' matches no name. {near}".rstrip(), path=f"{NODE}.drop")
    for pattern, new in settings.rename.items():
        rule = Initialization("", rename={pattern: new})
        if not any(rule.renamed(name) != name for name in values):
            near = did_you_mean(pattern.strip("*."), _parts(values), longest=12)
            raise ConfigError(f"'{pattern}' matches no name. {near}".rstrip(), path=f"{NODE}.rename")


def _parts(names: Collection[str]) -> set[str]:
    return {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}


def _check_shapes(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(own[name], Tensor) and not is_lazy(own[name]):  # a lazy layer takes the shape
            here = tuple(own[name].shape)
            is_tensor = isinstance(value, Tensor | StoredTensor)
            there = tuple(value.shape) if is_tensor else type(value).__name__
            if here != there:
                raise ConfigError(
                    f"'{name}' has shape {here} in the model, and {there} in the source. "
                    f"To leave it as the model makes it: '{NODE}.drop=[{name}]'",
                    path=NODE,
                )
            if value.dtype.is_complex and not own[name].dtype.is_complex:
                raise ConfigError(f"'{name}' is real in the model, and complex in the source", path=NODE)


def _memory(value: Any) -> Any:
    """Return what two names of one tensor, as of tied weights, have in common; None for what has no memory."""
    is_held = isinstance(value, Tensor) and not is_lazy(value) and value.layout is torch.strided and value.numel() > 0
    if not is_held:
        return None
    held = local(value)  # which may be empty where the whole is not
    return held.untyped_storage().data_ptr(), held.storage_offset(), value.shape, value.stride()


def _hint(unused: Collection[str], lacking: Collection[str]) -> str:
    """Suggest what to write: a prefix that one side has and the other has not, or what leaves the rest as it is."""
    for pattern, longer, shorter in (("{}*: '*'", unused, lacking), ("'*': {}*", lacking, unused)):
        ends = sorted(shorter, key=len, reverse=True)
        for name in longer:
            end = next((end for end in ends if name.endswith(f".{end}")), None)
            if end is not None and name.removesuffix(end) + ends[-1] in longer:
                return f"Perhaps {NODE}.rename has to have {pattern.format(name.removesuffix(end))}"
    return f"What is meant to differ goes to {NODE}.drop or {NODE}.rename; {NODE}.strict=false takes what fits"


def _listed(names: Collection[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


# Reading


def _read(
    found: StartingPoint, settings: Initialization, config: Mapping[str, Any], model: ModelBase, world: World
) -> dict[str, Any]:
    if found.checkpoint is None:
        return read_file(found.file, settings.key)
    checkpoint = read_newest(found.checkpoint, found.checkpoint.checkpoint_dir.name, world, holds=True)
    values = read_weights(found.file.parent, found.file.stem)
    return {**base_of(checkpoint, config, model, world), **checkpoint.model, **values}  # what has no average is its own


def base_of(
    checkpoint: Checkpoint, config: Mapping[str, Any], model: ModelBase, world: World | None = None
) -> dict[str, Any]:
    """Return the weights that a checkpoint refers to: from where its run has them, or as the new model has them.

    Args:
        checkpoint: The checkpoint.
        config: The config of the new run.
        model: Its model.
        world: Its ranks, which all call this; by default there is one.
    """
    world = world or World()
    if not checkpoint.base:
        return {}
    begun = model.tensors()
    stored = {**resolve(read_config(checkpoint.paths)), "output_dir": config["output_dir"]}
    if (settings := initialization_of(stored)) is not None:
        source = find_starting_point(stored, settings)
        check_checksum(settings, source)
        values = _read(source, settings, stored, model, world)
        renamed = {name: settings.renamed(name) for name in values}
        taken = [name for name, new in renamed.items() if not settings.drops(name) and not settings.drops(new)]
        begun |= {renamed[name]: values[name] for name in taken}
    try:
        return with_base({}, checkpoint.base, {name: whole(begun.get(name)) for name in checkpoint.base}, world)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.paths.checkpoint_dir}: {error}", path=f"{NODE}.from") from None


def read_file(file: Path, key: str | None = None) -> dict[str, Any]:
    """Read the weights in a file; nothing in it is executed.

    Args:
        file: A safetensors file, or a state dict that ``torch.save`` has written.
        key: Entry of the latter that holds the weights.

    Raises:
        ConfigError: It holds something else.
    """
    path = f"{NODE}.from"
    try:
        if file.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(file))
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        problem = "is no state dict that can be read without executing code in it; store one with safetensors"
        raise ConfigError(f"{file} {problem}", path=path) from None
    except Exception as error:  # the libraries raise a dozen types of errors
        raise ConfigError(
            f"{file} cannot be read: {(str(error) or repr(error)).splitlines()[0][:200]}", path=path
        ) from None
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            entries = content if isinstance(content, Mapping) else ()
            raise ConfigError(f"there is no entry '{key}'. {did_you_mean(key, entries)}", path=f"{NODE}.key")
        content = content[key]
    elif not _holds_weights(content) and isinstance(content, Mapping):
        candidates = [name for name, value in content.items() if _holds_weights(value)]
        if len(candidates) > 1:
            raise ConfigError(f"several entries hold weights: {', '.join(map(str, candidates))}", path=f"{NODE}.key")
        content = content[candidates[0]] if candidates else content
    if not _holds_weights(content):
        raise ConfigError(f"{file} holds no weights by name", path=path)
    return dict(content)


def _holds_weights(content: Any) -> bool:
    is_named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    return is_named and any(isinstance(value, Tensor) for value in content.values())
