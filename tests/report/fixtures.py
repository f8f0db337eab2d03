"""Directories of every kind that `oryx report` takes, made up and small: what the pages of the tests show."""

import json
import math
import random

LANGUAGE = {"lambada": ("acc", 5153, 0.32), "hellaswag": ("acc_norm", 10042, 0.31), "piqa": ("acc", 1838, 0.62),
            "arc_easy": ("acc", 2376, 0.43), "arc_challenge": ("acc_norm", 1172, 0.24), "openbookqa": ("acc_norm", 500, 0.29),
            "winogrande": ("acc", 1267, 0.51)}
CONFIG = {"layers": 8, "width": 384, "heads": 3, "mlp_width": 1024, "vocabulary": 50304, "mixers": ["attention", "ssd"]}
SWEEP = ["attention", "linear", "every(2)", "every(4)", "every(8)", "random(0.1)", "random(0.25)", "random(0.5)",
         "linear,attention@-64", "linear,attention@-256", "linear,attention@-1024", "linear->attention", "attention->linear"]
SHARE = {"attention": 1, "linear": 0, "every(2)": .5, "every(4)": .25, "every(8)": .125, "random(0.1)": .1,
         "random(0.25)": .25, "random(0.5)": .5, "linear,attention@-64": .05, "linear,attention@-256": .18,
         "linear,attention@-1024": .6, "linear->attention": .025, "attention->linear": .975}


def metric(value, error):
    return {"value": value, "standard_error": error}


def task(main, group, items, share, metrics, cells=None, length=900):
    tokens = items * length
    entry = {"items": items, "metrics": metrics, "main": main, "group": group, "tokens": tokens,
             "attention_tokens": round(tokens * share), "flops": tokens * (6.2e7 + 9e6 * share), "state_bytes": 9_830_400,
             "seconds": tokens / 41000, "items_file": "items/x.0.jsonl"}
    return entry | ({"cells": cells} if cells else {})


def evaluation_run(schedule, draw, level=0.0, needles=True):
    """Scores of one schedule: attention retrieves, the recurrence hardly does, and both model language."""
    share = SHARE[schedule]
    answers_by_attention = share == 1 or schedule.startswith("linear,attention") or schedule == "linear->attention"
    tasks = {}
    for name, (main, items, value) in LANGUAGE.items():
        value += level + draw.gauss(0, 0.006) + 0.006 * share
        metrics = {main: metric(value, math.sqrt(value * (1 - value) / items))}
        if main == "acc_norm":
            metrics["acc"] = metric(value - 0.02, 0.01)
        if name == "lambada":
            metrics = {"ppl": metric(61.0 - 300 * level - 4 * share + draw.gauss(0, 0.4), 1.9)} | metrics
        tasks[name] = task(main, "language", items, share, metrics, length=95)
    word = 48.2 - 200 * level - 2.1 * share + draw.gauss(0, 0.15)
    tasks["wikitext"] = task("word_perplexity", "language", 62, share, {"word_perplexity": metric(word, 0.9),
                             "bits_per_byte": metric(math.log2(word) / 5.3, 0.01)}, length=4400)
    for name in ("squad", "drop"):
        value = (0.21 if answers_by_attention else 0.11) + draw.gauss(0, 0.01)
        tasks[name] = task("contains", "retrieval", 929, share, {"contains": metric(value, 0.012)})
    averages = {"language": sum(tasks[n]["metrics"][LANGUAGE[n][0]]["value"] for n in LANGUAGE) / 7,
                "retrieval": sum(tasks[n]["metrics"]["contains"]["value"] for n in ("squad", "drop")) / 2}
    if needles:
        for name in ("needle_single_1", "needle_single_2", "needle_single_3"):
            hard = int(name[-1]) * 0.08
            cells = []
            for length in (512, 1024, 2048, 4096):
                for depth in (0, 25, 50, 75, 100):
                    fade = math.log2(length / 512) * (0.02 if answers_by_attention else 0.22) + (1 - depth / 100) * 0.08
                    value = min(1, max(0, (1.02 if answers_by_attention else 0.9) - hard - fade + draw.gauss(0, 0.02)))
                    cells.append({"length": length, "depth": depth, "value": value, "items": 25})
            value = sum(c["value"] for c in cells) / len(cells)
            tasks[name] = task("contains", "needle", 500, share, {"contains": metric(value, 0.02)}, cells)
        averages["needle"] = sum(tasks[n]["metrics"]["contains"]["value"] for n in tasks if n.startswith("needle")) / 3
    tasks["mqar"] = task("acc", "recall", 500, share, {"acc": metric(0.97 if share > 0.9 else 0.3 + 0.5 * share, 0.01)},
                         [{"length": 256, "pairs": pairs, "items": 500,
                           "value": 0.97 if answers_by_attention else min(0.95, 6 / pairs * (0.6 + share))} for pairs in (4, 8, 16, 32, 64)])
    return {"schedule": schedule, "tasks": tasks, "averages": averages}


def write_evaluation(directory, name="oryx-tm-35m", schedules=SWEEP, mixers=("attention", "ssd"), seed=1, level=0.0):
    draw = random.Random(seed)
    directory.mkdir(parents=True)
    config = CONFIG | {"mixers": list(mixers)}
    results = {"format": "oryx.evaluation", "version": 1,
               "model": {"directory": f"runs/{name}/latest", "name": name, "mixers": list(mixers), "parameters": 34_700_000,
                         "config": config},
               "device": "cuda", "dtype": "bfloat16", "seed": 0, "limit": None,
               "command": f"oryx evaluate runs/{name}/latest --tasks all --data data/eval --output {directory.name}",
               "runs": [evaluation_run(schedule, draw, level) for schedule in schedules]}
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def write_training(directory, seed=1, final=3.1, steps=1500, linear=True):
    draw = random.Random(seed)
    directory.mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        loss = final + 7.5 * math.exp(-step / (steps / 22)) + 0.6 * math.exp(-step / (steps / 3))
        if step % (steps // 15) == 0:
            losses = {"attention": loss + draw.gauss(0, 0.004)}
            if linear:
                losses["linear"] = loss + 0.03 * math.exp(-step / steps) - 0.01 + draw.gauss(0, 0.004)
            lines.append({"kind": "validation", "step": step, "tokens": step * 131072, "loss": losses})
        lines.append({"kind": "train", "step": step + 1, "tokens": (step + 1) * 131072, "loss": loss + draw.gauss(0, 0.03),
                      "learning_rate": 5e-3 * min((step + 1) / 150, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
                      "gradient_norm": 0.4 + 2 * math.exp(-step / 60) + abs(draw.gauss(0, 0.05)), "attention_share": 0.25,
                      "tokens_per_second": draw.gauss(1.03e6, 1.2e4), "seconds": step * 0.127})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


SAMPLES = [
    {"model": "runs/oryx-tm-35m/latest", "schedule": "linear,attention@24,linear@96", "prompt_tokens": 24, "ids": [1] * 140,
     "pieces": [
         {"text": "The river rises in the hills above the town, ", "mode": "linear", "prompt": True},
         {"text": "and was for centuries the only road to the coast. ", "mode": "attention", "prompt": False},
         {"text": "The bridge, built in 1764, is <the> oldest & of its kind.", "mode": "linear", "prompt": False}]},
]


def write_samples(path, samples=SAMPLES):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path
