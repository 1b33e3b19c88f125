"""From a command line to jobs: what varies, what is fixed, and mistakes before anything starts."""

import math

import pytest

from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.errors import ConfigError
from ksuit_runner.sweep.build_plan import plan_sweep


def jobs_of(*overrides):
    return plan_sweep(overrides, "command").jobs


def write_sweep(folder, text):
    (folder / "conf" / "sweep").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "sweep" / "mine.yaml").write_text("# @package _global_\n" + text)


@pytest.mark.parametrize("text", ["objective: accuracy/validation\n{}", "{}"])
def test_a_file_whose_first_line_is_missing_is_told_so(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path, "")
    file = tmp_path / "conf" / "sweep" / "mine.yaml"
    file.write_text(text.format("sweep:\n  params:\n    optimizer.lr: [1e-3, 1e-2]\n"))
    with pytest.raises(ConfigError, match="^sweep: a file of this group is about .* `# @package _global_`$"):
        jobs_of("sweep=mine")


def test_a_job_has_the_config_that_its_overrides_compose():
    fixed = ("trainer.max_epochs=2", "callbacks=[ema,accuracy]")
    swept = ("model=mlp,cnn", "optimizer.lr=1e-2,1e-3", "+model.dropout=0.1", "callbacks.ema.decays=[0.9],[0.99,0.9]")
    jobs = jobs_of(*fixed, *(item for item in swept if not item.startswith("+")))
    assert len(jobs) == 8
    for job in jobs:
        overrides = [f"{key}={value}" for key, value in job.combination.items()]
        assert job.config == check_config(without_sweep(compose_config([*fixed, *overrides])))


def test_the_command_line_counts_more_than_the_yaml(tmp_path, monkeypatch):
    write_sweep(tmp_path, "sweep:\n  params:\n    seed: [0, 1]\n    optimizer.lr: [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    assert [job.combination for job in jobs_of("sweep=mine", "seed=7,8", "optimizer.lr=5")] == [
        {"seed": "7"},
        {"seed": "8"},
    ]
    assert {job.config["optimizer"]["lr"] for job in jobs_of("sweep=mine", "optimizer.lr=5")} == {5}


def test_what_a_yaml_varies_can_be_removed(tmp_path, monkeypatch):
    write_sweep(tmp_path, "sweep:\n  params:\n    optimizer.lr: [1, 2]\n    optimizer.lrr: [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of("sweep=mine", "sweep.params=null", "seed=7,8")
    assert [job.combination for job in jobs] == [{"seed": "7"}, {"seed": "8"}]
    with pytest.raises(ConfigError, match="^optimizer.lrr: 'optimizer' has no 'lrr'. Did you mean 'lr'.$"):
        jobs_of("sweep=mine")


def test_a_yaml_can_choose_groups_and_draw(tmp_path, monkeypatch):
    write_sweep(
        tmp_path,
        "defaults:\n  - override /model: mlp\n"
        "sweep:\n  method: random\n  samples: 3\n  params:\n    optimizer.lr: interval(0.001, 0.1)\n    seed: [0, 1]\n",
    )
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of("sweep=mine")
    assert len(jobs) == 6
    assert all(job.config["model"]["_target_"].endswith("Mlp") for job in jobs)
    assert all("sweep" not in job.config and "launcher" not in job.config for job in jobs)
    assert len(jobs_of("sweep=mine", "sweep.samples=5")) == 10
    folds = jobs_of("sweep=mine", "trainer.max_epochs=1,2,3", "sweep.mean_over=[seed,trainer.max_epochs]")
    assert len(folds) == 18 and len({job.combination["optimizer.lr"] for job in folds}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=0"], "sweep.params: nothing varies"),
        (["output_dir=a,b"], "output_dir: it is the same for all jobs of a sweep"),
        (["model=mlp,mpl"], "model: there is no 'mpl'. Did you mean 'mlp'?"),
        (["optimizer.lr=1e-3,abc"], "optimizer.lr: expects"),
        (
            ["optimizer.lrr=1e-2,2", "seed=0,1"],
            "optimizer.lrr=1e-2,2: 'optimizer' has no 'lrr'. Did you mean 'lr'?",
        ),
        (
            ["model=mlp,cnn", "model.chanels=1e-2,2"],
            "write +model.chanels=1e-2,2\nThis is the job model=mlp model.chanels=0.01",
        ),
        (["seed=0,1", "sweep.methd=random"], "'sweep' has no 'methd'"),
        (["seed=0,1", "sweep.method=randm"], "sweep.method: expects"),
        (["seed=0,1", "sweep.method=random"], "sweep.samples: sweep.method=random needs a number of samples"),
        (["seed=0,1", "sweep.method=random", "sweep.samples=0"], "sweep.samples: expects a whole number of at least 1"),
        (["seed=0,1", "sweep.samples=4"], "sweep.samples: a grid draws nothing"),
        (["seed=0,1", "launcher.max_jobs=2"], "'launcher' has no 'max_jobs'"),
        (["seed=0,1", "launcher=joblb"], "launcher: there is no 'joblb'"),
        (
            ["optimizer.lr=1,2", "sweep.mean_over=[optimizer.l]"],
            "sweep.mean_over: the sweep does not vary 'optimizer.l'. Did you mean 'optimizer.lr'?",
        ),
        (
            ["callbacks=[ema,accuracy],[accuracy]", "objective=accuracy/validation/ema"],
            "no callback logs 'accuracy/validation/ema'. Did you mean 'accuracy/validation'?",
        ),
        (
            ["callbacks.ema.decays=[0.9],[0.9,0.99]", "objective=accuracy/validation/ema"],
            "This is the job callbacks.ema.decays=[0.9,0.99]",
        ),
        (
            [
                "callbacks=[accuracy]",
                "callbacks.accuracy.every_n_epochs=1,50",
                "+callbacks.accuracy.at_end=false",
                "objective=accuracy/validation",
            ],
            "objective: callbacks.accuracy logs 'accuracy/validation', but is not due before the run ends\n"
            "This is the job callbacks.accuracy.every_n_epochs=50",
        ),
        (
            ["evaluation.dataset=validation,test", "callbacks=[accuracy]", "objective=accuracy/${evaluation.dataset}"],
            "could not be ranked by 'accuracy/validation': its objective is 'accuracy/test'",
        ),
        (["callbacks=[ema],[emma]"], "callbacks: there is no 'emma'"),
        (["optimizer.lr=1,2", "sweep.method=tpe", "sweep.samples=3"], "objective: an Optuna search needs the metric"),
        (
            ["seed=1,2", "sweep.method=tpe", "sweep.samples=3", "objective=accuracy/validation"],
            "sweep.params.seed: an Optuna search has one seed",
        ),
    ],
)
def test_mistakes_end_a_sweep_before_it_begins(overrides, message):
    with pytest.raises(ConfigError) as caught:
        jobs_of(*overrides)
    assert message in str(caught.value)


