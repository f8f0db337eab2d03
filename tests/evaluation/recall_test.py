"""Multi-query associative recall is learnt: `oryx prepare --task mqar`, `oryx train`, `oryx evaluate`.

usage: recall_test.py ORYX [unittest arguments]
"""

import json
import os
import sys
import unittest
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "command_line"))
from command_line import CommandLineTest  # noqa: E402

os.environ["OMP_NUM_THREADS"] = "1"  # products of this size gain nothing from a second thread

# One layer is enough: the short convolution sets a key beside its value.
RECIPE = """
[model]
mixers = ["attention"]
short_conv = true
gate = true
norm = "full"
layers = 1
width = 64
heads = 2
head_dim = 32
mlp_width = 64
vocabulary = 257
[data]
train = ["data"]
sequence_length = 64
[schedule]
fixed = "attention"
[training]
tokens = 1_000_000
batch_tokens = 2048
micro_batch = 32
learning_rate = 5e-3
[run]
directory = "run"
seed = 1
device = "cpu"
"""


class Recall(CommandLineTest):
    def test_attention_learns_it(self):
        (self.folder / "recipe.toml").write_text(RECIPE)
        self.succeeds("prepare", "--task", "mqar", "--tokenizer", "bytes", "--length", 64, "--pairs", "2,4,8", "--sequences", 16000,
                      "--output", "data")
        self.succeeds("train", "recipe.toml")
        self.succeeds("evaluate", "run/latest", "--tasks", "mqar", "--mqar-length", 64, "--mqar-pairs", "4,8", "--mqar-samples", 100,
                      "--output", "scores", "--device", "cpu")
        results = json.loads((self.folder / "scores/results.json").read_text())
        cells = {cell["pairs"]: cell["value"] for cell in results["runs"][0]["tasks"]["mqar"]["cells"]}
        self.assertEqual(list(cells), [4, 8])
        # One of 127 values by chance, one of four or eight by guessing among those shown.
        self.assertGreater(min(cells.values()), 0.5, cells)


if __name__ == "__main__":
    unittest.main()
