"""Checkpoint files are whole or absent, and nothing damaged is ever used."""

import json
import os
import random
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from mim.errors import UserError
from mim.run.checkpoint_files import (
    KEEP,
    AtomicCheckpointIO,
    check_room,
    checkpoint_name,
    checkpoint_step,
    checkpoints,
    newest_good,
    sidecar,
    sweep,
    verify,
)


def save(folder, step, size=100):
    """A checkpoint whose weights tell its step."""
    path = folder / checkpoint_name(step)
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.full((size,), float(step))}, path)
    return path


def hidden(folder):
    return [path.name for path in folder.glob(".*")]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_saved_can_be_loaded(tmp_path):
    checkpoint = AtomicCheckpointIO().load_checkpoint(save(tmp_path, 3))
    assert checkpoint["global_step"] == 3
    assert torch.equal(checkpoint["weights"], torch.full((100,), 3.0))


def test_the_name_tells_the_step_and_sorts_by_it(tmp_path):
    paths = [tmp_path / checkpoint_name(step) for step in (999_999, 9, 10)]
    for path in paths:
        path.touch()
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [9, 10, 999_999]


def test_the_sidecar_holds_size_step_and_versions(tmp_path):
    path = save(tmp_path, 3)
    facts = json.loads(sidecar(path).read_text())
    assert (facts["bytes"], facts["step"], facts["torch"]) == (path.stat().st_size, 3, torch.__version__)


def test_the_newest_two_are_kept_with_their_sidecars(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    assert KEEP == 2
    names = {path.name for path in tmp_path.iterdir()} - {"last.ckpt"}
    assert names == {f"step-0000000{step}.{suffix}" for step in (6, 8) for suffix in ("ckpt", "json")}


def test_the_link_points_at_the_newest_even_if_the_folder_is_moved(tmp_path):
    for step in (2, 4):
        save(tmp_path / "run", step)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "last.ckpt").resolve().name == checkpoint_name(4)


def test_a_file_system_without_links_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.symlink_to", fail_with(1))
    assert verify(save(tmp_path, 2)) is None


# Writing that fails --------------------------------------------------------------------------------------------------


def fail_with(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "json.dumps"])
def test_a_failed_write_leaves_the_checkpoint_before_and_nothing_else(tmp_path, monkeypatch, function):
    good = save(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(f"mim.run.checkpoint_files.{function}", fail_with(5))
        with pytest.raises(UserError, match="cannot be written"):
            save(tmp_path, 4)
    sweep(tmp_path)
    assert checkpoints(tmp_path) == [good]
    assert newest_good(tmp_path) == (good, [])
    assert hidden(tmp_path) == []


def test_a_rename_that_fails_last_leaves_no_new_checkpoint(tmp_path, monkeypatch):
    good, replace = save(tmp_path, 2), os.replace

    def fail_for_checkpoints(source, target):
        (fail_with(5) if str(target).endswith(".ckpt") else replace)(source, target)

    monkeypatch.setattr("os.replace", fail_for_checkpoints)
    with pytest.raises(UserError):
        save(tmp_path, 4)
    assert newest_good(tmp_path) == (good, [])


def test_a_disk_without_reserve_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    good = save(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7 * 2**20))
    monkeypatch.setattr(torch, "save", fail_with(5))
    with pytest.raises(UserError, match="No space left") as stop:
        save(tmp_path, 4, size=2**20)  # 4 MiB of floats
    assert str(tmp_path / checkpoint_name(4)) in stop.value.error
    assert "needs 4 MiB" in stop.value.why
    assert "7 MiB are free" in stop.value.why
    assert newest_good(tmp_path) == (good, [])


def test_a_new_run_is_refused_if_its_checkpoints_have_no_room(tmp_path, monkeypatch):
    module = torch.nn.Linear(255, 1024)  # a MiB
    module.register_buffer("teacher", torch.zeros(512, 256))  # half of one, without moments
    needed = 4 * 3.5 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    check_room(tmp_path / "not" / "there", module)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="checkpoints need 14 MiB, 14 MiB are free"):
        check_room(tmp_path / "not" / "there", module)


def test_old_checkpoints_are_not_removed_before_the_new_one_stands(tmp_path, monkeypatch):
    old = [save(tmp_path, step) for step in (2, 4)]
    monkeypatch.setattr("os.replace", fail_with(28))
    with pytest.raises(UserError):
        save(tmp_path, 6)
    assert [verify(path) for path in old] == [None, None]


