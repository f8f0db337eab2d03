"""`oryx logits`: pieces, states, and tokens that are wrong.

usage: logits_test.py ORYX [unittest arguments]
"""

import unittest

import numpy as np
from safetensors.numpy import load_file

from command_line import CommandLineTest, VOCABULARY, write_model

SCHEDULE = "linear,attention@7,linear@20"


class Logits(CommandLineTest):
    def setUp(self):
        super().setUp()
        self.tokens = np.random.default_rng(3).integers(0, VOCABULARY, (3, 33))

    def test_shape_and_type(self):
        model = write_model(self.folder / "model")
        for dtype, expected in (("float32", np.float32), ("float64", np.float64)):
            self.succeeds("logits", model, "--tokens", self.write_tokens(self.tokens.astype(np.int32)), "--schedule",
                          "attention", "--output", "out", "--dtype", dtype, "--device", "cpu")
            logits = load_file(self.folder / "out")["logits"]
            self.assertEqual((logits.shape, logits.dtype), ((3, 33, VOCABULARY), expected))
        self.succeeds("logits", model, "--tokens", self.write_tokens(self.tokens), "--schedule", "attention", "--output",
                      "out", "--dtype", "bfloat16")
        self.assertIn(b'"BF16"', (self.folder / "out").read_bytes()[:200])

    def test_pieces_and_states_equal_the_whole(self):
        for kind in ("ssd", "gated_delta"):
            model = write_model(self.folder / kind, kind)
            whole = self.logits(model, self.tokens, SCHEDULE)
            for split in (1, 5, 33, 100):
                np.testing.assert_allclose(self.logits(model, self.tokens, SCHEDULE, "--split", split), whole, atol=1e-10)
            # Positions go on where the state stops: the same schedule text serves both calls.
            head = self.logits(model, self.tokens[:, :11], SCHEDULE, "--save-state", "state")
            self.assertEqual(load_file(self.folder / "state")["position"].tolist(), [11])
            tail = self.logits(model, self.tokens[:, 11:], SCHEDULE, "--load-state", "state", "--split", 6)
            np.testing.assert_allclose(np.concatenate([head, tail], 1), whole, atol=1e-10)
            # A sequence does not see its neighbours.
            alone = self.logits(model, self.tokens[1:2], SCHEDULE)
            np.testing.assert_allclose(alone[0], whole[1], atol=1e-10)

    def test_relative_starts_count_from_the_end_of_all_tokens(self):
        model = write_model(self.folder / "model")
        whole = self.logits(model, self.tokens, "linear,attention@-5")
        self.logits(model, self.tokens[:, :20], "linear", "--save-state", "state")
        tail = self.logits(model, self.tokens[:, 20:], "linear,attention@-5", "--load-state", "state")
        np.testing.assert_allclose(tail, whole[:, 20:], atol=1e-10)

    def refused(self, code, tokens, *mentions, options=(), **names):
        self.fails(code, ["logits", "model", "--tokens", self.write_tokens(tokens, **names), "--schedule", "linear",
                          "--output", "out", *options], *mentions)

    def test_wrong_tokens(self):
        write_model(self.folder / "model")
        self.write_tokens(self.tokens)
        self.refused(1, np.array([[1, VOCABULARY, 2]]), VOCABULARY)
        self.refused(1, np.array([[1, -1, 2]]), -1)
        self.refused(1, self.tokens.astype(np.float32), "int32", "tokens")
        self.refused(1, self.tokens.astype(np.uint16), "int32", "tokens")
        self.refused(1, self.tokens[0], "[batch, time]")
        self.refused(1, self.tokens[:, :0], "empty")
        self.refused(1, self.tokens, "tokens", key="ids")
        self.fails(1, ["logits", "model", "--tokens", "missing", "--schedule", "linear", "--output", "out"], "missing")
        (self.folder / "text").write_text("no tensors in here")
        self.fails(1, ["logits", "model", "--tokens", "text", "--schedule", "linear", "--output", "out"], "text")

    def test_wrong_options(self):
        write_model(self.folder / "model")
        self.write_tokens(self.tokens)
        for split in (0, -3):
            self.refused(2, self.tokens, split, options=["--split", split])
        self.fails(1, ["logits", "model", "--tokens", "tokens.safetensors", "--schedule", "linear", "--output",
                       "nowhere/out"], "nowhere")
        self.refused(1, self.tokens, "nowhere", options=["--save-state", "nowhere/state"])
        self.refused(1, self.tokens, "missing", options=["--load-state", "missing"])

    def test_wrong_states(self):
        model = write_model(self.folder / "model")
        write_model(self.folder / "other", "gated_delta")
        self.logits(model, self.tokens, "linear", "--save-state", "state")
        self.refused(1, self.tokens[:2], "3", "2", options=["--load-state", "state"])
        self.fails(1, ["logits", "other", "--tokens", self.write_tokens(self.tokens), "--schedule", "linear", "--output",
                       "out", "--load-state", "state"], "gated_delta")
        whole = (self.folder / "state").read_bytes()
        (self.folder / "state").write_bytes(whole[:-9])
        self.refused(1, self.tokens, "state", options=["--load-state", "state"])

    def test_nothing_is_left_when_the_state_cannot_be_written(self):
        write_model(self.folder / "model")
        self.write_tokens(self.tokens)
        (self.folder / "taken").mkdir()
        self.refused(1, self.tokens, "taken", options=["--save-state", "taken"])


if __name__ == "__main__":
    unittest.main()
