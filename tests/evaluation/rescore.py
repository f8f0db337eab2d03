"""Scores an evaluation again, independently: every metric and average from the items, and the log-likelihoods of a
sample of items from `oryx logits`, with tokens, spans, word counts and normalisation worked out here.

usage: rescore.py ORYX EVALUATION_DIRECTORY [--sample N] [--tolerance T]
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

PAPER = ["lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"]
AVERAGES = {"language": PAPER, "retrieval": ["squad", "drop"],
            "needle": [f"needle_single_{n}" for n in (1, 2, 3)]}


class Mismatch(AssertionError):
    pass


def expect_close(what, got, wanted, tolerance=1e-9):
    if got is None or wanted is None or not math.isclose(got, wanted, rel_tol=tolerance, abs_tol=tolerance):
        if not (got is None and (wanted is None or not math.isfinite(wanted))):
            raise Mismatch(f"{what}: the evaluation says {got}, this script {wanted}")


# ---- scores from items

def mean_and_error(values):
    values = np.asarray(values, np.float64)
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None


def exponential(mean, error):
    return math.exp(-mean), None if error is None else math.exp(-mean) * error


def per_weight(log_likelihoods, weights):
    """Nats per word or byte, and the linearised error of the ratio."""
    total, weights = -np.sum(log_likelihoods), np.asarray(weights, np.float64)
    ratio = total / weights.sum()
    residuals = -np.asarray(log_likelihoods) - ratio * weights
    error = np.sqrt((residuals ** 2).sum() / (len(weights) - 1) * len(weights)) / weights.sum() if len(weights) > 1 else None
    return ratio, error


def metrics_of(items):
    first = items[0]
    if "contained" in first:
        def contains(item):
            return any(re.search(re.escape(answer), item["continuation"], re.IGNORECASE) for answer in item["answers"])
        return {"contains": mean_and_error([bool(contains(item)) for item in items])}
    if "right" in first:
        return {"acc": mean_and_error([item["right"] / item["pairs"] for item in items])}
    if "log_likelihoods" in first:
        metrics = {"acc": mean_and_error([np.argmax(i["log_likelihoods"]) == i["gold"] for i in items])}
        if "bytes" in first:
            metrics["acc_norm"] = mean_and_error(
                [np.argmax(np.divide(i["log_likelihoods"], i["bytes"])) == i["gold"] for i in items])
        return metrics
    log_likelihoods = [item["log_likelihood"] for item in items]
    if "words" in first:
        metrics = {}
        for name, weight in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
            ratio, error = per_weight(log_likelihoods, [item[weight] for item in items])
            metrics[name] = exponential(-ratio, error)
        ratio, error = per_weight(log_likelihoods, [item["bytes"] for item in items])
        metrics["bits_per_byte"] = ratio / math.log(2), None if error is None else error / math.log(2)
        return metrics
    return {"acc": mean_and_error([item["is_greedy"] for item in items]),
            "ppl": exponential(*mean_and_error(log_likelihoods))}


def check_metrics(directory, run):
    for name, task in run["tasks"].items():
        items = [json.loads(line) for line in (directory / task["items_file"]).read_text().splitlines()]
        if len(items) != task["items"]:
            raise Mismatch(f"{name}: {len(items)} items in the file, {task['items']} in the results")
        again = metrics_of(items)
        if set(again) != set(task["metrics"]) or task["main"] not in again:
            raise Mismatch(f"{name}: metrics {sorted(task['metrics'])}, expected {sorted(again)}")
        for metric, (value, error) in again.items():
            expect_close(f"{name} {metric}", task["metrics"][metric]["value"], value)
            expect_close(f"{name} {metric} error", task["metrics"][metric]["standard_error"], error)
        for cell in task.get("cells", []):
            keys = [key for key in ("length", "depth", "pairs") if key in cell and key in items[0]]
            inside = [item for item in items if all(item[key] == cell[key] for key in keys)]
            if len(inside) != cell["items"]:
                raise Mismatch(f"{name}: a cell of {cell['items']} items, {len(inside)} in the file")
            expect_close(f"{name} {cell}", cell["value"], next(iter(metrics_of(inside).values()))[0])
    for average, names in AVERAGES.items():
        complete = all(name in run["tasks"] for name in names)
        if complete != (average in run["averages"]):
            raise Mismatch(f"average {average}: expected {'one' if complete else 'none'}")
        if complete:
            mains = [run["tasks"][name]["metrics"][run["tasks"][name]["main"]]["value"] for name in names]
            expect_close(f"average {average}", run["averages"][average], float(np.mean(mains)))


# ---- log-likelihoods from logits

class Tokens:
    def __init__(self, model, config):
        self.package = None
        if config["tokenizer"] != "bytes":
            import tokenizers
            self.package = tokenizers.Tokenizer.from_file(str(model / config["tokenizer"]))
            self.end = self.package.token_to_id("<|endoftext|>")
        else:
            self.end = 256

    def encode(self, text):
        return self.package.encode(text, add_special_tokens=False).ids if self.package else list(text.encode())

    def pair(self, context, continuation):
        """The tokens of both and where the continuation starts."""
        head = self.encode(context.rstrip())
        whole = self.encode(context + continuation)
        tail = whole[len(head):]
        head = head or [self.end]
        return head + tail, len(head)


def detokenized(page):
    page = re.sub(r"/' [0-9]/", "/'[0-9]/", page.replace("s '", "s'"))
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for a, b in ("()", "[]", "{}", '""', "''"):
        page = re.sub(rf"\{a}\s*([^\{b}]*?)\s*\{b}", lambda match, a=a, b=b: a + match.group(1) + b, page)
    for level in (4, 3, 2):
        page = page.replace(" ".join("=" * level), "=" * level)
    for before, after in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(before, after)
    return page


def pages_of(text):
    pages, lines = [], []
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [page for page in pages + ["\n".join(lines)] if page.strip()]


def windows_of(tokens, end, length):
    """(tokens read and predicted, how many of the last are predicted), each token predicted once."""
    for done in range(0, len(tokens), length):
        stop = min(len(tokens), done + length)
        start = stop - length - 1
        yield ([end] if start < 0 else []) + tokens[max(start, 0):stop], stop - done


class Logits:
    def __init__(self, oryx, model, dtype):
        self.oryx, self.model, self.dtype = oryx, model, dtype

    def of(self, sequences, schedule):
        """Log-probabilities [n, time, vocabulary] in float64 of sequences of equal length."""
        with tempfile.TemporaryDirectory() as folder:
            tokens, output = Path(folder) / "tokens.safetensors", Path(folder) / "logits.safetensors"
            save_file({"tokens": np.array(sequences, np.int64)}, tokens)
            subprocess.run([self.oryx, "logits", self.model, "--tokens", tokens, "--schedule", schedule, "--output", output,
                            "--device", "cpu", "--dtype", self.dtype], check=True, capture_output=True)
            logits = load_file(output)["logits"].astype(np.float64)
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True)), logits.argmax(-1)

    def score(self, requests, schedule):
        """[(tokens, first scored)] → [(log-likelihoods, is greedy)]; `schedule` may name @query."""
        groups = defaultdict(list)
        for index, (tokens, first) in enumerate(requests):
            groups[len(tokens), schedule.replace("@query", f"@{first}")].append(index)
        scores = [None] * len(requests)
        for (_, text), indices in groups.items():
            log_probabilities, best = self.of([requests[i][0] for i in indices], text)
            for row, i in enumerate(indices):
                tokens, first = requests[i]
                targets = np.array(tokens[first:])
                positions = np.arange(first - 1, len(tokens) - 1)
                scores[i] = log_probabilities[row, positions, targets], best[row, positions] == targets
        return scores


def records_of(path, count):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()][:count]


def requests_of(name, data, tokens, limit, length, items):
    """For each of the first items: its sequences, each (tokens, first scored)."""
    def cut(request):
        excess = max(0, len(request[0]) - 1 - length)
        return request[0][excess:], request[1] - excess
    if name == "mqar":
        return [[(item["sequence"], 2 * item["pairs"])] for item in items[:limit]]
    if name == "wikitext":
        pages = pages_of((data / "wikitext_test.txt").read_text())[:limit]
        return [[(window, len(window) - predicted)
                 for window, predicted in windows_of(tokens.encode(detokenized(page)), tokens.end, length)] for page in pages]
    requests = []
    for record in records_of(data / f"{name}.jsonl", limit):
        if "contexts" in record:
            pairs = [(context, record["continuation"]) for context in record["contexts"]]
        else:
            pairs = [(record["context"], choice) for choice in record.get("choices", [record.get("continuation")])]
        requests.append([cut(tokens.pair(*pair)) for pair in pairs])
    return requests


def check_lengths(name, data, items):
    if name == "wikitext":
        for item, page in zip(items, pages_of((data / "wikitext_test.txt").read_text())):
            wanted = len(re.split(r"\s+", page)), len(page.encode())
            if (item["words"], item["bytes"]) != wanted:
                raise Mismatch(f"wikitext {item['id']}: {item['words']} words and {item['bytes']} bytes, expected {wanted}")
    elif "bytes" in items[0]:
        for item, record in zip(items, records_of(data / f"{name}.jsonl", len(items))):
            texts = [choice.removeprefix(" ") for choice in record["choices"]]
            if item["bytes"] != [len(text.encode()) for text in texts] or item["characters"] != [len(t) for t in texts]:
                raise Mismatch(f"{name} {item['id']}: lengths {item['bytes']} and {item['characters']}")


def check_log_likelihoods(oryx, directory, results, run, sample, tolerance):
    model, settings = Path(results["model"]["directory"]), results["settings"]
    tokens = Tokens(model, results["model"]["config"])
    logits = Logits(oryx, model, results["dtype"])
    checked = 0
    for name, task in run["tasks"].items():
        if task["group"] not in ("language", "recall"):
            continue
        items = [json.loads(line) for line in (directory / task["items_file"]).read_text().splitlines()][:sample]
        if task["group"] == "language":
            check_lengths(name, Path(settings["data"]), items)
        requests = requests_of(name, Path(settings["data"]), tokens, len(items), settings["max_length"], items)
        flat = [request for group in requests for request in group]
        scores = iter(logits.score(flat, task["schedule"]))
        for item, group in zip(items, requests):
            mine = [next(scores) for _ in group]
            if name == "mqar":
                places = np.array(item["value_positions"]) - 2 * item["pairs"]
                if mine[0][1][places].sum() != item["right"]:
                    raise Mismatch(f"mqar {item['id']}: {item['right']} right, expected {mine[0][1][places].sum()}")
                expect_close(f"mqar {item['id']}", item["log_likelihood"], mine[0][0][places].sum(), tolerance)
            elif "log_likelihoods" in item:
                for choice, (theirs, (ours, _)) in enumerate(zip(item["log_likelihoods"], mine)):
                    expect_close(f"{name} {item['id']}.{choice}", theirs, ours.sum(), tolerance)
            else:
                expect_close(f"{name} {item['id']}", item["log_likelihood"], sum(ours.sum() for ours, _ in mine), tolerance)
                if "is_greedy" in item and item["is_greedy"] != bool(mine[0][1].all()):
                    raise Mismatch(f"{name} {item['id']}: is_greedy {item['is_greedy']}")
            checked += 1
    return checked


def check(oryx, directory, sample=8, tolerance=1e-4):
    """Raises Mismatch, or returns how many items' log-likelihoods were worked out again."""
    results = json.loads((directory / "results.json").read_text())
    checked = 0
    for run in results["runs"]:
        check_metrics(directory, run)
        checked += check_log_likelihoods(oryx, directory, results, run, sample, tolerance)
    return checked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("oryx", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sample", type=int, default=8, help="items of each task and schedule")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative, of log-likelihoods")
    options = parser.parse_args()
    count = check(options.oryx.resolve(), options.directory, options.sample, options.tolerance)
    print(f"all metrics agree, and the log-likelihoods of {count} items")
