"""Evaluations of an encoder on labelled images, from weights to results in the report."""