@pytest.mark.parametrize("limit", [0, 500, 3000, 40_000])
def test_a_file_size_limit_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path, limit):
    good = save(tmp_path, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            save(tmp_path, 4, size=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert hidden(tmp_path) == []
    assert newest_good(tmp_path) == (good, [])


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_mistake_of_the_user(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        save(tmp_path / "checkpoints", 2)


# Killed processes ----------------------------------------------------------------------------------------------------


def test_a_process_killed_while_it_saves_leaves_a_good_checkpoint(tmp_path):
    draw, step, leftovers, kills = random.Random(0), 0, 0, 0
    while kills < 15 or (not leftovers and kills < 150):  # on a busy machine few strike the middle of a save
        kills += 1
        save(tmp_path, step + 1)
        child = os.fork()
        if not child:
            try:
                for number in range(step + 2, step + 10_000):
                    save(tmp_path, number, size=50_000)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest, refused = newest_good(tmp_path)
        assert refused == []  # nothing unreadable under a final name
        assert newest is not None
        step = checkpoint_step(newest)
        assert AtomicCheckpointIO().load_checkpoint(newest)["weights"].eq(step).all()
        leftovers += len(hidden(tmp_path))
        sweep(tmp_path)
        assert hidden(tmp_path) == []
    assert leftovers  # the kills did hit the middle of a save


def test_sweeping_leaves_checkpoints_alone(tmp_path):
    path = save(tmp_path, 2)
    (tmp_path / ".step-00000004.ckpt.123.tmp").write_bytes(b"half")
    sweep(tmp_path)
    assert hidden(tmp_path) == []
    assert verify(path) is None


# Damage --------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_detected(tmp_path):
    path, draw = save(tmp_path, 2), random.Random(0)
    good = path.read_bytes()
    for _ in range(1000):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert verify(path) is not None


def test_every_truncation_is_detected(tmp_path):
    path, draw = save(tmp_path, 2), random.Random(0)
    good = path.read_bytes()
    for length in [0, 1, len(good) - 1, *(draw.randrange(len(good)) for _ in range(200))]:
        path.write_bytes(good[:length])
        assert verify(path) is not None


def test_a_damaged_sidecar_never_raises_and_never_vouches_for_other_contents(tmp_path):
    path, draw = save(tmp_path, 2), random.Random(0)
    good = sidecar(path).read_bytes()
    for length in range(len(good)):
        sidecar(path).write_bytes(good[:length])
        assert verify(path) is not None
    damage(path)
    for _ in range(300):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        sidecar(path).write_bytes(data)
        assert verify(path) is not None


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null", "{}", '{"bytes": 1}', "\x00" * 50])
def test_a_sidecar_that_says_something_else_vouches_for_nothing(tmp_path, text):
    path = save(tmp_path, 2)
    sidecar(path).write_text(text)
    assert verify(path) is not None


def test_a_sidecar_that_lost_its_hash_vouches_for_nothing(tmp_path):
    path = save(tmp_path, 2)
    sidecar(path).write_text(sidecar(path).read_text().replace("sha256", "sha257"))
    assert verify(path) is not None


def test_a_checkpoint_without_a_sidecar_is_not_used(tmp_path):
    path = save(tmp_path, 2)
    sidecar(path).unlink()
    assert verify(path) is not None


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    path = save(tmp_path, 2)
    damage(path)
    with pytest.raises(UserError, match="cannot be used") as stop:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "SHA-256" in stop.value.why


class Canary:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_with_a_true_hash_still_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / checkpoint_name(2)
    AtomicCheckpointIO().save_checkpoint({"global_step": 2, "canary": Canary()}, path)
    with pytest.raises(UserError, match="holds Python objects"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_the_newest_good_one_is_found_and_the_damaged_one_named(tmp_path):
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    damage(bad)
    path, refused = newest_good(tmp_path)
    assert path == good
    assert len(refused) == 1
    assert refused[0].startswith(f"{bad} is damaged")


def test_without_any_good_checkpoint_all_are_named(tmp_path):
    for step in (2, 4):
        damage(save(tmp_path, step))
    path, refused = newest_good(tmp_path)
    assert path is None
    assert len(refused) == 2


def test_a_folder_without_checkpoints_has_none_to_refuse(tmp_path):
    assert newest_good(tmp_path / "nowhere") == (None, [])


def test_a_resumed_run_keeps_its_new_checkpoint_beside_a_damaged_newer_one(tmp_path):
    save(tmp_path, 2)
    damage(save(tmp_path, 6))
    new = save(tmp_path, 4)
    assert newest_good(tmp_path)[0] == new
