"""Pictures of what a model sees: strips, tokens that are left, overlays of masks."""
