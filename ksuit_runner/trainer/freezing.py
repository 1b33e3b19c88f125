"""Frozen parameters: which are not trained, and from when to when; only the position of the run decides that."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.tensors.name_patterns import matching
from ksuit_runner.trainer.modes import Modes
from ksuit_runner.trainer.parameter_rules import hint, layer_numbers, named_parameters, select_parameters

_PATH = "trainer.freeze"
_UNITS = ("update", "epoch")
_KEYS = {
    *("match", "layers"),
    *(f"{end}_{unit}" for end in ("from", "until") for unit in _UNITS),
    *(f"every_n_{unit}s" for unit in _UNITS),
}
_Span = tuple[float, float]


class Freezing:
    """Freezes parameters by their names, for the whole run or for a part of it.

    A frozen parameter gets no gradient, so that the optimizer leaves it alone, weight decay and momentum included. A
    module that is frozen with everything in it computes in updates as it does in evaluation: the statistics of its
    normalization layers stay, and it drops nothing out. What the model itself has frozen stays frozen.

    Args:
        rules: Patterns of names, frozen for the whole run. Or rules by a name of your choice, each with ``match``
            (patterns of names) or ``layers`` (patterns with ``{}`` for the number of a layer, from the input on), and
            optionally ``from_update`` or ``from_epoch`` (completed ones, by default 0), and ``until_update`` or
            ``until_epoch`` (by default the run's end). With ``layers``, the last one thaws then, and each one before it
            ``every_n_updates`` or ``every_n_epochs`` later.
        model: The module that is trained.
        loss: The loss module, whose parameters' names begin with ``loss.``.
        counter: Position and end of the run.
        modes: Switches modules to evaluation mode.

    Raises:
        ConfigError: A rule matches nothing or makes no sense, or updates are left with nothing to train.
    """

    def __init__(
        self,
        rules: Sequence[str] | Mapping[str, Mapping[str, Any]],
        model: nn.Module,
        loss: nn.Module,
        counter: UpdateCounter,
        modes: Modes,
    ) -> None:
        self._roots, self._modes = (model, loss), modes
        named = named_parameters(model, loss)
        trained = {name: item for name, item in named.items() if item.requires_grad}
        self._spans: dict[str, list[_Span]] = {}
        for path, rule in _by_path(rules).items():
            for name, span in _spans(path, rule, named, counter).items():
                self._spans.setdefault(name, []).append(span)
        self._matched = {name: named[name] for name in self._spans}
        self._own = {name: trained[name] for name in self._spans if name in trained}
        moments = {moment for spans in self._spans.values() for span in spans for moment in span} | {0}
        self._bounds = sorted(moments - {_NEVER})
        self._now: _Span = (0, 0)
        for start in self._bounds:
            if start < counter.end_update and all(self._is_frozen(name, start) for name in trained):
                since = f"from update {int(start) + 1} on " if start else ""
                raise ConfigError(
                    f"{since}nothing is left to train. To evaluate only: trainer.max_epochs=0", path=_PATH
                )
        self.apply(counter.update)

    def apply(self, update: int) -> None:
        """Freeze and thaw for the update that follows a number of updates."""
        for name, parameter in self._own.items():
            parameter.requires_grad_(not self._is_frozen(name, update))

    def follow(self, update: int) -> None:
        """Do the same where something changes, and switch the modes of the modules; called before every update."""
        start, end = self._now
        if start <= update < end:
            return
        later = [bound for bound in self._bounds if bound > update]
        self._now = self._bounds[-len(later) - 1], later[0] if later else _NEVER
        self.apply(update)
        frozen = {id(item) for name, item in self._matched.items() if self._is_frozen(name, update)}
        self._modes.hold([module for root in self._roots for module in _wholly(root, frozen)])

    @property
    def thawing(self) -> list[nn.Parameter]:
        """The parameters that are trained at some time."""
        return [
            item for name, item in self._own.items() if not all(self._is_frozen(name, bound) for bound in self._bounds)
        ]

    def _is_frozen(self, name: str, update: float) -> bool:
        return any(start <= update < end for start, end in self._spans.get(name, ()))


_NEVER = float("inf")


def frozen_for_good(model: nn.Module, freezing: Freezing | None) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that are frozen now and will not thaw, by all of their names."""
    thawing = {id(item) for item in (freezing.thawing if freezing is not None else ())}
    named = model.named_parameters(remove_duplicate=False)
    return {name: item for name, item in named if not item.requires_grad and id(item) not in thawing}


def _wholly(module: nn.Module, frozen: Collection[int]) -> list[nn.Module]:
    """Return the highest modules that have parameters, all of which are frozen; whole numbers are never trained."""
    parameters = [item for item in module.parameters() if item.is_floating_point() or item.is_complex()]
    if parameters and all(id(item) in frozen for item in parameters):
        return [module]
    return [found for child in module.children() for found in _wholly(child, frozen)]


def _by_path(rules: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(rules, Mapping):
        return {_PATH: {"match": rules}} if rules else {}
    return {f"{_PATH}.{name}": rule for name, rule in rules.items()}


def _spans(
    path: str, rule: Mapping[str, Any], named: Mapping[str, nn.Parameter], counter: UpdateCounter
) -> dict[str, _Span]:
    """Return from how many completed updates until how many each parameter of a rule is frozen."""
    for key in rule.keys() - _KEYS:
        raise ConfigError(f"there is no such setting. {did_you_mean(key, _KEYS)}", path=f"{path}.{key}")
    if ("match" in rule) == ("layers" in rule):
        raise ConfigError("a list of patterns of names is needed: match, or layers", path=f"{path}.match")
    start = _updates(path, rule, "from_{}", counter) or 0
    end = _updates(path, rule, "until_{}", counter)
    step = _updates(path, rule, "every_n_{}s", counter)
    if (step is None) == ("layers" in rule) or (step is not None and end is None):
        raise ConfigError("layers, until_... and every_n_... are given together: the layers thaw one by one", path=path)
    numbers = _numbers(path, rule, named)
    last = max(numbers.values())
    spans: dict[str, _Span] = {
        name: (start, _NEVER if end is None else end + (step or 0) * (last - i)) for name, i in numbers.items()
    }
    if any(begin >= stop for begin, stop in spans.values()):
        raise ConfigError("it ends before it begins", path=path)
    return spans


def _numbers(path: str, rule: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return the parameters that a rule is about, each with the number of its layer from the input on, or 0."""
    if "match" in rule:
        patterns, numbers = rule["match"], dict.fromkeys(select_parameters(rule, named, path), 0)
    else:
        patterns = [rule["layers"]] if isinstance(rule["layers"], str) else rule["layers"]
        numbers = layer_numbers(path, patterns, named)
    for pattern in patterns:
        if not matching(pattern, named):
            raise ConfigError(f"'{pattern}' matches no parameter. {hint([pattern], named)}".rstrip(), path=path)
    if not numbers:
        raise ConfigError("it matches no parameter", path=path)
    return numbers


def _updates(path: str, rule: Mapping[str, Any], form: str, counter: UpdateCounter) -> int | None:
    """Return a moment or a distance, which is given in updates or epochs, in updates."""
    given = {unit: rule[form.format(unit)] for unit in _UNITS if rule.get(form.format(unit)) is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(map(form.format, given))} exclude each other", path=path)
    for unit, value in given.items():
        if unit == "epoch" and not counter.has_epochs:
            raise ConfigError(
                "the training data is a stream, which has no epochs. Count in updates",
                path=f"{path}.{form.format(unit)}",
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"a whole number is needed, not {value!r}", path=f"{path}.{form.format(unit)}")
        return value * (counter.updates_per_epoch if unit == "epoch" else 1)
    return None
