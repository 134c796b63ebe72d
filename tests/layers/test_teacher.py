"""The moving average of a student."""

import copy

import pytest
import torch
from fake_gpu import CUDA, machine, without_values
from torch import nn

from mim.layers.teacher import Teacher, lerp_together

NEVER, SKIPPED = torch.tensor(False), torch.tensor(True)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.norm, self.drop = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)
        self.teacher = Teacher(nn.ModuleDict({"map": self.map, "norm": self.norm}))


def moved(student):
    """The student after a step that nobody has followed."""
    for value in student.map.state_dict().values():
        value.add_(1.0)
    return student


def test_a_teacher_begins_as_a_copy_that_shares_nothing_with_the_student():
    student = Student()
    before = copy.deepcopy(student.teacher.state_dict())
    moved(student)
    assert all(torch.equal(value, before[name]) for name, value in student.teacher.state_dict().items())


def test_starting_copies_every_tensor_of_the_student_buffers_included():
    student = moved(Student())
    student.norm.running_mean.fill_(7.0)
    student.norm.num_batches_tracked.fill_(5)
    student.teacher.start()
    for name, value in student.teacher.module["norm"].state_dict().items():
        assert torch.equal(value, student.norm.state_dict()[name]), name
    assert torch.equal(student.teacher.module["map"].weight, student.map.weight)


@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
def test_an_update_keeps_the_share_that_momentum_says(momentum):
    student = Student()
    before = student.map.weight.clone()
    moved(student).teacher.update(momentum, unless=NEVER)
    torch.testing.assert_close(student.teacher.module["map"].weight, before + 1 - momentum)


def test_an_update_after_a_skipped_step_changes_nothing_whatever_the_student_holds():
    student = Student()
    before = copy.deepcopy(student.teacher.state_dict())
    moved(student).teacher.update(0.5, unless=SKIPPED)
    assert all(torch.equal(value, before[name]) for name, value in student.teacher.state_dict().items())


def test_a_teacher_never_trains():
    student = Student().train()
    student.eval().train()
    assert student.map.training
    assert not any(module.training for module in student.teacher.modules())
    assert not any(parameter.requires_grad for parameter in student.teacher.parameters())


def test_checkpoints_hold_the_average_once_and_the_student_under_its_own_names_alone():
    names = {name.rpartition(".")[0] for name in Student().state_dict()}
    assert names == {"map", "norm", "teacher.module.map", "teacher.module.norm"}


def test_a_copied_method_has_a_teacher_of_its_own_student():
    twin = copy.deepcopy(Student())
    moved(twin).teacher.update(0.0, unless=NEVER)
    assert torch.equal(twin.teacher.module["map"].weight, twin.map.weight)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.3])
def test_many_tensors_move_together_as_each_would_alone(share):
    own, other = ([torch.randn(shape) for shape in ((3, 2), (2,), (1, 4, 4))] for _ in range(2))
    alone = [torch.lerp(start, end, share) for start, end in zip(own, other, strict=True)]
    lerp_together(own, other, torch.tensor(share))
    torch.testing.assert_close(own, alone, rtol=0, atol=1e-6)


def test_a_device_moves_a_teacher_in_a_few_kernels():
    with machine() as present:
        student = without_values(nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))), CUDA)  # 80 tensors
        teacher = without_values(Teacher(student), CUDA)
        skipped = torch.tensor(False).to(CUDA)
        present.calls.clear()
        teacher.update(0.5, unless=skipped)
    assert sum("foreach" in call for call, _ in present.calls) == 6
    assert not any("lerp" in call for call, _ in present.calls)
