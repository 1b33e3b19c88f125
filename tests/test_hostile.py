"""Runs that somebody tampered with, and command lines that mean harm: refused, with nothing executed or overwritten."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import REPOSITORY, SMALL, mlflow_points, run_dir
from preloaded import ksuit

from ksuit_runner.checkpoint.format import MODEL, STATE
from ksuit_runner.checkpoint.manifest import MANIFEST, fingerprint, manifest_text

# Does what a user does, many times in one process: imports are most of what a command costs.
PROGRAM = """
import contextlib, io, json, sys, traceback
from ksuit_runner.cli.dispatch import main

for arguments in json.load(sys.stdin):
    sys.argv = ["ksuit_runner", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as error:
            status = error.code
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([status, said.getvalue()]))
"""


def commands(outputs, cases, cwd=REPOSITORY):
    """Return the exit status and the output of each command."""
    lines = [[f"output_dir={outputs}", *arguments] for arguments in cases]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(lines), cwd=cwd, capture_output=True, text=True, timeout=240)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(lines), done.stdout + done.stderr
    return results


def complaint(result, words, anywhere=False):
    """Return what is wrong with a refusal, or None: it ends with status 2 and a short error that has all the words."""
    status, output = result
    text = " ".join(output.split())
    missing = [word for word in words if word not in text]
    begins = "error: " in output if anywhere else output.startswith("error: ")
    if status == 2 and begins and not missing and len(output) < 2000:
        return None
    return f"status {status}, without {missing}: {output[:1000]}"


def are_refused(results, expected, **options):
    complaints = [complaint(*pair, **options) for pair in zip(results, expected, strict=True)]
    assert not any(complaints), "\n".join(filter(None, complaints))


def content(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".db", ".lock")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints, in an output folder of its own."""
    outputs = tmp_path_factory.mktemp("trained") / "outputs"
    ksuit(outputs, *SMALL, "tracker=noop", "default_callbacks=none", "callbacks=[ema]", "callbacks.ema.decays=[0.99]")
    return run_dir(outputs)


@pytest.fixture
def outputs(tmp_path):
    """An output folder beside a file that hostile input would like to write to."""
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "outputs" / "runs").mkdir(parents=True)
    yield tmp_path / "outputs"
    assert (tmp_path / "victim").read_text() == "untouched"
    assert not (tmp_path / "canary").exists()


def tampered(trained, outputs, number, change):
    """Copy the run under another id and change it."""
    folder = outputs / "runs" / f"tampered{number:03}"
    shutil.copytree(trained, folder)
    box = folder / "tracker.json"
    box.write_text(json.dumps({**json.loads(box.read_text()), "run_id": folder.name, "tracker_id": None}))
    (folder / "delivered.json").unlink()
    change(folder)
    return f"resume={folder.name}"


def replaced(file, old, new):
    def change(folder):
        text = (folder / "artifacts" / file).read_text()
        assert old in text
        (folder / "artifacts" / file).write_text(text.replace(old, new, 1))

    return change


def written(file, text):
    return lambda folder: (folder / "artifacts" / file).write_text(text)


def in_config(place, target, *arguments, **more):
    """Put an object into the stored config in place of whatever is there."""
    from omegaconf import OmegaConf

    def change(folder):
        path = folder / "artifacts" / "config.yaml"
        config = OmegaConf.load(path)
        node = {"_target_": target, **({"_args_": list(arguments)} if arguments else {}), **more}
        OmegaConf.update(config, place, node, merge=False, force_add=True)
        path.write_text(OmegaConf.to_yaml(config))

    return change


