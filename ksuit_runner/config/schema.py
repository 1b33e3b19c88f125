"""The config paths that hold objects, what the runner injects at each, and the rule for argument names.

Both the check before a run and the factory that builds the objects use these rules.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ksuit_runner.errors import ConfigError, did_you_mean

UNKNOWN: Any = object()
"""Default of a parameter whose default is not a plain value."""

SPECIAL_KEYS = frozenset({"_target_", "_args_", "_partial_", "_recursive_", "_convert_"})
"""Keys of an object's node that are not arguments."""


@dataclass(frozen=True)
class TargetParameter:
    """A parameter that an object is built with.

    Attributes:
        name: Its name.
        annotation: Source text of its annotation, or None if it has none.
        required: Whether it has no default.
        default: Its default if that is a plain value, else UNKNOWN.
    """

    name: str
    annotation: str | None = None
    required: bool = True
    default: Any = UNKNOWN


@dataclass(frozen=True)
class ObjectSpec:
    """What kind of object a config path holds.

    Attributes:
        kind: Dotted name of the class that it has to derive from, where that class is defined; None for any class.
        injects: Key of INJECTED.
        functions: Whether a function may stand for the class.
        asks: Whether such a function has to ask for something that the runner provides, as nothing else shows that it
            was made for this config path.
        delayed: Whether the object above gets a function that builds this one, and calls it with the collaborators.
        optional: Whether it may be null or missing.
        beside: Whether it stands, under a name of the user's choice, beside the arguments of the object above it, or
            without such an object. What has no ``_target_`` there is an argument.
        instead: Whether it may stand there only if there is no object above it.
        settings: Keys in its node that are read by the runner, and are no arguments: key -> what fits there.
    """

    kind: str | None
    injects: str = ""
    functions: bool = False
    asks: bool = False
    delayed: bool = False
    optional: bool = False
    beside: bool = False
    instead: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


_SCHEDULE = ObjectSpec(None, injects="schedule", functions=True, asks=True, optional=True, beside=True)
_LIMITS = dict.fromkeys(("clip_norm", "clip_value"), "PositiveFloat | None")
_SELECTORS = {
    "match": "Sequence[str] | None",
    **dict.fromkeys(("min_ndim", "max_ndim"), "NonNegativeInt | None"),
}
_OPTIMIZER = "torch.optim.optimizer.Optimizer"
_CALLBACK = ObjectSpec("ksuit_runner.callback_base.CallbackBase", injects="callbacks")

DATASETS = ObjectSpec(None, functions=True)
"""What holds datasets: what has ``__len__`` and ``__getitem__``."""

OBJECT_SPECS: Mapping[str, ObjectSpec] = {
    "data": ObjectSpec("ksuit_runner.data.container.DataContainer", injects="data"),
    "data.datasets.*": DATASETS,
    "data.order": ObjectSpec("ksuit_runner.data.order.Order", injects="order", delayed=True, optional=True),
    "model": ObjectSpec("torch.nn.modules.module.Module", injects="model", functions=True),
    "loss": ObjectSpec("torch.nn.modules.module.Module"),
    "optimizer": ObjectSpec(_OPTIMIZER, injects="optimizer"),
    "optimizer.*": ObjectSpec(
        _OPTIMIZER, injects="optimizer", beside=True, instead=True, settings=_SELECTORS | _LIMITS
    ),
    "optimizer.*.schedule": _SCHEDULE,
    "optimizer.*.weight_decay_schedule": _SCHEDULE,
    "schedule": replace(_SCHEDULE, beside=False),
    "weight_decay_schedule": replace(_SCHEDULE, beside=False),
    "strategy": ObjectSpec("ksuit_runner.distributed.strategy.Strategy", injects="strategy", optional=True),
    "trainer": ObjectSpec("ksuit_runner.trainer.sgd.SgdTrainer", injects="trainer"),
    "tracker": ObjectSpec("ksuit_runner.tracker.base.BaseTracker", injects="tracker"),
    "tracker.*": ObjectSpec("ksuit_runner.tracker.base.BaseTracker", injects="tracker", beside=True),
    "checkpoint": ObjectSpec("ksuit_runner.checkpoint.writer.CheckpointWriter", injects="checkpoint"),
    "metric_property_provider": ObjectSpec("ksuit_runner.metric_property.MetricPropertyProvider", optional=True),
    "launcher": ObjectSpec("ksuit_runner.launchers.base.Launcher", optional=True),
    "default_callbacks.*": _CALLBACK,
    "callbacks.*": _CALLBACK,
}
"""ObjectSpec of the config (``*`` stands for every key) -> what it holds."""

VALUES: dict[str, str] = {
    "name": "str | None",
    "seed": "int",
    "output_dir": "str",
    "objective": "str | None",
    "resume_strict": "bool",
    "parent_run_id": "str | None",
}
"""Key at the top of the config that holds a plain value -> what fits there."""

LATER_VALUES: dict[str, str] = {
    "register_anew": "bool",
    "ranks": "PositiveInt | Literal['auto']",
    "rank_timeout_s": "PositiveFloat",
    "max_restarts": "NonNegativeInt",
    "requeue": "bool",
    "notes": "str | None",
    "tags": "str | Sequence[str]",
}
"""The same for keys that may be missing, as in configs that earlier versions stored."""

