"""Frozen encoders: loading, extraction, kNN and linear accuracy, neighbours, maps."""