def hostile_configs(canary):
    shell, code = f"touch {canary}", f"__import__('pathlib').Path({str(canary)!r}).touch()"
    target, library = "_target_", "standard library"
    places = (
        "model",
        "loss",
        "callbacks.x",
        "data.datasets.train",
        "optimizer.betas",
        "trainer.x[0]",
        "schedule",
    )
    yield from ((in_config(place, "os.system", shell), (place, target, library)) for place in places[:5] + places[6:])
    yield in_config("trainer.parameter_rules.x", "os.system", shell), ("trainer.parameter_rules.x", library)
    yield in_config("model", "builtins.eval", code), ("model._target_", library)
    yield in_config("model", "subprocess.Popen", ["touch", str(canary)]), ("model._target_", library)
    yield in_config("model", "functools.partial", {"_target_": "os.system"}), ("model._target_", library)
    yield in_config("loss", "ksuit_runner.system.run_lock.os.system", shell), ("loss._target_", library)
    yield in_config("loss", "ksuit_runner.paths.Path", "x"), ("loss._target_", library)
    yield in_config("loss", "callbacks.ema.Ema.__init__.__globals__", 1), ("loss._target_", "__init__")
    yield in_config("loss", "torch.nn.__builtins__.eval", code), ("loss._target_", "__builtins__")
    for helper in ("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method"):
        yield in_config("model", helper, {"_target_": "os.system", "_args_": [shell]}), ("model._target_", "Hydra")
    run = "torch.utils.collect_env.run"  # a function of a package that passes its argument to a shell
    yield in_config("schedule", run, shell), ("schedule._target_", "function of a package")
    yield in_config("model", run, shell), ("model._target_", "function")
    precious = str(canary.with_name("victim"))
    for program in (
        ("psutil.Popen", {"args": ["touch", str(canary)]}),
        ("numpy.memmap", {"filename": precious, "mode": "w+", "shape": [5]}),
        ("torch._C.PyTorchFileWriter", {"_args_": [precious]}),
    ):
        for place in ("data.datasets.extra", "loss.weight"):
            yield in_config(place, program[0], **program[1]), (place, "trust=[")
    writes = "ksuit_runner.system.atomic_files.write_text"
    yield in_config("schedule", writes, path=str(canary), text="x"), ("schedule._target_", "cannot be used here")
    for target_value in (["os.system"], 3, "a." * 50_000 + "b", "os", "..os.system", "os.system\n"):
        yield in_config("model", target_value), ("model._target_", "not a dotted name")
    for value in ("${oc.env:PATH}", "${now:%Y}", "${seed}"):
        yield written_line("name", value), ("config.yaml", "'${'")
    yield written_line("name", f"!!python/object/apply:os.system ['{shell}']"), ("config.yaml", "python/object")
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    yield written("config.yaml", f"a0: &a0 [lol]\n{laughs}\n"), ("config.yaml", "repeats")
    yield written("config.yaml", "a: " + "[" * 5000 + "]" * 5000), ("config.yaml", "flow level")
    yield written("config.yaml", "just some words"), ("config.yaml", "is not a mapping")
    yield written("config.yaml", "a: [1, 2"), ("config.yaml", "not a readable config")
    yield written("config.yaml", ""), ("config.yaml", "is not a mapping")
    yield written("config.yaml", "seed: 0\n"), ("the config has no",)
    yield written("config.yaml", "\n".join(f"key{i}: {i}" for i in range(700_000))), ("config.yaml", "bytes")
    yield (lambda folder: (folder / "artifacts" / "config.yaml").write_bytes(b"\xff\xfe\x00")), ("config.yaml", "read")


def written_line(key, value):
    def change(folder):
        path = folder / "artifacts" / "config.yaml"
        lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
        path.write_text("\n".join([*lines, f"{key}: {value}"]) + "\n")

    return change


def hostile_launches():
    for text in ("", "[]", "3", "{}", "{" * 9, "[" * 90_000, '{"command": "x", "overrides": "y"}'):
        yield written("launch.json", text), ("launch.json",)
    whole = {"command": "x", "overrides": []}
    for change in (
        {"overrides": [1]},
        {"mode": "resume"},
        {"mode": []},
        {"origin": "../../etc"},
        {"resumed_by": {}},
    ):
        yield written("launch.json", json.dumps(whole | change)), ("launch.json", next(iter(change)))
    yield written("launch.json", json.dumps(whole | {"command": "x" * 10_000_000})), ("launch.json", "bytes")


def links_that_leave(victim):
    def run_itself(folder):
        elsewhere = victim.parent / folder.name
        shutil.move(folder, elsewhere)
        folder.symlink_to(elsewhere)

    def part(name):
        def change(folder):
            path = folder / name
            path.unlink(missing_ok=True)
            path.symlink_to(victim)

        return change

    def artifacts(folder):
        elsewhere = victim.parent / f"{folder.name}-artifacts"
        shutil.move(folder / "artifacts", elsewhere)
        (folder / "artifacts").symlink_to(elsewhere)

    for name in ("metrics.jsonl", "run.log", "artifacts/config.yaml", "artifacts/checkpoints/.latest.tmp"):
        yield part(name), ("link", Path(name).name)
    yield run_itself, ("link",)
    yield artifacts, ("link", "artifacts")


