"""Masses of images before training: duplicates, quality and balance, over shards, by any number of machines."""
