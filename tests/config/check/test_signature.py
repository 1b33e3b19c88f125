import ast
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

from ksuit_runner.config.check.signature import Signature, SignatureReader
from ksuit_runner.config.schema import UNKNOWN, TargetParameter
from ksuit_runner.errors import ConfigError
from ksuit_runner.system.optional_package import EXTRAS


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module below a folder that is on sys.path; importing any of them would fail."""

    def write_file(path, text, folder="lib"):
        root = tmp_path / folder
        if str(root) not in sys.path:
            monkeypatch.syspath_prepend(str(root))
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text) + "\nraise ImportError('this is only read')\n")

    return write_file


def read_signature(target: str) -> Signature | None:
    return SignatureReader().read(target)


def read(target: str) -> Signature:
    signature = read_signature(target)
    assert signature is not None
    return signature


def names(target: str) -> list[str]:
    return [parameter.name for parameter in read(target).parameters]


def test_parameters_of_a_class(write):
    write(
        "lab/a.py",
        """
        class A:
            def __init__(self, x: int, y: "str | None" = None, *rest, z: float = 1e-3, w=object(), v):
                pass
        """,
    )
    signature = read("lab.a.A")
    assert signature.is_class and not signature.any_name and signature.bases == {"lab.a.A"}
    assert signature.parameters == (
        TargetParameter("x", "int"),
        TargetParameter("y", "str | None", required=False, default=None),
        TargetParameter("z", "float", required=False, default=1e-3),
        TargetParameter("w", None, required=False, default=UNKNOWN),
        TargetParameter("v", None),
    )


def test_parameters_of_a_function(write):
    write("lab/a.py", "def make(x, y=-1, **more): ...")
    signature = read("lab.a.make")
    assert not signature.is_class and signature.any_name
    assert signature.parameters == (TargetParameter("x"), TargetParameter("y", required=False, default=-1))


def test_a_class_without_constructor_takes_that_of_its_base(write):
    write("lab/a.py", "class A:\n    def __init__(self, x): ...\nclass B(A): ...\nclass C: ...")
    assert names("lab.a.B") == ["x"]
    assert names("lab.a.C") == []
    assert not read("lab.a.C").any_name


def test_kwargs_passed_on_ask_for_what_the_base_asks_for(write):
    write("lab/base.py", "class Base:\n    def __init__(self, a, b=2, c=3): ...")
    write(
        "lab/a.py",
        """
        from .base import Base

        class Middle(Base):
            def __init__(self, d, **kwargs):
                super().__init__(**kwargs)

        class Fixed(Middle):
            def __init__(self, e, **rest):
                super().__init__(e, b=5, **rest)

        class Old(Base):
            def __init__(self, f, **kwargs):
                Base.__init__(self, f, **kwargs)

        class Open(Base):
            def __init__(self, *args, g, **kwargs):
                super().__init__(*args, **kwargs)

        class OldOpen(Base):
            def __init__(self, f, *args, **kwargs):
                Base.__init__(self, f, *args, **kwargs)
        """,
    )
    assert names("lab.a.Open") == ["g", "a", "b", "c"]
    assert names("lab.a.OldOpen") == ["f", "b", "c"]
    assert names("lab.a.Middle") == ["d", "a", "b", "c"]
    assert names("lab.a.Fixed") == ["e", "a", "c"]
    assert names("lab.a.Old") == ["f", "b", "c"]
    assert not read("lab.a.Fixed").any_name
    assert read("lab.a.Fixed").bases == {"lab.a.Fixed", "lab.a.Middle", "lab.base.Base"}


def test_kwargs_used_in_other_ways_may_be_anything(write):
    write(
        "lab/a.py",
        """
        class Base:
            def __init__(self, a): ...
        class Kept(Base):
            def __init__(self, b, **kwargs):
                self.kwargs = kwargs
        class Popped(Base):
            def __init__(self, b, **kwargs):
                self.c = kwargs.pop("c")
                super().__init__(**kwargs)
        """,
    )
    assert read("lab.a.Kept").any_name
    assert read("lab.a.Popped").any_name


def test_several_bases_in_the_order_of_look_up(write):
    write(
        "lab/a.py",
        """
        class Root:
            logs = ("root",)
            def __init__(self, r): ...
        class Left(Root): ...
        class Right(Root):
            logs = ["right"]
            def __init__(self, s): ...
        class Both(Left, Right): ...
        """,
    )
    signature = read("lab.a.Both")
    assert names("lab.a.Both") == ["s"]
    assert signature.logs == ("right",)


def test_logs(write):
    write(
        "lab/a.py",
        """
        class Open:
            logs: ClassVar[Sequence[str] | None] = None
        class Declared(Open):
            logs: ClassVar[Sequence[str] | None] = ("a/{b}", "c")
        class Inherited(Declared): ...
        class Computed(Declared):
            logs = (*Declared.logs, "d")
        """,
    )
    assert read("lab.a.Open").logs is None
    assert read("lab.a.Inherited").logs == ("a/{b}", "c")
    assert read("lab.a.Computed").logs is None


def test_re_exports_and_aliases_are_followed(write):
    write("lab/inner/deep.py", "class Deep:\n    def __init__(self, x): ...")
    write("lab/inner/__init__.py", "from .deep import Deep as Public\nfrom ..other import *")
    write(
        "lab/other.py", "import lab.inner.deep\nimport lab.inner.deep as d\nLong = lab.inner.deep.Deep\nShort = d.Deep"
    )
    write("lab/__init__.py", "from lab.inner import Public, Long\nfrom lab import inner")
    for target in ("lab.Public", "lab.inner.Public", "lab.Long", "lab.inner.Short", "lab.other.Long"):
        assert read(target).bases == {"lab.inner.deep.Deep"}, target


def test_the_branch_that_holds_the_real_thing_counts(write):
    write(
        "lab/a.py",
        """
        try:
            from lab.b import Base
        except ImportError:
            Base = None
        if True:
            class A(Base):
                def __init__(self, **kwargs):
                    super().__init__(**kwargs)
        else:
            class A: ...
        """,
    )
    write("lab/b.py", "class Base:\n    def __init__(self, x): ...")
    assert names("lab.a.A") == ["x"]


def test_namespace_packages_merge_several_folders(write):
    write("lab/first.py", "class A:\n    def __init__(self, x): ...", folder="one")
    write("lab/sub/third.py", "class C:\n    def __init__(self, z): ...", folder="one")
    write("lab/second.py", "from lab.first import A\nclass B(A): ...", folder="two")
    write("lab/sub/fourth.py", "from .third import C\nclass D(C): ...", folder="two")
    assert names("lab.second.B") == ["x"]
    assert names("lab.sub.fourth.D") == ["z"]


def test_dataclasses(write):
    write(
        "lab/a.py",
        """
        from dataclasses import dataclass, field, KW_ONLY
        @dataclass
        class A:
            x: int
            count: ClassVar[int] = 0
        @dataclass(frozen=True)
        class B(A):
            _: KW_ONLY
            y: list[int] = field(default_factory=list)
            z: str = "z"
            hidden: int = field(init=False)
            needed: int = field(repr=False)
        """,
    )
    assert read("lab.a.B").parameters == (
        TargetParameter("x", "int"),
        TargetParameter("y", "list[int]", required=False),
        TargetParameter("z", "str", required=False, default="z"),
        TargetParameter("needed", "int"),
    )


def test_what_cannot_be_told_from_source_is_left_open(write):
    write(
        "lab/a.py",
        """
        from gone import Missing
        Made = type("Made", (), {})
        class Child(Missing):
            def __init__(self, x): ...
        class Bare(Missing): ...
        class Named(make_base("x")): ...
        @register
        class Decorated: ...
        class Circle(Circle): ...
        """,
    )
    write("lab/lazy.py", "def __getattr__(name): ...")
    assert read_signature("lab.a.Made") is None
    assert read_signature("lab.a.Missing") is None
    assert read_signature("lab.lazy.Anything") is None
    assert read_signature("_struct.Struct") is None  # compiled
    child = read("lab.a.Child")
    assert not child.knows_bases and not child.any_name and child.logs is None
    assert all(read(f"lab.a.{name}").any_name for name in ("Bare", "Named", "Decorated", "Circle"))


LAZY = """
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        from lab.net import Net
    {exported}
    def __getattr__(name): return globals().setdefault(name, ...)
