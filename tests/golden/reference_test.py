"""The reference against closed forms and PyTorch's own functions: the judge is judged first."""

import math
import unittest

import torch
import torch.nn.functional as F

import reference_model as reference
import reference_training as training

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)


def random(*shape):
    return torch.randn(*shape)


class Operators(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)

    def check(self, actual, expected, tolerance=1e-12):
        self.assertEqual(actual.shape, expected.shape)
        self.assertLessEqual((actual - expected).abs().max().item(), tolerance)

    def test_attention_is_sdpa_with_grouped_keys(self):
        q, k, v = random(2, 33, 4, 16), random(2, 33, 2, 16), random(2, 33, 2, 16)
        expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                                  is_causal=True, enable_gqa=True).transpose(1, 2)
        self.check(reference.attention(q, k, v), expected)

    def test_short_conv_is_conv1d(self):
        x, weight = random(2, 17, 6), random(6, 4)
        expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], groups=6).transpose(1, 2)
        self.check(reference.short_conv(x, weight), expected)

    def test_rope_rotates_by_position_and_keeps_relative_products(self):
        x, y = random(1, 1, 1, 16).expand(1, 40, 1, 16), random(1, 1, 1, 16).expand(1, 40, 1, 16)
        products = reference.rope(x)[0, :, 0] @ reference.rope(y)[0, :, 0].T
        self.check(products[5:, 5:], products[:-5, :-5])
        first = torch.view_as_complex(torch.stack([x[0, :, 0, 0], x[0, :, 0, 8]], -1).contiguous())
        turned = first * torch.polar(torch.ones(40), torch.arange(40.0))  # pair 0 turns by one radian a token
        self.check(reference.rope(x)[0, :, 0, 0], turned.real)
        self.check(reference.rope(x)[0, :, 0, 8], turned.imag)

    def test_ssd_is_the_masked_product(self):
        q, k, v = random(2, 21, 4, 8), random(2, 21, 2, 8), random(2, 21, 2, 5)
        step = torch.rand(2, 21, 2)
        log_decay = -3 * torch.rand(2, 21, 2)
        output, state = reference.ssd(q, k, v, log_decay, step)
        total = log_decay.cumsum(1).transpose(1, 2)
        mask = (total[..., :, None] - total[..., None, :]).exp().tril() * step.transpose(1, 2)[..., None, :]
        q, wide_k, wide_v = q.transpose(1, 2), *(reference.spread(t, 4).transpose(1, 2) for t in (k, v))
        expected = (q @ wide_k.mT * mask.repeat_interleave(2, 1)) @ wide_v
        self.check(output, expected.transpose(1, 2))
        weight = mask[:, :, -1].transpose(1, 2)
        self.check(state, torch.einsum("btj,btjd,btje->bjde", weight, k, v))

    def test_gated_delta_is_the_product_of_matrices(self):
        q, k, v = random(1, 12, 2, 8), reference.l2_norm(random(1, 12, 2, 8)), random(1, 12, 2, 8)
        beta, log_decay = torch.rand(1, 12, 2) * 2, -torch.rand(1, 12, 2)
        output, state = reference.gated_delta(q, k, v, log_decay, beta)
        for head in range(2):
            keys, values = k[0, :, head], v[0, :, head]
            transitions = [log_decay[0, t, head].exp() * (torch.eye(8) - beta[0, t, head] * torch.outer(keys[t], keys[t]))
                           for t in range(12)]
            for t in range(12):
                expected = torch.zeros(8, 8)
                for source in range(t + 1):
                    term = beta[0, source, head] * torch.outer(keys[source], values[source])
                    for later in range(source + 1, t + 1):
                        term = transitions[later] @ term
                    expected += term
                self.check(output[0, t, head], q[0, t, head] @ expected / math.sqrt(8))
            self.check(state[0, head], expected)

    def test_gated_delta_stores_and_overwrites(self):
        """beta = 1, no decay: a unit key read back gives exactly the value written last under it."""
        k = torch.zeros(1, 3, 1, 4)
        k[0, [0, 1, 2], 0, [1, 2, 1]] = 1
        v = random(1, 3, 1, 4)
        output, state = reference.gated_delta(k, k, v, torch.zeros(1, 3, 1), torch.ones(1, 3, 1))
        self.check(output * 2, v)
        self.check(state[0, 0, 1], v[0, 2, 0])
        self.check(state[0, 0, 2], v[0, 1, 0])


