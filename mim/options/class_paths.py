"""What a setting may name as a class: our own building blocks. Everything else, importable or not, is refused."""

from jsonargparse import set_parsing_settings

BUILDING_BLOCKS = ("mim.methods", "mim.masking", "mim.reduction", "mim.targets", "mim.data.views", "mim.encoder")
"""Where a class path may lead; saved settings of runs and of reductions name them, so they stay where they are."""

set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(BUILDING_BLOCKS))