"""


def test_a_package_with_a_literal_all_makes_up_no_other_names(write):
    write("lab/net.py", "class Net:\n    def __init__(self, x: int): ...")
    write("lab/__init__.py", LAZY.format(exported="__all__ = ['Net', 'Made']"))
    assert read("lab.Net").parameters == (TargetParameter("x", "int"),)
    assert read("lab.Net").bases == {"lab.net.Net"}
    assert read_signature("lab.Made") is None
    with pytest.raises(ConfigError, match="there is no 'Mde' in 'lab'. Did you mean 'Made'?"):
        read_signature("lab.Mde")


@pytest.mark.parametrize(
    "exported",
    ["", "__all__ = ['Net', *more]", "__all__ = ['Net']; __all__ += more", "__all__ = ['Net']; __all__.append('X')"],
)
def test_a_package_without_one_may_have_any_name(write, exported):
    write("lab/net.py", "class Net: ...")
    write("lab/__init__.py", LAZY.format(exported=exported))
    assert read_signature("lab.Nett") is None


def test_a_package_loaded_lazily_may_have_any_name_that_its_modules_bind(write):
    write("lab/__init__.py", "from lab.net import *\ndef __getattr__(name): ...")
    write(
        "lab/net.py",
        """
        '''Not even a Word of a text is one.'''
        from gone import Taken
        from gone import (
            Of,
            Several,
        )
        First, Second = Taken, Of
        if Taken:
            class Deep(Taken): ...
        """,
    )
    for name in ("Taken", "Of", "Several", "First", "Second", "Deep"):
        read_signature(f"lab.{name}")
    with pytest.raises(ConfigError, match="there is no 'Word' in 'lab'"):
        read_signature("lab.Word")


def test_imports_in_a_circle_end(write):
    write("lab/a.py", "from lab.b import X")
    write("lab/b.py", "from lab.a import X")
    assert read_signature("lab.a.X") is None


def test_of_a_package_that_is_not_installed_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(EXTRAS, "labratory", "lab")
    with pytest.raises(ConfigError, match=r"'labratory' is not installed. pip install 'ksuit_runner\[lab\]'"):
        read_signature("labratory.a.Net")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("labratory.a.Net", "there is no module 'labratory'. Did you mean 'laboratory'?"),
        ("lab.nets.Net", "there is no 'nets' in 'lab'. Did you mean 'net'?"),
        ("lab.net.Nett", "there is no 'Nett' in 'lab.net'. Did you mean 'Net'?"),
        ("lab.shop.Nett", "there is no 'Nett' in 'lab.shop'. Did you mean 'Net'?"),
        ("lab.net", "'lab.net' is a module, not a class"),
        ("lab", "'lab' is a module, not a class"),
        ("lab.broken.Net", "module 'lab.broken', line 1: "),
    ],
)
def test_a_target_that_does_not_exist(write, target, message):
    write("lab/net.py", "class Net: ...\nclass Loss: ...")
    write("lab/shop.py", "from lab.net import *")
    write("lab/broken.py", "class Net(:")
    write("laboratory/net.py", "")
    with pytest.raises(ConfigError) as error:
        read_signature(target)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("file", ["labyrinth.py", "labyrinth/__init__.py"])
@pytest.mark.parametrize("here", ["project/scripts", "."])
def test_a_module_of_a_project_around_is_found(tmp_path, monkeypatch, file, here):
    path = tmp_path / "project" / file
    path.parent.mkdir(parents=True)
    path.write_text("class Net: ...")
    (tmp_path / "project" / "scripts").mkdir()
    monkeypatch.chdir(tmp_path / here)
    project = tmp_path / "project"
    with pytest.raises(ConfigError, match=f"^there is no module 'labyrinth'. {project} has it: cd {project}$"):
        read_signature("labyrinth.Net")


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "os.path.join", "subprocess.run", "time.sleep"])
def test_functions_are_known_as_functions(target):
    assert not read(target).is_class


def test_methods_and_nested_classes(write):
    write("lab/a.py", "class A:\n    class Inner:\n        def __init__(self, x): ...\n    def make(self): ...")
    assert names("lab.a.A.Inner") == ["x"]
    assert not read("lab.a.A.make").is_class
    assert read_signature("lab.a.A.inherited") is None


def test_a_reader_sees_a_file_once(write, tmp_path):
    write("lab/a.py", "class A: ...")
    reader = SignatureReader()
    first = reader.read("lab.a.A")
    (tmp_path / "lib" / "lab" / "a.py").unlink()
    assert reader.read("lab.a.A") == first


def test_the_callbacks_of_the_framework():
    signature = read("ksuit_runner.callback_bases.periodic.DatasetCallback")
    names = ["dataset_key", "batch_size", "max_batches", "at_end", "weights_of"]
    names += ["every_n_epochs", "every_n_updates", "every_n_samples", "at_start", "trainer"]
    assert [item.name for item in signature.parameters][: len(names)] == names
    assert "ksuit_runner.callback_base.CallbackBase" in signature.bases and signature.knows_bases


def test_the_classes_of_torch():
    for target, root in (
        ("torch.optim.AdamW", "torch.optim.optimizer.Optimizer"),
        ("torch.optim.SGD", "torch.optim.optimizer.Optimizer"),
        ("torch.nn.CrossEntropyLoss", "torch.nn.modules.module.Module"),
        ("torch.nn.Linear", "torch.nn.modules.module.Module"),
    ):
        assert root in read(target).bases
        assert not read(target).any_name


def test_reading_imports_nothing():
    script = """
