"""A vision transformer of Hugging Face, built by a function of the project."""

from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).logits
        return logits


def tiny_vit(input_shape: tuple[int, ...], output_shape: tuple[int, ...], width: int = 32, depth: int = 2) -> nn.Module:
    """Build a ViT (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) that fits the images, with patches of 2 x 2.

    Args:
        input_shape: (channels, size, size) of an image, from the data.
        output_shape: (classes,), from the data.
        width: Width of its layers.
        depth: Number of its layers.

    Returns:
        A module from images (batch, channels, size, size) to scores (batch, classes).
    """
    channels, size, _ = input_shape
    config = ViTConfig(
        num_channels=channels,
        image_size=size,
        patch_size=2,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=2 * width,
        num_labels=output_shape[0],
        initializer_range=width**-0.5,  # the default is for layers that are 20 times as wide
    )
    return _Logits(ViTForImageClassification(config))
