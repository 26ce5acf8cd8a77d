"""Data sets, pictures and batches: what happens between a file and a model."""
