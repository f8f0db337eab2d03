"""Wrong commands, schedules, recipes and model files: one line that names what is wrong, and nothing left behind.

usage: errors_test.py ORYX [unittest arguments]
"""

import json
import unittest

import numpy as np

from command_line import COMMANDS, CommandLineTest, config_of, weights_of, write_model


class Usage(CommandLineTest):
    def test_help_of_every_command(self):
        for arguments in [["--help"]] + [[command, "--help"] for command in COMMANDS]:
            done = self.succeeds(*arguments)
            self.assertIn("--help", done.stdout)
            self.assertEqual(done.stderr, "")
        listed = self.succeeds("--help").stdout
        for command in COMMANDS:
            self.assertIn(command, listed)
        self.assertRegex(self.succeeds("--version").stdout, r"\d+\.\d+")

    def test_unknown_command_names_the_nearest(self):
        for wrong, right in (("genrate", "generate"), ("logit", "logits"), ("trian", "train"), ("insepct", "inspect")):
            self.fails(2, [wrong], wrong, right)
            self.fails(2, [wrong, "--help"], right)

    def test_command_is_required(self):
        self.fails(2, [])

    def test_flags(self):
        self.fails(2, ["generate", "model", "--prompt", "a", "--no-such-flag", "3"], "--no-such-flag")
        self.fails(2, ["generate"], "model")
        self.fails(2, ["logits", "model", "--schedule", "linear", "--output", "o"], "--tokens")
        self.fails(2, ["generate", "model", "--prompt", "a", "--max-tokens", "many"], "max-tokens")
        self.fails(2, ["generate", "model", "--prompt", "a", "--color", "sometimes"], "sometimes")
        self.fails(2, ["curve", "model", "--data", "d"], "--output")

    def test_devices_and_types(self):
        model = write_model(self.folder / "model")
        self.fails(2, ["generate", model, "--prompt", "a", "--device", "tpu"], "tpu", "cpu")
        self.fails(2, ["generate", model, "--prompt", "a", "--dtype", "float16"], "float16", "bfloat16")

    def test_missing_model(self):
        self.fails(1, ["generate", "nowhere", "--prompt", "a"], "nowhere")
        self.fails(1, ["inspect", "nowhere"], "nowhere")


class Schedules(CommandLineTest):
    def test_bad_schedules(self):
        model = write_model(self.folder / "model")
        tokens = self.write_tokens(np.zeros((1, 100), np.int64))
        cases = {
            "attention,linear@50,attention@20": "20",
            "attention,linear@50,attention@50": "50",
            "attention@3": "3",
            "softmax": "softmax",
            "attention,linear": "linear",
            "linear@": "",
            "attention,linear@101%": "101",
            "attention,linear@-200": "200",
            "attention,linear@50%,attention@10": "10",
            "every(0)": "0",
            "every(2": "",
            "random(1.5)": "1.5",
            "": "",
            "attention,,linear@3": "",
        }
        for schedule, mention in cases.items():
            with self.subTest(schedule):
                self.fails(2, ["logits", model, "--tokens", tokens, "--schedule", schedule, "--output", "out"], mention)
                self.fails(2, ["generate", model, "--prompt", "x" * 100, "--schedule=" + schedule], mention) \
                    if schedule else None

    def test_a_mode_that_the_model_lacks(self):
        model = write_model(self.folder / "model", "attention")
        self.fails(1, ["generate", model, "--prompt", "abc", "--schedule", "linear"], "linear")


class Recipes(CommandLineTest):
    RECIPE = ('[model]\nmixers = ["attention", "ssd"]\nlayers = 1\nwidth = 32\nheads = 2\nmlp_width = 64\n'
              'vocabulary = 257\n')

    def write(self, text):
        path = self.folder / "recipe.toml"
        path.write_text(text)
        return path

    def test_good_recipe(self):
        self.succeeds("inspect", self.write(self.RECIPE))

    def test_unknown_keys_name_the_nearest(self):
        self.fails(1, ["inspect", self.write(self.RECIPE.replace("mlp_width", "mlp_widht"))], "mlp_widht", "mlp_width")
        self.fails(1, ["inspect", self.write(self.RECIPE), "model.hedas=3"], "hedas", "heads")
        recipe = self.RECIPE + '[data]\ntrain = ["x"]\n[trainning]\nsteps = 3\n[run]\ndirectory = "run"\n'
        self.fails(1, ["train", self.write(recipe)], "trainning", "training")

    def test_wrong_types_and_values(self):
        self.fails(1, ["inspect", self.write(self.RECIPE.replace("heads = 2", 'heads = "two"'))], "heads", "two")
        self.fails(1, ["inspect", self.write(self.RECIPE.replace('"ssd"', '"sdd"'))], "sdd", "ssd")
        self.fails(1, ["inspect", self.write(self.RECIPE + 'norm = "batch"\n')], "norm", "batch", "full")
        self.fails(1, ["inspect", self.write(self.RECIPE + "layers = 2\n")], "layers")
        self.fails(1, ["inspect", self.write("[model\n")], "recipe.toml")


class ModelFiles(CommandLineTest):
    def refused(self, *mentions):
        tokens = self.write_tokens(np.zeros((1, 4), np.int64))
        self.fails(1, ["logits", "model", "--tokens", tokens, "--schedule", "linear", "--output", "out.safetensors"],
                   *mentions)

    def test_truncated_and_lying_files(self):
        file = write_model(self.folder / "model") / "model.safetensors"
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for name, content in {
            "empty": b"",
            "half a length": whole[:5],
            "half a header": whole[:header // 2],
            "no tensors": whole[:header],
            "last byte missing": whole[:-1],
            "a byte too many": whole + b"\0",
            "length beyond the file": (1 << 40).to_bytes(8, "little") + whole[8:],
            "length of all ones": b"\xff" * 8 + whole[8:],
            "no JSON": whole[:8] + b"?" * (header - 8) + whole[header:],
        }.items():
            with self.subTest(name):
                file.write_bytes(content)
                self.refused("model.safetensors")

    def test_missing_extra_and_misshapen_tensors(self):
        name = "layers.1.mixer.ssd.step.weight"
        tensors = weights_of("ssd")
        del tensors[name]
        write_model(self.folder / "model", tensors=tensors)
        self.refused(name)
        write_model(self.folder / "model", tensors=weights_of("ssd") | {"layers.7.mlp.up.weight": np.ones(3, np.float32)})
        self.refused("layers.7.mlp.up.weight")
        write_model(self.folder / "model", tensors=weights_of("ssd") | {name: np.ones((3, 32), np.float32)})
        self.refused(name, "3", "32")
        write_model(self.folder / "model", tensors=weights_of("ssd") | {name: np.ones((2, 32), np.int32)})
        self.refused(name)

    def test_configs(self):
        model = write_model(self.folder / "model")
        for changes, mentions in (({"widht": 3}, ["widht", "width"]), ({"layers": -1}, ["layers", "-1"]),
                                  ({"heads": 5}, ["heads", "5"]), ({"mixers": ["atention"]}, ["atention"]),
                                  ({"vocabulary": 100}, ["100"]), ({"format_version": 99}, ["99"]),
                                  ({"tokenizer": "missing.json"}, ["missing.json"])):
            with self.subTest(changes):
                (model / "config.json").write_text(json.dumps(config_of("ssd") | changes))
                self.fails(1, ["generate", model, "--prompt", "a"], *mentions)
        (model / "config.json").write_text('{"layers": 1,')
        self.refused("config.json")
        (model / "config.json").unlink()
        self.refused("config.json")


if __name__ == "__main__":
    unittest.main()
