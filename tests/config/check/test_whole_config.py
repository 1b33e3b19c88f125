import subprocess
import sys
from textwrap import dedent

import pytest
import yaml
from omegaconf import OmegaConf

from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.check.whole_config import check_config, resolve
from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.groups import choices, shipped_conf
from ksuit_runner.errors import ConfigError

CONFIG = """
name: null
seed: 0
output_dir: outputs
objective: null
resume_strict: true
parent_run_id: null
data:
  _target_: ksuit_runner.data.container.DataContainer
  batch_size: 32
  datasets:
    train: {_target_: lab.parts.Points, size: 100}
    test: {_target_: lab.parts.Points, size: 10}
model: {_target_: lab.parts.Net, width: 8}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.AdamW, lr: 1.0e-3}
schedule: {_target_: ksuit_runner.schedule.cosine, warmup: 0.1}
trainer: {_target_: ksuit_runner.trainer.sgd.SgdTrainer, max_epochs: 3}
tracker: {_target_: ksuit_runner.tracker.noop.NoopTracker}
checkpoint: {_target_: ksuit_runner.checkpoint.writer.CheckpointWriter}
metric_property_provider: {_target_: ksuit_runner.metric_property.MetricPropertyProvider}
callbacks:
  score: {_target_: lab.callbacks.Score, dataset_key: test, every_n_epochs: 1}
  watch: {_target_: lab.callbacks.Watch, metric_key: score/test}
default_callbacks:
  rate: {_target_: lab.callbacks.Rate}
"""

PARTS = """
from torch import nn

class Points:
    def __init__(self, size: int, noise: float = 0.0): ...

class Net(nn.Module):
    def __init__(self, width: int, input_shape: tuple[int, ...], output_shape, head=None, layers: list | None = None):
        super().__init__()

class Head(nn.Module):
    def __init__(self, depth: int = 1, target: str = "x"): ...

def make(width): ...
"""

MEAN = "callbacks.ema={_target_: lab.callbacks.Mean}"
MEANS = "callbacks.ema={_target_: lab.callbacks.Mean, decays: [0.9, 0.99]}"
BEST = (
    "callbacks.score={_target_: lab.callbacks.Score, dataset_key: test, weights_of: best}",
    "callbacks.watch.metric_key=score/test/best",
    "callbacks.keep={_target_: lab.callbacks.Keeps}",
)

END = "callbacks.end={{_target_: lab.callbacks.Score, dataset_key: test, weights_of: {}}}"

