"""Several processes and devices: signals, groups, sharded weights."""
