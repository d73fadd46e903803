"""Stages, the loop that runs them, optimisers and checkpoints."""
