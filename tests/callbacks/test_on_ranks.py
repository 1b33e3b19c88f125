"""All callbacks that ship log on two ranks what they log in one process, to the last bit, also over resumes."""

import shutil
from contextlib import closing

import pytest
from command import TIMINGS
from ranks import ksuit_on_ranks

from ksuit_runner.checkpoint.folders import names
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal

GIVEN = (
    *("model=mlp", "tracker=noop", "strategy=ddp", "trainer.accumulation_steps=2", "trainer.clip_norm=1.0"),
    *("data.batch_size=70", "data.eval_batch_size=50", "trainer.max_updates=44", "+checkpoint.every_n_updates=18"),
    "callbacks=[accuracy,loss,ema,best_checkpoint,best_loss,early_stop,output_statistics,prune,test_accuracy,test_loss]",
    *(
        "+callbacks.output_statistics.every_n_updates=15",
        "checkpoint.keep_last=9",
        "callbacks.prune.metric_key=loss/validation",
    ),
)


def only_run(folder):
    [path] = OutputPaths(folder).runs_dir.iterdir()
    return PathProvider(folder, path.name)


def recorded(paths):
    """Return all points but the measured ones, in their order."""
    with closing(Journal(paths.journal)) as journal:
        points = [point for points, _ in journal.read() for point in points]
    return [(point.step, point.key, point.value) for point in points if point.key not in TIMINGS]


def checkpoints(paths):
    """Return the content of all checkpoints by path, without manifests, which have the hash of the config."""
    folder = paths.checkpoints_dir
    files = [path for name in names(paths) for path in (folder / name).iterdir() if path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_two_ranks_log_and_store_what_one_process_does(tmp_path):
    alone, together, cut = (tmp_path / name for name in ("alone", "together", "cut"))
    ksuit_on_ranks(alone, 1, *GIVEN)
    ksuit_on_ranks(together, 2, *GIVEN)
    one, two = only_run(alone), only_run(together)
    wanted = recorded(one)
    assert {"loss/train", "outputs/output/std", "accuracy/test/best/ema", "gradient_norm"} <= {
        key for _, key, _ in wanted
    }
    assert recorded(two) == wanted
    assert checkpoints(two) == checkpoints(one) and len(names(one)) == 3
    shutil.copytree(together, cut)
    last = only_run(cut)
    shutil.rmtree(last.checkpoints_dir / names(last)[0])
    ksuit_on_ranks(cut, 1, f"resume={last.run_id}")
    assert checkpoints(last) == checkpoints(one)