@pytest.mark.slow
def test_a_stored_run_that_was_tampered_with_is_refused(trained, outputs, tmp_path):
    cases = [
        *hostile_configs(tmp_path / "canary"),
        *hostile_launches(),
        *links_that_leave(tmp_path / "victim"),
    ]
    lines = [[tampered(trained, outputs, number, change)] for number, (change, _) in enumerate(cases)]
    before, start = content(outputs), time.monotonic()
    are_refused(commands(outputs, lines), [words for _, words in cases])
    assert content(outputs) == before
    assert time.monotonic() - start < 120  # reading the large ones as YAML would take far longer


IDS = [
    "../../etc",
    "..",
    "/etc/passwd",
    "a\nb",
    "x" * 100_000,
    "*",
    "[a-z]",
    "'; drop table runs; --",
    "\"' or 1=1",
    "é",
    "~",
]


@pytest.mark.slow
def test_what_is_no_run_id_is_refused(trained, outputs):
    tampered(trained, outputs, 0, lambda folder: None)
    index = [
        "[" * 100_000,
        "3",
        "\udcff\x00",
        '{"run_id": ["x"], "name": "listed", "start_time": 1}',
        '{"run_id": "../..", "name": "leaves", "start_time": 1}',
        '{"run_id": "tampered000", "name": {}, "start_time": "x"}',
        '{"run_id": "tampered000", "name": "x", "start_time": 1, "mode": 1}',
    ]
    (outputs / "runs.jsonl").write_text("\n".join(index), errors="surrogateescape")
    (outputs / "runs" / "not.an.id").mkdir()
    queries = [*IDS, "listed", "leaves", "not.an.id", "last"]
    before = content(outputs)
    cases = [[f"{flag}={query}"] for flag in ("resume", "fork") for query in queries]
    are_refused(commands(outputs, cases), [()] * len(cases))
    assert content(outputs) == before


