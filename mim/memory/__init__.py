"""Learnable memory: a frozen ViT and, for each task, a class token, memory cells in every block and a classifier."""

from mim.memory.files import MEMORY, holds_memory, load_memory, save_memory
from mim.memory.task import Task
from mim.memory.vit import ORIGINAL, MemoryViT, check_memory

__all__ = ["MEMORY", "ORIGINAL", "MemoryViT", "Task", "check_memory", "holds_memory", "load_memory", "save_memory"]
