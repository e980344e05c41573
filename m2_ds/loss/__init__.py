"""Losses: features in, loss and gradients out."""