LATER_DEFAULTS: Mapping[str, Any] = {
    "evaluation": {"dataset": "test"},
    "ranks": 1,
    "rank_timeout_s": 600,
    "max_restarts": 3,
    "requeue": True,
    "notes": None,
    "tags": [],
}
"""Key at the top of the config that earlier versions did not store -> what stands for it then."""

INJECTED: Mapping[str, frozenset[str]] = {
    "callbacks": frozenset(
        {
            "trainer",
            "model",
            "data_container",
            "tracker",
            "log_writer",
            "checkpoint_writer",
            "metric_property_provider",
            "path_provider",
            "update_counter",
            "phases",
            "siblings",
            "name",
        }
    ),
    "trainer": frozenset(
        {"model", "data_container", "optimizer", "schedule", "weight_decay_schedule", "loss", "seed", "strategy"}
    ),
    "strategy": frozenset({"world"}),
    "model": frozenset({"input_shape", "output_shape"}),
    "data": frozenset({"seed", "interruption", "world"}),
    "order": frozenset({"dataset", "seed", "samples_per_epoch"}),
    "tracker": frozenset({"output_paths"}),
    "checkpoint": frozenset({"path_provider", "config_hash", "check_owner", "is_urgent", "hand_over", "world"}),
    "optimizer": frozenset({"params"}),
    "schedule": frozenset({"optimizer", "total_updates", "updates_per_epoch"}),
    "": frozenset(),
}
"""Names of the arguments that the runner provides, for the config paths that ask for them."""


_FUNCTIONS_BELOW = ("model.", "data.datasets.", "data.collate_fn")
"""Begin of the config paths below which arguments may be made by functions, such as a tokenizer."""


def spec_at(path: str) -> ObjectSpec | None:
    """Return what a config path holds, or None if it holds no object of OBJECT_SPECS."""
    above, _, last = path.rpartition(".")
    return OBJECT_SPECS.get(path) or OBJECT_SPECS.get(f"{above}.*") or OBJECT_SPECS.get(f"{_star(above)}.{last}")


def _star(path: str) -> str:
    return f"{path.rpartition('.')[0]}.*"


def takes_functions(path: str) -> bool:
    """Whether a function may stand for a class at a config path."""
    spec = spec_at(path)
    return spec.functions if spec else path.startswith(_FUNCTIONS_BELOW)


def objects_beside(path: str, node: Any) -> list[str]:
    """Return the names, in the node of an object, of the objects that stand beside its arguments."""
    found = []
    for key, value in node.items() if isinstance(node, Mapping) else ():
        spec = spec_at(f"{path}.{key}") if isinstance(value, Mapping) and "_target_" in value else None
        if spec and spec.beside and not (spec.instead and "_target_" in node):
            found.append(str(key))
    return found


def settings_in(path: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is in the node of an object for the runner, and is no argument of the object."""
    spec = spec_at(path)
    return {key: value for key, value in node.items() if key in spec.settings} if spec else {}


def bind(
    path: str,
    parameters: Sequence[TargetParameter],
    given: Collection[str],
    injected: Collection[str],
    any_name: bool = False,
) -> list[str]:
    """Check the names of an object's arguments and return those that the runner provides.

    Args:
        path: Config path of the object, for messages.
        parameters: What its constructor asks for.
        given: Names of the arguments in the config, without the SPECIAL_KEYS.
        injected: Names that the runner can provide at this config path.
        any_name: Whether the constructor also takes names that are not among the parameters.

    Raises:
        ConfigError: An argument is unknown, missing, or provided by the runner.
    """
    names = {parameter.name for parameter in parameters}
    for name in given:
        if name in injected:
            raise ConfigError(f"'{name}' is provided by the runner; remove it", path=f"{path}.{name}")
        if name not in names and not any_name:
            spec = spec_at(path)
            hint = did_you_mean(name, {*names, *(spec.settings if spec else ())} - set(injected), longest=40)
            raise ConfigError(f"there is no such argument. {hint}".rstrip(), path=f"{path}.{name}")
    for parameter in parameters:
        if parameter.required and parameter.name not in given and parameter.name not in injected:
            raise ConfigError("a value is needed", path=f"{path}.{parameter.name}")
    return [parameter.name for parameter in parameters if parameter.name in injected]


def check_injected(path: str, target: str, is_class: bool, wanted: Collection[str], spec: ObjectSpec) -> None:
    """Check that a function takes something that the runner provides, where it has to.

    Args:
        path: Config path of the object, for messages.
        target: Name of the function or class.
        is_class: Whether it is a class, which has a kind instead.
        wanted: What ``bind`` returned.
        spec: What the config path holds.

    Raises:
        ConfigError: It is a function that asks for nothing.
    """
    if spec.asks and not is_class and not wanted:
        names = ", ".join(sorted(INJECTED[spec.injects]))
        raise ConfigError(f"'{target}' cannot be used here: it takes none of {names}", path=f"{path}._target_")
