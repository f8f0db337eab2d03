"""`oryx generate` from outside: its text, its JSON, colours, stop strings, and prompts that are wrong.

usage: generate_test.py ORYX [unittest arguments]
"""

import json
import os
import signal
import subprocess
import unittest

import numpy as np

from command_line import ORYX, CommandLineTest, write_model

PROMPT = "The oryx grazes at dawn."


def schedule_text(modes):
    return ",".join(f"{span['mode']}@{span['begin']}" for span in modes)


class Generate(CommandLineTest):
    def setUp(self):
        super().setUp()
        self.model = write_model(self.folder / "model")

    def arguments(self, *options, prompt=PROMPT):
        return ["generate", self.model, "--prompt", prompt, "--device", "cpu", *options]

    def generate(self, *options, prompt=PROMPT):
        return json.loads(self.succeeds(*self.arguments("--json", *options, prompt=prompt)).stdout)

    def test_greedy_is_the_argmax_of_the_logits(self):
        for kind in ("ssd", "gated_delta"):
            self.model = write_model(self.folder / kind, kind)
            for schedule in ("attention", "linear,attention@50%,linear@30,attention@33", "attention,linear@generation"):
                done = self.generate("--schedule", schedule, "--max-tokens", 15, "--dtype", "float64")
                self.assertEqual((len(done["ids"]), done["finish_reason"]), (15, "length"))
                tokens = list(PROMPT.encode()) + done["ids"]
                self.assertEqual(done["modes"][-1]["end"], len(tokens))
                logits = self.logits(self.model, [tokens], schedule_text(done["modes"]))[0]
                np.testing.assert_array_equal(logits[len(PROMPT) - 1:-1, :257].argmax(-1), done["ids"])
                # The probabilities are those of the model, rows of padding included.
                logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                expected = logprobs[np.arange(len(PROMPT) - 1, len(tokens) - 1), done["ids"]]
                np.testing.assert_allclose(done["logprobs"], expected, atol=1e-9)

    def test_text_is_that_of_the_ids(self):
        done = self.generate("--max-tokens", 20)
        self.assertEqual(done["text"], bytes(done["ids"]).decode())
        self.assertEqual(done["prompt_tokens"], len(PROMPT))
        self.assertGreater(done["tokens_per_second"]["generation"], 0)
        plain = self.succeeds(*self.arguments("--max-tokens", 20))
        self.assertEqual(plain.stdout, done["text"] + "\n")
        self.assertIn("20 tokens", plain.stderr)
        self.assertEqual(self.succeeds(*self.arguments("--max-tokens", 20, "--echo")).stdout, PROMPT + plain.stdout)

    def test_stop_strings(self):
        whole = self.generate("--max-tokens", 30)["text"]
        stop = whole[9:12]
        end = whole.find(stop)
        done = self.generate("--max-tokens", 30, "--stop", "~never~", "--stop", stop)
        self.assertEqual((done["text"], done["finish_reason"]), (whole[:end], "stop"))
        self.assertEqual(len(done["ids"]), end + 3)
        streamed = self.succeeds(*self.arguments("--max-tokens", 30, "--stop", stop)).stdout
        self.assertEqual(streamed.rstrip("\n"), whole[:end].rstrip("\n"))
        # The beginning of a stop string that does not come is text after all.
        done = self.generate("--max-tokens", 30, "--stop", whole[-2:] + "\x7f")
        self.assertEqual(done["text"], whole)

    def test_seeds(self):
        options = ["--temperature", "2", "--max-tokens", "25", "--top-p", "0.99", "--top-k", "200"]
        first = self.generate(*options, "--seed", 1)
        self.assertEqual(first["ids"], self.generate(*options, "--seed", 1)["ids"])
        self.assertNotEqual(first["ids"], self.generate(*options, "--seed", 2)["ids"])
        self.assertLess(max(first["ids"]), 257)
        first["text"].encode()
        greedy = self.generate("--max-tokens", 25)["ids"]
        self.assertEqual(self.generate("--temperature", "3", "--top-k", "1", "--max-tokens", "25")["ids"], greedy)

    def test_colours(self):
        options = ["--schedule", "attention,linear@30", "--max-tokens", 12]
        plain = self.succeeds(*self.arguments(*options)).stdout
        self.assertNotIn("\x1b", plain)
        self.assertEqual(self.succeeds(*self.arguments(*options, "--color", "never")).stdout, plain)
        coloured = self.succeeds(*self.arguments(*options, "--color", "always"))
        attention, linear, end = "\x1b[1;38;5;32m", "\x1b[38;5;166m", "\x1b[0m"
        stripped = coloured.stdout
        for code in (attention, linear, end):
            self.assertIn(code, stripped)
            stripped = stripped.replace(code, "")
        self.assertEqual(stripped, plain)
        before, after = coloured.stdout.split(linear)
        self.assertEqual(before, end + attention + plain[:30 - len(PROMPT)] + end)
        self.assertEqual(after, plain[30 - len(PROMPT):-1] + end + "\n")
        self.assertIn("attention", coloured.stderr)
        self.assertIn("linear", coloured.stderr)

    def test_colours_on_a_terminal(self):
        def on_terminal(**environment):
            leader, follower = os.openpty()
            command = [ORYX, *map(str, self.arguments("--max-tokens", 3))]
            variables = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"} | environment
            subprocess.run(command, stdout=follower, stderr=subprocess.DEVNULL, env=variables, check=True, timeout=60)
            os.close(follower)
            shown = os.read(leader, 10000).decode()
            os.close(leader)
            return "\x1b[" in shown
        self.assertTrue(on_terminal())
        self.assertFalse(on_terminal(NO_COLOR="1"))
        self.assertFalse(on_terminal(TERM="dumb"))

    def test_prompt_files(self):
        (self.folder / "prompt.txt").write_text(PROMPT)
        expected = self.generate("--max-tokens", 8)["ids"]
        for file, stdin in (("prompt.txt", ""), ("-", PROMPT)):
            done = self.succeeds("generate", self.model, "--prompt-file", file, "--max-tokens", 8, "--json", stdin=stdin)
            self.assertEqual(json.loads(done.stdout)["ids"], expected)

    def test_wrong_prompts_and_options(self):
        self.fails(1, self.arguments(prompt=""), "prompt is empty")
        (self.folder / "empty.txt").write_text("")
        self.fails(1, ["generate", self.model, "--prompt-file", "empty.txt"], "empty.txt")
        self.fails(1, ["generate", self.model, "--prompt-file", "-"], "empty")
        self.fails(1, ["generate", self.model, "--prompt-file", "missing.txt"], "missing.txt")
        self.fails(2, ["generate", self.model], "--prompt")
        self.fails(2, self.arguments("--prompt-file", "-"), "--prompt")
        for option, value in (("max-tokens", "0"), ("temperature", "-1"), ("top-p", "0"), ("top-p", "1.01"),
                              ("top-k", "-2"), ("stop", "")):
            self.fails(2, self.arguments(f"--{option}", value), option)

    def test_full_disk(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([ORYX, *map(str, self.arguments("--max-tokens", 3))], stdout=full, text=True,
                                  stderr=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertIn("standard output", done.stderr)

    def test_interrupt(self):
        for options in ([], ["--json"]):
            process = subprocess.Popen([ORYX, *map(str, self.arguments("--max-tokens", 10_000_000, "--schedule", "linear",
                                                                       *options))],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            begun = b"" if options else process.stdout.read(5)
            if options:
                try:
                    process.wait(3)  # far longer than it takes to load
                except subprocess.TimeoutExpired:
                    pass
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 130, errors)
            self.assertNotIn(b"oryx:", errors)
            if options:
                self.assertEqual(json.loads(rest)["finish_reason"], "cancelled")
            else:
                (begun + rest).decode()
                self.assertTrue(rest.endswith(b"\n"))


if __name__ == "__main__":
    unittest.main()
