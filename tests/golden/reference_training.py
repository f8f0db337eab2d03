"""Training as an independent reference: data order, loss, clipping, AdamW and the learning rate in float64."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from reference_model import Model


@dataclass
class Recipe:
    steps: int
    batch: int  # sequences of one step
    sequence_length: int
    learning_rate: float
    minimum_learning_rate: float = 1e-5
    warmup_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


def learning_rate(recipe, step):
    """Linear warm-up that reaches the peak at its last step, then a cosine to the floor."""
    warmup = math.floor(recipe.warmup_fraction * recipe.steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (recipe.steps - warmup)
    span = recipe.learning_rate - recipe.minimum_learning_rate
    return recipe.minimum_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def sequence(data, index, length):
    """Sequence i covers the tokens i*T .. i*T+T; the data starts again at its end, the incomplete tail is unused."""
    count = (len(data) - 1) // length
    start = (index % count) * length
    return data[start:start + length + 1]


def clip_scale(gradients, clip):
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    return min(1.0, clip / (norm.item() + 1e-6))


class AdamW:
    def __init__(self, weights, recipe):
        self.recipe = recipe
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def update(self, weights, gradients, step):
        """In place; step counts from 0. Only tensors of two dimensions decay."""
        r, rate = self.recipe, learning_rate(self.recipe, step)
        for name, w in weights.items():
            first, second, g = self.first[name], self.second[name], gradients[name]
            first.copy_(r.beta1 * first + (1 - r.beta1) * g)
            second.copy_(r.beta2 * second + (1 - r.beta2) * g * g)
            mean = first / (1 - r.beta1 ** (step + 1))
            deviation = torch.sqrt(second / (1 - r.beta2 ** (step + 1)))
            decay = r.weight_decay if w.dim() > 1 else 0.0
            w.copy_(w - rate * (mean / (deviation + r.epsilon) + decay * w))


def train(config, weights, data, recipe, attention_mode):
    """Float64 throughout. data: 1-D integer tensor; attention_mode: [T] booleans. -> (weights, loss of each step)"""
    weights = {name: w.double().clone().requires_grad_() for name, w in weights.items()}
    model = Model(config, weights)
    optimizer = AdamW(weights, recipe)
    losses = []
    for step in range(recipe.steps):
        rows = [sequence(data, step * recipe.batch + i, recipe.sequence_length) for i in range(recipe.batch)]
        batch = torch.stack(rows).long()
        logits = model.forward(batch[:, :-1], attention_mode)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights.values())]
        scale = clip_scale(gradients, recipe.clip)
        optimizer.update(weights, {name: g * scale for name, g in zip(weights, gradients)}, step)
        losses.append(loss.item())
    return {name: w.detach() for name, w in weights.items()}, losses
