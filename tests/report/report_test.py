"""`oryx report`, from its command line to what a browser makes of its page.

usage: report_test.py ORYX [unittest arguments]
ORYX_REPORT_SCREENSHOT=FILE.png keeps a picture of the page's top.
"""

import json
import os
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "command_line"))

from command_line import CommandLineTest, config_of, write_model
from browser import Browser, find_browser
from fixtures import write_evaluation, write_samples, write_training

TEXT = "".join(f"line {i} of a text that says little, {i * i} times. " for i in range(400))
SECTIONS = ["models", "training", "tasks", "needles", "recall", "curves", "cost", "samples"]
RECIPE = """
[model]
mixers = ["attention", "ssd"]
layers = 1
width = 32
heads = 2
mlp_width = 48
vocabulary = 260
[data]
train = ["shards"]
validation = ["shards"]
sequence_length = 128
[training]
steps = 12
batch_tokens = 512
learning_rate = 5e-3
validation_every = 4
validation_sequences = 4
[run]
directory = "run"
seed = 1
device = "cpu"
"""


class Report(CommandLineTest):
    def report(self, *sources):
        self.succeeds("report", *sources, "--output", "report.html")
        return (self.folder / "report.html").read_text()

    def test_from_training_to_the_page(self):
        (self.folder / "text.txt").write_text(TEXT)
        (self.folder / "recipe.toml").write_text(RECIPE)
        self.succeeds("prepare", "--tokenizer", "bytes", "--output", "shards", "text.txt")
        self.succeeds("train", "recipe.toml")
        self.succeeds("curve", "run/latest", "--data", "text.txt", "--switches", "paper", "--length", 256, "--windows", 4,
                      "--output", "curve", "--device", "cpu")
        curves = json.loads((self.folder / "curve/curve.json").read_text())
        self.assertEqual([c["schedule"] for c in curves["curves"]][:3], ["attention", "linear", "linear,attention@64"])
        self.assertEqual(len(curves["curves"]), 16)
        for curve in curves["curves"]:
            for low, value, high in zip(*(curve["smoothed_perplexity" + end] for end in ("_low", "", "_high"))):
                self.assertLessEqual(low, value)
                self.assertLessEqual(value, high)
        made = self.succeeds("generate", "run/latest", "--prompt", "line 7 of", "--schedule", "linear,attention@4",
                             "--max-tokens", 8, "--json", "--device", "cpu").stdout
        sample = json.loads(made)
        self.assertEqual("".join(p["text"] for p in sample["pieces"] if p["prompt"]), "line 7 of")
        self.assertEqual("".join(p["text"] for p in sample["pieces"] if not p["prompt"]), sample["text"])
        self.assertEqual([p["mode"] for p in sample["pieces"]][:2], ["linear", "attention"])
        (self.folder / "samples.jsonl").write_text(made + made)
        page = self.report("trained=run", "run/latest", "curve", "samples.jsonl")
        for section in ("models", "training", "curves", "samples"):
            self.assertIn(f'<section id="{section}">', page)
        for absent in ("tasks", "needles", "recall", "cost"):
            self.assertNotIn(f'<section id="{absent}">', page)
        self.assertIn("One switch, linear to attention, 4 windows of 256 tokens", page)
        self.assertIn("training.batch_tokens", page)

    def test_wrong_input(self):
        write_training(self.folder / "run", steps=30)
        (self.folder / "empty").mkdir()
        (self.folder / "text.txt").write_text(TEXT)
        write_evaluation(self.folder / "bad", schedules=["linear"])
        results = json.loads((self.folder / "bad/results.json").read_text())
        results["runs"][0]["tasks"]["piqa"]["items"] = "many"
        (self.folder / "bad/results.json").write_text(json.dumps(results))
        output = ["--output", "report.html"]
        self.fails(1, ["report", "run", "empty", *output], "empty", "metrics.jsonl")
        self.fails(1, ["report", "missing", *output], "missing")
        self.fails(1, ["report", "text.txt", *output], "text.txt")
        self.fails(1, ["report", "bad", *output], "bad/results.json", "piqa", "items", "many")
        self.fails(1, ["report", "run", "--output", "nowhere/report.html"], "nowhere")
        self.fails(1, ["report", "run", "--output", "run"], "run")
        self.fails(2, ["report", *output], "sources")


