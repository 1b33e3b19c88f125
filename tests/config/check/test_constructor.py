"""A constructor that does not call that of its base class with what it needs is found in its source."""

import ast
from pathlib import Path

import pytest

from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.check.references import check_intervals
from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.check.whole_config import check_config, resolve
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.errors import ConfigError

SOURCE = '''
from ksuit_runner import CallbackBase, PeriodicCallback

class NoCall(CallbackBase):
    def __init__(self, rate=0.1, **kwargs):
        self.rate = rate

class Below(NoCall):
    """Has the constructor of its base."""

class NotPassed(PeriodicCallback):
    def __init__(self, rate=0.1, **kwargs):
        super().__init__(every_n_epochs=1)

class NotTaken(CallbackBase):
    def __init__(self, rate=0.1):
        super().__init__()

class Half(CallbackBase):
    def __init__(self, trainer, model, data_container, tracker, log_writer):
        super().__init__(trainer, model, data_container, tracker, log_writer=log_writer)

class Good(CallbackBase):
    def __init__(self, rate=0.1, **kwargs):
        super().__init__(**kwargs)

class Positional(CallbackBase):
    def __init__(self, *collaborators, **named):
        CallbackBase.__init__(self, *collaborators, **named)

class Whole(CallbackBase):
    def __init__(self, trainer, model, data_container, tracker, log_writer, checkpoint_writer, properties):
        CallbackBase.__init__(self, trainer, model, data_container, tracker, log_writer, checkpoint_writer, properties)

class Old(CallbackBase):
    def __init__(self, **kwargs):
        construct = super(Old, self).__init__
        construct(**kwargs)

class Plain:
    def __init__(self, rate):
        self.rate = rate
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_constructor_that_leaves_out_its_base_is_found(project):
    flaws = {name: SignatureReader().read(f"own_callbacks.{name}").flaw for name in ("NoCall", "Below")}
    assert all(
        f"NoCall.__init__ ({project.name}/own_callbacks.py, line 5) does not call super().__init__(**kwargs)" in flaw
        for flaw in flaws.values()
    )
    for name, lost in {
        "NotPassed": "trainer, model, data_container, tracker, log_writer, checkpoint_writer, metric_property_provider",
        "NotTaken": "trainer, model, data_container, tracker, log_writer, checkpoint_writer, metric_property_provider",
        "Half": "checkpoint_writer, metric_property_provider",
    }.items():
        assert f"does not pass {lost} on: take **kwargs" in SignatureReader().read(f"own_callbacks.{name}").flaw


@pytest.mark.parametrize("name", ["Good", "Positional", "Whole", "Old", "Plain"])
def test_one_that_calls_its_base_is_not(project, name):
    assert SignatureReader().read(f"own_callbacks.{name}").flaw == ""


def test_the_flaw_and_a_missing_name_are_said_before_anything_is_imported(project):
    with pytest.raises(ConfigError, match=r"^callbacks.mine._target_: NoCall.__init__ \(.*does not call super"):
        check_config(without_sweep(compose_config(["+callbacks.mine._target_=own_callbacks.NoCall"])))
    (project / "conf" / "callbacks").mkdir(parents=True)
    (project / "conf" / "callbacks" / "mine.yaml").write_text("_target_: own_callbacks.Good\nrate: 0.2\n")
    with pytest.raises(ConfigError, match=r"^callbacks._target_: .*conf/callbacks/mine.yaml needs the line `mine:`"):
        check_config(without_sweep(compose_config(["callbacks=[mine]"])))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.order=sequential"], "'data.order={_target_: ksuit_runner.data.order.Sequential}'"),
        (
            ["data.order=random"],
            "where NAME is one of Shuffled, Sequential, Repeated, Weighted, ClassBalanced, Mixture",
        ),
        (["+callbacks.loss.max_batches=0"], "expects a whole number of at least 1, or null, got 0"),
    ],
)
def test_a_value_that_no_object_takes_is_refused_before_a_run_begins(overrides, message):
    with pytest.raises(ConfigError) as raised:
        check_config(without_sweep(compose_config(overrides)))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("second", "meets"),
    [
        ("{_target_: own_callbacks.Norm, every_n_epochs: 4}", True),  # within the 20 epochs of the run
        ("{_target_: own_callbacks.Norm, every_n_epochs: 13}", False),
        ("{_target_: own_callbacks.Norm, every_n_updates: 5}", False),  # which depends on the length of an epoch
        ("{_target_: own_callbacks.Norm, every_n_updates: 5, at_end: true}", True),
        ("{_target_: own_callbacks.Other, every_n_epochs: 3}", False),
        ("{_target_: own_callbacks.Same, every_n_epochs: 3}", True),  # the key of another class
    ],
)
def test_two_callbacks_that_log_one_key_at_one_update_are_found(project, second, meets):
    with (project / "own_callbacks.py").open("a") as file:
        file.write(
            "class Norm(PeriodicCallback):\n    logs = ('norm',)\n    is_repeatable = False\n"
            "class Other(Norm):\n    logs = ('other',)\n"
            "class Same(PeriodicCallback):\n    logs = ('norm',)\n"
        )
    first = "+callbacks.first={_target_: own_callbacks.Norm, every_n_epochs: 3, at_end: true}"
    config = without_sweep(compose_config([first, f"+callbacks.second={second}", "trainer.max_epochs=20"]))
    if not meets:
        check_config(config)
        return
    with pytest.raises(ConfigError, match="^callbacks.first: it logs 'norm' at updates at which callbacks.second does"):
        check_config(config)


AT_LEAST_1 = frozenset(
    [
        "accumulation_steps",
        "batch_size",
        "count",
        "draws",
        "epoch",
        "every_n_epochs",
        "every_n_updates",
        "first_update",
        "fit_batches",
        "k",
        "keep_every",
        "keep_last",
        "max_batches",
        "max_iterations",
        "min_trials",
        "patience",
        "reference_batch_size",
        "rows",
        "sample",
        "top_k",
        "update",
        "updates",
        "warmup",
        "window",
    ]
)
"""Keys of conf/ that are no number, or one of at least 1, in every choice that has them."""


OTHER_RANGES = {
    "clip_norm": (0, -1.0),
    "clip_value": (0, -1.0),
    "close_timeout_s": (-1,),
    "decay": (0, 1, 1.5),
    "decays": ([0.9, 1.5], [0]),
    "dropout": (-0.1, 1.0),
    "end_factor": (-0.5,),
    "end_value": (-0.5,),
    "every_n_seconds": (0,),
    "factor": (0.5, 1),
    "flops_per_sample": (0,),
    "inverse_regularization": (0,),
    "min_delta": (-0.1,),
    "min_epochs": (-1,),
    "peak_tflops": (0,),
    "peer_timeout_s": (0, -1),
    "room_timeout_s": (-1,),
    "smoothing": (-0.1, 1),
    "temperature": (0, -1),
    "test_fraction": (0, 1, 1.5),
    "threshold": (0, -1),
    "timeout_s": (0, -1),
    "validation_fraction": (-0.1, 1),
}
"""Keys of conf/ with another range -> values that are out of it, in every choice that has them."""


def test_numbers_that_are_out_of_range_are_refused_in_every_choice_that_ships():
    beside = (
        "+data.datasets.train.test_fraction=0.2",
        "+checkpoint.room_timeout_s=30",
        "+checkpoint.peer_timeout_s=600",
    )
    trackers = "tracker=[mlflow,tensorboard,wandb]"
    composed = compose_config(["debug=all_callbacks", "schedule=cosine", trackers, *beside])
    values, reader, accepted, refused = resolve(composed), SignatureReader(), [], set()
    nodes = {key: values[key] for key in ("trainer", "checkpoint", "schedule", "model", "tracker")}
    nodes |= {f"tracker.{name}": values["tracker"][name] for name in ("tensorboard", "wandb")}
    nodes |= {f"data.datasets.{name}": node for name, node in values["data"]["datasets"].items()}
    for group in ("callbacks", "default_callbacks"):
        nodes |= {f"{group}.{name}": node for name, node in values[group].items()}
    wrong = [(key, number) for key in AT_LEAST_1 for number in (0, -1)]
    wrong += [(key, number) for key, numbers in OTHER_RANGES.items() for number in numbers]
    for path, node in nodes.items():
        for key, number in wrong:
            if key not in node or (path, key) == ("schedule", "warmup"):  # which may be 0
                continue
            checker = ObjectChecker(reader)
            try:
                checker.walk(path, {**node, key: number})
                for item in checker.objects:
                    check_intervals(item)
                accepted.append(f"{path}.{key}={number}")
            except ConfigError as error:
                assert path in str(error) and key in str(error)
                refused.add(key)
    assert accepted == []
    assert refused == AT_LEAST_1 | OTHER_RANGES.keys()


def test_what_a_constructor_checks_is_checked_before_a_run_begins():
    """A constructor checks its numbers by the types of its annotations, which are what the check of a config sees."""
    root, checked, missed = Path(__file__).parents[3], 0, []
    for file in [*root.glob("callbacks/*.py"), *root.glob("ksuit_runner/**/*.py")]:
        for method in ast.walk(ast.parse(file.read_text())):
            if not isinstance(method, ast.FunctionDef) or method.name != "__init__":
                continue
            kinds = {item.arg: ast.unparse(item.annotation) for item in method.args.args if item.annotation}
            for call in ast.walk(method):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "check_numbers":
                    kind = ast.literal_eval(call.args[0])
                    names = kinds.keys() & {word.arg for word in call.keywords if isinstance(word.value, ast.Name)}
                    checked += len(names)
                    missed += [f"{file.name}: {name}" for name in names if kind not in kinds[name]]
    assert missed == [] and checked > 50