def test_a_mistake_in_one_job_names_the_job():
    with pytest.raises(ConfigError, match=r"This is the job optimizer.lr=abc seed=1") as caught:
        jobs_of("optimizer.lr=1e-3,abc", "seed=1,2")
    assert "optimizer.lr" in str(caught.value).splitlines()[0]


def test_the_first_job_is_checked_before_it_is_said(tmp_path):
    said = []
    planned = plan_sweep(["seed=0,1", f"output_dir={tmp_path}"], "command", said.append)
    assert said == [planned.config] and said[0].output_dir == str(tmp_path)
    search = ["optimizer.lr=interval(0.1,1)", "sweep.method=tpe", "sweep.samples=3", "objective=loss/train"]
    planned = plan_sweep(search, "command", said.append)
    assert said[1:] == [planned.config] and planned.jobs == []
    with pytest.raises(ConfigError, match="expects a number"):
        plan_sweep(["optimizer.lr=fast,1e-3"], "command", said.append)
    assert len(said) == 2


def test_a_file_that_is_added_meanwhile_is_seen_by_the_next_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no 'mine'"):
        jobs_of("model=mine,mlp")
    with pytest.raises(ConfigError, match="'mine'"):
        jobs_of("mine.size=1,2")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("_target_: ksuit_runner.models.linear.Linear\n")
    assert len(jobs_of("model=mine,mlp")) == 2
    (tmp_path / "conf" / "mine").mkdir()
    for name in ("small", "large"):
        (tmp_path / "conf" / "mine" / f"{name}.yaml").write_text(f"size: {name}\n")
    assert [job.config["mine"]["size"] for job in jobs_of("+mine=small,large", "seed=0")] == ["small", "large"]


def test_what_a_value_refers_to_is_looked_up_in_each_job(tmp_path, monkeypatch):
    write_sweep(
        tmp_path,
        "name: ${hydra:runtime.choices.model}-${hydra:job.num}-${hydra:job.override_dirname}\n"
        "sweep:\n  params:\n    model: [mlp, linear]\n    tracker.experiment: ['${model._target_}', '1.10']\n",
    )
    monkeypatch.chdir(tmp_path)
    configs = [job.config for job in jobs_of("sweep=mine")]
    models = [f"ksuit_runner.models.{name}" for name in ("mlp.Mlp", "linear.Linear")]
    assert [config["tracker"]["experiment"] for config in configs] == [models[0], "1.10", models[1], "1.10"]
    names = [config["name"].split("-") for config in configs]
    assert [name[:2] for name in names] == [["mlp", "0"], ["mlp", "1"], ["linear", "2"], ["linear", "3"]]
    assert all("model=mlp" in name[2] for name in names[:2])


def test_a_config_with_nan_can_be_swept():
    jobs = jobs_of("seed=0,1", "callbacks=[accuracy,early_stop]", "callbacks.early_stop.good_enough=nan")
    assert [math.isnan(job.config["callbacks"]["early_stop"]["good_enough"]) for job in jobs] == [True, True]
