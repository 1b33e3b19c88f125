"""Masking of passwords, and limits for configs that others may have made."""
