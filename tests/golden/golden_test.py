"""The oryx binary against the independent reference: logits, joint state and training.

    golden_test.py --oryx build/oryx [unittest arguments]

Every check runs commands as a user would and compares with reference_model.py in float64.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import load_file, save_file

import reference_model as reference
import reference_training as training
import schedules

SIZES = dict(layers=2, width=48, heads=3, head_dim=16, mlp_width=64, vocabulary=320)
TM = dict(SIZES, mixers=["attention", "ssd"])
TG = dict(SIZES, mixers=["attention", "gated_delta"])
TRANSFORMER = dict(SIZES, mixers=["attention"])

# One small model for each option of [model] and each ablation, beside the plain variants.
MODELS = {
    "tm": TM,
    "tg": TG,
    "transformer": TRANSFORMER,
    "tm grouped": dict(TM, width=64, heads=4, kv_heads=2),
    "tg grouped": dict(TG, width=64, heads=4, kv_heads=1),
    "tm head_dim 24, 3 layers": dict(TM, width=72, head_dim=24, layers=3),
    "tm no gate": dict(TM, gate=False),
    "tm no conv": dict(TM, short_conv=False),
    "tm no conv, no gate, no norm": dict(TM, short_conv=False, gate=False, norm="none"),
    "tm per-head norm, shared query": dict(TM, norm="per_head", shared_query=True),
    "tm rope attention": dict(TM, rope="attention"),
    "tm silu": {**TM, "conv_activation": "silu", "attention.query_activation": "silu",
                "ssd.query_activation": "none", "norm_order": "before_gate"},
    "tm l2 key": {**TM, "attention.l2_norm": "key", "ssd.l2_norm": "query_key"},
    "tg full norm after gate": dict(TG, norm="full", norm_order="after_gate"),
    "tg rope all, l2 everywhere": {**TG, "rope": "all", "attention.l2_norm": "query_key"},
    "tg rope none, l2 key": {**TG, "rope": "none", "gated_delta.l2_norm": "key", "attention.l2_norm": "key"},
    "tg identity": {**TG, "conv_activation": "none", "attention.query_activation": "none",
                    "gated_delta.query_activation": "none"},
    "tg shared query, silu attention only": {**TG, "shared_query": True,
                                             "gated_delta.query_activation": "none"},
    "transformer, grouped, gate and norm": dict(TRANSFORMER, width=64, heads=4, kv_heads=2, gate=True,
                                                norm="full", short_conv=True),
    "mamba-2": dict(SIZES, mixers=["ssd"], heads=1, head_dim=32, value_heads=6, value_dim=16),
    "gated deltanet": dict(SIZES, mixers=["gated_delta"], heads=3, head_dim=16, value_dim=24),
    "gated deltanet, values grouped": dict(SIZES, mixers=["gated_delta"], heads=2, value_heads=4, value_dim=8),
    "inter-layer hybrid": dict(TM, layers=3, hybrid="inter_layer", layer_pattern=["ssd", "attention"]),
    "intra-layer hybrid": dict(TG, hybrid="intra_layer"),
}
BATCH, LENGTH = 3, 151
LOGITS_TOLERANCE = 1e-10   # of the largest |logit|
WEIGHTS_TOLERANCE = 1e-6   # of the largest update of the tensor

oryx_binary = None
largest = {}  # what was compared -> largest error, printed at the end


def note(what, error):
    largest[what] = max(largest.get(what, 0.0), error)


def run_oryx(*arguments):
    done = subprocess.run([oryx_binary, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"oryx {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr}")
    return done


def in_parallel(tasks):
    """Runs callables on as many threads as there are cores; the first failure is raised."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="oryx-golden-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def make_model(self, name, values, seed):
        """-> (model directory, reference in float64)"""
        config = reference.resolve(values)
        weights = reference.random_weights(config, seed)
        directory = self.folder / name
        reference.write_model(directory, values, weights)
        return directory, reference.Model(config, weights)

    def make_tokens(self, seed, length=LENGTH, batch=BATCH, dtype=torch.int64):
        """Ids of the whole vocabulary, padding rows included."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(SIZES["vocabulary"], (batch, length), generator=generator).to(dtype)

    def logits(self, name, model, tokens, schedule, *arguments, dtype="float64"):
        """One call of `oryx logits`."""
        file = self.folder / f"{name}.tokens.safetensors"
        output = self.folder / f"{name}.logits.safetensors"
        save_file({"tokens": tokens.contiguous()}, file)
        run_oryx("logits", model, "--tokens", file, "--schedule", schedule, "--output", output,
                 "--dtype", dtype, "--device", "cpu", *arguments)
        result = load_file(output)["logits"]
        self.assertEqual(result.dtype, getattr(torch, dtype))
        self.assertEqual(tuple(result.shape), (*tokens.shape, SIZES["vocabulary"]))
        return result.double()

    def check_logits(self, what, actual, expected, tolerance=LOGITS_TOLERANCE):
        self.assertTrue(actual.isfinite().all(), what)
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        note(what.partition(":")[0], error)
        self.assertLessEqual(error, tolerance, what)


class Logits(Case):
    def test_float64_whole_and_in_pieces(self):
        """Every model: the whole sequence at once, and one way of cutting it (they take turns)."""
        pieces = [1, 7, 64]

        def check(index, name, values):
            key = f"model{index}"
            directory, model = self.make_model(key, values, seed=index)
            if len(values["mixers"]) == 2:
                schedule = schedules.draw(index, LENGTH, switches=1 + index % 4)
            else:
                schedule = "attention" if values["mixers"] == ["attention"] else "linear"
            tokens = self.make_tokens(index, dtype=torch.int32 if index % 2 else torch.int64)
            expected = model.forward(tokens, schedules.attention_mode(schedule, LENGTH))
            self.check_logits(f"float64 whole: {name} {schedule}",
                              self.logits(key, directory, tokens, schedule), expected)
            piece = pieces[index % len(pieces)]
            self.check_logits(f"float64 --split {piece}: {name} {schedule}",
                              self.logits(key, directory, tokens, schedule, "--split", piece), expected)

        in_parallel([lambda i=i, n=n, v=v: check(i, n, v) for i, (n, v) in enumerate(MODELS.items())])

    def test_every_split_of_the_two_variants(self):
        for variant, values in (("tm", TM), ("tg", TG)):
            directory, model = self.make_model(variant, values, seed=20)
            schedule = "linear,attention@5,linear@64,attention@101"
            tokens = self.make_tokens(20)
            expected = model.forward(tokens, schedules.attention_mode(schedule, LENGTH))
            in_parallel([lambda s=split: self.check_logits(
                f"float64 --split {s}: {variant}",
                self.logits(f"{variant}{s}", directory, tokens, schedule, "--split", s), expected)
                for split in (1, 7, 64, LENGTH)])

    def test_forms_of_schedules(self):
        directory, model = self.make_model("tm", TM, seed=21)
        tokens = self.make_tokens(21, batch=1)

        def check(schedule):
            expected = model.forward(tokens, schedules.attention_mode(schedule, LENGTH))
            name = "".join(c for c in schedule if c.isalnum())
            self.check_logits(f"float64 whole: {schedule}", self.logits(name, directory, tokens, schedule), expected)

        in_parallel([lambda s=schedule: check(s) for schedule in (
            "attention", "linear", "linear,attention@97.5%", "attention,linear@33.3%,attention@-7",
            "every(3,chunk=16)")])

    def test_saved_state(self):
        """Two calls equal one, and the recurrent state in the file is the state of the mathematics."""
        for seed, (variant, values) in enumerate((("ssd", TM), ("gated_delta", TG)), start=30):
            directory, model = self.make_model(variant, values, seed)
            tokens = self.make_tokens(seed)
            for cut, first, second in ((70, "linear,attention@33", "linear"), (65, "attention,linear@64", "attention")):
                mode = torch.cat([schedules.attention_mode(first, cut),
                                  schedules.attention_mode(second, LENGTH - cut)])
                state = self.folder / f"{variant}.state.safetensors"
                head = self.logits("head", directory, tokens[:, :cut], first, "--save-state", state)
                saved = load_file(state)
                tail = self.logits("tail", directory, tokens[:, cut:], second, "--load-state", state)
                self.check_logits(f"float64 two calls: {variant}", torch.cat([head, tail], 1),
                                  model.forward(tokens, mode))
                model.forward(tokens[:, :cut], mode[:cut])
                for layer, expected in enumerate(model.states):
                    actual = saved[f"layers.{layer}.{variant}.state"]
                    self.assertEqual(actual.dtype, torch.float64)
                    self.check_logits(f"float64 state: {variant}", actual, expected)
                    for tensor in ("key_cache", "value_cache", "key_conv_tail", "value_conv_tail"):
                        self.assertIn(f"layers.{layer}.{tensor}", saved)
                self.assertEqual(saved["position"].flatten().tolist(), [cut])
                self.assertIn("modes", saved)

    def test_schedule_of_a_continued_sequence(self):
        """Positions go on from the state's: both calls are given the schedule of the whole sequence."""
        directory, model = self.make_model("tm", TM, seed=32)
        tokens = self.make_tokens(32)
        schedule, cut = "linear,attention@33,linear@95,attention@-20", 70
        state = self.folder / "state"
        head = self.logits("head", directory, tokens[:, :cut], schedule.rpartition(",")[0], "--save-state", state)
        tail = self.logits("tail", directory, tokens[:, cut:], schedule, "--load-state", state, "--split", 7)
        self.check_logits("float64 two calls: tm, one schedule", torch.cat([head, tail], 1),
                          model.forward(tokens, schedules.attention_mode(schedule, LENGTH)))

    def test_state_of_a_state(self):
        """Save, load and save again: three calls equal one."""
        directory, model = self.make_model("tg", TG, seed=33)
        tokens = self.make_tokens(33)
        cuts = [0, 2, 75, LENGTH]
        parts = []
        for index, mode in enumerate(("linear", "attention", "linear")):
            state = ["--save-state", self.folder / f"{index}.state"]
            if index > 0:
                state += ["--load-state", self.folder / f"{index - 1}.state"]
            parts.append(self.logits("part", directory, tokens[:, cuts[index]:cuts[index + 1]], mode, *state))
        schedule = f"linear,attention@{cuts[1]},linear@{cuts[2]}"
        self.check_logits("float64 three calls: tg", torch.cat(parts, 1),
                          model.forward(tokens, schedules.attention_mode(schedule, LENGTH)))

    def test_other_types_of_file_are_converted(self):
        """A float32 and a bfloat16 file computed in float64 equal the reference on the rounded weights."""
        values = TG
        config = reference.resolve(values)
        schedule = "linear,attention@40"
        for stored in (torch.float32, torch.bfloat16):
            weights = reference.random_weights(config, 40, dtype=stored)
            directory = self.folder / str(stored)
            reference.write_model(directory, values, weights)
            tokens = self.make_tokens(40)
            model = reference.Model(config, {name: w.double() for name, w in weights.items()})
            self.check_logits("float64 of other files: tg", self.logits("t", directory, tokens, schedule),
                              model.forward(tokens, schedules.attention_mode(schedule, LENGTH)))

    def test_narrow_types(self):
        """float32 and bfloat16: the error against float64 is at most twice that of the reference computed in the
        same type (root mean square; both are rounded to that type at every step)."""
        def check(variant, values, dtype, split):
            config = reference.resolve(values)
            weights = {name: w.to(torch.bfloat16).to(torch.float32)
                       for name, w in reference.random_weights(config, 50).items()}
            directory = self.folder / f"{variant}{dtype}{len(split)}"
            reference.write_model(directory, values, weights)
            schedule = "linear,attention@37,linear@100"
            mode = schedules.attention_mode(schedule, LENGTH)
            tokens = self.make_tokens(50)
            exact = reference.Model(config, weights).forward(tokens, mode)
            same_type = reference.Model(config, weights, getattr(torch, dtype)).forward(tokens, mode).double()
            actual = self.logits(directory.name, directory, tokens, schedule, *split, dtype=dtype)
            rms = lambda x: x.square().mean().sqrt().item()
            ratio = rms(actual - exact) / rms(same_type - exact)
            note(f"{dtype} error, relative", rms(actual - exact) / rms(exact))
            note(f"{dtype} error / reference's", ratio)
            self.assertLessEqual(ratio, 2.0, f"{variant} {dtype} {split}")

        in_parallel([lambda v=v, m=m, d=d, s=s: check(v, m, d, s)
                     for v, m in (("tm", TM), ("tg", TG)) for d in ("float32", "bfloat16")
                     for s in ((), ("--split", 7))])


