"""A tiny run of every recipe: what the harnesses kill, poison, repeat and spread over processes.

Recipes are found, not listed: every folder of ``configs`` with a ``demo.yaml``. One without settings of its own below
is its demo with a smaller encoder.
"""

from pathlib import Path

from mim import methods
from mim.methods import Method
from mim.run.config import parse

ROOT = Path(__file__).parents[2]
SAVE_EVERY = 4
"""Steps between checkpoints of a tiny run."""
HAND_MADE = {
    "mae": ["--config", "tests/tiny.yaml"],
    "ibot": ["--config", "tests/tiny-ibot.yaml", "--model.init_args.masking", "BlockMasking"],
    "attmask": ["--config", "tests/tiny-ibot.yaml"],
    "hpm": ["--config", "tests/tiny_hpm.yaml"],
    "mp3": ["--config", "tests/tiny_mp3.yaml"],
    "spark": ["--config", "tests/tiny_spark.yaml"],
}
ENCODER = "--model.init_args.encoder."
SMALL = {
    f"{ENCODER}img_size": "32",
    f"{ENCODER}drop_path_rate": "0.1",
    f"{ENCODER}kwargs": "{embed_dim: 32, depth: 2, num_heads: 2}",
    "--model.init_args.optim.warmup_epochs": "0.05",
    "--data": "shapes",
    "--batch_size": "16",
    "--num_workers": "0",
    "--epochs": "0.375",
    "--log_every": "1",
    "--save_every": "0.0625",
    "--eval_every": "0.2",
    "--pictures": "2",
    "--probe_images": "60",
    "--threads": "1",
}
"""24 steps of 16 images, a checkpoint every four."""


def shrunk(name: str) -> list[str]:
    """The demo of a recipe at the size of seconds."""
    return ["--config", f"configs/{name}/demo.yaml", *(part for option in SMALL.items() for part in option)]


NAMES = sorted(path.parent.name for path in ROOT.glob("configs/*/demo.yaml"))
SETTINGS = {name: HAND_MADE.get(name) or shrunk(name) for name in NAMES}
"""Arguments of ``pretrain`` for every recipe; relative paths start at the checkout."""


def exported_methods() -> set[type[Method]]:
    """Every method that ``mim.methods`` exports."""
    found = (getattr(methods, name) for name in methods.__all__)
    return {cls for cls in found if isinstance(cls, type) and issubclass(cls, Method) and cls is not Method}


def method_of(config: str) -> str:
    """Name of the class that a recipe trains."""
    return parse([f"--config={ROOT / config}"]).model.class_path.rpartition(".")[2]


def uncovered() -> set[str]:
    """Exported methods that no tiny run trains."""
    return {cls.__name__ for cls in exported_methods()} - {method_of(args[1]) for args in SETTINGS.values()}
