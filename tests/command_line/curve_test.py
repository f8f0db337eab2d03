"""`oryx curve`: what it writes, and that its losses are those of the logits.

usage: curve_test.py ORYX [unittest arguments]
"""

import json
import unittest
import xml.etree.ElementTree

import numpy as np
from safetensors.numpy import save_file

from command_line import CommandLineTest, write_model

TEXT = "".join(f"line {i} of a text that says little, {i * i} times. " for i in range(60))


class Curve(CommandLineTest):
    def setUp(self):
        super().setUp()
        self.model = write_model(self.folder / "model")
        (self.folder / "text.txt").write_text(TEXT)

    def curve(self, *options, data="text.txt"):
        return self.succeeds("curve", self.model, "--data", data, "--output", "out", "--device", "cpu", *options)

    def test_losses_are_those_of_the_logits(self):
        schedule = "attention,linear@20,attention@28"
        self.curve("--switch", schedule, "--length", 40, "--windows", 3, "--batch", 2, "--dtype", "float64", "--smooth", 5)
        report = json.loads((self.folder / "out/curve.json").read_text())
        self.assertEqual((report["windows"], report["length"], report["smooth"]), (3, 40, 5))
        self.assertEqual([c["schedule"] for c in report["curves"]][:2], ["attention", "linear"])
        tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
        available = (len(tokens) + 1 - 1) // 40  # the end-of-text token counts
        starts = [i * available // 3 * 40 for i in range(3)]
        windows = np.stack([tokens[start:start + 41] for start in starts])
        for curve in report["curves"]:
            logits = self.logits(self.model, windows[:, :-1], curve["schedule"])
            losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
            np.testing.assert_allclose(curve["loss"], losses.mean(0), atol=1e-9)
            self.assertAlmostEqual(curve["perplexity"], np.exp(losses.mean()), places=6)
            smooth = [losses.mean(0)[max(0, i - 2):i + 3].mean() for i in range(40)]
            np.testing.assert_allclose(curve["smoothed_perplexity"], np.exp(smooth), rtol=1e-9)
        switches = report["curves"][2]["switches"]
        self.assertEqual([(s["position"], s["from"], s["to"]) for s in switches],
                         [(20, "attention", "linear"), (28, "linear", "attention")])
        # Eight tokens hold no window of 16; the twelve up to the end neither.
        self.assertEqual([s["excess"] for s in switches], [[], []])

    def test_excess_after_a_switch(self):
        self.curve("--switch", "attention,linear@100", "--length", 200, "--windows", 4)
        report = json.loads((self.folder / "out/curve.json").read_text())
        linear, switched = (np.array(report["curves"][i]["loss"]) for i in (1, 2))
        excess = report["curves"][2]["switches"][0]["excess"]
        self.assertEqual([e["end"] for e in excess], [16, 64])
        for e in excess:
            self.assertAlmostEqual(e["excess_loss"], (switched - linear)[100:100 + e["end"]].mean(), places=5)
            self.assertGreater(e["standard_error"], 0)

    def test_picture_and_terminal(self):
        done = self.curve("--length", 64, "--windows", 2, "--switch", "linear,attention@32")
        root = xml.etree.ElementTree.parse(self.folder / "out/curve.svg").getroot()
        self.assertTrue(root.tag.endswith("svg"))
        texts = [element.text for element in root.iter() if element.text]
        for label in ("attention", "linear", "linear,attention@32", "position"):
            self.assertIn(label, texts)
            self.assertIn(label, done.stdout)
        self.assertNotIn("\x1b", done.stdout)
        self.assertIn("\x1b[38;5;", self.curve("--length", 64, "--color", "always").stdout)

    def test_json_on_standard_output(self):
        done = self.curve("--json", "--length", 32)
        self.assertEqual(json.loads(done.stdout), json.loads((self.folder / "out/curve.json").read_text()))

    def test_shards_give_what_their_text_gives(self):
        first = json.loads(self.curve("--json", "--length", 50).stdout)
        shards = self.folder / "shards"
        shards.mkdir()
        ids = np.array(list(TEXT.encode()) + [256], np.uint16)
        metadata = {"tokenizer": "bytes", "documents": "1", "vocabulary": "257"}
        save_file({"tokens": ids}, shards / "tokens-00000.safetensors", metadata)
        second = json.loads(self.curve("--json", "--length", 50, data="shards").stdout)
        self.assertEqual(first["curves"], second["curves"])
        save_file({"tokens": ids}, shards / "tokens-00000.safetensors", metadata | {"tokenizer": "0" * 64})
        self.fails(1, ["curve", self.model, "--data", "shards", "--output", "new"], "bytes", "0" * 64)

    def test_a_model_of_one_mixer(self):
        self.model = write_model(self.folder / "plain", "attention")
        report = json.loads(self.curve("--json", "--length", 32).stdout)
        self.assertEqual([c["schedule"] for c in report["curves"]], ["attention"])

    def test_wrong_input(self):
        def refused(code, *options, mentions=(), data="text.txt"):
            self.fails(code, ["curve", self.model, "--data", data, "--output", "new", *options], *mentions)
        refused(1, "--length", 100_000, mentions=["100000"])
        refused(1, data="missing.txt", mentions=["missing.txt"])
        (self.folder / "empty.txt").write_text("")
        refused(1, data="empty.txt", mentions=["empty.txt"])
        for option in ("windows", "length", "smooth", "batch"):
            refused(2, f"--{option}", 0, mentions=[option])
        refused(2, "--switch", "attention,linear@50,attention@20", mentions=["20"])
        self.fails(1, ["curve", self.model, "--data", "text.txt", "--output", "text.txt"], "text.txt")


if __name__ == "__main__":
    unittest.main()
