"""What a sweep varies: reading values, every combination, random draws."""

import random
import statistics
from collections import Counter

import pytest
import yaml

from ksuit_runner.config.overrides import parse, to_text
from ksuit_runner.errors import ConfigError
from ksuit_runner.sweep.parameters import Distribution, draw, grid, read_parameters


def values_of(params):
    return {item.key: item.values or item.interval for item in read_parameters(params, 0)}


def test_lists_text_ranges_groups_and_lists_of_callbacks_are_read():
    params = {
        "optimizer.lr": [1e-3, 0.01],
        "optimizer.weight_decay": "0,0.1",
        "seed": "range(0,3)",
        "model": "glob(*,exclude=[gpt,gru,mnist1d*])",
        "callbacks": [["ema", "accuracy"], []],
        "+callbacks": "early_stop,[]",
        "name": None,
        "trainer.compile": [True, False],
    }
    assert values_of(params) == {
        "optimizer.lr": ("0.001", "0.01"),
        "optimizer.weight_decay": ("0", "0.1"),
        "seed": ("0", "1", "2"),
        "model": ("cnn", "linear", "mlp"),
        "callbacks": ("[ema,accuracy]", "[]"),
        "+callbacks": ("early_stop", "[]"),
        "name": ("null",),
        "trainer.compile": ("true", "false"),
    }


def test_a_list_of_callbacks_as_text_is_one_value_each():
    assert values_of({"callbacks": "[ema,accuracy],[accuracy]"}) == {"callbacks": ("[ema,accuracy]", "[accuracy]")}


def test_intervals_are_read_with_their_scale_and_kind():
    found = values_of(
        {
            "a": "interval(0.5, 1)",
            "b": "tag(log, interval(1e-4, 1e-1))",
            "c": "int(interval(1, 9))",
        }
    )
    assert found == {
        "a": Distribution(0.5, 1.0),
        "b": Distribution(1e-4, 1e-1, log=True),
        "c": Distribution(1, 9, whole=True),
    }


def test_a_grid_is_every_combination_with_the_last_key_changing_fastest():
    assert grid(read_parameters({"b": [1, 2], "a": "x,y"}, 0)) == [
        {"b": "1", "a": "x"},
        {"b": "1", "a": "y"},
        {"b": "2", "a": "x"},
        {"b": "2", "a": "y"},
    ]


def test_draws_are_the_same_for_a_seed_and_stay_when_something_is_added():
    params = {"lr": "tag(log, interval(1e-4, 1e-1))", "depth": "int(interval(1, 9))", "model": ["cnn", "mlp"]}
    drawn = draw(read_parameters(params, 0), 20, seed=3)
    assert drawn == draw(read_parameters(params, 0), 20, seed=3)
    assert drawn != draw(read_parameters(params, 0), 20, seed=4)
    longer = draw(read_parameters(params | {"width": "interval(0, 1)"}, 0), 30, seed=3)
    assert [{key: item[key] for key in params} for item in longer[:20]] == drawn
    rates = [float(item["lr"]) for item in drawn]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert sum(rate < 3e-3 for rate in rates) in range(4, 17)  # spread by the logarithm: about a half
    assert {int(item["depth"]) for item in drawn} <= set(range(1, 10))
    assert {item["model"] for item in drawn} == {"cnn", "mlp"}


def test_every_draw_is_done_with_every_seed():
    drawn = draw(read_parameters({"lr": "interval(0, 1)", "seed": [0, 1, 2]}, 0), 2, seed=0)
    assert [item["seed"] for item in drawn] == ["0", "1", "2"] * 2
    assert len({item["lr"] for item in drawn}) == 2