class Page(CommandLineTest):
    """In a browser, on sources of every kind."""

    def setUp(self):
        super().setUp()
        if not find_browser():
            self.skipTest("no Chromium here: scripts/test installs it where the distribution has it")
        write_training(self.folder / "oryx-tm-35m", final=3.12)
        write_training(self.folder / "transformer-35m", seed=2, final=3.2, linear=False)
        write_model(self.folder / "model", config=config_of("ssd"))
        write_evaluation(self.folder / "scores-tm")
        write_evaluation(self.folder / "scores-transformer", name="transformer-35m", schedules=["attention"],
                         mixers=["attention"], seed=2, level=-0.004)
        (self.folder / "text.txt").write_text(TEXT)
        self.succeeds("curve", "model", "--data", "text.txt", "--length", 256, "--windows", 6, "--output", "curve",
                      "--device", "cpu")
        write_samples(self.folder / "samples.jsonl")
        self.succeeds("report", "oryx-tm-35m", "transformer-35m", "tiny=model", "scores-tm", "scores-transformer", "curve",
                      "samples.jsonl", "--output", "report.html", "--title", "A report <of all>")
        self.browser = Browser()
        self.addCleanup(self.browser.close)
        self.browser.resize(1280, 900)
        self.browser.open(self.folder / "report.html")

    def test_page(self):
        ask = self.browser.evaluate
        self.assertEqual(ask("document.title"), "A report <of all>")
        self.assertEqual(ask("[...document.querySelectorAll('main > section')].map(s => s.id)"), SECTIONS)
        self.assertEqual(ask("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))"), SECTIONS)
        ids = ask("[...document.querySelectorAll('[id]')].map(e => e.id)")
        self.assertEqual(len(ids), len(set(ids)))
        self.assertGreater(ask("document.querySelectorAll('figure.plot').length"), 12)
        self.assertGreater(ask("document.querySelectorAll('td.best').length"), 10)
        # Nothing is wider than the window; what may be scrolls by itself.
        self.assertLessEqual(ask("document.documentElement.scrollWidth"), 1280)
        scrolling = ask("[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth).length")
        self.assertEqual(scrolling, 0)
        # Every curve lies where its frame is.
        outside = ask("""[...document.querySelectorAll('figure.plot svg[data-frame]')].filter(svg => {
            const box = svg.getBoundingClientRect();
            return box.width < 100 || box.height < 100 || !svg.querySelector('[data-series]');
        }).length""")
        self.assertEqual(outside, 0)
        self.check_comforts(ask)
        self.check_print_and_narrow(ask)
        if picture := os.environ.get("ORYX_REPORT_SCREENSHOT"):
            self.browser.resize(1280, 900)
            ask("scrollTo({top: 0, behavior: 'instant'})")
            self.browser.screenshot(Path(picture))
        self.assertEqual(self.browser.problems, [])
        self.assertEqual(self.browser.requests, [(self.folder / "report.html").as_uri()])

    def check_comforts(self, ask):
        """Legends switch curves off and on, the pointer reads values, the theme changes."""
        legend = "document.querySelector('figure.plot .legend li')"
        group = "document.querySelector('figure.plot g[data-series=\"0\"]')"
        shown = f"getComputedStyle({group}).display"
        self.assertNotEqual(ask(shown), "none")
        ask(f"{legend}.click()")
        self.assertEqual((ask(shown), ask(f"{legend}.getAttribute('aria-pressed')")), ("none", "false"))
        ask(f"{legend}.click()")
        self.assertNotEqual(ask(shown), "none")
        box = ask("""(() => { const svg = document.querySelector('figure.plot .picture svg');
            svg.scrollIntoView({behavior: 'instant', block: 'center'});
            const b = svg.getBoundingClientRect(); return [b.left + b.width * 0.6, b.top + b.height / 2]; })()""")
        self.browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        readout = ask("document.querySelector('.readout')?.innerText ?? ''")
        # The middle of the run: between the first loss and the last, of both modes of the first run.
        self.assertIn("oryx-tm-35m, attention", readout)
        values = [float(line.split()[0]) for line in readout.splitlines()[1:]]
        self.assertTrue(values and all(3.0 < value < 4.5 for value in values), readout)
        self.browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
        self.assertIsNone(ask("document.querySelector('.readout')"))
        paper = "getComputedStyle(document.body).backgroundColor"
        light = ask(paper)
        ask("document.querySelector('nav button').click()")
        self.assertNotEqual(ask(paper), light)
        ask("document.querySelector('nav button').click()")
        self.assertEqual(ask(paper), light)

    def check_print_and_narrow(self, ask):
        """On paper the page is its text and pictures, always light; on a telephone one column."""
        ask("document.querySelector('nav button').click()")
        self.browser.call("Emulation.setEmulatedMedia", media="print")
        self.assertEqual(ask("getComputedStyle(document.querySelector('nav')).display"), "none")
        self.assertEqual(ask("getComputedStyle(document.body).backgroundColor"), "rgb(255, 255, 255)")
        self.browser.call("Emulation.setEmulatedMedia", media="")
        ask("document.querySelector('nav button').click()")
        self.browser.resize(390, 800)
        self.assertLessEqual(ask("document.documentElement.scrollWidth"), 390)
        self.browser.resize(1280, 900)

    def test_page_without_scripts(self):
        self.browser.call("Emulation.setScriptExecutionDisabled", value=True)
        self.browser.open(self.folder / "report.html")
        self.assertIsNone(self.browser.evaluate("document.querySelector('nav button')"))
        self.assertGreater(self.browser.evaluate("document.querySelectorAll('figure.plot svg .line').length"), 20)
        self.assertEqual(self.browser.problems, [])


if __name__ == "__main__":
    unittest.main()
