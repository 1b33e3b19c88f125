from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.comparable import comparable
from ksuit_runner.config.compose import compose_config, without_sweep


def params(*overrides):
    return comparable(check_config(without_sweep(compose_config(list(overrides)))))


def test_choices_and_values_are_compared_and_nothing_that_is_about_the_command():
    found = params("model=mlp", "callbacks=[ema,accuracy]", "optimizer.lr=0.1", "output_dir=elsewhere", "name=mine")
    assert [found[key] for key in ("model", "optimizer", "loss", "schedule", "data", "callbacks")] == [
        *("Mlp", "AdamW", "CrossEntropyLoss", "cosine", "Digits", "ema, accuracy")
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
