"""Weights in and out: the canonical unsharded layout and the layouts that convert to and from it."""