CALLBACKS = """
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.config.types import DatasetKey, MetricKey

class HandsOn(CallbackBase):
    logs = ()

    def _after_epoch(self, update_counter):
        keep_good_ones(self.checkpoint_writer)

class PassesUp(CallbackBase):
    logs = ()

    def __init__(self, checkpoint_writer, **kwargs):
        super().__init__(checkpoint_writer=checkpoint_writer, **kwargs)

class Score(DatasetCallback):
    logs = ("score/{dataset_key}{/weights}", "score_top{topk}/{dataset_key}")
    def __init__(self, topk: Sequence[int] = (1, 5), smoothing: float = 0.0, **kwargs):
        super().__init__(**kwargs)

class Watch(CallbackBase):
    logs = ()
    def __init__(self, metric_key: MetricKey, others: Sequence[MetricKey] = (), on: DatasetKey = "test", **kwargs):
        super().__init__(**kwargs)

class Rate(PeriodicCallback):
    logs = ("rate/{name}",)
    def __init__(self, every_n_updates: int | None = 50, **kwargs):
        super().__init__(every_n_updates=every_n_updates, **kwargs)

class Mean(CallbackBase):
    logs = ()
    offers = ("{name}{_decays+}",)
    def __init__(self, decays: Sequence[float] = (0.9,), **kwargs):
        super().__init__(**kwargs)

class Keeps(CallbackBase):
    logs = ()
    tags = ("{tag}",)
    def __init__(self, tag: str = "best", **kwargs):
        super().__init__(**kwargs)

class Asks(CallbackBase):
    logs = ()
    def _after_update(self, update_counter):
        self.checkpoint_writer.request("any")

class Undeclared(CallbackBase):
    logs = ()
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trainer.add_evaluation_model("other", self.model)

class Silent(CallbackBase): ...
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Offer a project's own package; importing a part of it would fail."""
    for name, text in {"parts": PARTS, "callbacks": CALLBACKS}.items():
        file = tmp_path / "lab" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(text) + "\nraise ImportError('this is only read')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def check(lab):
    """Check the config above with some values changed; return the message of the error, or None."""

    def check_changed(*dotlist):
        config = OmegaConf.create(CONFIG)
        for item in dotlist:
            key, _, value = item.partition("=")
            OmegaConf.update(config, key, yaml.safe_load(value), merge=False)
        try:
            check_config(config)
        except ConfigError as error:
            return str(error)
        return None

    return check_changed


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["callbacks={}", "default_callbacks={}"],
        ["callbacks.watch.metric_key=score_top5/test"],
        [MEAN, "callbacks.watch.metric_key=score/test/ema"],
        [MEANS, "callbacks.watch.metric_key=score/test/ema_0.99"],
        [MEAN, *BEST, "objective=score/test/best/ema"],
        ["callbacks.other={_target_: lab.callbacks.Undeclared}", "objective=score/test/other"],
        [END.format("any"), "callbacks.asks={_target_: lab.callbacks.Asks}"],
        ["callbacks.watch.metric_key=rate/rate"],
        ["callbacks.watch.others=[score/test, rate/rate]"],
        ["callbacks.score.topk=[3]", "objective=score_top3/test"],
        ["callbacks.score.every_n_epochs=null", "callbacks.score.every_n_samples=10"],
        ["callbacks.score.every_n_epochs=null"],  # what evaluates does so at the end, too
        ["callbacks.score.every_n_updates=5", "callbacks.score.at_start=true"],
        ["checkpoint.every_n_updates=10"],
        ["model.head={_target_: lab.parts.Head, target: some.text}"],
        ["model.layers=[{_target_: torch.nn.ReLU}, {_target_: torch.nn.Linear, _args_: [3, 2]}]"],
        ["model.layers=[{_target_: torch.nn.Linear, _partial_: true, in_features: 3}]"],
        ["model.width=${data.batch_size}"],
        ["schedule=null"],
        ["schedule={_target_: torch.optim.lr_scheduler.StepLR, step_size: 3}"],
        ["metric_property_provider=null"],
        ["optimizer.lr=1"],
        ["optimizer.betas=[0.9, 0.99]"],
        ["+remarks={target: 'some.text'}"],
    ],
    ids=str,
)
def test_what_is_right_passes(check, changes):
    assert check(*changes) is None


