import gc
from math import inf, nan

import torch

from ksuit_runner.tensors.first_not_finite import FirstNotFinite, NotFinite


def looked(*updates):
    seen = FirstNotFinite()
    for update, values in enumerate(updates, 1):
        seen.begin(update)
        for name, value in values.items():
            seen.look(name, torch.tensor([1.0, value]))
    return seen


def test_it_is_the_first_one_of_the_first_update():
    good, other = {"a": 1.0, "b": 2.0, "c": 3.0}, {"c": 1.0, "d": 2.0}
    seen = looked(good, other, {**good, "b": nan, "c": inf}, {**other, "c": nan}, good)
    assert seen.take() == NotFinite(3, "b", "a")
    assert seen.take() is None
    assert looked(other, {**good, "a": inf}).take() == NotFinite(2, "a", "")
    assert looked(good, other).take() is None
    assert looked(good, {**other, "d": nan}).take() == NotFinite(2, "d", "c")


def test_what_has_no_numbers_to_be_wrong_is_passed_over():
    seen = FirstNotFinite()
    for tensor in (torch.tensor([1]), torch.empty(0), torch.tensor([1.0, nan]).to_sparse()):
        seen.look("other", tensor)
    assert seen.take() is None
    seen.look("complex", torch.tensor([complex(0, nan)]))
    assert seen.take() == NotFinite(0, "complex", "")


def test_many_updates_are_held_like_one():
    def held(updates):
        seen = looked(*[{"a": 1.0, "b": 2.0}] * updates)
        gc.collect()
        count = sum(type(item) is torch.Tensor for item in gc.get_objects())
        assert seen.take() is None
        return count

    assert held(2) == held(50)
