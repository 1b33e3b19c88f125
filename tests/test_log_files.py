"""Images, tables and the like: files with their updates in their names, once, whatever happens to a run."""

import io
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.delivery.metric_sender import Shipment
from ksuit_runner.errors import KsuitError
from ksuit_runner.record.file_formats import figure_files, histogram_files, image_files, table_files, text_files
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.testing import tiny_run
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.tracker.tensorboard import TensorboardTracker
from ksuit_runner.trainer.sgd import SgdTrainer


class Logging(SgdTrainer):
    """Logs from its training step, in which it fails once."""

    def __init__(self, *args, fails_at=None, diverges_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.fails_at, self.diverges_at = fails_at, diverges_at

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        self.writer.add_scalar("spread", outputs.std())
        self.writer.add_scalar("samples", float(len(outputs)))
        if self.counter.update % 2:
            self.writer.add_image("inputs/first", batch[0][0].reshape(8, 8) / 16)
            self.writer.add_text("note", f"update {self.counter.update}, {len(outputs)} samples")
        if self.counter.update == self.fails_at:
            raise ZeroDivisionError
        if self.counter.update == self.diverges_at:
            losses = {"total": losses["total"] * float("nan")}
        return losses, outputs


class Files(CallbackBase):
    """Logs every kind of file, and evaluates, for which the training step may log nothing."""

    def _after_update(self, update_counter):
        weight = self.model.module.layer.weight
        self.writer.add_histogram("weights", weight, bins=8)
        self.writer.add_image("weights/as pixels", weight.reshape(10, 1, 8, 8))
        self.trainer.forward((torch.ones(3, 1, 8, 8), torch.zeros(3).long()))
        if update_counter.update == 3:
            rows = [(1, 0.5, None), (weight[0, 0], "a|b", float("nan"))]
            self.writer.add_table("rows", ("number", "other", "more"), rows)
            self.writer.add_file("source/config", __file__)
            self.writer.add_image("levels", torch.tensor([[0, 128, 300]]))
            self.writer.add_histogram("half", weight.bfloat16(), bins=2)


def files_of(run):
    names = {file.path for line, _ in run.journal.lines() for file in line.files}
    listed = [(file.key, file.step) for line, _ in run.journal.lines() for file in line.files]
    assert len(set(listed)) == len(listed)
    root = run.paths.artifacts_dir
    found = [path for path in root.rglob("*.*") if path.is_file() and run.paths.checkpoints_dir not in path.parents]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}, names


