"""The programs: one module per command, one function each."""
