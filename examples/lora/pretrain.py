"""Makes pretrained.safetensors, in plain PyTorch: ``python pretrain.py``. The transformer learns upright digits."""

import safetensors.torch
import torch
from lora import Transformer
from torch import nn

from ksuit_runner.data.digits import Digits

torch.manual_seed(0)
data = Digits("train")
network = Transformer((1, 8, 8), (10,))
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for _ in range(20):
    for rows in torch.randperm(len(data)).split(64):
        loss = nn.functional.cross_entropy(network(data.inputs[rows]), data.targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss of the last batch: {loss.item():.4f}")
safetensors.torch.save_file(network.state_dict(), "pretrained.safetensors")