class WholeModel(unittest.TestCase):
    def model(self, mixers, **options):
        values = dict(layers=2, width=32, heads=2, head_dim=16, mlp_width=48, vocabulary=64, mixers=mixers)
        values.update(options)
        config = reference.resolve(values)
        return reference.Model(config, reference.random_weights(config, seed=3))

    def test_later_tokens_and_modes_change_nothing_before_them(self):
        for mixers in (["attention", "ssd"], ["attention", "gated_delta"]):
            model = self.model(mixers)
            tokens = torch.randint(64, (2, 30))
            modes = torch.rand(30) < 0.5
            before = model.forward(tokens, modes)
            tokens[:, 20:], modes[20:] = torch.randint(64, (2, 10)), ~modes[20:]
            after = model.forward(tokens, modes)
            self.assertTrue(torch.equal(before[:, :20], after[:, :20]))
            self.assertGreater((before[:, 20:] - after[:, 20:]).abs().max(), 1e-2)

    def test_every_tensor_of_the_model_matters(self):
        for mixers, options in ((["attention", "ssd"], {}), (["attention", "gated_delta"], {}), (["attention"], {}),
                                (["ssd"], dict(heads=1, value_heads=3)), (["gated_delta"], dict(value_dim=24)),
                                (["attention", "ssd"], dict(hybrid="intra_layer"))):
            model = self.model(mixers, **options)
            weights = {name: w.requires_grad_() for name, w in model.weights.items()}
            modes = torch.arange(40) % 3 == 0
            logits = model.forward(torch.randint(64, (2, 40)), modes)
            gradients = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), torch.randint(64, (80,))),
                                            list(weights.values()))
            for name, gradient in zip(weights, gradients):
                self.assertGreater(gradient.abs().max(), 1e-7, name)


class Training(unittest.TestCase):
    recipe = training.Recipe(steps=10, batch=2, sequence_length=8, learning_rate=1e-2, warmup_fraction=0.25,
                             clip=0.5)

    def test_learning_rate(self):
        rates = [training.learning_rate(self.recipe, step) for step in range(10)]
        self.assertEqual(rates[:3], [5e-3, 1e-2, 1e-2])
        self.assertAlmostEqual(rates[6], 1e-5 + (1e-2 - 1e-5) / 2)
        self.assertGreater(rates[9], 1e-5)

    def test_sequences_wrap_and_skip_the_tail(self):
        data = torch.arange(30)
        self.assertEqual(training.sequence(data, 2, 8).tolist(), list(range(16, 25)))
        self.assertEqual(training.sequence(data, 3, 8).tolist(), list(range(9)))
        self.assertEqual(training.sequence(data[:25], 2, 8).tolist(), list(range(16, 25)))
        self.assertEqual(training.sequence(data[:24], 2, 8).tolist(), list(range(9)))

    def test_optimizer_is_torch_adamw_with_clipping(self):
        torch.manual_seed(2)
        weights = {"matrix": random(5, 4), "vector": random(4)}
        ours = {name: w.clone() for name, w in weights.items()}
        theirs = [w.clone().requires_grad_() for w in weights.values()]
        optimizer = torch.optim.AdamW([dict(params=[theirs[0]], weight_decay=0.1),
                                       dict(params=[theirs[1]], weight_decay=0.0)], betas=(0.9, 0.95), eps=1e-8)
        mine = training.AdamW(ours, self.recipe)
        for step in range(10):
            gradients = [random(5, 4), random(4) * 10 ** random(1).item()]
            for parameter, gradient in zip(theirs, gradients):
                parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_(theirs, self.recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate(self.recipe, step)
            optimizer.step()
            scale = training.clip_scale(gradients, self.recipe.clip)
            mine.update(ours, dict(zip(ours, (g * scale for g in gradients))), step)
        for mine, expected in zip(ours.values(), theirs):
            self.assertLess((mine - expected).abs().max(), 1e-12)

    def test_training_lowers_the_loss_and_leaves_the_start_alone(self):
        values = dict(layers=1, width=32, heads=2, head_dim=16, mlp_width=48, vocabulary=64,
                      mixers=["attention", "gated_delta"])
        config = reference.resolve(values)
        start = reference.random_weights(config, seed=3)
        copy = {name: w.clone() for name, w in start.items()}
        data = torch.arange(41) % 7
        trained, losses = training.train(config, start, data, self.recipe, torch.arange(8) < 4)
        self.assertLess(losses[-1], losses[0] - 0.5)
        for name in start:
            self.assertTrue(torch.equal(start[name], copy[name]))
            self.assertFalse(torch.equal(start[name], trained[name]))


if __name__ == "__main__":
    unittest.main()