import sys
from ksuit_runner.config.check.signature import SignatureReader
before = set(sys.modules)
reader = SignatureReader()
assert reader.read("torch.optim.AdamW") and reader.read("sklearn.linear_model.Ridge")
print(*sorted({"torch", "sklearn", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def lazy_package(write, count):
    """Write a package that shows its modules by stars, as those that are loaded lazily do."""
    lazy = "import sys\nsys.modules[__name__] = object()\n"
    write("lazy/__init__.py", f"{lazy}from .models import *\n")
    write("lazy/models/__init__.py", lazy + "".join(f"from .m{number} import *\n" for number in range(count)))
    for number in range(count):
        write(f"lazy/models/m{number}/__init__.py", f"{lazy}from .net{number} import *\n")
        write(f"lazy/models/m{number}/net{number}.py", f"class Net{number}:\n    def __init__(self, width: int): ...\n")


def test_a_lazy_package_is_searched_without_parsing_all_of_it(write, monkeypatch):
    lazy_package(write, 100)
    parsed = []
    parse = ast.parse
    monkeypatch.setattr(
        "ast.parse", lambda source, *rest, **words: parsed.append(source) or parse(source, *rest, **words)
    )
    assert names("lazy.Net3") == ["width"]
    assert len([source for source in parsed if "class Net" in source]) <= 11  # Net3, and Net30 to Net39
    with pytest.raises(ConfigError, match="^there is no 'Absent' in 'lazy'.$"):
        read_signature("lazy.Absent")


def test_a_search_that_would_take_long_is_left_to_the_factory(write, monkeypatch):
    monkeypatch.setattr("ksuit_runner.config.check.signature_lookup._MOST_SEARCHED", 50)
    lazy_package(write, 100)
    write("lazy/models/m5/net5.py", "class Net3: ...\n")  # so that it is not clear which one is meant
    reader = SignatureReader()
    assert reader.read("lazy.Net3") is None  # the last one is asked first
    assert reader.read("lazy.Net99").parameters[0].name == "width"
    assert reader.read("lazy.models.m3.net3.Net3").parameters[0].name == "width"


@pytest.fixture(params=["callbacks/__init__.py", "callbacks.py"])
def own_package(tmp_path, request):
    """A project whose callbacks are a package, or a module, that would hide those that ship."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / request.param).write_text("OWN = 1\n")
    (tmp_path / "callbacks" / "mine.py").write_text("class Mine:\n    pass\n")
    (tmp_path / "callbacks" / "ema.py").write_text("class Ema:\n    def __init__(self, own): ...\n")
    return tmp_path


def test_callbacks_that_ship_are_read_beside_a_package_of_ones_own(own_package, monkeypatch):
    monkeypatch.syspath_prepend(own_package)
    assert "dataset_key" in names("callbacks.accuracy.Accuracy")
    assert names("callbacks.mine.Mine") == [] and names("callbacks.ema.Ema") == ["own"]


def test_callbacks_that_ship_are_imported_beside_a_package_of_ones_own(own_package):
    program = """
        import sys
        sys.path.insert(0, "")
        import callbacks, importlib.util, ksuit_runner
        assert getattr(callbacks, "OWN", 1) == 1
        for name in ("accuracy", "mine", "ema"):
            print(importlib.util.find_spec(f"callbacks.{name}").origin)
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], cwd=own_package, capture_output=True, text=True)
    ships, *own = done.stdout.splitlines()
    assert Path(ships).samefile(Path(__file__).parents[3] / "callbacks" / "accuracy.py"), done.stderr
    assert own == [str(own_package / "callbacks" / f"{name}.py") for name in ("mine", "ema")]


def test_a_package_that_is_loaded_lazily_is_searched_and_not_parsed(write):
    lazy = "import sys\nif TYPE_CHECKING:\n    from {} import *\nelse:\n    sys.modules[__name__] = object()\n"
    write("lazily/__init__.py", lazy.format(".models"))
    write("lazily/models/__init__.py", lazy.format(".modeling_bert"))
    update = "class BertAuto(Base): ...\nBertAuto = update(BertAuto)\n"
    write(
        "lazily/models/modeling_bert.py", f"class BertModel(Base):\n    def __init__(self, config: int): ...\n{update}"
    )
    write("lazily/models/modular_bert.py", "class BertModel(Base): ...\n")  # which nothing imports
    write("lazily/models/broken.py", "class Other(: BertModelling\n")  # which could not be parsed
    assert names("lazily.BertModel") == ["config"]
    assert read_signature("lazily.BertAuto").is_class
    with pytest.raises(ConfigError, match="^there is no 'BertModl' in 'lazily'. Did you mean 'BertModel'?"):
        read_signature("lazily.BertModl")
    write("lazily/models/native.so", "")  # which may have any name
    assert read_signature("lazily.BertModl") is None


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_is_read_within_two_seconds():
    begin = time.process_time()
    assert SignatureReader().read("transformers.BertModel").is_class
    with pytest.raises(ConfigError, match="Did you mean 'AutoModel'?"):
        SignatureReader().read("transformers.AutoModl")
    assert SignatureReader().read("transformers.Linear") is None  # a word of many modules, in which none exports it
    assert time.process_time() - begin < 2
