"""Runs seen from outside, while they run and afterwards: a view on the terminal, a page, numbers for Prometheus.

Everything comes from the run folder; nothing is written into it, and no torch is imported.
"""
