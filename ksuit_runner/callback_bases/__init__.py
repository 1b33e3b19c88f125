"""Bases of callbacks: what several of them share, beyond the hooks of ``CallbackBase``."""
