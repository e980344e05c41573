"""Evaluation: retrieval, zero-shot classification, and the page that shows them."""