OF_PYTHON = "belongs to Python's standard library; only the project's classes and those of packages are accepted here"
MISTAKES = {
    # interpolations and missing values
    "model.width=${data.batch_sise}": "model.width: cannot resolve '${data.batch_sise}': Interpolation key "
    "'data.batch_sise' not found. Did you mean 'data.batch_size'?",
    "model.layers=[1, '${zzz}']": "model.layers[1]: cannot resolve '${zzz}': Interpolation key 'zzz' not found.",
    "model.width=???": "model.width: a value is needed instead of '???'",
    # plain values
    "seed=abc": "seed: expects a whole number, got 'abc'",
    "ranks=0": "ranks: expects a whole number of at least 1, or 'auto', got 0",
    "rank_timeout_s=0": "rank_timeout_s: expects a number above 0, got 0",
    "max_restarts=-1": "max_restarts: expects a whole number of at least 0, got -1",
    "tags=['a,b']": "tags: a tag has no comma, which separates tags: 'a,b'. Several: tags=[a,b]",
    # config paths
    "model=null": "model: an object with a _target_ is needed, and there is none",
    "model=3": "model: an object with a _target_ is needed, not 3",
    "callbacks=[ema]": "callbacks: a mapping from names to objects is needed, not ['ema']",
    "callbacks.score=null": (
        "callbacks.score: an object with a _target_ is needed, not null. "
        "Without it: '~callbacks.score' on the command line"
    ),
    "data.datasets.test=abc": "data.datasets.test: an object with a _target_ is needed, not 'abc'",
    "data.datasets=[abc]": "data.datasets: a mapping from names to objects is needed, not ['abc']",
    "loss={}": "loss: it has no _target_, which names the class of the object",
    "model={model: {_target_: torch.nn.Linear}}": "model: it has no _target_, which names the class of the object. Its "
    "keys are one level too deep: leave out the line 'model:' around them",
    "loss={_target: torch.nn.MSELoss}": "loss._target: there is no such key here. Did you mean '_target_'?",
    "loss={target: torch.nn.MSELoss}": "loss.target: there is no such key here. Did you mean '_target_'?",
    "model.head={_target__: a.B}": "model.head._target__: there is no such key here. Did you mean '_target_'?",
    "model.layers=[{_traget_: a.B}]": "model.layers[0]._traget_: there is no such key here. Did you mean '_target_'?",
    # targets
    "loss._target_=Net": "loss._target_: 'Net' is not a dotted name like package.module.Class",
    "loss._target_=3": "loss._target_: 3 is not a dotted name like package.module.Class",
    "loss._target_=torch.nn.CrossEntropyLos": "loss._target_: there is no 'CrossEntropyLos' in 'torch.nn'. "
    "Did you mean 'CrossEntropyLoss'?",
    "model._target_=lab.parts.py.Net": "model._target_: there is no 'py' in 'lab.parts'. Did you mean 'lab.parts.Net'?",
    "callbacks.score._target_=lab.calbacks.Score": "callbacks.score._target_: there is no 'calbacks' in 'lab'. "
    "Did you mean 'callbacks'?",
    "model._target_=os.system": "model._target_: 'os.system' " + OF_PYTHON,
    "loss._target_=lab.parts.make": "loss._target_: 'lab.parts.make' is a function; only a class is accepted here",
    "model._target_=lab.parts.make": "model._target_: 'lab.parts.make' is a function of a package; of those, only "
    "constructors such as Class.from_pretrained and the builders of timm.models, torchvision.models, datasets.load are "
    "accepted here, besides functions of ksuit_runner and of the project",
    "data.order={_target_: ksuit_runner.data.order.Weightd}": "data.order._target_: there is no 'Weightd' in "
    "'ksuit_runner.data.order'. Did you mean 'Weighted'?",
    "data.order={_target_: lab.parts.Points, size: 1}": "data.order._target_: 'lab.parts.Points' does not derive from "
    "Order",
    "data.order={_target_: ksuit_runner.data.order.Repeated, times: two}": "data.order.times: expects a whole number "
    "of at least 1, got 'two'",
    "data.batch_size=0": "data.batch_size: expects a whole number of at least 1, got 0",
    "data.num_workers=-1": "data.num_workers: expects a whole number of at least 0, got -1",
    "data.order={_target_: ksuit_runner.data.order.Repeated, times: 2, seed: 1}": "data.order.seed: 'seed' is provided "
    "by the runner; remove it",
    "model.head={_target_: builtins.eval}": "model.head._target_: 'builtins.eval' " + OF_PYTHON,
    "data.datasets.test={_target_: os.system}": "data.datasets.test._target_: 'os.system' " + OF_PYTHON,
    # kinds
    "callbacks.score={_target_: lab.parts.Points, size: 1}": "callbacks.score._target_: 'lab.parts.Points' does not "
    "derive from CallbackBase",
    "model={_target_: lab.parts.Points, size: 1}": "model._target_: 'lab.parts.Points' does not derive from Module",
    "optimizer={_target_: torch.nn.ReLU}": "optimizer._target_: 'torch.nn.ReLU' does not derive from Optimizer",
    # names of arguments
    "callbacks.score.smothing=0.1": "callbacks.score.smothing: there is no such argument. Did you mean 'smoothing'?",
    "data.datasets.test.sizze=1": "data.datasets.test.sizze: there is no such argument. Did you mean 'size'?",
    "data.datasets.test={_target_: lab.parts.Points}": "data.datasets.test.size: a value is needed",
    "schedule.warm_up=0.1": "schedule.warm_up: there is no such argument. Did you mean 'warmup'?",
    "model.head={_target_: lab.parts.Head, dept: 1}": "model.head.dept: there is no such argument. "
    "Did you mean 'depth'?",
    # what the runner provides
    "callbacks.score.trainer=1": "callbacks.score.trainer: 'trainer' is provided by the runner; remove it",
    "callbacks.score.name=a": "callbacks.score.name: 'name' is provided by the runner; remove it",
    "optimizer.params=[]": "optimizer.params: 'params' is provided by the runner; remove it",
    "model.input_shape=[3]": "model.input_shape: 'input_shape' is provided by the runner; remove it",
    # types
    "model.width=wide": "model.width: expects a whole number, got 'wide'",
    "optimizer.lr=abc": "optimizer.lr: expects a number, got 'abc'",
    "trainer.max_epochs=1.5": "trainer.max_epochs: expects a whole number of at least 0, or null, got 1.5",
    "trainer.precision=half": "trainer.precision: expects 'float32', 'bfloat16', or 'float16', got 'half'",
    "callbacks.score.topk=1": "callbacks.score.topk: expects a list of whole numbers, got 1",
    # intervals
    "default_callbacks.rate.every_n_updates=null": "default_callbacks.rate: one of every_n_epochs, every_n_updates, "
    "every_n_samples, at_start, at_end is needed, not none",
    "callbacks.score.every_n_epochs=0": "callbacks.score.every_n_epochs: expects a whole number of at "
    "least 1, or null, got 0",
    "checkpoint.every_n_samples=-1": "checkpoint.every_n_samples: expects a whole number of at "
    "least 1, or null, got -1",
    # keys of datasets and metrics
    "callbacks.score.dataset_key=tset": "callbacks.score.dataset_key: there is no dataset 'tset'. Did you mean 'test'? "
    "(test, train)",
    "callbacks.watch.on=xyz": "callbacks.watch.on: there is no dataset 'xyz'. Valid: test, train.",
    "callbacks.watch.metric_key=scroe/test": "callbacks.watch.metric_key: no callback logs 'scroe/test'. "
    "Did you mean 'score/test'?\nLogged are: rate/rate, score/test, score_top1/test, score_top5/test",
    "callbacks.watch.others=[score/test, zzz]": "callbacks.watch.others[1]: no callback logs 'zzz'.\n"
    "Logged are: rate/rate, score/test, score_top1/test, score_top5/test",
    "callbacks.watch.metric_key=${objective}": "callbacks.watch.metric_key: expects the key of a logged metric, such "
    "as accuracy/validation, got null\nIts value is that of ${objective}: change it there, or here.",
    END.format("best"): "callbacks.end.weights_of: no"
    " callback gives a checkpoint the tag 'best'. Add best_checkpoint, or best_loss, to the callbacks.\n"
    "A callback of your own that gives it says so: tags = ('best',)",
    "objective=rate/rat": "objective: no callback logs 'rate/rat'. Did you mean 'rate/rate'?\n"
    "Logged are: rate/rate, score/test, score_top1/test, score_top5/test",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_named_with_its_config_path(check, change):
    assert check(change) == MISTAKES[change]


def test_a_default_counts_as_an_interval_and_gives_way_to_null(check):
    assert "needed, not none" in check("default_callbacks.rate.every_n_updates=null")
    assert check("default_callbacks.rate.every_n_updates=null", "default_callbacks.rate.every_n_epochs=1") is None


def test_a_default_that_names_no_dataset_is_found(check):
    message = check("data.datasets={train: {_target_: lab.parts.Points, size: 3}}", "callbacks.score.dataset_key=train")
    assert message == "callbacks.watch.on: there is no dataset 'test'. Valid: train."


def test_of_many_metrics_a_few_like_the_unknown_one_are_listed(check):
    many = f"callbacks.score.topk=[{','.join(map(str, range(1, 40)))}]"
    unknown = "objective: no callback logs 'score_top/test'. "
    assert check(many, "objective=score_top/test") == f"{unknown}Did you mean 'score_top9/test'?"
    message = check(many, "objective=top")
    assert message.startswith("objective: no callback logs 'top'. Similar: score_top1/test, score_top10/test,")
    assert message.count("score_top") == 6


def test_metrics_are_not_checked_beside_a_callback_that_leaves_open_what_it_logs(check):
    assert check("callbacks.silent={_target_: lab.callbacks.Silent}", "objective=anything") is None


def test_tags_are_not_checked_beside_a_callback_that_hands_the_writer_on(check):
    assert check("callbacks.hands={_target_: lab.callbacks.HandsOn}", END.format("best")) is None
    assert "no callback gives" in check("callbacks.hands={_target_: lab.callbacks.PassesUp}", END.format("best"))


def test_a_tag_that_nearly_exists_is_suggested_and_a_stored_run_may_have_it_already(check):
    keep = "callbacks.keep={_target_: lab.callbacks.Keeps, tag: good}"
    own = "A callback of your own that gives it says so: tags = ('goood',)"
    message = f"no callback gives a checkpoint the tag 'goood'. Did you mean 'good'?\n{own}"
    assert check(keep, END.format("goood")) == f"callbacks.end.weights_of: {message}"
    key, _, end = END.format("goood").partition("=")
    config = OmegaConf.create(CONFIG)
    OmegaConf.update(config, key, yaml.safe_load(end))
    check_config(config, is_stored=True)


def test_checkpoints_that_are_kept_for_good_have_a_tag(check):
    end = END.format("update-20")
    assert "no callback gives a checkpoint the tag 'update-20'" in check(end)
    assert check(end, "checkpoint.every_n_updates=10", "checkpoint.keep_every=2") is None


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ([], "score/test/ema"),
        ([MEANS], "score/test/ema"),
        ([MEAN], "score/test/ema_0.9"),
        ([MEANS], "score/test/ema_0.999"),
        ([MEAN, *BEST], "score/test/ema"),
    ],
)
def test_a_metric_of_weights_that_are_not_evaluated_is_refused(check, changes, metric):
    assert f"no callback logs '{metric}'" in check(*changes, f"objective={metric}")


