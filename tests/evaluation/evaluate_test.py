"""`oryx evaluate`: scores against rescore.py, independence of batches and order, continuation, errors.

usage: evaluate_test.py ORYX [unittest arguments]
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "command_line"))
from command_line import ORYX, CommandLineTest, write_model  # noqa: E402

import rescore  # noqa: E402

os.environ["OMP_WAIT_POLICY"] = "passive"

LANGUAGE = ["lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "wikitext"]
CHOICES = [
    {"context": "The cat sat on the", "choices": [" mat.", " moon and sang", " table, é là", " x"], "gold": 0},
    {"context": "Trailing blank ", "choices": [" one", " two words", " drei"], "gold": 2},
    {"context": "", "choices": [" nothing before", " anything"], "gold": 1},
    {"context": "Question: why?\nAnswer:", "choices": [" because of this", " because of that"], "gold": 0},
    {"context": "A longer context, which is there to be read only once for " * 3, "choices": [" a", " b", " c", " d"], "gold": 3},
]
WIKITEXT = (" = One page = \n Some words , with \" quotes \" and ( brackets ) @-@ joined ; it 's 1 @,@ 000 . \n"
            " = = Section = = \n More of it . \n = Another = \n Short , N ° . \n")
WORDS = "It was early. The road went on! Who knew where to? Nobody said; all walked along the river. "


class Evaluate(CommandLineTest):
    def setUp(self):
        super().setUp()
        self.model = write_model(self.folder / "model")
        self.data = self.folder / "data"
        self.data.mkdir()
        self.write("lambada", [{"context": f"Some passage number {i} ends with a", "continuation": f" word{i}"} for i in range(6)])
        for task in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa"):
            self.write(task, CHOICES)
        self.write("winogrande", [{"contexts": ["Ann saw Bob so Ann", "Ann saw Bob so Bob"], "continuation": " waved.", "gold": 1},
                                  {"contexts": ["The box", "The ball is"], "continuation": " big", "gold": 0}])
        for task in ("squad", "drop"):
            self.write(task, [{"context": f"Fact {i}: the name is X{i}. " * (2 + i), "prompt": "\nQuestion: the name?\nAnswer:",
                               "answers": [f"X{i}", "the"]} for i in range(3)])
        (self.data / "wikitext_test.txt").write_text(WIKITEXT)
        (self.data / "essay.txt").write_text(WORDS * 20)

    def write(self, task, records):
        (self.data / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def command(self, *options, tasks="all", output="out"):
        small = {"--needle-lengths": "600", "--needle-samples": "2", "--mqar-length": "32", "--mqar-pairs": "2,4",
                 "--mqar-samples": "3", "--max-new-tokens": "8"}
        defaults = [word for name, value in small.items() if name not in options for word in (name, value)]
        return ["evaluate", self.model, "--tasks", tasks, "--data", self.data, "--output", output, "--device", "cpu",
                *defaults, *options]

    def evaluate(self, *options, output="out", **choice):
        self.succeeds(*self.command(*options, output=output, **choice))
        return json.loads((self.folder / output / "results.json").read_text())

    def items(self, results, task, run=0, output="out"):
        path = self.folder / output / results["runs"][run]["tasks"][task]["items_file"]
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_every_score_equals_that_of_an_independent_script(self):
        results = self.evaluate("--schedule", "attention", "--schedule", "linear,attention@97.5%", "--schedule", "linear->attention",
                                "--dtype", "float64", "--max-length", "48")
        self.assertEqual([run["schedule"] for run in results["runs"]], ["attention", "linear,attention@97.5%", "linear->attention"])
        checked = rescore.check(ORYX, self.folder / "out", sample=100, tolerance=1e-8)
        self.assertEqual(checked, 3 * (6 + 5 * 5 + 2 + 2 + 6))
        tasks = results["runs"][2]["tasks"]
        self.assertEqual(tasks["squad"]["schedule"], "linear,attention@97.5%")
        self.assertEqual(tasks["needle_single_1"]["schedule"], "linear,attention@query")
        for run in results["runs"]:
            self.assertEqual(set(run["averages"]), {"language", "retrieval", "needle"})
            for name, task in run["tasks"].items():
                self.assertGreater(task["flops"], 0, name)
                self.assertGreater(task["state_bytes"], 0, name)
                self.assertEqual(task["attention_tokens"] == task["tokens"], run["schedule"] == "attention", name)
        self.assertGreater(tasks["hellaswag"]["items_cut"], 0)

    def test_float32_too(self):
        self.evaluate("--schedule", "every(2,chunk=8)", "--schedule", "attention,linear@query", tasks="lambada,hellaswag,winogrande,mqar")
        rescore.check(ORYX, self.folder / "out", sample=100, tolerance=1e-4)

    def test_batches_and_order_change_nothing(self):
        tasks = "lambada,hellaswag,winogrande,wikitext"
        whole = self.evaluate("--schedule", "linear,attention@60%", tasks=tasks, output="whole")
        small = self.evaluate("--schedule", "linear,attention@60%", "--batch-tokens", "1", tasks=tasks, output="small")
        for task in tasks.split(","):
            for a, b in zip(self.items(whole, task, output="whole"), self.items(small, task, output="small"), strict=True):
                for one, other in zip(self.numbers(a), self.numbers(b), strict=True):
                    self.assertAlmostEqual(one, other, delta=1e-5 * max(1, abs(one)))
        lines = (self.data / "hellaswag.jsonl").read_text().splitlines()
        order = list(range(len(lines)))
        random.Random(1).shuffle(order)
        (self.data / "hellaswag.jsonl").write_text("".join(lines[i] + "\n" for i in order))
        shuffled = self.items(self.evaluate("--schedule", "linear,attention@60%", tasks="hellaswag", output="shuffled"), "hellaswag",
                              output="shuffled")
        original = self.items(whole, "hellaswag", output="whole")
        for item, i in zip(shuffled, order):
            self.assertEqual(item["log_likelihoods"], original[i]["log_likelihoods"])  # bit for bit

    def numbers(self, item):
        return item["log_likelihoods"] if "log_likelihoods" in item else [item["log_likelihood"]]

    def test_retrieval_continuations_are_greedy(self):
        results = self.evaluate("--schedule", "linear,attention@50%", "--dtype", "float64", tasks="squad")
        scorer = rescore.Logits(ORYX, self.model, "float64")
        for item, record in zip(self.items(results, "squad"), rescore.records_of(self.data / "squad.jsonl", 9)):
            prompt = list((record["context"] + record["prompt"]).encode())
            self.assertEqual(item["prompt_tokens"], len(prompt))
            self.assertEqual(item["query"], len(record["context"]))
            new = list(item["continuation"].encode())
            self.assertEqual(len(new), 8)
            schedule = f"linear,attention@{len(prompt) // 2}"
            (_, greedy), = scorer.score([(prompt + new, len(prompt))], schedule)
            self.assertTrue(greedy.all())

    def test_long_contexts_are_cut_and_the_question_stays_whole(self):
        results = self.evaluate("--context-tokens", "80", tasks="squad")
        self.assertEqual(results["runs"][0]["tasks"]["squad"]["items_cut"], 2)
        self.assertEqual([item["prompt_tokens"] for item in self.items(results, "squad")][1:], [80, 80])
        self.fails(1, self.command("--context-tokens", "20", tasks="squad", output="new"), "squad.jsonl:1", "20")
        self.fails(1, self.command("--max-length", "60", "--too-long", "refuse", tasks="hellaswag", output="new"), "hellaswag.jsonl:5", "60")
        self.fails(1, self.command("--max-length", "4", tasks="lambada", output="new"), "lambada.jsonl:1", "continuation", "4")

    def test_questions_of_ones_own(self):
        self.write("mine", [{"context": "a b c", "prompt": "?", "answers": ["q"]}])
        results = self.evaluate("--retrieval", f"other={self.data / 'squad.jsonl'}", tasks=str(self.data / "mine.jsonl"))
        self.assertEqual(list(results["runs"][0]["tasks"]), ["mine", "other"])
        self.fails(2, self.command("--retrieval", "squad=x.jsonl", tasks="lambada", output="new"), "squad")
        self.fails(2, self.command("--retrieval", "x.jsonl", tasks="lambada", output="new"), "NAME=FILE")

    def test_needles(self):
        results = self.evaluate("--needle-samples", "4", "--needle-depths", "0,100", "--needle-lengths", "700,900", tasks="needle")
        for name, task in results["runs"][0]["tasks"].items():
            self.assertEqual([(c["length"], c["depth"], c["items"]) for c in task["cells"]],
                             [(700, 0, 2), (700, 1, 2), (900, 0, 2), (900, 1, 2)], name)
            for item in self.items(results, name):
                self.assertLessEqual(item["prompt_tokens"] + 8, item["length"], name)
        self.fails(1, self.command("--needle-lengths", "100", tasks="needle_single_1", output="new"), "needle_single_1", "100")
        (self.data / "essay.txt").unlink()
        self.fails(1, self.command(tasks="needle_single_2", output="new"), "--essay")

    def test_an_interrupted_run_goes_on(self):
        command = self.command("--mqar-samples", "6000", tasks="lambada,mqar")
        process = subprocess.Popen([ORYX, *map(str, command)], cwd=self.folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        results = self.folder / "out/results.json"
        for _ in range(600):
            if results.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130)
        self.assertEqual(list(json.loads(results.read_text())["runs"][0]["tasks"]), ["lambada"])
        before = (self.folder / "out/items/lambada.0.jsonl").stat().st_mtime_ns
        self.fails(1, self.command(tasks="lambada,mqar"), "mqar_samples", "6000", "3")
        other = write_model(self.folder / "other", "gated_delta")
        self.fails(1, [command[0], other, *command[2:]], "model", "remove it")
        command[command.index("lambada,mqar")] = "lambada,winogrande"
        # The same directory and config, but training went on: one bit of one weight.
        weights = self.model / "model.safetensors"
        stored = weights.read_bytes()
        weights.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
        self.fails(1, command, "model.weights", "crc32", "remove it")
        weights.write_bytes(stored)
        self.succeeds(*command, "--schedule", "attention", "--schedule", "linear")
        after = json.loads(results.read_text())
        self.assertEqual([list(run["tasks"]) for run in after["runs"]], [["lambada", "winogrande"]] * 2)
        self.assertEqual((self.folder / "out/items/lambada.0.jsonl").stat().st_mtime_ns, before)

    def test_what_is_printed(self):
        done = self.succeeds(*self.command("--schedule", "attention", "--schedule", "linear", tasks="lambada,squad"))
        for text in ("lambada", "ppl", "contains", "attention", "linear", "tokens in attention"):
            self.assertIn(text, done.stdout)
        done = self.succeeds(*self.command("--json", tasks="lambada,squad"))
        self.assertEqual(json.loads(done.stdout), json.loads((self.folder / "out/results.json").read_text()))

    def test_wrong_input(self):
        def refused(code, *options, mentions=(), tasks="lambada"):
            self.fails(code, self.command(*options, tasks=tasks, output="new"), *mentions)
        for limit in (["--limit=0"], ["--limit=-3"], ["--limit", ""], ["--limit", "ten"]):
            refused(2, *limit, mentions=["limit", "at least 1"])
        refused(2, tasks="lambda", mentions=["lambda", "lambada"])
        refused(2, "--schedule", "linear,attention@query", tasks="wikitext", mentions=["wikitext", "query"])
        refused(2, "--schedule", "attention->", mentions=["attention"])
        refused(2, "--needle-depths", "101", mentions=["101"])
        refused(2, "--mqar-pairs", "9", tasks="mqar", mentions=["9", "32"])
        (self.data / "piqa.jsonl").unlink()
        refused(1, tasks="lambada,piqa", mentions=["piqa.jsonl"])
        for record, mentions in (({"context": "x"}, ["choices"]), ({"context": "x", "choices": [" a"], "gold": 0}, ["choices", "2"]),
                                 ({"context": "x", "choices": [" a", " b"], "gold": 2}, ["gold", "2"]),
                                 ({"context": 5, "choices": [" a", " b"], "gold": 1}, ["context", "5"]),
                                 ({"context": "x", "choices": [" a", ""], "gold": 1}, ["choices"]), ([], ["object"])):
            self.write("piqa", [CHOICES[0], record])
            refused(1, tasks="lambada,piqa", mentions=["piqa.jsonl:2", *mentions])
        (self.data / "piqa.jsonl").write_text("{\n")
        refused(1, tasks="piqa", mentions=["piqa.jsonl:1"])
        (self.data / "piqa.jsonl").write_text("\n")
        refused(1, tasks="piqa", mentions=["piqa.jsonl"])
        plain = write_model(self.folder / "plain", "attention")
        self.fails(2, ["evaluate", plain, "--tasks", "lambada", "--data", self.data, "--schedule", "linear", "--output", "new"], "linear")
        self.fails(1, ["evaluate", self.folder / "no", "--tasks", "lambada", "--data", self.data, "--output", "new"], "no")
        self.fails(2, ["evaluate", self.model, "--tasks", "lambada", "--output", "new"], "--data")


if __name__ == "__main__":
    unittest.main()
