"""The PyTorch peer of the benchmarks computes the same model: a peer that is wrong proves nothing about speed."""

import pathlib
import sys
import unittest

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import peer_model as peer  # noqa: E402
import reference_model as reference  # noqa: E402

VARIANTS = {"ssd": ["attention", "ssd"], "gated_delta": ["attention", "gated_delta"], None: ["attention"]}
LENGTH = 150
torch.set_num_threads(1)


class Peer(unittest.TestCase):
    def setUp(self):
        self.tokens = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(1))

    def pair(self, linear):
        sizes = dict(layers=2, width=64, heads=4, mlp_width=96, vocabulary=64)
        config = reference.resolve(dict(sizes, mixers=VARIANTS[linear]))
        weights = reference.random_weights(config, seed=2)
        model = peer.PeerModel(peer.PeerConfig(linear=linear, **sizes)).double()
        model.load_state_dict(weights)
        return reference.Model(config, weights), model

    def check(self, actual, expected):
        self.assertLess((actual - expected).abs().max(), 1e-10 * expected.abs().max())

    def test_training_form_and_its_gradients(self):
        mode = torch.arange(LENGTH) // 20 % 3 == 0
        for linear in VARIANTS:
            model, other = self.pair(linear)
            modes = True if linear is None else mode.expand(self.tokens.shape)
            logits = other.logits(other.hidden(self.tokens, modes))
            weights = {name: w.requires_grad_() for name, w in model.weights.items()}
            expected = model.forward(self.tokens, mode if linear else torch.ones(LENGTH, dtype=torch.bool))
            self.check(logits, expected)
            targets = self.tokens.roll(-1, 1).flatten()
            gradients = torch.autograd.grad(F.cross_entropy(expected.flatten(0, 1), targets), list(weights.values()))
            F.cross_entropy(logits.flatten(0, 1), targets).backward()
            for (name, parameter), gradient in zip(weights.items(), gradients):
                self.check(other.get_parameter(name).grad, gradient)

    def test_loss_in_chunks_of_rows(self):
        _, model = self.pair(None)
        answers = []
        for rows in (None, 64, 1000):  # in all 300
            model.zero_grad()
            hidden = model.hidden(self.tokens, True).detach().requires_grad_()
            loss = model.loss(hidden, self.tokens.roll(-1, 1), rows)
            (3 * loss).backward()
            answers.append((loss.detach(), hidden.grad, model.embedding.weight.grad.clone()))
        for other in answers[1:]:
            for actual, expected in zip(other, answers[0]):
                self.check(actual, expected)

    @torch.no_grad()
    def test_prefill_then_decode(self):
        """A mode for each piece, as inference uses them: prefill, another piece, then token by token."""
        pieces = [(0, 70, False), (70, 100, True)] + [(t, t + 1, t % 3 == 0) for t in range(100, LENGTH)]
        for linear in VARIANTS:
            model, other = self.pair(linear)
            state = peer.State(other.config, 2, LENGTH, torch.float64)
            mode = torch.zeros(LENGTH, dtype=torch.bool)
            parts = []
            for begin, end, attention in pieces:
                mode[begin:end] = attention or linear is None
                modes = attention or linear is None
                parts.append(other.logits(other.hidden(self.tokens[:, begin:end], modes, state)))
            self.check(torch.cat(parts, 1), model.forward(self.tokens, mode))


if __name__ == "__main__":
    unittest.main()
