#!/usr/bin/env python3
"""Predicted tokens/s of data-parallel training on many GPUs, from a measured step on one and published link rates; and
the bytes that it predicts, beside those that Gloo ranks on this machine really send.

    scale_model.py [--json]                         the prediction for 1.4b (docs/distributed.md says what is assumed)
    .venv/bin/python benchmarks/scale_model.py --check [--oryx build/oryx] [--ranks 2]
                                                    bytes a step over the loopback interface, beside the model's
"""

import argparse
import dataclasses
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Model:
    name: str
    parameters: int       # stored; float32 gradients
    embedding: int        # of them; its gradient is the last to be complete
    tokens_per_second: float  # of one card, at `micro_batch` tokens a step (docs/performance.md)
    per_step: float       # seconds of a step that do not depend on its tokens: the optimizer
    per_pass: float       # seconds of a pass that do not either: weights to bfloat16
    micro_batch: int = 16384


@dataclasses.dataclass
class Links:
    """One direction, bytes a second and GPU: published rates, and the share of them that large exchanges reach."""
    nvlink: float = 450e9
    network: float = 50e9  # 400 Gb/s
    efficiency: float = 0.8
    gpus_per_machine: int = 8


# Parameters as `oryx inspect` counts them; times on an H200, docs/performance.md and the parts of its step.
MODELS = [Model("Oryx-TG 1.4b", 1_520_670_464, 50304 * 2048, 54000, 0.0119, 0.0066),
          Model("Oryx-TM 1.4b", 1_519_930_496, 50304 * 2048, 53200, 0.0119, 0.0066)]
BATCHES = [1 << 20, 1 << 23]
BACKWARD = 2 / 3  # of the forward and backward pass


def all_reduce_seconds(size, gpus, links):
    """A reduce-scatter and an all-gather within each machine, and rings over the machines in between, in which every
    GPU's own link carries its share."""
    local = min(gpus, links.gpus_per_machine)
    machines = gpus // local
    inside = 2 * (local - 1) / local * size / (links.nvlink * links.efficiency)
    between = 2 * (machines - 1) / machines * size / local / (links.network * links.efficiency)
    return inside + between


def predict(model, gpus, batch, links):
    tokens = batch // gpus
    passes = max(1, tokens // model.micro_batch)
    step_of_one = model.micro_batch / model.tokens_per_second
    per_token = (step_of_one - model.per_step - model.per_pass) / model.micro_batch
    compute = tokens * per_token + passes * model.per_pass + model.per_step
    last_backward = BACKWARD * min(tokens, model.micro_batch) * per_token
    exchange = all_reduce_seconds(4 * model.parameters, gpus, links)
    # What backward hides, and the embedding, whose gradient is complete only when backward ends.
    tail = all_reduce_seconds(4 * model.embedding, gpus, links)
    exposed = max(tail, exchange - last_backward)
    step = compute + exposed
    return dict(model=model.name, gpus=gpus, batch_tokens=batch, tokens_per_gpu=tokens, passes=passes, compute_s=compute,
                exchange_s=exchange, exposed_s=exposed, step_s=step, tokens_per_second=batch / step,
                efficiency=batch / step / gpus / model.tokens_per_second)


def loopback_bytes():
    return int(pathlib.Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def check(options):
    """The difference between a long and a short run leaves starting, validation and saving out."""
    sys.path.insert(0, str(ROOT / "tests" / "distributed"))
    sys.argv[1:] = [str(options.oryx)]
    import ranks as helper

    test = helper.RanksTest("assert_close")
    helper.RanksTest.setUpClass()
    shape = ["model.width=256", "model.mlp_width=512", "model.layers=4", "training.batch_tokens=512",
             "training.validation_every=0", "training.checkpoint_every=0", "data.validation=[]"]
    try:
        rows = []
        for sharded, dtype in ((False, "float32"), (True, "float32"), (True, "bfloat16")):
            sent, outcome = [], None
            for steps in (10, 50):
                begin = loopback_bytes()
                run = test.root / f"run-{steps}-{sharded}-{dtype}"
                test.train(options.ranks, run, *shape, f"training.steps={steps}", f"training.dtype={dtype}",
                           f"training.shard_optimizer={str(sharded).lower()}")
                sent.append(loopback_bytes() - begin)
            measured = (sent[1] - sent[0]) / 40
            weights = sum(tensor.nbytes for tensor in helper.load_file(run / "latest" / "model.safetensors").values())
            # All ranks together. In parts it would be as much, but Gloo's reduce-scatter is an all-reduce of which a
            # rank keeps its part, and the all-gather of the weights, in the computing type, comes on top.
            gathered = (0.5 if dtype == "bfloat16" else 1) if sharded else 0
            predicted = (2 + gathered) * (options.ranks - 1) * weights
            rows.append(dict(sharded=sharded, dtype=dtype, ranks=options.ranks, weight_bytes=weights, predicted=predicted,
                             measured=measured))
            print(f"{options.ranks} ranks, optimizer {'in parts' if sharded else 'whole':<8} {dtype:<8} {weights / 1e6:.2f} MB of weights: "
                  f"{measured / 1e6:.2f} MB a step sent, {predicted / 1e6:.2f} predicted ({measured / predicted:.3f})")
        return rows
    finally:
        helper.RanksTest.tearDownClass()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--oryx", type=pathlib.Path, default=ROOT / "build" / "oryx")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.check:
        check(options)
        return
    rows = [predict(model, gpus, batch, Links()) for model in MODELS for batch in BATCHES for gpus in (1, 8, 64, 512)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'model':<14} {'batch':>9} {'GPUs':>5} {'tokens each':>11} {'compute ms':>11} {'exchange ms':>12} {'exposed ms':>11} "
          f"{'tok/s':>12} {'of one GPU':>10}")
    for row in rows:
        print(f"{row['model']:<14} {row['batch_tokens']:>9} {row['gpus']:>5} {row['tokens_per_gpu']:>11} "
              f"{1e3 * row['compute_s']:>11.0f} {1e3 * row['exchange_s']:>12.0f} {1e3 * row['exposed_s']:>11.0f} "
              f"{row['tokens_per_second']:>12,.0f} {100 * row['efficiency']:>9.1f}%")


if __name__ == "__main__":
    main()
