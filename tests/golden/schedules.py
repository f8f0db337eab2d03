"""Schedules as text, read independently of the C++ parser (span lists and every(N); draws are not reproduced)."""

import math
import random
import re
from fractions import Fraction

import torch


def attention_mode(text, length):
    """[length] booleans: True where the token is served by attention."""
    every = re.fullmatch(r"every\((\d+)(?:,chunk=(\d+))?\)", text)
    if every:
        period, chunk = int(every[1]), int(every[2] or 128)
        return (torch.arange(length) // chunk + 1) % period == 0
    mode = torch.zeros(length, dtype=torch.bool)
    for span in text.split(","):
        name, _, start = span.partition("@")
        mode[first_token(start or "0", length):] = name == "attention"
    return mode


def first_token(start, length):
    if start.endswith("%"):
        return math.floor(Fraction(start[:-1]) * length / 100)
    return int(start) if int(start) >= 0 else length + int(start)


def draw(seed, length, switches):
    """A random schedule with that many switches, none of them at a multiple of 8."""
    generator = random.Random(seed)
    starts = sorted(generator.sample([t for t in range(1, length) if t % 8], switches))
    names = ["attention", "linear"] if generator.random() < 0.5 else ["linear", "attention"]
    return ",".join([names[0]] + [f"{names[(i + 1) % 2]}@{start}" for i, start in enumerate(starts)])
