"""torch.ops.oryx.* from Python: values against plain torch, gradients by torch.autograd.gradcheck in float64."""

import sys
import unittest

import torch
import torch.nn.functional as F

torch.ops.load_library(sys.argv.pop(1))
oryx = torch.ops.oryx


def leaf(*sizes):
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


def spans(*rows):
    return torch.tensor(rows, dtype=torch.int64)


class Operators(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def gradcheck(self, function, *inputs):
        self.assertTrue(torch.autograd.gradcheck(function, inputs, fast_mode=False, atol=1e-6, rtol=1e-5))

    def test_linear_mixers(self):
        batch, time, heads, dim = 2, 9, 2, 3
        chosen = spans((0, 2, 7), (1, 0, 3), (1, 5, 9))
        rows = 12
        query, key, value = leaf(rows, heads, dim), leaf(batch, time, heads, dim), leaf(batch, time, heads, dim)
        state = leaf(batch, heads, dim, dim)
        decay = (-torch.rand(batch, time, heads, dtype=torch.float64)).requires_grad_()
        step = torch.rand(batch, time, heads, dtype=torch.float64).requires_grad_()
        skip = leaf(heads)
        for name in ("ssd", "ssd_recurrence"):
            self.gradcheck(lambda q, k, v, g, s, d, s0: getattr(oryx, name)(q, k, v, g, s, d, chosen, s0, 4),
                           query, key, value, decay, step, skip, state)
        for name in ("gated_delta_rule", "gated_delta_rule_recurrence"):
            self.gradcheck(lambda q, k, v, g, b, s0: getattr(oryx, name)(q, k, v, g, b, chosen, s0, 0.5, 4),
                           query, key, value, decay, step, state)

    def test_ssd_is_its_recurrence(self):
        time, dim = 70, 4
        query, key, value = leaf(time, 1, dim), leaf(1, time, 1, dim), leaf(1, time, 1, dim)
        decay = -torch.rand(1, time, 1, dtype=torch.float64)
        step = torch.rand(1, time, 1, dtype=torch.float64)
        output, final = oryx.ssd(query, key, value, decay, step, None, spans((0, 0, time)), None)
        state = torch.zeros(dim, dim, dtype=torch.float64)
        for t in range(time):
            state = decay[0, t, 0].exp() * state + step[0, t, 0] * torch.outer(key[0, t, 0], value[0, t, 0])
            torch.testing.assert_close(output[t, 0], query[t, 0] @ state)
        torch.testing.assert_close(final[0, 0], state)

    def test_attention(self):
        batch, time, heads, dim = 2, 11, 2, 4
        key, value = leaf(batch, time, heads, dim), leaf(batch, time, heads, dim)
        query = leaf(batch * time, heads, dim)
        everything = spans((0, 0, time), (1, 0, time))
        expected = F.scaled_dot_product_attention(
            query.view(batch, time, heads, dim).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            is_causal=True, scale=0.5).transpose(1, 2).reshape(batch * time, heads, dim)
        torch.testing.assert_close(oryx.attention(query, key, value, everything, 0.5), expected)
        some = spans((0, 3, 7), (1, 10, 11))
        self.gradcheck(lambda q, k, v: oryx.attention(q, k, v, some, 0.5), leaf(5, heads, dim), key, value)

    def test_pointwise(self):
        self.gradcheck(lambda x, w, b, t: oryx.short_conv(x, w, b, t, "silu"),
                       leaf(2, 5, 3), leaf(3, 4), leaf(3), leaf(2, 3, 3))
        rows = torch.randperm(10).view(2, 5)
        self.gradcheck(lambda x, b, a, s: oryx.decays(x, b, a, s, rows), leaf(10, 3), leaf(3), leaf(3), leaf(10, 3))
        x, bias, log_a = leaf(2, 5, 3), leaf(3), leaf(3)
        step = F.softplus(x + bias)
        torch.testing.assert_close(oryx.decays(x, bias, log_a), (-log_a.exp() * step, step))
        cosine, sine = oryx.rotary_tables(torch.arange(3), 4, 10000.0, torch.float64)
        self.gradcheck(lambda x: oryx.rotary(x, cosine, sine), leaf(2, 3, 2, 4))
        self.gradcheck(oryx.l2_norm, leaf(3, 2, 4))
        for order in ("after_gate", "before_gate"):
            for group in (6, 3):
                self.gradcheck(lambda x, g, w: oryx.gated_norm(x, g, w, 1e-5, order), leaf(4, 6), leaf(4, 6),
                               leaf(group))
        self.gradcheck(lambda x, g: oryx.gated_norm(x, g, None), leaf(4, 6), leaf(4, 6))
        self.gradcheck(oryx.add_norm, leaf(4, 6), leaf(4, 6), leaf(6))

    def test_cross_entropy(self):
        hidden, weight = leaf(7, 5), leaf(11, 5)
        targets = torch.tensor([0, 3, 10, -1, 2, 2, 5])
        loss, each = oryx.cross_entropy(hidden, weight, targets, 0.25, 3)
        expected = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=-1, reduction="none")
        torch.testing.assert_close(each, expected.detach())
        torch.testing.assert_close(loss, 0.25 * expected.sum())
        got = torch.autograd.grad(loss, (hidden, weight))
        wanted = torch.autograd.grad(0.25 * expected.sum(), (hidden, weight))
        torch.testing.assert_close(got, wanted)

    def test_projections(self):
        self.gradcheck(lambda x, a, b: oryx.projections(x, [a, b], [0, 2], [6, 3]), leaf(6, 4), leaf(3, 4), leaf(2, 4))
        self.gradcheck(oryx.linear, leaf(20, 4), leaf(3, 4))
        self.gradcheck(lambda a, b: oryx.merge_rows([a, b], [torch.tensor([4, 0, 3]), torch.tensor([1, 2])], 5), leaf(3, 2), leaf(2, 2))

    def test_errors_say_what_was_expected(self):
        with self.assertRaisesRegex(RuntimeError, r"\[ssd\]"):
            oryx.ssd(leaf(1, 1, 2), leaf(1, 3, 1, 4), leaf(1, 3, 1, 2), leaf(1, 3, 1), leaf(1, 3, 1), None,
                     spans((0, 0, 1)), None)


if __name__ == "__main__":
    unittest.main()
