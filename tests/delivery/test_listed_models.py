import json

import pytest

from ksuit_runner.delivery.delivered import Delivery, RunState
from ksuit_runner.delivery.listed_models import unlisted
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.tracker.base import EndStatus, ExportedModel, ModelVersion

LIVE, AVERAGED = ("accuracy/test",), ("accuracy/test/ema", "loss/test")


@pytest.fixture
def paths(tmp_path):
    """Paths of a run with two checkpoints, of which the first one is the best."""
    paths = PathProvider(OutputPaths(tmp_path).output_dir, "a" * 32)
    for name in ("E1_U2_S3", "E2_U4_S6"):
        folder = paths.checkpoints_dir / name
        folder.mkdir(parents=True)
        for weights in ("model", "ema", "trainer"):
            (folder / f"{weights}.safetensors").touch()
    paths.tags.write_text(json.dumps({"best": "E1_U2_S3", "other": "E2_U4_S6"}))
    return paths


def models(paths, keys, status=EndStatus.KILLED, delivery=None, exports=()):
    box = Outbox("a" * 32, "digits", listed={"best": keys, "never": keys}, status=status, exports=list(exports))
    return unlisted(paths, RunState(box, delivery or Delivery()))


def exported(paths, label, weights="model", checkpoint="E1_U2_S3"):
    folder = paths.artifacts_dir / "models" / label
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MLmodel").touch()
    return ExportedModel(f"models/{label}", checkpoint, weights)


def listed(keys=LIVE, weights="model", export=None):
    return ModelVersion("checkpoints/E1_U2_S3", "best", None, keys, weights, export)


def test_a_run_that_has_ended_lists_what_its_tags_name_once(paths):
    assert models(paths, LIVE, None) == []
    for status in EndStatus:
        assert models(paths, LIVE, status) == [listed()]
    assert models(paths, LIVE, delivery=Delivery(listed={"best": "checkpoints/E1_U2_S3"})) == []
    assert models(paths, LIVE, delivery=Delivery(listed={"best": "checkpoints/E0_U1_S1"})) == [listed()]


def test_what_mlflow_loads_has_the_weights_that_the_metric_is_about(paths):
    live, averaged = exported(paths, "a"), exported(paths, "b", "ema")
    later = exported(paths, "c", "ema", "E2_U4_S6")
    for exports in ((live, averaged, later), (later, averaged, live)):
        assert models(paths, LIVE, exports=exports) == [listed(export="models/a")]
        assert models(paths, AVERAGED, exports=exports) == [listed(AVERAGED, "ema", "models/b")]
    assert models(paths, AVERAGED, exports=[live]) == [listed(AVERAGED, "ema")]
    known = Delivery(listed={"best": "checkpoints/E1_U2_S3"})
    assert models(paths, LIVE, delivery=known, exports=[live]) == [listed(export="models/a")]


def test_an_export_that_is_gone_or_leads_elsewhere_is_not_taken(paths, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "MLmodel").touch()
    (paths.artifacts_dir / "models").mkdir()
    (paths.artifacts_dir / "models" / "link").symlink_to(outside)
    for path in ("models/gone", "models/link", "../../../outside", str(outside)):
        assert models(paths, LIVE, exports=[ExportedModel(path, "E1_U2_S3", "model")]) == [listed()]
