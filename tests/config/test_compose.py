"""Mistakes that Hydra's own words would mislead about: what is said, and that it is not misleading."""

from pathlib import Path

import pytest

from ksuit_runner import run
from ksuit_runner.config.check.known_keys import check_keys
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.config.groups import shipped_conf
from ksuit_runner.errors import ConfigError

RULE = "trainer.parameter_rules={head: {match: ['head*']}}"
ANOTHER = """\
# @package _global_
defaults:
  - override /model: mlp
  - override /callbacks: [acuracy]
trainer.max_epochs: 1
evaluation.dataset: test
max_epochs: 1
"""
INLINE = "model={_target_: torch.nn.Linear, in_features: 64}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "conf" / "experiment" / "vision").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "another.yaml").write_text(ANOTHER)
    (tmp_path / "conf" / "experiment" / "vision" / "small.yaml").write_text("# @package _global_\nseed: 1\n")
    (tmp_path / "conf" / "callbacks").mkdir()
    (tmp_path / "conf" / "callbacks" / "dotted.yaml").write_text("acc.v1:\n  _target_: callbacks.accuracy.Accuracy\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "first", "second"),
    [
        ([RULE], "'trainer.parameter_rules' has no 'head'. Valid: no_decay.", f"To add a new key, write +{RULE}"),
        ([INLINE], "'model' has no 'in_features'", "write a file in conf/model/ and choose it"),
        (
            ["model=mlp", "model.hiden=3"],
            "model.hiden=3: 'model' has no 'hiden'. Did you mean 'hidden_dims'?",
            "+model.hiden",
        ),
        (["trainer.max_epoch=3"], "'trainer' has no 'max_epoch'. Did you mean 'max_epochs'?", None),
        (["data.eval_batch_sizes=3"], "'data' has no 'eval_batch_sizes'.", None),
        (
            ["callbacks.accuracy.every_n_updates=3"],
            "'callbacks.accuracy' has no 'every_n_updates'. Did you mean 'every_n_epochs'?",
            "To add a new key, write +callbacks.accuracy.every_n_updates=3",
        ),
        (["optimizer.lr.x=3"], "optimizer.lr.x=3: 'optimizer.lr' is a value and has no keys", ""),
        (
            ["experiment=vision/smal"],
            "experiment/vision: there is no 'smal'. Did you mean 'small'?",
            "There are: small",
        ),
        (["experiment=vison/small"], "there is no group 'experiment/vison'", ""),
        (["experiment=conf/experiment/vision/small.yaml"], "Write experiment=vision/small", ""),
        (["optimizer=3"], "optimizer=3: a choice is the name of a file in conf/optimizer/. There are: adamw, sgd", ""),
        (["callbacks=[[ema]]"], "callbacks=[[ema]]: a choice is the name of a file in conf/callbacks/", ""),
    ],
)
def test_what_is_missing_is_named_where_it_is_missing(project, overrides, first, second):
    with pytest.raises(ConfigError) as raised:
        compose_config(overrides)
    lines = [*str(raised.value).splitlines(), ""]
    assert first in lines[0] and (len(lines) == 2 if second is None else second in lines[1])


def test_a_nested_file_is_composed(project):
    assert compose_config(["experiment=vision/small"]).seed == 1


TUNED = """# @package _global_
defaults:
  - override /callbacks: [accuracy, auroc, early_stop]
callbacks:
  early_stop: {metric_key: loss/test}
  auroc: {outputs: logits, targets: digit}
  mine: {_target_: callbacks.loss.Loss, dataset_key: test, every_n_epochs: 1}
default_callbacks: {progress: {line_per_epoch: true}}
"""


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["callbacks=[]"], {"mine"}),
        (["callbacks=[loss]", "callbacks.loss.every_n_epochs=2", "default_callbacks=none"], {"mine", "loss"}),
        (["callbacks=[early_stop]"], {"mine", "early_stop"}),
    ],
)
def test_what_is_left_out_takes_its_settings_along(project, overrides, kept):
    Path("conf/experiment/tuned.yaml").write_text(TUNED)
    config = compose_config(["experiment=tuned", *overrides])
    check_config(without_sweep(config))
    assert set(config.callbacks) == kept
    assert ("progress" in config.default_callbacks) == ("default_callbacks=none" not in overrides)


