"""A stored config that this user has not made here is data: what it may name, and how more is allowed."""

import sys

import pytest
import torch
from omegaconf import OmegaConf

from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust
from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.stored_run import Launch, read_config_and_text, store
from ksuit_runner.security.authorship import KEY_VARIABLE, is_signed, sign
from ksuit_runner.security.trust import limits, trust_in

OWN = """
import psutil
import torch.nn
from psutil import Popen as Program
from torch.utils.data import TensorDataset as Tensors

try:
    from psutil import Popen as Maybe
except ImportError:
    class Maybe:
        pass

class Model(torch.nn.Module):
    pass

class Data:
    def __init__(self, transform=None):
        self.transform = transform
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return index
"""
PACKAGE = "import torch.nn\n\nclass Model(torch.nn.Module):\n    pass\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with code of its own, an installed package beside it, and code in its output folder."""
    project = tmp_path / "project"
    for path, text in {
        "project/owncode.py": OWN,
        "project/outputs/planted.py": PACKAGE,
        "site-packages/installed.py": PACKAGE,
        "site-packages/timm/__init__.py": "from .models import create_model\n",
        "site-packages/timm/models/__init__.py": "from ._factory import create_model\n",
        "site-packages/timm/models/_factory.py": "def create_model(model_name, **kwargs):\n    pass\n",
        "project/.venv/lib/site-packages/local.py": PACKAGE,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.chdir(project)
    for folder in (project / ".venv" / "lib" / "site-packages", tmp_path / "site-packages", project):
        monkeypatch.syspath_prepend(str(folder))
    yield project
    for name in ("owncode", "outputs", "outputs.planted", "installed", "local", *filter(_is_of_timm, sys.modules)):
        sys.modules.pop(name, None)


def _is_of_timm(name):
    return name.partition(".")[0] == "timm"


def trust(project, *packages, changes=()):
    return Trust(packages, project / "outputs", changes)


def both(path, node, given):
    """Check a part of a config from source, and again when it would be built."""
    config: dict = {}
    parts = path.split(".")
    part = config
    for key in parts[:-1]:
        part = part.setdefault(key, {})
    part[parts[-1]] = node
    complaints = []
    for check in (
        lambda: ObjectChecker(trust=given).walk(path, node),
        lambda: Factory(config, given).delayed(path, None),
    ):
        try:
            check()
            complaints.append("")
        except ConfigError as error:
            complaints.append(str(error))
    return complaints


NESTED = {"_target_": "torch.nn.Sequential"}
DATA = {"_target_": "owncode.Data"}
POPEN = {"_target_": "psutil.Popen", "args": ["true"]}
OPENER = "torch.utils.data.datapipes.iter.FileOpener"
REFUSED = [
    ("data.datasets.x", POPEN, "psutil"),
    ("data.datasets.x", {"_target_": "numpy.memmap", "filename": "x", "mode": "w+", "shape": [5]}, "numpy"),
    ("data.datasets.x", {"_target_": "torch._C.PyTorchFileWriter", "_args_": ["x"]}, "torch"),
    ("loss", {**NESTED, "_args_": [POPEN]}, "psutil"),
    ("data.datasets.x", {**DATA, "transform": [[{"y": {"_target_": "numpy.memmap"}}]]}, "numpy"),
    ("data.datasets.x", {**DATA, "_recursive_": False, "transform": {**POPEN, "_partial_": True}}, "psutil"),
    ("data.datasets.x", {**DATA, "_convert_": "all", "transform": {"_target_": OPENER, "datapipe": []}}, "torch"),
    ("callbacks.x.metrics.y", {"_target_": "torchmetrics.image.TotalVariation", "_partial_": True}, "torchmetrics"),
    ("model", {"_target_": "installed.Model"}, "installed"),
    ("model", {"_target_": "local.Model"}, "local"),
    ("model", {"_target_": "outputs.planted.Model"}, "outputs"),
    ("model", {"_target_": "owncode.Program", "args": ["true"]}, "psutil"),
    ("model", {"_target_": "owncode.psutil.Popen", "args": ["true"]}, "psutil"),
    ("model", {"_target_": "owncode.Maybe", "args": ["true"]}, "psutil"),
    ("model", {"_target_": "ksuit_runner.record.provenance.psutil.Popen", "args": ["true"]}, "psutil"),
]


@pytest.mark.parametrize(("path", "node", "package"), REFUSED)
def test_what_is_of_another_package_is_refused_before_anything_of_it_is_called(project, path, node, package):
    from_source, built = both(path, node, trust(project))
    for complaint in (built, from_source or built):  # the source of a compiled class does not tell
        assert complaint.startswith(path), complaint
        assert f"trust=[{package}]" in complaint
    assert not (project / "x").exists()


ALLOWED = [
    ("model", {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}),
    ("model", {"_target_": "ksuit_runner.models.mlp.Mlp"}),
    ("model", {"_target_": "owncode.Model"}),
    ("model", {"_target_": "owncode.torch.nn.ReLU"}),
    ("loss", {"_target_": "torch.nn.CrossEntropyLoss"}),
    ("optimizer", {"_target_": "torch.optim.AdamW", "lr": 1}),
    ("data.datasets.x", {"_target_": "owncode.Data", "transform": {"_target_": "owncode.Model"}}),
    ("data.datasets.x", {"_target_": "torch.utils.data.ConcatDataset", "datasets": [{"_target_": "owncode.Data"}]}),
    ("callbacks.x", {"_target_": "callbacks.ema.Ema", "decays": [0.5]}),
    ("callbacks.x.metrics.f1", {"_target_": "torchmetrics.classification.MulticlassF1Score", "num_classes": 3}),
]


@pytest.mark.parametrize(("path", "node"), ALLOWED)
def test_what_ships_is_the_projects_own_or_torchs_building_blocks_may_stand_there(project, path, node):
    assert both(path, node, trust(project)) == ["", ""]


def test_the_user_says_which_packages_are_trusted_and_what_the_command_line_brings_is(project):
    node = {"_target_": "installed.Model"}
    for given in (
        trust(project, "installed"),
        trust(project, changes=("model",)),
        trust(project, changes=("model._target_",)),
        None,
    ):
        assert both("model", node, given) == ["", ""]
    for given in (
        trust(project, "install"),
        trust(project, "installed.models"),
        trust(project, changes=("mode", "model.x")),
    ):
        assert all("trust=[installed]" in complaint for complaint in both("model", node, given))
    inner = {**NESTED, "_args_": [node]}
    assert both("model", inner, trust(project, changes=("model._args_",))) == ["", ""]
    assert all(both("model", inner, trust(project, changes=("model._target_",))))


def test_a_function_is_called_if_it_was_made_for_its_place_or_the_user_names_it(project):
    """Any other one could delete files, whoever wrote it."""
    (project / "owncode.py").write_text(
        "import torch\n\ndef build(input_shape):\n    pass\n\ndef clean(folder='.'):\n    pass\n\n"
        "class Model(torch.nn.Module):\n    @classmethod\n    def from_file(cls, path='x'):\n        pass\n"
    )
    clean, load = {"_target_": "owncode.clean"}, {"_target_": "owncode.Model.from_file"}
    assert both("model", {"_target_": "owncode.build"}, trust(project)) == ["", ""]
    nested = {"_target_": "torch.utils.data.ConcatDataset", "datasets": [clean]}
    shipped = {"_target_": "ksuit_runner.system.untrusted_files.remove", "path": "outputs"}
    for path, node in (("model", clean), ("data.datasets.x", clean), ("model", load), ("data.datasets.x", nested)):
        for complaint in both(path, node, trust(project)):
            assert complaint.startswith(path) and complaint.endswith("'trust=[owncode]'"), complaint
        for given in (trust(project, "owncode"), trust(project, changes=(path,)), None):
            assert node is nested or both(path, node, given) == ["", ""]
    assert all("is a function" in complaint for complaint in both("data.datasets.x", shipped, trust(project)))
    builder = {"_target_": "timm.create_model", "model_name": "vit", "img_size": 8}
    for complaint in both("model", builder, trust(project)):
        assert complaint.startswith("model._target_") and complaint.endswith("'trust=[timm]'")
    for given in (trust(project, "timm"), trust(project, changes=("model",)), None):
        assert both("model", builder, given) == ["", ""]
    assert all("is a function" in complaint for complaint in both("loss", builder, None))


def test_code_in_the_output_folder_is_nobodys_even_if_that_is_the_project(project):
    (project / "runs" / "r1").mkdir(parents=True)
    (project / "runs" / "r1" / "planted.py").write_text(PACKAGE)
    here = Trust((), project)
    assert all(both("model", {"_target_": "runs.r1.planted.Model"}, here))
    assert both("model", {"_target_": "owncode.Model"}, here) == ["", ""]


def test_a_shipped_class_that_opens_files_is_no_argument(project):
    victim = project / "victim"
    victim.write_text("untouched")
    for target, argument in (("record.journal.Journal", "path"), ("ui.logs._FileHandler", "filename")):
        node = {**NESTED, "x": {"_target_": f"ksuit_runner.{target}", argument: str(victim)}}
        with pytest.raises(ConfigError, match=f"ksuit_runner.{target}' is not a class that a config builds"):
            Factory({"loss": node}, trust(project)).build("loss", torch.nn.Module)
    assert victim.read_text() == "untouched"
    data = {**NESTED, "_args_": [{"_target_": "ksuit_runner.data.digits.Digits", "split": "train"}]}
    assert isinstance(Factory({"loss": data}, trust(project)).delayed("loss", None).args[0], Digits)


def test_what_is_not_a_dataset_is_refused_before_it_is_built(project):
    for given in (trust(project), None):
        with pytest.raises(ConfigError, match=r"data\.datasets\.x\._target_: ReLU is not a dataset"):
            Factory({"data": {"datasets": {"x": {"_target_": "torch.nn.ReLU"}}}}, given).delayed(
                "data.datasets.x", None
            )


def trust_in_run(paths, tracker, overrides):
    return trust_in(paths.signature, [read_config_and_text(paths)[1]], paths, tracker, overrides)


@pytest.fixture
def stored(project):
    paths = PathProvider(project / "outputs", "run00000")
    store(paths, {"seed": 1, "tracker": {"uri": None}}, Launch("x", []))
    return paths


@pytest.fixture
def key(project, tmp_path, monkeypatch):
    path = tmp_path / "state" / "key"
    monkeypatch.setenv(KEY_VARIABLE, str(path))
    return path


def test_the_users_own_config_is_known_until_it_is_touched(key, stored):
    assert trust_in_run(stored, {}, []) is None
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_bytes().hex() not in stored.signature.read_text()
    text = stored.config.read_text()
    stored.config.write_text(text + "\n")
    assert trust_in_run(stored, {}, []) == Trust((), stored.output_dir)
    stored.config.write_text(text)
    assert trust_in_run(stored, {}, []) is None


def test_what_a_resume_has_changed_is_signed_anew(key, stored):
    store(stored, {"seed": 2, "tracker": {"uri": None}}, Launch("x", []))
    assert trust_in_run(stored, {}, []) is None


@pytest.mark.parametrize("change", ["other key", "no key", "others read it", "a link", "short", "no signature", "pipe"])
def test_without_the_users_key_a_config_is_nobodys(key, stored, change, tmp_path, monkeypatch):
    assert is_signed(stored.signature, [stored.config.read_text()])
    if change == "other key":
        key.unlink()
        sign(tmp_path / "x", "")
    elif change == "no key":
        key.unlink()
    elif change == "others read it":
        key.chmod(0o640)
    elif change == "a link":
        key.rename(tmp_path / "elsewhere")
        key.symlink_to(tmp_path / "elsewhere")
    elif change == "short":
        key.write_bytes(b"")
    else:
        stored.signature.unlink()
        if change == "pipe":
            import os

            os.mkfifo(stored.signature)
    assert trust_in_run(stored, {}, []) is not None


def test_where_no_key_can_be_kept_nothing_is_signed_and_nothing_fails(project, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "file" / "key"))
    paths = PathProvider(project / "outputs", "run00000")
    store(paths, {"seed": 1}, Launch("x", []))
    assert not paths.signature.exists()
    assert trust_in_run(paths, {}, []) is not None


def test_the_list_comes_from_the_users_config_and_command_line_only(key, stored, project):
    stored.config.write_text("seed: 1\ntrust: [psutil]\n")
    assert trust_in_run(stored, {}, []).packages == ()
    assert trust_in_run(stored, {}, ["trust=[timm,a.b]"]).packages == ("timm", "a.b")
    for wrong in ("timm", "3", "[1]"):
        with pytest.raises(ConfigError, match="^trust: "):
            trust_in_run(stored, {}, [f"trust={wrong}"])


def test_a_config_of_others_sends_nothing_where_the_user_does_not(project, monkeypatch):
    paths, said = PathProvider(project / "outputs", "run00000"), ["tracker.uri=http://host:5000"]
    node = OmegaConf.create({"uri": "http://host:5000", "artifact_root": None})
    with pytest.raises(ConfigError, match=r"tracker\.uri=http://host:5000"):
        limits(paths, node, [])
    with pytest.raises(ConfigError, match=r"tracker\.artifact_root=/etc"):
        limits(paths, {"artifact_root": "/etc"}, said)
    limits(paths, node, said)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    limits(paths, node, [])