def test_a_metric_of_a_callback_that_is_never_due_is_refused(check):
    never = ["callbacks.score.every_n_epochs=4", "callbacks.score.at_end=false"]  # of 3
    assert (
        check(*never)
        == "callbacks.watch.metric_key: callbacks.score logs 'score/test', but is not due before the run ends"
    )
    for change in ("trainer.max_epochs=4", "callbacks.score.every_n_updates=9", "callbacks.score.at_start=true"):
        assert check(*never, change) is None


def test_what_ships_declares_what_it_logs_so_that_metric_keys_are_checked():
    reader, conf = SignatureReader(), shipped_conf()
    files = [path for group in ("callbacks", "default_callbacks") for path in (conf / group).glob("*.yaml")]
    nodes = [node for path in files for node in (yaml.safe_load(path.read_text()) or {}).values()]
    targets = {node["_target_"] for node in nodes if isinstance(node, dict)}
    assert len(targets) > 40 and not [item for item in targets if reader.read(item).logs is None]


def test_a_metric_to_watch_where_nothing_is_logged(check):
    message = check("callbacks={}", "default_callbacks={}", "objective=score/test")
    assert message == "objective: no callback logs 'score/test'. No callback logs anything."


def test_a_class_that_cannot_be_read_passes_with_any_argument_but_those_of_the_runner(check):
    assert check("model={_target_: torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX, a: 1}") is None
    message = check("model={_target_: torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX, input_shape: 1}")
    assert message == "model.input_shape: 'input_shape' is provided by the runner; remove it"


def test_resolve_returns_plain_values():
    config = OmegaConf.create({"a": {"b": "${c}"}, "c": [1, 2]})
    assert resolve(config) == {"a": {"b": [1, 2]}, "c": [1, 2]}


@pytest.mark.parametrize(
    "override", [f"{group}={name}" for group in ("model", "loss", "optimizer", "schedule") for name in choices(group)]
)
def test_the_configs_that_ship_pass(override):
    check_config(compose_config([override]))


def test_a_check_imports_nothing_heavy():
    script = """
import sys
from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
config = compose_config([])
check_config(config)
config.optimizer.lr = "abc"
try:
    check_config(config)
except Exception as error:
    print(type(error).__name__, *sorted({"torch", "mlflow", "numpy", "sklearn", "callbacks"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ConfigError"]


def test_an_argument_of_another_optimizer_is_answered_as_any_other_that_does_not_exist():
    with pytest.raises(ConfigError, match="^optimizer.betas: there is no such argument"):
        check_config(compose_config(["optimizer=sgd", "+optimizer.betas=[0.9,0.95]"]))