@pytest.mark.parametrize(
    "overrides",
    [["callbacks=[]", "+callbacks.early_stop.min_epochs=3"], ["callbacks=[]", "+callbacks.loss.every_n_epochs=3"]],
)
def test_settings_that_the_command_line_gives_need_their_object(project, overrides):
    Path("conf/experiment/tuned.yaml").write_text(TUNED)
    with pytest.raises(ConfigError, match="there is no such object whose settings these could be"):
        check_config(without_sweep(compose_config(["experiment=tuned", *overrides])))


def test_a_name_with_a_dot_is_refused_for_its_dot(project):
    with pytest.raises(ConfigError, match=r"^callbacks: the name 'acc.v1' has a dot, which separates the parts of a"):
        check_config(without_sweep(compose_config(["callbacks=[dotted]"])))


WHOLE = "# @package _global_\n"
SEVERAL = (
    f"{WHOLE}defaults:\n  - override /optimizer: null\n"
    "optimizer:\n  a: {_target_: torch.optim.SGD, match: ['*bias']}\n"
)
FILE = "conf/experiment/mine.yaml"
FILES = {
    "a tab": (f"{WHOLE}optimizer:\n\tlr: 1\n", f"{FILE}, line 3: found character"),
    "a key twice": (f"{WHOLE}seed: 1\nname: a\nseed: 2\n", f"{FILE}, line 4: found duplicate key seed"),
    "another column": (
        f"{WHOLE}seed: 1\n name: a\n",
        f"{FILE}, line 3: mapping values are not allowed here. Keys",
    ),
    "two documents": (f"{WHOLE}---\nseed: 1\n---\n", f"{FILE}, line 4: expected a single document in the stream, but"),
    "no UTF-8": (b"# @package _global_\nname: \xe9\n", f"{FILE}, line 2: this is not UTF-8"),
    "a list": ("- seed\n", f"{FILE}: a config has keys, `KEY: VALUE`, and this is a list"),
    "a text": ("seed\n", f"{FILE}: a config has keys, `KEY: VALUE`, and this is a text"),
    "a list in place of keys": (f"{WHOLE}optimizer: [1]\n", f"{FILE}: optimizer: keys are needed, `KEY: VALUE`, and"),
    "half an interpolation": (f"{WHOLE}name: ${{seed\n", "name: it cannot be read at '${seed'"),
    "an unset variable": (f"{WHOLE}name: ${{oc.env:NO_SUCH}}\n", "name: the environment variable 'NO_SUCH' is not set"),
    "a misspelt key": (
        f"{WHOLE}optimiser: {{lr: 1}}\n",
        "optimiser: the config has no such key, and nothing refers to",
    ),
    "a key with dots": (
        f"{WHOLE}trainer.max_epochs: 1\n",
        f"trainer.max_epochs: the config has no such key, and nothing refers to it ({FILE}). Did you mean "
        "`trainer: {max_epochs: VALUE}`?",
    ),
    "a key with dots that others refer to": (
        f"{WHOLE}evaluation.dataset: test\n",
        f"evaluation.dataset: the config has no such key, and nothing refers to it ({FILE}). Did you mean `eval",
    ),
    "a key without its node": (
        f"{WHOLE}max_epochs: 1\n",
        f"max_epochs: the config has no such key, and nothing refers to it ({FILE}). Did you mean `trainer: {{",
    ),
    "a list of choices as a value": (
        f"{WHOLE}callbacks: [ema]\n",
        f"{FILE}: callbacks: keys are needed, `KEY: VALUE`, and this is a list. To choose files: `- over",
    ),
    "a class as a value": (
        f"{WHOLE}callbacks: {{mine: callbacks.ema.Ema}}\n",
        "callbacks.mine: an object with a _target_ is needed, not 'callbacks.ema.Ema'. Its class is named by",
    ),
    "a misspelt setting": (f"{WHOLE}evaluation: {{datset: test}}\n", "evaluation.datset: 'evaluation' has no such key"),
    "settings of no callback": (
        f"{WHOLE}callbacks: {{acuracy: {{topk: [1]}}}}\n",
        "callbacks.acuracy: there is no such",
    ),
    "settings of one not chosen": (
        f"{WHOLE}callbacks: {{early_stop: {{patience: 1}}}}\n",
        "callbacks.early_stop: there is no such object whose settings these could be. To choose conf/callbacks/early_",
    ),
    "settings with targets": (
        f"{WHOLE}callbacks: {{auroc: {{targets: digit}}}}\n",
        "callbacks.auroc: there is no such object whose settings these could be. To choose conf/callbacks/auroc.yaml",
    ),
    "a choice as a value": (f"{WHOLE}model: mlp\n", "model: an object with a _target_ is needed, not 'mlp'. To choose"),
    "a launcher's argument": (f"{WHOLE}launcher: {{jobs: 2}}\n", "launcher.jobs: there is no such argument"),
    "a sweep": (f"{WHOLE}sweep: {{params: {{seed: [0, 1]}}}}\n", "sweep.params: values that vary are those of a sweep"),
    "a key of Hydra": (f"{WHOLE}hydra: {{rn: 1}}\n", "hydra.rn: there is no such key. Did you mean 'run'?"),
    "no truth value": (f"{WHOLE}hydra: {{verbose: maybe}}\n", "hydra.verbose: true or false is needed, not maybe"),
    "two choices of one group": (
        f"{WHOLE}defaults:\n  - override /model: mlp\n  - override /model: cnn\n",
        f"{FILE}: defaults: two lines override '/model', and only one of them would count",
    ),
    "a misspelt choice": (
        f"{WHOLE}defaults:\n  - override /callbacks:\n    - acuracy\n",
        f"{FILE}: callbacks: there is no 'acuracy'. Did you mean 'accuracy'?",
    ),
    "a misspelt group": (
        f"{WHOLE}defaults:\n  - override /modle: mlp\n",
        f"{FILE}: defaults: there is no group 'modle'. Did you mean 'model'?",
    ),
    "no slash": (
        f"{WHOLE}defaults:\n  - override model: mlp\n",
        f"{FILE}: defaults: a slash is missing. Write `- over",
    ),
    "a misspelt word": (f"{WHOLE}defaults:\n  - overide /model: mlp\n", f"{FILE}: defaults: 'overide' means nothing"),
    "a choice too early": (
        f"{WHOLE}defaults:\n  - override /sweep: seeds\n",
        f"{FILE}: defaults: 'sweep' can be chosen",
    ),
    "overrides first": (
        f"{WHOLE}defaults:\n  - override /model: mlp\n  - /callbacks: ema\n",
        f"{FILE}: defaults: lines with `override` come after all others",
    ),
    "a value beside several optimizers": (
        f"{SEVERAL}  lr: 0.1\n",
        "optimizer.lr: there are several by name, each with arguments of its own: write optimizer.a.lr",
    ),
    "no package": ("seed: 1\n", "experiment: a file of this group is about the whole config: its first line has to be"),
    "no package, with choices": ("defaults:\n  - override /model: mlp\n", f"{FILE}: it is about the whole config"),
    "no override": (
        f"{WHOLE}defaults:\n  - /model: mlp\n",
        f"{FILE}: defaults: the config has chosen from 'model' already",
    ),
    "defaults of another kind": (f"{WHOLE}defaults: {{/model: mlp}}\n", f"{FILE}: defaults: a list is needed"),
    "a choice of another kind": (f"{WHOLE}defaults: [override /model: 3]\n", f"{FILE}: defaults: a choice is `- GROUP"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_names_the_file(project, name):
    text, message = FILES[name]
    Path(FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as raised:
        run(["experiment=mine"])
    assert str(raised.value).startswith(message)
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    "text",
    [
        f"{WHOLE}seed: 7\n",
        f"{WHOLE}number: 7\nseed: ${{number}}\n",
        f"{WHOLE}evaluation: {{dataset: '${{.of}}', of: test}}\nseed: 7\n",
        f"{WHOLE}evaluation: {{mine: 7}}\nhead: ${{evaluation}}\nseed: ${{head.mine}}\n",
        f"{SEVERAL}  rate: 0.1\n  b: {{_target_: torch.optim.SGD, lr: '${{..rate}}'}}\nseed: 7\n",
        f"{SEVERAL}  rate: 0.1\n  b: {{_target_: torch.optim.SGD, lr: '${{optimizer.rate}}'}}\nseed: 7\n",
    ],
)
@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_a_file_may_begin_with_a_mark_and_have_names_of_its_own(project, text, mark, end):
    Path(FILE).write_bytes((mark + text.replace("\n", end)).encode())
    config = compose_config(["experiment=mine"])
    check_keys(config, ["experiment=mine"])
    check_config(without_sweep(config))
    assert config.seed == 7


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("+optimzer.lr=1", "optimizer"),
        ("++traner.max_epochs=3", "trainer"),
        ("+modle=cnn", "model"),
        ("+callback=[accuracy,loss]", "callbacks"),
        ("+nots=better", "notes"),
        ("+evaluaton={dataset: test}", "evaluation"),
        ("+evaluation.datset=test", "dataset"),
        ("+initialize.strct=false", "strict"),
    ],
)
def test_what_is_added_is_no_note_if_it_is_a_misspelt_key(project, override, near):
    message = f"nothing refers to it. Did you mean '{near}'\\? A note has to have another name$"
    with pytest.raises(ConfigError, match=message):
        check_keys(compose_config([override]), [override])