def test_shuffle_is_reproducible_and_leaves_the_generator_alone():
    random.seed(1)
    before = random.getstate()
    first = values_of({"a": "shuffle(range(0, 20))"})
    assert random.getstate() == before
    random.seed(2)
    assert values_of({"a": "shuffle(range(0, 20))"}) == first
    assert sorted(map(int, first["a"])) == list(range(20)) != list(map(int, first["a"]))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": []}, "sweep.params.a: the list is empty"),
        ({"a": ["range(0", "3)"]}, "sweep.params.a: .* literally. Without the brackets: range.0,3.$"),
        ({"a": "interval(2, 1)"}, "sweep.params.a: the ends of an interval"),
        ({"a": "tag(log, interval(0, 1))"}, "sweep.params.a: a logarithmic interval must start above 0"),
        ({"modell": "glob(*)"}, "there is no group 'modell'"),
        ({"model": "glob(x*)"}, "no file of the group 'model' matches"),
        (
            {"a": "interval(1, inf)"},
            "sweep.params.a: the ends of an interval must be finite and in order, not 1.0 and inf",
        ),
        ({"a": "interval(-inf, 1)"}, "sweep.params.a: the ends of an interval"),
        ({"a": "interval(nan, 1)"}, "sweep.params.a: the ends of an interval"),
        ({"a": "range(1,"}, "a=range"),
        ({"a": [1, {"größe": 1}]}, "sweep.params.a: the key 'größe' cannot be written in an override"),
    ],
)
def test_mistakes_name_the_parameter(params, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read_parameters(params, 0)


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        ("optimizer", {"lr": [0.01, 1e-3]}, ["optimizer.lr: [0.01,0.001]"]),
        (
            "optimizer",
            {"lr": "tag(log, interval(1e-4, 1e-1))", "eps": 0.1},
            ["optimizer.lr: tag(log, interval(1e-4, 1e-1))", "optimizer.eps: 0.1"],
        ),
        ("data", {"datasets": {"train": {"fold": [0, 1]}}}, ["data.datasets.train.fold: [0,1]"]),
        ("+model.more", {"a": {"b": "1,2"}}, ["+model.more.a.b: 1,2"]),
    ],
)
def test_nested_parameters_are_refused_with_their_dotted_keys(key, value, lines):
    with pytest.raises(ConfigError) as caught:
        read_parameters({key: value}, 0)
    first, *others, last = str(caught.value).splitlines()
    assert first.startswith(f"sweep.params.{key}: a mapping is one value")
    assert others == lines and last.endswith(f"{key}: [{{...}}]")
    assert len(values_of({key: [value]})[key]) == 1, "what the last line says"
    for line in lines:
        name, _, text = line.partition(": ")
        read_parameters({name: yaml.safe_load(text) if text.startswith("[") else text}, 0)


@pytest.mark.parametrize(
    "value",
    [
        {"lr": 0.1},
        {"text": "a [b"},
        {"_target_": "x.Y", "betas": [0.9, 0.99]},
        {"mine": {"_target_": "x.Y", "decays": [0.9], "text": "1,2"}},
        {},
    ],
)
def test_a_mapping_without_several_values_is_one_value(value):
    assert values_of({"a": value}) == {"a": (to_text(value),)}


def test_a_grid_of_an_interval_says_how_to_draw():
    with pytest.raises(
        ConfigError, match="sweep.params.a: a grid cannot have an interval. Draw from it: sweep.method=random"
    ):
        grid(read_parameters({"a": "interval(0, 1)"}, 0))


def test_the_parameters_of_a_draw_are_independent_of_each_other():
    params = {"a": "interval(0, 1)", "b": "interval(0, 1)", "c": ["x", "y"], "d": ["x", "y"]}
    drawn = draw(read_parameters(params, 0), 400, seed=0)
    a, b = ([float(item[key]) for item in drawn] for key in "ab")
    assert len({*a, *b}) == 800
    assert abs(statistics.correlation(a, b)) < 0.15  # three times the deviation of independent ones
    pairs = Counter((item["c"], item["d"]) for item in drawn)
    assert len(pairs) == 4 and all(70 <= count <= 130 for count in pairs.values())
    halves = Counter((item["a"] < "0.5", item["c"]) for item in drawn)
    assert len(halves) == 4 and all(70 <= count <= 130 for count in halves.values())


def test_text_in_a_list_stands_for_itself_and_other_text_is_in_the_grammar():
    texts = ["1.10", "null", "größe", "a,b", "", "lr-${optimizer.lr}"]
    values = values_of({"name": texts})["name"]
    assert [parse(f"name={value}").value() for value in values] == texts
    assert values_of({"name": "'1.10','größe'"}) == {"name": ("'1.10'", "'größe'")}
    with pytest.raises(ConfigError, match="sweep.params.name: name=größe.*\nText is parsed as an override"):
        values_of({"name": "größe"})


def test_files_of_any_name_are_matched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    for name in ("my-ä", "my-b"):
        (tmp_path / "conf" / "model" / f"{name}.yaml").touch()
    assert values_of({"model": "glob(my*)"}) == {"model": ("my-b", "'my-ä'")}


def test_what_has_to_compose_before_anything_is_drawn():
    read = read_parameters({"a": [1, 2, 3], "b": "int(interval(1, 9))", "c": "interval(0.5, 2)", "d": "x"}, 0)
    assert [item.extremes() for item in read] == [("1", "2", "3"), ("1", "9"), ("0.5", "2.0"), ("x",)]


def test_an_interval_needs_both_ends_in_their_order():
    for text in ("interval(1, 1)", "interval(2, 1)", "tag(log, interval(0, 1))"):
        with pytest.raises(ConfigError, match=r"sweep\.params\.a: "):
            read_parameters({"a": text}, 0)
    (parameter,) = read_parameters({"a": "interval(1, 9.5)"}, 0)
    assert not parameter.interval.whole
