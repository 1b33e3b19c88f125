"""Makes pretrained.safetensors, in plain PyTorch: ``python pretrain.py``. Its names begin with ``trunk``."""

import safetensors.torch
import torch
from fine_tuning import Network, SomeDigits
from torch import nn

torch.manual_seed(0)
data = SomeDigits("train", digits=[0, 1, 2, 3, 4])
network = Network((1, 8, 8), (5,))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
for _ in range(20):
    for rows in torch.randperm(len(data)).split(64):
        loss = nn.functional.cross_entropy(network(data.inputs[rows]), data.targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss of the last batch: {loss.item():.4f}")
weights = {name.replace("encoder", "trunk"): value for name, value in network.state_dict().items()}
safetensors.torch.save_file(weights, "pretrained.safetensors")