class Training(Case):
    LENGTH, SEQUENCES = 48, 11

    def write_shards(self, tokens):
        """Two shards of one directory: the data is their concatenation, sequences cross the border."""
        directory = self.folder / "data"
        directory.mkdir(exist_ok=True)
        border = 123
        for name, part in (("00000.safetensors", tokens[:border]), ("00001.safetensors", tokens[border:])):
            save_file({"tokens": part.to(torch.uint16)}, directory / name,
                      {"tokenizer": "bytes", "documents": "1", "vocabulary": "257"})
        return directory

    def check(self, name, values, schedule_text, attention_mode, micro_batch, seed, steps=5):
        config = reference.resolve(values)
        start_directory, model = self.make_model(f"start{seed}", values, seed)
        generator = torch.Generator().manual_seed(seed)
        # Eleven sequences and a tail too short for a twelfth; five batches of four start over in the third.
        data = torch.randint(257, (self.LENGTH * self.SEQUENCES + 20,), generator=generator)
        shards = self.write_shards(data)
        recipe = training.Recipe(steps=steps, batch=4, sequence_length=self.LENGTH, learning_rate=4e-3,
                                 minimum_learning_rate=1e-4, warmup_fraction=0.5, clip=0.7)
        run = self.folder / f"run{seed}"
        file = self.folder / "recipe.toml"
        model_lines = "\n".join(f"{key} = {toml(value)}" for key, value in values.items())
        file.write_text(f"""[model]
{model_lines}

[data]
train = [{toml(str(shards))}]
sequence_length = {self.LENGTH}
order = "sequential"

[schedule]
{schedule_text}

[training]
steps = {steps}
batch_tokens = {recipe.batch * self.LENGTH}
micro_batch = {micro_batch}
learning_rate = {recipe.learning_rate}
minimum_learning_rate = {recipe.minimum_learning_rate}
warmup_fraction = {recipe.warmup_fraction}
beta1 = {recipe.beta1}
beta2 = {recipe.beta2}
weight_decay = {recipe.weight_decay}
clip = {recipe.clip}
dtype = "float64"
initial_model = {toml(str(start_directory))}

[run]
directory = {toml(str(run))}
seed = 1
device = "cpu"
""")
        run_oryx("train", file)
        trained = reference.read_weights(newest_checkpoint(run))
        expected, losses = training.train(config, model.weights, data, recipe, attention_mode)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        recorded = [line["loss"] for line in lines if line["kind"] == "train"]
        self.assertEqual(len(recorded), steps)
        for actual, loss in zip(recorded, losses):
            note("training: loss, relative", abs(actual / loss - 1))
            self.assertAlmostEqual(actual, loss, delta=1e-9)
        self.assertEqual(set(trained), set(expected))
        for tensor, weight in expected.items():
            actual = trained[tensor]
            self.assertEqual(actual.dtype, torch.float64, tensor)
            update = (weight - model.weights[tensor]).abs().max().item()
            error = (actual - weight).abs().max().item()
            note("training: weights, of the update", error / update if update else error)
            self.assertLessEqual(error, WEIGHTS_TOLERANCE * update, f"{name}: {tensor}")

    def test_tm_mixed_with_accumulation(self):
        schedule = "linear,attention@37,linear@41"
        self.check("tm", TM, f'fixed = "{schedule}"', schedules.attention_mode(schedule, self.LENGTH),
                   micro_batch=2, seed=60)

    def test_tg_mixed_with_uneven_accumulation(self):
        schedule = "attention,linear@19"
        self.check("tg", TG, f'fixed = "{schedule}"', schedules.attention_mode(schedule, self.LENGTH),
                   micro_batch=3, seed=61)

    def test_tg_linear_only(self):
        """What attention alone reads gets gradient zero; its weights still decay."""
        self.check("tg linear", TG, "attention_probability = 0.0", torch.zeros(self.LENGTH, dtype=torch.bool),
                   micro_batch=4, seed=62)

    def test_tm_attention_only(self):
        self.check("tm attention", dict(TM, width=64, heads=4, kv_heads=2), "attention_probability = 1.0",
                   torch.ones(self.LENGTH, dtype=torch.bool), micro_batch=1, seed=63)

    def test_tg_per_sequence_with_ablations(self):
        values = {**TG, "shared_query": True, "norm": "full", "norm_order": "after_gate", "rope": "all",
                  "attention.l2_norm": "query_key"}
        schedule = "linear,attention@11,linear@29"
        self.check("tg ablations", values, f'fixed = "{schedule}"',
                   schedules.attention_mode(schedule, self.LENGTH), micro_batch=4, seed=64)

    def test_transformer(self):
        self.check("transformer", TRANSFORMER, 'fixed = "attention"',
                   torch.ones(self.LENGTH, dtype=torch.bool), micro_batch=4, seed=65)

    def test_linear_baselines(self):
        for seed, name in ((66, "mamba-2"), (67, "gated deltanet, values grouped")):
            with self.subTest(name):
                self.check(name, MODELS[name], 'fixed = "linear"', torch.zeros(self.LENGTH, dtype=torch.bool),
                           micro_batch=4, seed=seed)


def toml(value):
    return json.dumps(value)


def newest_checkpoint(run):
    """`latest` of a run directory is a link to the newest checkpoint, or a file that holds its name."""
    latest = run / "latest"
    return latest if latest.is_dir() else run / latest.read_text().strip()


def main():
    global oryx_binary
    parser = argparse.ArgumentParser()
    parser.add_argument("--oryx", required=True, type=pathlib.Path)
    arguments, rest = parser.parse_known_args()
    torch.set_num_threads(1)  # the cases run side by side
    oryx_binary = arguments.oryx.resolve()
    if not os.access(oryx_binary, os.X_OK):
        sys.exit(f"golden_test: no program {oryx_binary}: build the target oryx first")
    program = unittest.main(argv=[sys.argv[0], *rest], exit=False)
    for what, error in sorted(largest.items()):
        print(f"{what:<45} {error:.2e}", file=sys.stderr)
    sys.exit(not program.result.wasSuccessful())


if __name__ == "__main__":
    main()
