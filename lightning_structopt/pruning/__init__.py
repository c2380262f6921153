"""Pruning: which weights matter least, which go together, how fast they go, and that they stay gone."""
