"""Arrays written row by row are what NumPy and safetensors read."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from mim.interop.arrays import RowWriter


def read(file):
    return np.load(file) if file.suffix == ".npy" else load_file(file)["class"]


@pytest.mark.parametrize("name", ["class.npy", "class.safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (1,)])
def test_rows_in_batches_of_any_size_are_one_array(name, dtype, shape, tmp_path):
    rows = np.random.default_rng(0).normal(size=(11, *shape)).astype(np.float32)
    with RowWriter(tmp_path / name, "class", shape, dtype) as writer:
        for first, last in ((0, 1), (1, 1), (1, 9), (9, 11)):
            writer.write(rows[first:last])
    array = read(tmp_path / name)
    assert array.dtype == np.dtype(dtype)
    assert np.array_equal(array, rows.astype(dtype))


@pytest.mark.parametrize("name", ["class.npy", "class.safetensors"])
def test_no_rows_are_an_empty_array(name, tmp_path):
    with RowWriter(tmp_path / name, "class", (4,), "float32"):
        pass
    assert read(tmp_path / name).shape == (0, 4)


@pytest.mark.parametrize("name", ["class.npy", "class.safetensors"])
def test_a_file_is_whole_or_absent(name, tmp_path):
    def fail():
        with RowWriter(tmp_path / name, "class", (4,), "float32") as writer:
            writer.write(np.zeros((2, 4), np.float32))
            assert not (tmp_path / name).exists()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert list(tmp_path.iterdir()) == []
