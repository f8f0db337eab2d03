"""What the tests of the oryx binary share: running it, and models small enough to be written on the spot."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORYX = Path(sys.argv.pop(1)).resolve() if len(sys.argv) > 1 else Path("build/oryx").resolve()
COMMANDS = ["prepare", "train", "inspect", "generate", "logits", "evaluate", "curve", "report", "benchmark"]

WIDTH, HEADS, MLP, VOCABULARY = 32, 2, 48, 260  # three rows more than the 257 ids of the byte tokenizer

CONFIGS = {
    "ssd": {"mixers": ["attention", "ssd"]},
    "gated_delta": {"mixers": ["attention", "gated_delta"]},
    "attention": {"mixers": ["attention"]},
}


def config_of(kind, layers=2):
    return {**CONFIGS[kind], "layers": layers, "width": WIDTH, "heads": HEADS, "mlp_width": MLP,
            "vocabulary": VOCABULARY, "tokenizer": "bytes"}


def weights_of(kind, layers=2, seed=0):
    """Random weights whose most likely next byte is always a printable character."""
    draw = np.random.default_rng(seed)

    def normal(*shape, scale=0.2):
        return draw.normal(0, scale, shape).astype(np.float32)

    tensors = {"embedding.weight": normal(VOCABULARY, WIDTH, scale=1.0),
               "final_norm.weight": np.ones(WIDTH, np.float32)}
    # A row of zeros has logit 0, below the largest of many random ones.
    tensors["embedding.weight"][:32] = 0
    tensors["embedding.weight"][127:257] = 0
    for n in range(layers):
        layer, mixer = f"layers.{n}.", f"layers.{n}.mixer."
        tensors |= {layer + "mixer_norm.weight": np.ones(WIDTH, np.float32),
                    layer + "mlp_norm.weight": np.ones(WIDTH, np.float32),
                    layer + "mlp.gate.weight": normal(MLP, WIDTH), layer + "mlp.up.weight": normal(MLP, WIDTH),
                    layer + "mlp.down.weight": normal(WIDTH, MLP), mixer + "attention.query.weight": normal(WIDTH, WIDTH)}
        for name in ("key", "value", "output"):
            tensors[f"{mixer}{name}.weight"] = normal(WIDTH, WIDTH)
        if kind == "attention":
            continue
        tensors[mixer + "gate.weight"] = normal(WIDTH, WIDTH)
        for name in ("key", "value"):
            tensors[f"{mixer}{name}_conv.weight"] = normal(WIDTH, 4, scale=0.5)
        linear = f"{mixer}{kind}."
        tensors[linear + "query.weight"] = normal(WIDTH, WIDTH)
        tensors[linear + "A_log"] = draw.uniform(-1, 1, HEADS).astype(np.float32)
        if kind == "ssd":
            tensors |= {mixer + "norm.weight": np.ones(WIDTH, np.float32), linear + "step.weight": normal(HEADS, WIDTH),
                        linear + "step_bias": normal(HEADS), linear + "D": np.ones(HEADS, np.float32)}
        else:
            tensors |= {mixer + "norm.weight": np.ones(WIDTH // HEADS, np.float32),
                        linear + "decay.weight": normal(HEADS, WIDTH), linear + "decay_bias": normal(HEADS),
                        linear + "beta.weight": normal(HEADS, WIDTH)}
    return tensors


def write_model(directory, kind="ssd", config=None, tensors=None):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or config_of(kind)))
    save_file(tensors or weights_of(kind), directory / "model.safetensors")
    return directory


class CommandLineTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="oryx-test-")
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def run_oryx(self, *arguments, stdin="", environment=None):
        return subprocess.run([ORYX, *map(str, arguments)], input=stdin, capture_output=True, text=True,
                              cwd=self.folder, timeout=120, env={**os.environ, **(environment or {})})

    def succeeds(self, *arguments, **options):
        done = self.run_oryx(*arguments, **options)
        self.assertEqual(done.returncode, 0, f"{arguments}: {done.stderr}")
        return done

    def fails(self, code, arguments, *mentions, **options):
        """One line on standard error that holds every mention; nothing on standard output; no new file."""
        before = sorted(self.folder.rglob("*"))
        done = self.run_oryx(*arguments, **options)
        what = f"{arguments}: {done.stdout[-300:]}{done.stderr}"
        self.assertEqual(done.returncode, code, what)
        self.assertTrue(done.stderr.startswith("oryx: "), what)
        self.assertEqual(done.stderr.count("\n"), 1, what)
        self.assertEqual(done.stdout, "", what)
        for mention in mentions:
            self.assertIn(str(mention), done.stderr, what)
        self.assertEqual(sorted(self.folder.rglob("*")), before, what)

    def write_tokens(self, tokens, name="tokens.safetensors", key="tokens"):
        save_file({key: np.ascontiguousarray(tokens)}, self.folder / name)  # a view would be saved wrong
        return self.folder / name

    def logits(self, model, tokens, schedule, *options):
        """As `oryx logits` gives them in float64."""
        output = self.folder / "logits.safetensors"
        self.succeeds("logits", model, "--tokens", self.write_tokens(tokens), "--schedule", schedule, "--output", output,
                      "--device", "cpu", "--dtype", "float64", *options)
        tensors = load_file(output)
        self.assertEqual(list(tensors), ["logits"])
        return tensors["logits"]
