import importlib
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.factory import Factory, OnDemand, parameters_of
from ksuit_runner.data.container import DataContainer
from ksuit_runner.errors import ConfigError, KsuitError


class Base(CallbackBase):
    def __init__(self, path_provider, size: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.paths, self.size = path_provider, size


class Mine(Base):
    """Asks for a list, and through its bases for all that they ask for."""

    def __init__(self, rates, **kwargs):
        super().__init__(**kwargs)
        self.rates = rates


class Chosen(Mine):
    """Gives its base what that needs."""

    def __init__(self, **kwargs):
        super().__init__(rates=[7], **kwargs)


class Closed(CallbackBase):
    """Passes nothing on that it does not name itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class Picky(CallbackBase):
    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        raise ConfigError(f"size: {size} is too much")


class Sized(torch.nn.Linear):
    def __init__(self, input_shape, units):
        super().__init__(input_shape[0], units)


class Anything:
    def __init__(self, **kwargs):
        self.given = kwargs


def make_linear(optimizer=None):
    return torch.nn.Linear(1, 1)


class Quits(torch.nn.Linear):
    def __init__(self, inner=None):
        raise SystemExit(0)


HERE = __name__


@pytest.mark.parametrize("node", [{}, {"inner": {"_target_": f"{HERE}.Quits"}}])
def test_a_class_that_ends_the_process_is_an_error_at_its_config_path(node):
    path = "model.inner" if node else "model"
    with pytest.raises(ConfigError, match=rf"^{path}: it calls sys.exit\(0\) instead of being built"):
        factory(model={"_target_": f"{HERE}.Quits", **node}).build("model", torch.nn.Module)


def factory(**nodes):
    return Factory(OmegaConf.create(nodes))


def callbacks(cls, **arguments):
    return factory(callbacks={"mine": {"_target_": f"{HERE}.{cls}", **arguments}})


@pytest.fixture
def collaborators(maker):
    """What the runner hands to callbacks."""
    run = maker.run()
    return {
        "trainer": run.trainer,
        "model": run.trainer.model,
        "data_container": run.data,
        "tracker": {"is": "a dict, which Hydra would copy"},
        "log_writer": run.log_writer,
        "checkpoint_writer": run.checkpoint_writer,
        "metric_property_provider": ["a list, which Hydra would copy"],
        "path_provider": run.checkpoint_writer.path_provider,
        "update_counter": run.counter,
    }


# Injection


def test_collaborators_come_through_all_bases_and_keep_their_identity(collaborators):
    mine = callbacks("Mine", rates=[1, {"a": 2}], size=3).build_all("callbacks", CallbackBase, **collaborators)["mine"]
    assert (mine.name, mine.size, mine.rates) == ("mine", 3, [1, {"a": 2}])
    assert mine.paths is collaborators["path_provider"]
    assert mine.writer is collaborators["log_writer"]
    for name in ("trainer", "model", "data_container", "tracker", "checkpoint_writer", "metric_property_provider"):
        assert getattr(mine, name) is collaborators[name], name


def test_arguments_are_plain_containers(collaborators):
    mine = callbacks("Mine", rates=[1, {"a": 2}]).build_all("callbacks", CallbackBase, **collaborators)["mine"]
    assert type(mine.rates) is list and type(mine.rates[1]) is dict


def test_a_class_that_only_passes_on_asks_for_what_its_base_asks_for(collaborators):
    built = callbacks("Closed").build_all("callbacks", CallbackBase, **collaborators)
    assert built["mine"].trainer is collaborators["trainer"]


def test_objects_keep_the_order_of_the_config(collaborators):
    config = {key: {"_target_": f"{HERE}.Closed"} for key in ("z", "a", "m")}
    built = factory(callbacks=config).build_all("callbacks", CallbackBase, **collaborators)
    assert [(key, item.name) for key, item in built.items()] == [("z", "z"), ("a", "a"), ("m", "m")]


@pytest.mark.parametrize("config", [{}, {"callbacks": None}, {"callbacks": {}}])
def test_no_objects(config):
    assert factory(**config).build_all("callbacks", CallbackBase) == {}


def test_only_what_is_asked_for_is_worked_out():
    def never():
        raise AssertionError

    model = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    assert factory(model=model).build("model", torch.nn.Module, input_shape=OnDemand(never)).in_features == 2
    model = {"_target_": f"{HERE}.Sized", "units": 3}
    assert factory(model=model).build("model", torch.nn.Module, input_shape=OnDemand(lambda: (5,))).in_features == 5


def test_nested_objects_are_built():
    digits = {"_target_": "ksuit_runner.data.digits.Digits", "split": "test"}
    data = {"_target_": "ksuit_runner.data.container.DataContainer", "datasets": {"train": digits}, "batch_size": 4}
    built = factory(data=data).build("data", DataContainer, seed=7)
    assert (len(built.datasets["train"]), built.seed) == (359, 7)


def test_delayed_objects_are_built_when_the_rest_is_there():
    config = {
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5},
        "schedule": {"_target_": "ksuit_runner.schedule.linear", "warmup": 2},
    }
    made = factory(**config)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = made.delayed("optimizer", torch.optim.Optimizer)([parameter])
    assert optimizer.param_groups[0]["params"][0] is parameter
    schedule = made.delayed("schedule", None)(optimizer, 10)
    assert schedule.get_last_lr() == [pytest.approx(0.5 / 3)]


def test_whether_a_config_path_describes_an_object():
    made = factory(schedule=None, data={"_target_": "x"})
    assert made.has("data") and not made.has("schedule") and not made.has("loss")


@pytest.mark.parametrize(
    ("target", "required", "optional"),
    [
        (PeriodicCallback, {"trainer", "model", "log_writer"}, {"every_n_epochs", "every_n_samples", "name"}),
        (DatasetCallback, {"dataset_key", "trainer"}, {"every_n_updates", "name"}),
        (Mine, {"rates", "path_provider", "tracker"}, {"size"}),
        (make_linear, set(), {"optimizer"}),
    ],
)
def test_parameters_through_the_bases(target, required, optional):
    found = {item.name: item.required for item in parameters_of(target)}
    assert {name for name, needed in found.items() if needed} >= required
    assert {name for name, needed in found.items() if not needed} >= optional
    assert "kwargs" not in found and "self" not in found


def test_a_subclass_may_give_its_base_what_that_needs(collaborators):
    ObjectChecker().walk("callbacks.mine", {"_target_": f"{HERE}.Chosen"})
    assert callbacks("Chosen").build_all("callbacks", CallbackBase, **collaborators)["mine"].rates == [7]


# Mistakes


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        ("Mine", {"rates": [], "sise": 1}, r"callbacks.mine.sise: there is no such argument. Did you mean 'size'\?"),
        ("Mine", {}, "callbacks.mine.rates: a value is needed"),
        ("Mine", {"rates": [], "trainer": 1}, "callbacks.mine.trainer: 'trainer' is provided by the runner"),
        ("Mine", {"rates": [], "path_provider": 1}, "callbacks.mine.path_provider: 'path_provider' is provided"),
        ("Mine", {"rates": [], "name": "other"}, "callbacks.mine.name: 'name' is provided by the runner"),
        ("Picky", {"size": 9}, "callbacks.mine: size: 9 is too much"),
        ("Anything", {}, "callbacks.mine._target_: Anything does not derive from CallbackBase"),
        ("make_linear", {}, "callbacks.mine._target_: .*make_linear' is a function"),
        ("Mien", {}, "callbacks.mine._target_: there is no 'Mien' in"),
    ],
)
def test_mistakes_name_their_config_path(collaborators, cls, arguments, message):
    with pytest.raises(ConfigError, match=message):
        callbacks(cls, **arguments).build_all("callbacks", CallbackBase, **collaborators)


@pytest.mark.parametrize("node", [{"_target": "x.Y"}, {}, "x.Y", None])
def test_a_target_is_needed(node):
    with pytest.raises(ConfigError, match=r"callbacks.mine: an object with a _target_ is needed"):
        factory(callbacks={"mine": node}).build("callbacks.mine", CallbackBase)


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "builtins.eval", "builtins.exec", "pickle.loads"])
@pytest.mark.parametrize("path", ["callbacks.mine", "schedule", "model"])
def test_a_config_cannot_call_bare_functions(tmp_path, target, path):
    proof = tmp_path / "called"
    node = {"_target_": target, "_args_": [f"touch {proof}"]}
    config = OmegaConf.create({})
    OmegaConf.update(config, path, node, force_add=True)
    with pytest.raises(KsuitError, match=f"^{path}"):
        Factory(config).build(path, torch.nn.Module)
    assert not proof.exists()


@pytest.mark.parametrize("target", ["os.system", "builtins.eval"])
def test_a_bare_function_is_not_called_inside_of_arguments_either(tmp_path, target, collaborators):
    proof = tmp_path / "called"
    inner = {"_target_": target, "_args_": [f"touch {proof}"]}
    with pytest.raises(KsuitError, match=r"callbacks.mine"):
        callbacks("Mine", rates=[inner]).build_all("callbacks", CallbackBase, **collaborators)
    assert not proof.exists()


def test_a_function_that_builds_the_wrong_kind_is_refused():
    with pytest.raises(ConfigError, match=r"schedule._target_: it builds a Linear instead of a LRScheduler"):
        config = {"schedule": {"_target_": f"{HERE}.make_linear"}}
        factory(**config).build("schedule", torch.optim.lr_scheduler.LRScheduler)


class Broken:
    def __init__(self, lines):
        self.table = self._read(lines)

    def _read(self, lines):
        raise KeyError("columns") if not lines else ValueError("\n".join(lines))

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(("lines", "message"), [([], "KeyError: 'columns'"), (["one", "two"], "ValueError: one\ntwo")])
def test_what_a_nested_constructor_raises_is_said_with_its_type_and_config_path(lines, message):
    datasets = {"train": {"_target_": f"{HERE}.Broken", "lines": lines}}
    data = {"_target_": "ksuit_runner.data.container.DataContainer", "datasets": datasets, "batch_size": 1}
    path = r"\(raised in .*test_factory.py, line \d+, in _read\)"
    with pytest.raises(ConfigError, match=rf"^data.datasets.train: {message}\n{path}$") as raised:
        factory(data=data).build("data", DataContainer, seed=7)
    assert isinstance(raised.value.__cause__, (KeyError, ValueError))


def test_what_a_library_raises_is_said_without_its_lines():
    inner = {"_target_": "torch.nn.Linear", "in_features": -1, "out_features": 1}
    with pytest.raises(ConfigError, match=r"^model._args_\[0\]: RuntimeError: .*negative") as raised:
        factory(model={"_target_": "torch.nn.Sequential", "_args_": [inner]}).build("model", torch.nn.Module)
    assert "raised in" not in str(raised.value)


def test_what_is_raised_while_a_file_is_imported_is_said_with_its_line(tmp_path, monkeypatch):
    for name, source in {"lacks": "import json\nimport not_there\n", "fails": "TABLE = {}['x']\n"}.items():
        (tmp_path / f"own_{name}.py").write_text(f"{source}\nclass Mine:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, raised, line in (
        ("lacks", "ModuleNotFoundError: No module named 'not_there'", 2),
        ("fails", "KeyError: 'x'", 1),
    ):
        message = (
            f"callbacks.mine: 'own_{name}.Mine' cannot be imported: {raised}\n(raised in own_{name}.py, line {line}, "
        )
        with pytest.raises(ConfigError, match=re.escape(message)):
            Factory({"callbacks": {"mine": {"_target_": f"own_{name}.Mine"}}}).build("callbacks.mine", CallbackBase)


class Fails(CallbackBase):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        assert self.name == "other"


def test_what_a_callback_raises_is_said_with_its_type_and_config_path(collaborators):
    with pytest.raises(
        ConfigError, match=r"^callbacks.mine: AssertionError(.|\n)*\n\(raised in .*, line \d+, in __init__\)$"
    ):
        callbacks("Fails").build_all("callbacks", CallbackBase, **collaborators)


def make_model(input_shape, width=3):
    return torch.nn.Linear(*input_shape, width)


def make_number(output_shape):
    return output_shape


def make_anything(width=3):
    return torch.nn.Linear(1, width)


def test_a_function_of_the_project_may_build_the_model():
    shapes = {"input_shape": (2,), "output_shape": (1,)}
    factory = Factory({"model": {"_target_": f"{__name__}.make_model", "width": 4}})
    assert factory.build("model", torch.nn.Module, **shapes).weight.shape == (4, 2)
    factory = Factory({"model": {"_target_": f"{__name__}.make_anything", "width": 4}})
    assert factory.build("model", torch.nn.Module, **shapes).weight.shape == (4, 1)
    factory = Factory({"model": {"_target_": f"{__name__}.make_number"}})
    with pytest.raises(ConfigError, match=r"model._target_: .*builds a tuple"):
        factory.build("model", torch.nn.Module, **shapes)


def make_table(rows=2):
    return torch.ones(rows, 3)


def make_data(size):
    return list(range(size))


class Rows(list):
    """A dataset of a class that has another constructor, as those of Hugging Face."""

    @classmethod
    def from_size(cls, size, shift=0):
        return cls(range(shift, size + shift))


TABLE = {"_target_": f"{HERE}.make_table", "rows": 5}


def test_constructors_of_packages_and_functions_of_the_project_also_in_arguments():
    node = {"_target_": "torch.nn.Embedding.from_pretrained", "embeddings": TABLE, "freeze": False}
    config = OmegaConf.create({"model": node})
    ObjectChecker().walk("model", node)
    assert Factory(config).build("model", torch.nn.Module).weight.shape == (5, 3)
    datasets = {
        "train": {"_target_": f"{HERE}.make_data", "size": 6},
        "test": {"_target_": f"{HERE}.Rows.from_size", "size": 2, "shift": 1},
    }
    order = {"_target_": "ksuit_runner.data.order.Weighted", "weights": [0, 0, 1, 0, 0, 0]}
    collate = {"train": {"_target_": f"{HERE}.make_number", "_partial_": True}}
    container = "ksuit_runner.data.container.DataContainer"
    data = {"_target_": container, "datasets": datasets, "batch_size": 3, "order": order, "collate_fn": collate}
    ObjectChecker().walk("data", data)
    built = factory(data=data).build("data", DataContainer, seed=7)
    assert (len(built.datasets["train"]), list(built.datasets["test"])) == (6, [1, 2])
    built.open(built.new_counter(max_updates=1))
    assert built.next_training_batch()[0].batch == [2, 2, 2]
    shipped = ((f"ksuit_runner.data.order.{name}", {}) for name in ("Shuffled", "Sequential", "ClassBalanced"))
    for target, arguments in (*shipped, ("ksuit_runner.data.order.Repeated", {"times": 2})):
        data["datasets"] = {"train": {"_target_": "ksuit_runner.data.digits.Digits", "split": "test"}}
        data["order"] = {"_target_": target, **arguments}
        ObjectChecker().walk("data", data)
        assert factory(data=data).build("data", DataContainer, seed=7).new_counter(max_epochs=1).end_update > 100


@pytest.mark.parametrize(
    ("path", "node", "message"),
    [
        (
            "model",
            {"_target_": "torch.nn.functional.relu"},
            "of those, only constructors such as Class.from_pretrained",
        ),
        ("model", {"_target_": "torch.nn.Linear.forward"}, "torch.nn.Linear.forward' is a function"),
        ("loss", TABLE, "is a function; only a class is accepted here"),
        ("loss", {"_target_": "torch.nn.Sequential", "_args_": [TABLE]}, "is a function; only a class is accepted"),
    ],
)
def test_other_functions_are_refused(path, node, message):
    for check in (lambda: ObjectChecker().walk(path, node), lambda: Factory({path: node}).build(path, torch.nn.Module)):
        with pytest.raises(ConfigError, match=rf"^{path}.*{message}"):
            check()


def test_a_data_function_that_builds_no_dataset_is_an_error():
    datasets = {"train": {"_target_": f"{HERE}.make_model", "input_shape": [2]}}
    data = {"_target_": "ksuit_runner.data.container.DataContainer", "datasets": datasets, "batch_size": 3}
    with pytest.raises(ConfigError, match="data.datasets.train: Linear is not a dataset: it needs"):
        factory(data=data).build("data", DataContainer, seed=7)


def test_a_module_that_is_loaded_again_as_in_a_notebook_is_not_taken_as_it_was(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def built(version):
        (tmp_path / "edited.py").write_text(f"class Edited:\n    version = {version}\n")
        known = sys.modules.get("edited")
        module = importlib.reload(known) if known else importlib.import_module("edited")
        found = Factory({"thing": {"_target_": "edited.Edited"}}).build("thing", object)
        assert type(found) is module.Edited
        return found.version

    assert (built(1), built(1_000)) == (1, 1_000)
    del sys.modules["edited"]