@pytest.mark.parametrize(
    "override", ["+mode=fast", "+date=2024-01-01", "+model_size=7", "+paper.table=3", "+evaluation.why=x", "+lr=1"]
)
def test_what_is_added_is_a_note_otherwise(project, override):
    check_keys(compose_config([override]), [override])
    added = ["+nots=better", "notes=${nots}"]
    check_keys(compose_config(added), added)  # which is referred to


def test_the_default_config_of_a_project_may_have_settings_of_its_own(project):
    default = (shipped_conf() / "config.yaml").read_text(encoding="utf-8")
    own = default.replace("\nevaluation:\n", "\nevaluation:\n  mine: 7\n")
    Path("conf/config.yaml").write_text(f"{own}\noptimizer:\n  lr: 0.5\n")
    config = compose_config([])
    check_keys(config, [])
    assert config.evaluation.mine == 7


def test_files_that_choose_each_other_end(project):
    for name, other in (("mine", "yours"), ("yours", "mine")):
        Path(FILE).with_stem(name).write_text(f"{WHOLE}defaults: [/experiment/{other}]\n")
    with pytest.raises(ConfigError, match="files choose each other in `defaults`"):
        compose_config(["experiment=mine"])


def test_an_empty_mapping_that_would_change_nothing_is_refused(project):
    cases = (
        ("trainer.parameter_rules={}", "=null"),
        ("callbacks={ }", r"=\[\]"),
        ("model={}", "another, write model=NAME"),
        ("evaluation={}", "such as evaluation.dataset=VALUE"),
        ("sweep={}", "none, write sweep=null"),
        ("schedule={}", r"=\[\]"),
    )
    for item, instead in cases:
        with pytest.raises(ConfigError, match=f"^{item}: it would change nothing, .*{instead}$"):
            compose_config([item])
    assert compose_config(["initialize.rename={}"]).initialize.rename == {}  # which it is already
    assert compose_config(["+mine={}", "+mine.one=1"]).mine == {"one": 1}
