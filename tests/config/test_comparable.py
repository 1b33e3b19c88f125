from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.comparable import comparable, named_choices
from ksuit_runner.config.compose import compose_with_choices, without_sweep


def params(*overrides):
    composed, chosen = compose_with_choices(list(overrides))
    config = check_config(without_sweep(composed))
    return comparable(config, named_choices(config, chosen))


def test_choices_and_values_are_compared_and_nothing_that_is_about_the_command():
    found = params("model=mlp", "callbacks=[ema,accuracy]", "optimizer.lr=0.1", "output_dir=elsewhere", "name=mine")
    assert [found[key] for key in ("model", "optimizer", "loss", "schedule", "data", "callbacks")] == [
        *("mlp", "adamw", "cross_entropy", "cosine", "digits", "ema, accuracy")
    ]
    assert (found["optimizer.lr"], found["seed"], found["data.batch_size"]) == (0.1, 0, 64)
    assert not any(value in (None, {}, []) for value in found.values())
    assert not any("_target_" in key for key in found)
    others = {"output_dir", "name", "resume_strict", "parent_run_id", "register_anew", "tracker", "checkpoint", "ranks"}
    assert not {key.partition(".")[0] for key in found} & others


def test_two_runs_differ_where_their_configs_do():
    one, other = params("model=mlp"), params("model=cnn", "loss.label_smoothing=0.1")
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert {"model", "loss.label_smoothing"} <= differing
    assert {key.partition(".")[0] for key in differing} == {"model", "loss"}


def test_a_choice_whose_class_is_replaced_is_not_named():
    found = params(
        "model=mlp",
        "model._target_=ksuit_runner.models.linear.Linear",
        "~model.hidden_dims",
        "~model.activation",
        "~model.dropout",
    )
    assert (found["model"], found["optimizer"]) == ("Linear", "adamw")
    assert comparable({"model": {"_target_": "mine.Net"}}) == {"model": "Net"}
    assert named_choices({"model": {"_target_": "mine.Net"}}, {"model": "../../mlp"}) == {}
