#!/usr/bin/env python3
"""The first steps of training on a GPU in bfloat16 beside the same steps on the CPU in float32.

    compare_losses.py train RECIPE… --device cpu|cuda --data SHARDS --output DIR [--oryx build/oryx] [--steps 100]
    compare_losses.py compare DIR_CPU DIR_CUDA [--tolerance 0.03]

Both draw the same weights, batches and schedules, so the losses part only by rounding: `compare` fails where the mean
difference over the last twenty steps, or any difference in the first ten, exceeds the tolerance (nats). The learning
rate is a mild one: at the recipes' own rates the early steps of the plain Transformer are chaotic, and two runs on the
CPU that differ in nothing but rounding end 0.2 nats apart. The two halves can run on different machines.
"""

import argparse
import json
import pathlib
import subprocess
import sys


def losses(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]


def train(options):
    for recipe in options.recipes:
        run = options.output / recipe.stem
        command = [options.oryx, "train", recipe, f"data.train=['{options.data}']", "data.validation=[]",
                   f"training.steps={options.steps}", f"training.learning_rate={options.learning_rate}", "training.validation_every=0", "training.checkpoint_every=0",
                   f"training.dtype={'bfloat16' if options.device == 'cuda' else 'float32'}",
                   f"run.directory={run}", "--device", options.device]
        subprocess.run(list(map(str, command)), check=True)


def compare(options):
    failed = False
    print(f"{'recipe':<24} {'first':>8} {'last 20: cpu':>13} {'cuda':>8} {'difference':>11} {'largest early':>14}")
    for run in sorted(options.cpu.iterdir()):
        other = options.cuda / run.name
        if not other.exists():
            continue
        cpu, cuda = losses(run), losses(other)
        if len(cpu) != len(cuda) or len(cpu) < 30:
            sys.exit(f"{run.name}: expected the same number of steps, at least 30, got {len(cpu)} and {len(cuda)}")
        early = max(abs(a - b) for a, b in zip(cpu[:10], cuda[:10]))
        mean = [sum(x[-20:]) / 20 for x in (cpu, cuda)]
        bad = not (abs(mean[1] - mean[0]) <= options.tolerance and early <= options.tolerance)
        failed |= bad
        print(f"{run.name:<24} {cpu[0]:>8.4f} {mean[0]:>13.4f} {mean[1]:>8.4f} {mean[1] - mean[0]:>+11.4f} "
              f"{early:>14.4f}{'  FAILED' if bad else ''}")
    sys.exit(failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train")
    command.add_argument("recipes", nargs="+", type=pathlib.Path)
    command.add_argument("--device", choices=["cpu", "cuda"], required=True)
    command.add_argument("--data", required=True)
    command.add_argument("--output", type=pathlib.Path, required=True)
    command.add_argument("--oryx", type=pathlib.Path, default="build/oryx")
    command.add_argument("--steps", type=int, default=100)
    command.add_argument("--learning-rate", type=float, default=1e-3)
    command.set_defaults(run=train)
    command = commands.add_parser("compare")
    command.add_argument("cpu", type=pathlib.Path)
    command.add_argument("cuda", type=pathlib.Path)
    command.add_argument("--tolerance", type=float, default=0.03)
    command.set_defaults(run=compare)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
