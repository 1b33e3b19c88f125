import sys

import pytest
import torch
from omegaconf import OmegaConf

from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import DEEPEST, check_function, check_module, check_name, check_values
from ksuit_runner.errors import ConfigError


def shell(optimizer, total_updates):
    """A function of the tests, which belong to the project."""
    raise AssertionError


@pytest.mark.parametrize("name", ["torch.nn.Linear", "callbacks.ema.Ema", "a._private.B", "osmium.System"])
def test_names_that_may_stand(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *(
            (name, "standard library")
            for name in ("os.system", "builtins.eval", "subprocess.Popen", "functools.partial")
        ),
        *(
            (name, "standard library")
            for name in ("posix.system", "_io.open", "importlib.import_module", "pathlib.Path")
        ),
        *((name, "Hydra") for name in ("hydra.utils.call", "hydra._internal.utils._locate", "omegaconf.OmegaConf")),
        ("torch.nn.__builtins__.eval", "'__builtins__'"),
        ("callbacks.ema.Ema.__init__.__globals__", "'__init__'"),
        ("__main__.X", "'__main__'"),
        *(
            (name, "not a dotted name")
            for name in ("", "x", ".x", "x.", "a..b", "a b.c", "a.b\n", "a.b()", "x.\0", "a." * 9999 + "b")
        ),
        *((name, "not a dotted name") for name in (None, 3, 1.5, True, ["os.system"], {"a": "b"}, b"os.system")),
    ],
)
def test_names_that_are_refused(name, why):
    with pytest.raises(ConfigError, match=why) as error:
        check_name(name)
    assert len(str(error.value)) < 300


def test_what_counts_is_where_it_is_defined():
    check_module("x.Linear", "torch.nn.modules.linear")
    with pytest.raises(ConfigError, match="'x.system', defined in 'posix', belongs to Python's standard library"):
        check_module("x.system", "posix")


def test_functions_are_those_of_the_project_and_of_the_runner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, installed = tmp_path / "a.py", tmp_path / ".venv" / "lib" / "site-packages" / "a.py"
    check_function("a.f", True, "a", str(own))
    check_function("ksuit_runner.schedule.cosine", True, "ksuit_runner.schedule", None)
    for module, file in (
        ("a", str(installed)),
        ("a", None),
        ("torch.hub", torch.hub.__file__),
        ("ksuit_runner_x", None),
    ):
        with pytest.raises(ConfigError, match="function of a package"):
            check_function(f"{module}.f", True, module, file)
    with pytest.raises(ConfigError, match="only a class is accepted here"):
        check_function("a.f", False, "a", str(own))


def test_depth_and_what_is_still_to_be_resolved():
    check_values({"a": [{"b": "$x {y}"}]})
    with pytest.raises(ConfigError, match=r"a\[0\].b: '\$\{c\}' is not resolved"):
        check_values({"a": [{"b": "${c}"}]})
    deep: list = []
    for _ in range(DEEPEST + 1):
        deep = [deep]
    with pytest.raises(ConfigError, match="levels are nested"):
        check_values({"a": deep})


ALIASES = [
    "ksuit_runner.system.run_lock.os.system",
    "ksuit_runner.record.provenance.subprocess.Popen",
    "ksuit_runner.config.factory.partial",
    "ksuit_runner.config.factory.instantiate",
    "torch.utils.collect_env.run",
    "torch.hub.load",
    "torch.nn.Linear.forward",
    "torch._C._jit_init",
    "torch.nn.functional.relu",
]


@pytest.mark.filterwarnings("ignore:Using '_target_. functools.partial")  # Hydra says so before it is refused
@pytest.mark.parametrize("target", ALIASES)
@pytest.mark.parametrize("path", ["model", "schedule", "nested", "in a list", "not recursive"])
def test_the_factory_looks_at_the_object_itself(tmp_path, path, target):
    canary = tmp_path / "canary"
    node = {"_target_": target, "_args_": [f"touch {canary}"]}
    around = {"_target_": "torch.nn.Sequential"}
    model = {
        "nested": {**around, "_args_": [{**around, "_args_": [node]}]},
        "in a list": {**around, "x": [[{"y": node}]]},
        "not recursive": {**around, "_recursive_": False, "x": node},
    }.get(path, node)
    where = "schedule" if path == "schedule" else "model"
    factory = Factory(OmegaConf.create({where: model}))
    with pytest.raises(ConfigError, match=f"^{where}.*(belongs to|function|Reference|Target)"):
        factory.delayed(where, None)
    assert not canary.exists()


class Loud(torch.nn.Module):
    made = 0

    def __init__(self, *args):
        super().__init__()
        type(self).made += 1


def test_nothing_is_called_if_anything_is_refused():
    around = {"_target_": f"{__name__}.Loud"}
    config = {"model": {**around, "_args_": [around, {"_target_": "os.system", "_args_": ["true"]}]}}
    with pytest.raises(ConfigError, match=r"model._args_\[1\]._target_: 'os.system' belongs to"):
        Factory(OmegaConf.create(config)).build("model", torch.nn.Module)
    assert Loud.made == 0


def test_a_function_of_the_project_may_be_a_schedule():
    config = {"schedule": {"_target_": f"{__name__}.shell"}}
    assert Factory(OmegaConf.create(config)).delayed("schedule", None).func is sys.modules[__name__].shell
    writes = {"schedule": {"_target_": "ksuit_runner.system.atomic_files.write_text", "path": "x", "text": "y"}}
    with pytest.raises(ConfigError, match="cannot be used here"):
        Factory(OmegaConf.create(writes)).delayed("schedule", None)
