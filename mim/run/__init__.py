"""A run on disk: its folder, its settings, its checkpoints, and weights in and out."""
