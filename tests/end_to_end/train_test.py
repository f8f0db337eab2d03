"""`oryx train` from outside: resumption after any end, errors, and what other programs read of a run.

usage: train_test.py ORYX [unittest arguments]
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORYX = Path(sys.argv.pop(1)).resolve()
STEPS = 24
# Threads that spin between the tiny products of this model take the processor from each other on a busy machine.
os.environ["OMP_WAIT_POLICY"] = "passive"
TIMING_KEYS = {"seconds", "tokens_per_second"}

RECIPE = """
[model]
mixers = ["attention", "ssd"]
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
batch_tokens = 256
micro_batch = 2
learning_rate = 5e-3
dtype = "float32"
validation_every = 6
checkpoint_every = 4

[run]
directory = "{run}"
seed = 3
device = "cpu"
"""


def write_shards(directory, tokens, pieces=2, vocabulary=257):
    directory.mkdir(parents=True)
    for i, piece in enumerate(np.array_split(np.asarray(tokens, np.uint16), pieces)):
        save_file({"tokens": piece}, directory / f"shard-{i:05d}.safetensors",
                  {"tokenizer": "bytes", "documents": "1", "vocabulary": str(vocabulary)})


def sentences(count, seed):
    words = ["the", "quick", "onyx", "oryx", "grazes", "under", "seven", "pale", "acacias", "again"]
    draw = random.Random(seed)
    return list(" ".join(draw.choice(words) for _ in range(count)).encode()) + [256]


class TrainTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = Path(tempfile.mkdtemp(prefix="oryx-train-"))
        cls.data = cls.root / "data"
        write_shards(cls.data / "train", sentences(4000, 1))
        write_shards(cls.data / "validation", sentences(300, 2), pieces=1)
        cls.reference = cls.root / "reference"
        run = cls.train(cls, cls.reference)
        assert run.returncode == 0, run.stderr
        cls.reference_output = json.loads(run.stdout)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.root)

    # Running the program

    def command(self, run, *overrides):
        recipe = self.root / "recipe.toml"
        recipe.write_text(RECIPE.format(data=self.data, run=run, steps=STEPS))
        return [str(ORYX), "train", str(recipe), "--json", *overrides]

    def train(self, run, *overrides, **options):
        return subprocess.run(TrainTest.command(self, run, *overrides), capture_output=True, text=True,
                              timeout=120, **options)

    def start(self, run, *overrides):
        return subprocess.Popen(self.command(run, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)

    def wait_for_lines(self, process, run, count):
        metrics = run / "metrics.jsonl"
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
                return
            time.sleep(0.002)

    # What is compared

    def metrics(self, run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]

    def assert_same_result(self, run, reference=None):
        reference = reference or self.reference
        for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
            self.assertEqual((run / "latest" / name).read_bytes(), (reference / "latest" / name).read_bytes(), name)
        self.assertEqual(self.metrics(run), self.metrics(reference))

    def assert_one_error(self, result, code, *fragments):
        self.assertEqual(result.returncode, code, result.stderr)
        errors = [line for line in result.stderr.splitlines() if line.startswith("oryx: ")]
        self.assertEqual(len(errors), 1, result.stderr)
        for fragment in fragments:
            self.assertIn(fragment, errors[0])

    # The tests

    def test_an_uninterrupted_run(self):
        output = self.reference_output
        self.assertEqual(output["steps"], STEPS)
        self.assertEqual(output["tokens"], STEPS * 256)
        self.assertEqual(set(output["validation_loss"]), {"attention", "linear"})
        self.assertEqual(Path(output["directory"]), self.reference)

        lines = self.metrics(self.reference)
        train = [line for line in lines if line["kind"] == "train"]
        validation = [line for line in lines if line["kind"] == "validation"]
        self.assertEqual([line["step"] for line in train], list(range(1, STEPS + 1)))
        self.assertEqual([line["step"] for line in validation], [0, 6, 12, 18, 24])
        for mode in ("attention", "linear"):
            self.assertLess(validation[-1]["loss"][mode], validation[0]["loss"][mode] - 1)

        latest = self.reference / "latest"
        state = json.loads((latest / "training.json").read_text())
        self.assertEqual(state["step"], STEPS)
        weights, moments = load_file(latest / "model.safetensors"), load_file(latest / "optimizer.safetensors")
        self.assertEqual(set(moments), {f"{m}_moment.{name}" for m in ("first", "second") for name in weights})
        self.assertEqual(json.loads((latest / "config.json").read_text())["tokenizer"], "bytes")

    def test_tensorboard_reads_the_charts(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(self.reference))
        events.Reload()
        train = [line for line in self.metrics(self.reference) if line["kind"] == "train"]
        points = events.Scalars("train/loss")
        self.assertEqual([p.step for p in points], [line["step"] for line in train])
        np.testing.assert_allclose([p.value for p in points], [line["loss"] for line in train], rtol=1e-6)
        self.assertEqual([p.step for p in events.Scalars("validation/loss_linear")], [0, 6, 12, 18, 24])

    def test_killed_at_any_moment_ends_the_same(self):
        run = self.root / "killed"
        draw = random.Random(7)
        for lines in (3, 8, 12, 16, 22):  # what the run has logged when it is killed, wherever that is
            process = self.start(run)
            self.wait_for_lines(process, run, lines)
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
            process.communicate()
        result = self.train(run)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assert_same_result(run)
        # Nothing of a half-written checkpoint remains, and only the newest are kept.
        self.assertEqual(sorted(os.listdir(run / "checkpoints")), ["step-00000020", "step-00000024"])

        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(run))
        events.Reload()
        self.assertEqual([p.step for p in events.Scalars("train/loss")], list(range(1, STEPS + 1)))

    def test_killed_while_it_saves_ends_the_same(self):
        # The other variant and type; a checkpoint at every step makes most kills fall into the writing of one.
        settings = ['model.mixers=["attention", "gated_delta"]', "training.dtype=bfloat16"]
        reference, run = self.root / "undisturbed", self.root / "killed-saving"
        self.assertEqual(self.train(reference, *settings).returncode, 0)
        settings.append("training.checkpoint_every=1")
        for lines in (5, 13, 21):
            process = self.start(run, *settings)
            self.wait_for_lines(process, run, lines)
            process.kill()
            process.communicate()
        result = self.train(run, *settings)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assert_same_result(run, reference)

    def test_leftovers_of_a_killed_write_are_removed(self):
        run = self.root / "leftovers"
        shutil.copytree(self.reference, run, symlinks=True)
        newest = (run / "latest").resolve()
        partial = next(p for p in self.partial_names(newest))
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
        result = self.train(run)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertFalse(partial.exists())

    def partial_names(self, checkpoint):
        yield checkpoint.with_name(f"{checkpoint.name}.partial")

    def test_interrupt_saves_and_exits_130(self):
        for name, number in (("sigint", signal.SIGINT), ("sigterm", signal.SIGTERM)):
            run = self.root / name
            process = self.start(run)
            self.wait_for_lines(process, run, 4)
            process.send_signal(number)
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 130)
            saved = json.loads((run / "latest" / "training.json").read_text())["step"]
            logged = [line["step"] for line in self.metrics(run) if line["kind"] == "train"]
            self.assertEqual(logged, list(range(1, saved + 1)))  # the step under way was kept
            self.assertLess(saved, STEPS)
            result = self.train(run)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assert_same_result(run)

    def test_a_finished_run_says_so(self):
        before = (self.reference / "metrics.jsonl").read_bytes()
        result = self.train(self.reference)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(json.loads(result.stdout)["validation_loss"], self.reference_output["validation_loss"])
        self.assertIn("finished", result.stderr)
        self.assertEqual((self.reference / "metrics.jsonl").read_bytes(), before)

    def test_another_recipe_is_refused(self):
        result = self.train(self.reference, "training.learning_rate=0.004")
        self.assert_one_error(result, 1, "training.learning_rate", "0.004", "0.005")
        result = self.train(self.reference, "model.rope=none")
        self.assert_one_error(result, 1, "model.rope")
        result = self.train(self.reference, "training.validation_every=5", "training.checkpoint_every=7")
        self.assertEqual(result.returncode, 0, result.stderr)

    def test_data_may_move_but_not_change(self):
        moved = self.root / "moved"
        shutil.copytree(self.data / "train", moved)
        result = self.train(self.reference, f'data.train=["{moved}"]')
        self.assertEqual(result.returncode, 0, result.stderr)
        other = self.root / "other"
        write_shards(other, sentences(4000, 9))
        result = self.train(self.reference, f'data.train=["{other}"]')
        self.assert_one_error(result, 1, "data.train", "other tokens")

    def test_one_process_a_directory(self):
        run = self.root / "locked"
        process = self.start(run)
        self.wait_for_lines(process, run, 2)
        process.send_signal(signal.SIGSTOP)
        try:
            self.assert_one_error(self.train(run), 1, str(run), "another process")
        finally:
            process.kill()
            process.communicate()

    def test_full_disk_keeps_the_previous_checkpoint(self):
        run = self.root / "full"
        process = self.start(run)
        self.wait_for_lines(process, run, 6)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        before = os.readlink(run / "latest")
        model_bytes = (run / "latest" / "model.safetensors").stat().st_size

        def small_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (model_bytes // 2, model_bytes // 2))

        result = self.train(run, preexec_fn=small_files)
        self.assert_one_error(result, 1, "model.safetensors")
        self.assertEqual(os.readlink(run / "latest"), before)
        self.assertIn(Path(before).name, os.listdir(run / "checkpoints"))
        self.assertFalse([name for name in os.listdir(run / "checkpoints") if name.endswith(".partial")])
        result = self.train(run)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assert_same_result(run)

    @unittest.skipUnless(os.geteuid() == 0, "mounting a small file system takes root")
    def test_full_file_system(self):
        run = self.root / "tmpfs"
        run.mkdir()
        kept = sum(file.stat().st_size for file in (self.reference / "latest").iterdir())
        size = kept * 3 // 2 + 65536  # the first checkpoint fits, the second does not
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run)],
                               capture_output=True)
        if mount.returncode != 0:
            self.skipTest("no file system can be mounted here")
        try:
            result = self.train(run)
            self.assert_one_error(result, 1, "No space left on device")
            self.assertEqual(json.loads((run / "latest" / "training.json").read_text())["step"], 4)
            subprocess.run(["mount", "-o", f"remount,size={size * 10}", str(run)], check=True)
            result = self.train(run)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assert_same_result(run)
        finally:
            subprocess.run(["umount", str(run)], check=True)

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        spoiled = self.root / "spoiled"
        shutil.copytree((self.reference / "latest").resolve(), spoiled)
        weights = load_file(spoiled / "model.safetensors")
        weights["layers.1.mlp.up.weight"][3, 5] = np.nan
        save_file(weights, spoiled / "model.safetensors")
        run = self.root / "nan"
        result = self.train(run, f"training.initial_model={spoiled}", "data.validation=[]")
        self.assert_one_error(result, 1, "step 1", "nan")
        self.assertFalse((run / "latest").exists())

        # Later: the last good checkpoint stays.
        run = self.root / "diverged"
        result = self.train(run, "training.learning_rate=1e35", "training.warmup_fraction=0", "training.clip=0",
                            "training.checkpoint_every=1", "training.weight_decay=1e5", "data.validation=[]")
        self.assert_one_error(result, 1, "step ")
        saved = json.loads((run / "latest" / "training.json").read_text())["step"]
        self.assertEqual(len(self.metrics(run)), saved)

    def test_types(self):
        for dtype, stored in (("float64", np.float64), ("bfloat16", np.float32)):
            run = self.root / dtype
            result = self.train(run, f"training.dtype={dtype}", "training.steps=4", "training.warmup_fraction=0")
            self.assertEqual(result.returncode, 0, result.stderr)
            for file in ("model.safetensors", "optimizer.safetensors"):
                for name, tensor in load_file(run / "latest" / file).items():
                    self.assertEqual(tensor.dtype, stored, name)
            losses = [line["loss"] for line in self.metrics(run) if line["kind"] == "train"]
            self.assertLess(losses[-1], losses[0])

    def test_the_tokenizer_goes_with_the_model(self):
        data = self.root / "tokenized"
        shutil.copytree(self.data / "train", data)
        for shard in data.iterdir():
            save_file(load_file(shard), shard, {"tokenizer": "ab" * 32, "documents": "1", "vocabulary": "257"})
        run = self.root / "tokenized-run"
        overrides = [f'data.train=["{data}"]', "data.validation=[]", "training.steps=2"]
        self.assert_one_error(self.train(run, *overrides), 1, "tokenizer.json", str(data))
        (data / "tokenizer.json").write_text('{"model": {}}')
        result = self.train(run, *overrides)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual((run / "latest" / "tokenizer.json").read_text(), '{"model": {}}')
        self.assertEqual(json.loads((run / "latest" / "config.json").read_text())["tokenizer"], "tokenizer.json")

    def test_wrong_recipes(self):
        run = self.root / "never"
        cases = [
            (["training.learning_rat=1"], 1, "learning_rate"),
            (["training.batch_tokens=100"], 1, "batch_tokens", "100", "64"),
            (["training.tokens=100"], 1, "training.tokens", "100", "256"),
            (["training.initial_model=/nowhere"], 1, "/nowhere"),
            (["data.sequence_length=65536", "training.batch_tokens=65536"], 1, "65536", "train"),
            (["model.vocabulary=200"], 1, "200", "257"),
            (["schedule.fixed=linear,attention@-900"], 1, "-900"),
            (["model.mixers=[\"attention\"]", "schedule.fixed=linear"], 1, "linear"),
            (["training.warmup_fraction=1.5"], 1, "warmup_fraction", "1.5"),
            (["data.train=[\"/nowhere\"]"], 1, "/nowhere"),
        ]
        for overrides, code, *fragments in cases:
            with self.subTest(overrides=overrides):
                self.assert_one_error(self.train(run, *overrides), code, *fragments)
                self.assertFalse(run.exists())

    def test_ids_beyond_the_vocabulary_name_the_shard(self):
        data = self.root / "lying"
        tokens = sentences(2000, 4)
        tokens[700] = 999
        write_shards(data, tokens, pieces=1)
        result = self.train(self.root / "lying-run", f'data.train=["{data}"]')
        self.assert_one_error(result, 1, "999", "shard-00000.safetensors")


if __name__ == "__main__":
    unittest.main()
