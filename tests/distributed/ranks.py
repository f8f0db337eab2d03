"""What the tests of several ranks share: tiny data and recipes, and starting ranks by torchrun or one by one.

ORYX_TEST_DEVICE=cuda: ranks on GPUs over NCCL, two of them, which is how many GPUs it takes.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORYX = Path(sys.argv.pop(1)).resolve() if len(sys.argv) > 1 else Path("build/oryx").resolve()
TORCHRUN = Path(sys.executable).parent / "torchrun"
DEVICE = os.environ.get("ORYX_TEST_DEVICE", "cpu")
MANY = 4 if DEVICE == "cpu" else 2
# The type in which runs of different numbers of ranks are compared closely, and how closely.
EXACT, EXACT_TOLERANCE = ("float64", 1e-9) if DEVICE == "cpu" else ("float32", 1e-3)
CLOSE = 2e-4 if DEVICE == "cpu" else 1e-3  # of float32
STEPS = 24
TIMING_KEYS = {"seconds", "tokens_per_second"}
# Threads that spin between the tiny products of this model take the processor from each other.
os.environ.update({"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"})

# Sequences of four chunks: many have no token in attention, so ranks meet parameters without a gradient.
RECIPE = """
[model]
mixers = ["attention", "{mixer}"]
layers = 2
width = 32
heads = 2
mlp_width = 64
vocabulary = 257

[data]
train = ["{data}/train"]
validation = ["{data}/validation"]
sequence_length = 64

[schedule]
chunk = 16

[training]
steps = {steps}
batch_tokens = 320
micro_batch = 1
learning_rate = 5e-3
validation_every = 6
validation_sequences = 7
checkpoint_every = 4
checkpoints_to_keep = 10
timeout_seconds = 60

[run]
directory = "{run}"
seed = 3
device = "{device}"
"""


def write_shards(directory, tokens, pieces=2):
    directory.mkdir(parents=True)
    for i, piece in enumerate(np.array_split(np.asarray(tokens, np.uint16), pieces)):
        save_file({"tokens": piece}, directory / f"shard-{i:05d}.safetensors",
                  {"tokenizer": "bytes", "documents": "1", "vocabulary": "257"})


def sentences(count, seed):
    words = ["the", "quick", "onyx", "oryx", "grazes", "under", "seven", "pale", "acacias", "again"]
    draw = random.Random(seed)
    return list(" ".join(draw.choice(words) for _ in range(count)).encode()) + [256]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain_environment():
    """Without what a launcher around these tests may have set."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "SLURM_", "OMPI_")
    return {name: value for name, value in os.environ.items() if not name.startswith(launchers)}


class RanksTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = Path(tempfile.mkdtemp(prefix="oryx-ranks-"))
        cls.data = cls.root / "data"
        write_shards(cls.data / "train", sentences(4000, 1))
        write_shards(cls.data / "validation", sentences(300, 2), pieces=1)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.root)

    # Starting

    def command(self, run, *overrides, mixer="ssd", steps=STEPS):
        recipe = self.root / f"{run.name}-{mixer}-{steps}.toml"
        recipe.write_text(RECIPE.format(device=DEVICE, data=self.data, run=run, mixer=mixer, steps=steps))
        return [str(ORYX), "train", str(recipe), "--json", *overrides]

    def start(self, ranks, run, *overrides, **options):
        """One process for `ranks` = 1, else torchrun with that many."""
        command = self.command(run, *overrides, **options)
        if ranks > 1:
            command = [str(TORCHRUN), "--standalone", "--nproc-per-node", str(ranks), "--no-python", *command]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=plain_environment())

    def start_rank(self, rank, size, port, run, *overrides, environment=None, **options):
        """One rank as a launcher without a store of its own would start it."""
        variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port} if environment is None else environment
        return subprocess.Popen(self.command(run, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**plain_environment(), **{k: str(v) for k, v in variables.items()}}, **options)

    def end(self, process, timeout=180):
        """The process with its output, once it is over."""
        try:
            process.out, process.errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.out, process.errors = process.communicate()
            self.fail(f"still running after {timeout} s: {process.errors}")
        return process

    def train(self, ranks, run, *overrides, **options):
        process = self.end(self.start(ranks, run, *overrides, **options))
        self.assertEqual(process.returncode, 0, process.errors)
        self.assertEqual(process.out.count("\n"), 1, process.out)  # rank 0 alone speaks
        return json.loads(process.out)

    def wait_for_lines(self, process, run, count):
        metrics = run / "metrics.jsonl"
        deadline = time.time() + 90
        while time.time() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
                return
            time.sleep(0.002)

    def workers(self, launcher):
        """The processes that torchrun started, by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher.pid:
                    variables = dict(text.split("=", 1) for text in (entry / "environ").read_text().split("\0") if "=" in text)
                    if "RANK" in variables:
                        found[int(variables["RANK"])] = int(entry.name)
            except (OSError, ValueError, IndexError):
                continue
        return found

    # Comparing

    def metrics(self, run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]

    def assert_same_weights(self, run, other):
        for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
            self.assertEqual((run / "latest" / name).read_bytes(), (other / "latest" / name).read_bytes(), name)

    def assert_same_bytes(self, run, other):
        self.assert_same_weights(run, other)
        self.assertEqual(self.metrics(run), self.metrics(other))

    def assert_close(self, run, other, tolerance):
        """Losses, weights and moments equal but for the order of sums."""
        for name in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = load_file(run / "latest" / name), load_file(other / "latest" / name)
            self.assertEqual(list(ours), list(theirs))
            for key in ours:
                self.assertEqual(ours[key].shape, theirs[key].shape, key)
                difference = np.linalg.norm((ours[key] - theirs[key]).ravel())
                self.assertLessEqual(difference, tolerance * (np.linalg.norm(theirs[key].ravel()) + 1e-30), f"{name}: {key}")
        ours, theirs = self.metrics(run), self.metrics(other)
        self.assertEqual(len(ours), len(theirs))
        for a, b in zip(ours, theirs):
            self.assertEqual({k: v for k, v in a.items() if k not in ("loss", "gradient_norm")},
                             {k: v for k, v in b.items() if k not in ("loss", "gradient_norm")})
            for x, y in zip(a["loss"].values() if isinstance(a["loss"], dict) else [a["loss"]],
                            b["loss"].values() if isinstance(b["loss"], dict) else [b["loss"]]):
                self.assertAlmostEqual(x, y, delta=tolerance * abs(y))

    def cut_back(self, run, step):
        """The run directory as it stood when this step had been saved."""
        for checkpoint in (run / "checkpoints").iterdir():
            if int(checkpoint.name.split("-")[1]) > step:
                shutil.rmtree(checkpoint)
        (run / "latest").unlink()
        (run / "latest").symlink_to(f"checkpoints/step-{step:08d}")

    def error_lines(self, process):
        return [line for line in process.errors.splitlines() if "oryx: " in line]

    def assert_one_line(self, process, *fragments, code=1):
        self.assertEqual(process.returncode, code, process.errors)
        lines = self.error_lines(process)
        self.assertEqual(len(lines), 1, process.errors)
        for fragment in fragments:
            self.assertIn(fragment, lines[0])