def new_run(folder, run_id, parts=1, **options):
    trainer = partial(Logging, **{key: options.pop(key) for key in ("fails_at", "diverges_at") if key in options})
    callbacks = {"files": Files, **options.pop("callbacks", {})}
    given = {
        "max_updates": 6,
        "accumulation_steps": parts,
        "checkpoint": {"every_n_updates": 2, "keep_last": 9},
        **options,
    }
    return tiny_run(folder, callbacks, run_id, trainer_class=trainer, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return new_run(tmp_path_factory.mktemp("whole"), "whole").train()


def test_every_kind_of_file_is_there_with_its_update(whole):
    contents, names = files_of(whole)
    assert names <= contents.keys()
    assert {name.rpartition("/")[0] for name in names} == {
        "images", "histograms/weights", "histograms/half", "tables/rows", "texts/note", "files/source/config"
    }  # fmt: skip
    assert contents["texts/note/00000004.txt"] == b"update 3, 72 samples"
    histogram = json.loads(contents["histograms/weights/00000001.json"])
    assert histogram["columns"] == ["from", "to", "count"] and sum(row[2] for row in histogram["data"]) == 640
    assert json.loads(contents["tables/rows/00000003.json"])["data"][0] == [1, 0.5, None]
    assert json.loads(contents["tables/rows/00000003.json"])["data"][1][1:] == ["a|b", "nan"]
    assert b"Images, tables and the like" in contents["files/source/config/00000003.py"]
    assert len([name for name in names if name.startswith("images/weights~as pixels+step+")]) == 6
    assert len([name for name in contents if name.endswith("+compressed.webp")]) == 10
    levels = next(content for name, content in contents.items() if re.match("images/levels.*png", name))
    assert np.asarray(Image.open(io.BytesIO(levels))).tolist() == [[0, 128, 255]]
    assert list(whole.metric("spread")) == [1, 2, 3, 4, 5, 6] and set(whole.metric("samples").values()) == {72.0}


def test_the_files_of_a_failed_and_resumed_run_are_the_same_bytes(whole, tmp_path):
    with pytest.raises(ZeroDivisionError):
        new_run(tmp_path, "broken", fails_at=3).train()
    broken = new_run(tmp_path, "broken", stop_at=5)
    assert files_of(broken)[0].keys() < files_of(whole)[0].keys()
    broken.train()
    later = files_of(broken)[0]
    # As if it had been killed after update 5, with a checkpoint of update 4, and a file torn by a power cut.
    shutil.rmtree(broken.paths.checkpoints_dir / "E0_U5_S360")
    torn = broken.paths.artifacts_dir / "histograms/weights/00000005.json"
    torn.write_bytes(b"")
    resumed = new_run(tmp_path, "broken").train()
    assert files_of(resumed) == files_of(whole) and later.items() < files_of(whole)[0].items()
    assert resumed.metric("spread") == whole.metric("spread")


class Faulty(CallbackBase):
    """Fails after the update in which others have logged."""

    def _after_update(self, update_counter):
        if update_counter.update == 3:
            raise ZeroDivisionError


def test_what_is_logged_when_a_later_callback_fails_is_logged_by_the_resumed_run(whole, tmp_path):
    with pytest.raises(ZeroDivisionError):
        new_run(tmp_path, "broken", callbacks={"faulty": Faulty}).train()
    resumed = new_run(tmp_path, "broken", callbacks={"faulty": CallbackBase}).train()
    assert files_of(resumed) == files_of(whole) and resumed.metric("spread") == whole.metric("spread")


def test_a_skipped_update_logs_nothing_of_its_training_step(whole, tmp_path):
    run = new_run(tmp_path, "skips", diverges_at=3, nan_loss="skip").train()
    assert files_of(whole)[1] - files_of(run)[1] == {
        name for name in files_of(whole)[1] if name.startswith(("images/inputs~first+step+4+", "texts/note/00000004"))
    }
    assert list(run.metric("spread")) == [1, 2, 3, 5, 6]


def test_parts_of_a_batch_log_their_mean_and_the_file_of_the_first(whole, tmp_path):
    run = new_run(tmp_path, "parts", parts=5)
    run.train()  # parts of 14, 14, 15, 14 and 15 samples
    assert files_of(run)[0]["texts/note/00000002.txt"] == b"update 1, 14 samples"
    assert run.metric("samples")[1] == pytest.approx(sum(size * size for size in (14, 14, 15, 14, 15)) / 72)


def test_trackers_show_them_once(whole, paths):
    """Sent again after a crash, they are there once; the journal's files need no tracker to be read."""
    runs = paths.runs_dir
    runs.mkdir(exist_ok=True)
    board = TensorboardTracker(paths)
    board.start_run("a run", {})
    mlflow = MlflowTracker(paths)
    mlflow.start_run("a run", {})
    reader = JournalReader(whole.paths.journal)
    for number, tracker in enumerate((board, mlflow, board)):
        tracker.resume_run(tracker.run_id)
        artifacts = runs / tracker.run_id / "artifacts"
        shutil.copytree(whole.paths.artifacts_dir, artifacts, dirs_exist_ok=True)
        Shipment(reader, paths.output_dir / f"sent{number}", tracker).send()
    shown = EventAccumulator(str(runs / board.run_id / "tensorboard"), {"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in shown.Tensors("images/weights/as pixels")] == [1, 2, 3, 4, 5, 6]
    width, _, content = shown.Tensors("images/inputs/first")[0].tensor_proto.string_val
    assert (width, content[:4]) == (b"8", b"\x89PNG")
    assert [event.step for event in shown.Tensors("texts/note")] == [2, 4, 6]
    assert b"|a\\|b|nan|" in shown.Tensors("tables/rows")[0].tensor_proto.string_val[0]
    assert shown.Tensors("histograms/weights")[0].tensor_proto.tensor_shape.dim[0].size == 8
    tags = mlflow._client.get_run(mlflow.run_id).data.tags
    assert tags["mlflow.loggedImages"] == "True"
    tables = [entry["path"] for entry in json.loads(tags["mlflow.loggedArtifacts"])]
    assert len(tables) == 8 and "tables/rows/00000003.json" in tables
    assert mlflow._client.download_artifacts(mlflow.run_id, tables[0])
    assert len(mlflow.list_artifacts("images")) == 20
    assert {key: len(mlflow.history(key)) for key in mlflow.last_steps()} == {"spread": 6, "samples": 6}


def test_images_of_all_shapes():
    def size_and_mode(image):
        files = image_files("a", 1, image)
        assert image_files("a", 1, image) == files
        path, small = files
        assert path.startswith("images/a+step+1+timestamp+1+") and small.endswith("+compressed.webp")
        opened = Image.open(io.BytesIO(files[path]))
        return opened.size, opened.mode

    assert size_and_mode(np.zeros((5, 6))) == ((6, 5), "L")
    assert size_and_mode(np.zeros((3, 5, 6))) == size_and_mode(np.zeros((5, 6, 3))) == ((6, 5), "RGB")
    assert size_and_mode(np.zeros((5, 4, 4, 6))) == ((3 * 6 + 4, 2 * 4 + 2), "RGBA")
    assert size_and_mode(Image.new("L", (3, 2))) == ((3, 2), "L")
    with pytest.raises(KsuitError, match=r"'a' has to be an image, .* not an array of shape \(2, 5, 7\)"):
        image_files("a", 1, np.zeros((2, 5, 7)))
    for no_image in (np.zeros((0, 5)), np.zeros((0, 3, 4, 4)), np.zeros((4, 6), np.complex64)):
        with pytest.raises(KsuitError, match="'a' has to be an image"):
            image_files("a", 1, no_image)
    with pytest.raises(KsuitError, match="'../a' is to name a file"):
        image_files("../a", 1, np.zeros((4, 6)))


def test_what_cannot_be_shown_is_said():
    assert json.loads(*histogram_files("a", 1, [1.0, float("inf")], 1).values())["data"][-1] == [None, None, 1]
    for narrow in ([1.0, np.nextafter(1.0, 2.0)], [-1.7e308, 1.7e308]):
        assert json.loads(*histogram_files("a", 1, narrow, 64).values())["data"] == [[*narrow, 2]]
    with pytest.raises(KsuitError, match="'a': a histogram has at least one bin, not 0"):
        histogram_files("a", 1, [1.0], 0)
    with pytest.raises(KsuitError, match="has not one value for each of its 2 columns"):
        table_files("a", 1, ("x", "y"), [(1,)])
    with pytest.raises(KsuitError, match="not of complex ones"):
        histogram_files("a", 1, np.zeros(2, np.complex64), 1)
    with pytest.raises(KsuitError, match="'a' has to be a text, not an int"):
        text_files("a", 1, 3)
    assert text_files("a", 1, "\ud800") == {"texts/a/00000001.txt": rb"\ud800"}
    cells = [[np.zeros(2), torch.zeros(2), np.float32(1), torch.tensor(2)]]
    assert json.loads(*table_files("a", 1, "abcd", cells).values())["data"] == [["[0. 0.]", "tensor([0., 0.])", 1, 2]]
    with pytest.raises(KsuitError, match="has to be a figure of Matplotlib, not an int"):
        figure_files("a", 1, 3)


def test_a_figure_is_an_image_with_the_same_bytes_every_time():
    from matplotlib.figure import Figure

    def drawn():
        figure = Figure((2, 1), dpi=50)
        figure.subplots().plot([1, 2, 3])
        return figure_files("a", 1, figure)

    assert drawn() == drawn() and next(iter(drawn())).endswith(".png")


def test_other_content_under_one_name_is_an_error_that_names_both(tmp_path):
    class Another(CallbackBase):
        def _after_update(self, update_counter):
            self.writer.add_text("same", "text")
            self.writer.add_text("other", str(self.name))

    with pytest.raises(KsuitError, match=r"callbacks\.two: 'texts/other/.* before by callbacks\.one"):
        tiny_run(tmp_path, {"one": Another, "two": Another}, max_updates=1).train()


def test_two_files_under_one_key_are_an_error_though_their_names_differ(tmp_path):
    class Files(CallbackBase):
        def _after_update(self, update_counter):
            for suffix in ("txt", "csv"):
                (tmp_path / f"a.{suffix}").write_text("same")
                self.writer.add_file("a", tmp_path / f"a.{suffix}")

    with pytest.raises(KsuitError, match=r"files/a/00000001.txt' is logged twice with different content"):
        tiny_run(tmp_path, {"files": Files}, max_updates=1).train()


@pytest.mark.parametrize(
    "log",
    [
        lambda writer: writer.add_file("a", "/nowhere"),
        lambda writer: writer.add_image("a", torch.eye(3).to_sparse()),
        lambda writer: writer.add_histogram("a", [[1], [1, 2]]),
        lambda writer: writer.add_table("a", ["x"], [1]),
        lambda writer: writer.add_text(None, "text"),
    ],
)
def test_what_cannot_be_stored_is_an_error_that_names_the_callback(tmp_path, log):
    class Logs(CallbackBase):
        def _after_update(self, update_counter):
            log(self.writer)

    with pytest.raises(KsuitError, match=r"callbacks\.logs: '(a|None)' cannot be stored"):
        tiny_run(tmp_path, {"logs": Logs}, max_updates=1).train()


class Ignoring(SgdTrainer):
    """Most parts of a batch have no target at all."""

    value = None

    def training_step(self, batch, model):
        inputs, targets = batch
        step = self.counter.accumulation_step
        self.writer.add_scalar("step", step)
        self.writer.add_scalar("step", float(step))  # the same once more
        if self.value is not None:
            self.writer.add_scalar("step", self.value)
        outputs = model(inputs)
        return self.loss(outputs, torch.where(targets == (0 if step else 1), targets, -100)), outputs


@pytest.mark.parametrize(
    "value, message", [(7, "'step' twice, as 0.0 and as 7.0"), ("text", "'step' has to be a number, not str 'text'")]
)
def test_a_training_step_logs_one_number_under_a_key(tmp_path, value, message):
    run = tiny_run(tmp_path, {}, trainer_class=Ignoring, accumulation_steps=4, max_updates=1)
    assert run.train().metric("step") == {1: 1.5}  # over samples, whatever the loss counts
    with pytest.raises(KsuitError, match=message):
        tiny_run(tmp_path, {}, "b", trainer_class=type("Wrong", (Ignoring,), {"value": value}), max_updates=1).train()