def sealed(folder):
    """Write a manifest that vouches for what is in a checkpoint's folder now."""
    (folder / MANIFEST).unlink()
    files = {path.name: fingerprint(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(manifest_text(files, folder.name, "hash", False, {}, keep_last=2))


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def checkpoints(folder):
    found = [path for path in (folder / "artifacts" / "checkpoints").iterdir() if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("_U")[1].split("_")[0]))


def evil_state(canary):
    """A pickle that runs code, as torch writes it, in place of the state."""

    def change(folder):
        torch.save({"trainer": Evil(f"touch {canary}"), "callbacks": {}}, folder / STATE)
        sealed(folder)

    return change


def evil_pickle(canary):
    """The same in the file that early versions had."""

    def change(folder):
        (folder / "trainer.pt").write_bytes(pickle.dumps(Evil(f"touch {canary}")))
        (folder / STATE).unlink()
        sealed(folder)

    return change


def evil_kind(canary):
    """A value of a type that would run code if types were looked up by name."""

    def change(folder):
        state = json.loads((folder / STATE).read_text())
        state["trainer"]["counter"] = {"__kind__": "os.system", "command": f"touch {canary}"}
        (folder / STATE).write_text(json.dumps(state))
        sealed(folder)

    return change


def no_state(folder):
    (folder / STATE).write_text("[1, 2]")
    sealed(folder)


def no_tensors(file):
    def change(folder):
        (folder / file).write_bytes(b"\xff" * 300)
        sealed(folder)

    return change


@pytest.mark.slow
def test_pickled_code_in_a_checkpoint_is_not_run_and_an_older_one_is_taken(trained, outputs, tmp_path):
    canary = tmp_path / "canary"
    harmful = [(change(canary), STATE) for change in (evil_state, evil_pickle, evil_kind)] + [(no_state, STATE)]
    (ema,) = (path.name for path in checkpoints(trained)[-1].glob("ema*"))
    harmful += [(no_tensors(MODEL), MODEL), (no_tensors(ema), ema)]
    lines = [
        [tampered(trained, outputs, number, lambda folder, change=change: change(checkpoints(folder)[-1]))]
        for number, (change, _) in enumerate(harmful)
    ]
    for number, (status, output) in enumerate(commands(outputs, lines)):
        text = "".join(output.split())
        assert status == 0, output
        assert "isdamagedandskipped" in text and harmful[number][1] in text, output
        folder = outputs / "runs" / f"tampered{number:03}"
        (whole,) = {path.read_bytes() for path in (checkpoints(folder)[-1] / MODEL, checkpoints(trained)[-1] / MODEL)}
        assert whole  # trained again from the older one, to the same end


@pytest.mark.slow
def test_without_a_good_checkpoint_nothing_starts_anew(trained, outputs, tmp_path):
    def all_evil(folder):
        for path in checkpoints(folder):
            evil_state(tmp_path / "canary")(path)

    def only(name):
        def change(folder):
            for path in checkpoints(folder):
                shutil.rmtree(path)
            for path in (folder / "artifacts" / "checkpoints").iterdir():
                if path.name != name:
                    path.unlink()
            (folder / "artifacts" / "checkpoints" / name).write_text("{}")

        return change

    def away(folder):
        shutil.move(folder / "artifacts" / "checkpoints", tmp_path / "checkpoints")
        (folder / "artifacts" / "checkpoints").symlink_to(tmp_path / "checkpoints")

    def cut(folder):
        for path in checkpoints(folder):
            (path / MODEL).write_bytes(b"")

    last = checkpoints(trained)[-1].name
    cases = [
        (all_evil, ("can be read", last, STATE)),
        (cut, ("can be read", last, MODEL)),
        (only("latest"), ("no checkpoint",)),
        (only("tags.json"), ("no checkpoint",)),
        (away, ("link",)),
    ]
    lines = [[tampered(trained, outputs, number, change)] for number, (change, _) in enumerate(cases)]
    before = content(outputs)
    are_refused(commands(outputs, lines), [words for _, words in cases], anywhere=True)
    assert content(outputs) == before


PROJECT = {
    "conf/callbacks/logs.yaml": "logs:\n  _target_: callbacks.logs.Logs\n",
    "callbacks/logs.py": """from ksuit_runner.callback_base import CallbackBase


class Logs(CallbackBase):
    def _after_update(self, update_counter):
        self.writer.add_scalar("good", update_counter.update)
        if update_counter.update == 5:
            self.writer.add_scalar("bad" * 100, 1.0)
""",
}


@pytest.mark.slow
def test_what_is_too_large_or_refused_on_a_fresh_command_line(tmp_path, outputs):
    project = tmp_path / "project"
    (project / "conf" / "model").mkdir(parents=True)
    big = project / "conf" / "model" / "big.yaml"
    big.write_text("_target_: torch.nn.Linear\n" + "".join(f"key{i}: {i}\n" for i in range(800_000)))
    start = time.monotonic()
    are_refused(commands(outputs, [["model=big"]], cwd=project), [("big.yaml", "bytes")])
    canary = tmp_path / "canary"
    shell = f'"touch {canary}"'
    cases = {
        f"+callbacks.x={{_target_: os.system, _args_: [{shell}]}}": ("callbacks.x._target_", "standard library"),
        f"model={{_target_: torch.nn.Sequential, _args_: [{{_target_: os.system, _args_: [{shell}]}}]}}": ("model",),
        f"+trainer.parameter_rules.x=[[{{_target_: os.system, _args_: [{shell}]}}]]": ("parameter_rules",),
        f"+trainer.parameter_rules.x={{y: [{{_target_: os.system, _args_: [{shell}]}}]}}": ("rules.x", "library"),
        "name=" + "x" * 10_000_000: ("name=xxx", "characters"),
        "name=[" + "1," * 15_000 + "1]": ("name=[1", "characters"),
        "name=" + "[" * 2000 + "]" * 2000: ("nested",),
        "+model.x=" + "[" * 100 + "]" * 100: ("nested",),
        r"name='\${oc.env:PATH}'": ("name", "'${'"),
        "~seed": ("seed",),
    }
    are_refused(commands(outputs, [[case] for case in cases]), cases.values())
    assert time.monotonic() - start < 120
    assert list(outputs.iterdir()) == [outputs / "runs"]


def test_a_metric_key_that_mlflow_refuses_names_its_callback_and_loses_nothing(tmp_path, outputs):
    project = tmp_path / "project"
    for name, text in PROJECT.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    output = ksuit(outputs, *SMALL, "default_callbacks=none", "callbacks=[logs]", status=2, cwd=project)
    text = " ".join(output.split())
    assert "callbacks.logs: metric 'badbad" in text and "1 to 250 characters in MLflow, not 300" in text
    assert "Traceback" not in output
    points = {key: value for key, value in mlflow_points(outputs).items() if key[0] == "good"}
    assert points == {("good", step): float(step) for step in range(1, 5)}
