"""Timings: a training step against its plain formulation, and accuracy over speed of reduced models."""
