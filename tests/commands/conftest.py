"""What evaluations measure in tests: a few drawn images."""

import signal
import time
from pathlib import Path

import pytest
from torchvision.transforms.v2.functional import to_pil_image

from mim.data.shapes import ShapeSource


@pytest.fixture
def photos(tmp_path):
    """A folder with ``train/`` and ``val/``: three classes, 12 and 5 images of each."""
    for part, count in (("train", 12), ("val", 5)):
        source = ShapeSource(part, 10 * count, 32)
        for index in range(len(source)):
            name = source.classes[source.labels[index]]
            if name in ("arrow", "circle", "cross"):
                folder = Path(tmp_path, "photos", part, name)
                folder.mkdir(parents=True, exist_ok=True)
                to_pil_image(source.read(index)).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def stop_after_a_checkpoint():
    """Sends SIGTERM to a training as soon as it has saved; it ends with the status that asks to go on."""

    def stop(process, folder):
        while not list(Path(folder).glob("seed-0/checkpoints/step-*.ckpt")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert not Path(folder, "metrics.json").exists()

    return stop
