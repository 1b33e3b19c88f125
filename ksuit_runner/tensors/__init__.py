"""Tensors and modules: their device, memory layout and names."""
