from functools import partial

import torch
from safetensors.torch import load_file

from callbacks.ema import Ema
from callbacks.features import FeatureDump


def test_the_file_has_the_features_of_all_samples_in_their_order(new_run, digits):
    dump = partial(FeatureDump, dataset_key="test", layers=["layer"], pooling="none", max_batches=2)
    whole = new_run({"ema": Ema, "features": dump}, run_id="whole", max_updates=4).train()
    path = whole.paths.artifacts_dir / "files" / "features" / "test" / "00000004.safetensors"
    found = load_file(path)
    assert found.keys() == {"layer", "ema/layer", "targets"}
    assert torch.equal(found["targets"], digits["test"].targets[:200])
    images = digits["test"].inputs[:200].flatten(1)
    for name, model in (("layer", whole.model.module), ("ema/layer", whole["ema"].models["ema"].module)):
        with torch.no_grad():
            assert torch.allclose(found[name], model.layer(images), atol=1e-6)
    new_run({"ema": Ema, "features": dump}, run_id="cut", max_updates=4, stop_at=2).train()
    resumed = new_run({"ema": Ema, "features": dump}, run_id="cut", max_updates=4).train()
    again = resumed.paths.artifacts_dir / path.relative_to(whole.paths.artifacts_dir)
    assert again.read_bytes() == path.read_bytes()
