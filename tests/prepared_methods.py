"""A method of a tiny run, ready for a step without a trainer."""

import torch
from recipes import SETTINGS

from mim.methods import Plan
from mim.options.pretraining import translate
from mim.run.config import instantiate, parse


def prepared(name, *changes):
    """Method and data of a tiny run on the CPU, in the middle of ten steps; ``logged`` holds what it logs."""
    torch.manual_seed(0)
    objects = instantiate(parse(translate([*SETTINGS[name], *changes])))
    method, logged = objects.model, {}
    method.plan, method.logged = Plan(max_steps=10, batch_size=16), logged
    method.log, method.log_dict = logged.__setitem__, logged.update
    method.setup("fit")
    return method, objects.data
