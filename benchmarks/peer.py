#!/usr/bin/env python3
"""Times eager PyTorch on the models of recipes, the peer that `oryx benchmark` is compared with.

    peer.py train   RECIPE… [--batch B] [--length T] [--device cuda] [--loss plain,chunked]
    peer.py prefill RECIPE… [--length N] [--mode attention,linear] [--all-logits]
    peer.py decode  RECIPE… [--context N] [--tokens K] [--mode attention,linear]

Each measurement is a process of its own. Settings: `plain` is PyTorch as installed; `tuned` mends what a user can
mend from outside: MKL's fast path on processors that are not Intel's (a preloaded library answers its question)
and an allocator that keeps memory, in huge pages, instead of handing it back to the kernel at every step. On a GPU
`tuned` is torch.compile, or eager PyTorch where that fails on the machine (the result then has a note), and `graph`
replays the whole step from a CUDA graph.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib

FAST_MKL = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
ALLOCATOR = ("glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=67108864:"
             "glibc.malloc.hugetlb=1")
CHUNK_ROWS = 4096  # of the chunked loss
MODE_NAMES = {"attention": True, "linear": False}


def read_model(recipe):
    """The [model] section of a recipe file, with what its base says underneath."""
    path = pathlib.Path(recipe)
    values = tomllib.loads(path.read_text())
    model = read_model(path.parent / values["base"]) if "base" in values else {}
    return {**model, **values.get("model", {})}


def peer_sizes(recipe):
    """Arguments of PeerConfig. The peer knows the default options of its three models only."""
    known = {"mixers", "layers", "width", "heads", "head_dim", "mlp_width", "vocabulary"}
    model = read_model(recipe)
    linear = {("attention", "ssd"): "ssd", ("attention", "gated_delta"): "gated_delta", ("attention",): None}
    if set(model) - known or tuple(model["mixers"]) not in linear:
        sys.exit(f"peer: {recipe}: the peer has Oryx-TM, Oryx-TG and Transformer++ with their default options only")
    if model["heads"] * model.get("head_dim", model["width"] // model["heads"]) != model["width"]:
        sys.exit(f"peer: {recipe}: expected heads times head_dim to be the width")
    sizes = {key: model[key] for key in ("layers", "width", "heads", "mlp_width", "vocabulary")}
    return dict(sizes, linear=linear[tuple(model["mixers"])])


def environment(case):
    """The environment of a measured process; `tuned` on a CPU compiles the preloaded library once a user."""
    values = dict(os.environ)
    if case["setting"] == "plain" or case.get("device") == "cuda":
        return values
    library = pathlib.Path(tempfile.gettempdir()) / f"oryx-peer-{os.getuid()}" / "fast_mkl.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        built = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", built], input=FAST_MKL.encode(), check=True)
        built.rename(library)
    return dict(values, LD_PRELOAD=str(library), GLIBC_TUNABLES=ALLOCATOR)


def run_case(case):
    """Measures one case in a process of its own -> dict with tokens_per_second and peak_memory_bytes."""
    done = subprocess.run([sys.executable, __file__, "case", json.dumps(case)], env=environment(case),
                          stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"peer: the measurement of {case} failed")
    return {**case, **json.loads(done.stdout)}


def peak_memory(case):
    """Bytes; of tensors on a GPU, else of this process alone (getrusage would include the parent before exec)."""
    if case.get("device") == "cuda":
        import torch
        return torch.cuda.max_memory_allocated()
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def repeat(work, seconds, warmup):
    """Seconds of each call of `work` for about so long, at least three of them."""
    for _ in range(warmup):
        work()
    times = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def measure(case):
    import torch
    from peer_model import PeerConfig, PeerModel

    torch.manual_seed(1)
    torch.set_default_device(case.get("device", "cpu"))
    model = PeerModel(PeerConfig(**peer_sizes(case["recipe"])))
    measured = {"train": measure_train, "prefill": measure_prefill, "decode": measure_decode}[case["what"]]
    tokens, times, notes = measured(torch, model, case)
    ordered = sorted(times)
    return dict(tokens_per_second=tokens / ordered[0], median_tokens_per_second=tokens / ordered[len(ordered) // 2],
                runs=len(times), peak_memory_bytes=peak_memory(case), threads=torch.get_num_threads(),
                torch=torch.__version__, **notes)


def measure_train(torch, model, case):
    """Forward, backward, clip and AdamW on random tokens; each chunk of 128 is attention with probability 1/4."""
    batch, length, device, setting = case["batch"], case["length"], case.get("device", "cpu"), case["setting"]
    is_graph = device == "cuda" and setting == "graph"
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([dict(params=[p for p in parameters if p.dim() > 1], weight_decay=0.1),
                                   dict(params=[p for p in parameters if p.dim() == 1], weight_decay=0.0)],
                                  lr=1e-3, betas=(0.9, 0.95), fused=True, capturable=is_graph)
    chunk_rows = CHUNK_ROWS if case.get("loss") == "chunked" else None
    tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
    modes = torch.zeros(batch, length, dtype=torch.bool) if model.config.linear else True

    def eager_loss(tokens, modes):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=case["dtype"] == "bfloat16"):
            return model.loss(model.hidden(tokens[:, :-1], modes), tokens[:, 1:], chunk_rows)

    loss_of = eager_loss

    def draw():
        tokens.copy_(torch.randint(model.config.vocabulary, tokens.shape))
        if model.config.linear:
            modes.copy_((torch.rand(batch, -(-length // 128)) < 0.25).repeat_interleave(128, 1)[:, :length])

    def update():
        optimizer.zero_grad(set_to_none=True)
        loss_of(tokens, modes).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    if device == "cpu":
        return batch * length, repeat(lambda: (draw(), update()), case["seconds"], warmup=2), {}

    torch.set_float32_matmul_precision("high")
    notes = {}
    with fast_attention():
        draw()
        if setting == "tuned":
            loss_of = torch.compile(eager_loss)
            try:
                update()
            except Exception as error:  # of a compiler that lacks something on this machine
                notes["note"] = f"eager: torch.compile failed ({one_line(error)})"
                torch._dynamo.reset()
                loss_of = eager_loss
        run = captured(torch, update) if is_graph else update

        def step():
            draw()
            run()
            torch.cuda.synchronize()

        times = repeat(step, case["seconds"], warmup=2)
    return batch * length, times, notes


def fast_attention():
    """A context in which attention on a GPU is cuDNN's where that serves, else FlashAttention, else what is left."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH], set_priority=True)


def captured(torch, update):
    """`update` as a CUDA graph, after it has run three times as it is -> a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph.replay


def one_line(error):
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


def measure_prefill(torch, model, case):
    from peer_model import State

    length, dtype = case["length"], getattr(torch, case["dtype"])
    model.to_inference(dtype)
    tokens = torch.randint(model.config.vocabulary, (1, length))

    @torch.inference_mode()
    def prefill():
        hidden = model.hidden(tokens, MODE_NAMES[case["mode"]], State(model.config, 1, length, dtype))
        model.logits(hidden if case["all_logits"] else hidden[:, -1:])

    return length, repeat(prefill, case["seconds"], warmup=1), {}


def measure_decode(torch, model, case):
    """Greedy tokens one at a time after a context of random tokens."""
    from peer_model import State

    dtype, count, mode = getattr(torch, case["dtype"]), case["tokens"], MODE_NAMES[case["mode"]]
    model.to_inference(dtype)
    context = torch.randint(model.config.vocabulary, (1, case["context"]))
    state = State(model.config, 1, case["context"] + count, dtype)
    with torch.inference_mode():
        token = model.logits(model.hidden(context, mode, state)[:, -1:]).argmax(-1)

    @torch.inference_mode()
    def decode():
        nonlocal token
        state.position = case["context"]  # the cache past it is written again
        for _ in range(count):
            token = model.logits(model.hidden(token, mode, state)).argmax(-1)

    return count, repeat(decode, case["seconds"], warmup=1), {}


def print_table(results):
    print(f"{'what':<8} {'recipe':<18} {'mode/loss':<10} {'dtype':<9} {'setting':<8} {'tok/s':>9} {'median':>9} "
          f"{'peak GiB':>9}")
    for r in results:
        line = (f"{r['what']:<8} {pathlib.Path(r['recipe']).stem:<18} {r.get('mode', r.get('loss', '')):<10} "
                f"{r['dtype']:<9} {r['setting']:<8} {r['tokens_per_second']:>9,.1f} "
                f"{r['median_tokens_per_second']:>9,.1f} {r['peak_memory_bytes'] / 2**30:>9.2f} {r.get('note', '')}")
        print(line.rstrip())


def main():
    if sys.argv[1:2] == ["case"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    words = lambda text: text.split(",")
    for name in ("train", "prefill", "decode"):
        command = commands.add_parser(name)
        command.add_argument("recipes", nargs="+", metavar="RECIPE")
        command.add_argument("--dtype", type=words, default=["float32"], help="float32,bfloat16")
        command.add_argument("--setting", type=words, default=["plain", "tuned"], help="plain,tuned,graph")
        command.add_argument("--seconds", type=float, default=3.0, help="of each measurement, warm-up excluded")
        command.add_argument("--json", action="store_true", help="an array of objects instead of the table")
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: train only")
        if name == "train":
            command.add_argument("--batch", type=int, default=8)
            command.add_argument("--length", type=int, default=512)
            command.add_argument("--loss", type=words, default=["plain"],
                                 help="plain,chunked: with all logits at once or some rows of them at a time")
            continue
        command.add_argument("--mode", type=words, default=["attention", "linear"], help="attention,linear")
        if name == "prefill":
            command.add_argument("--length", type=int, default=2048)
            command.add_argument("--all-logits", action="store_true", help="of every token, not of the last one")
        else:
            command.add_argument("--context", type=int, default=2048)
            command.add_argument("--tokens", type=int, default=32)
    options = vars(parser.parse_args())
    for flag, known in (("setting", {"plain", "tuned", "graph"}), ("loss", {"plain", "chunked"})):
        if unknown := set(options.get(flag, [])) - known:
            parser.error(f"--{flag}: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    if options["device"] == "cuda" and options["what"] != "train":
        parser.error(f"--device: expected cpu for {options['what']}, got cuda")
    if options["device"] == "cpu" and "graph" in options["setting"]:
        parser.error("--setting: expected plain or tuned on a CPU, got graph")
    recipes, dtypes, settings, as_json = (options.pop(key) for key in ("recipes", "dtype", "setting", "json"))
    modes, losses = options.pop("mode", [None]), options.pop("loss", [None])
    results = []
    for recipe, mode, loss, dtype, setting in itertools.product(recipes, modes, losses, dtypes, settings):
        if mode == "linear" and peer_sizes(recipe)["linear"] is None:
            continue
        case = dict(options, recipe=recipe, dtype=dtype, setting=setting, mode=mode, loss=loss)
        results.append(run_case({key: value for key, value in case.items() if value is not None}))
    print(json.dumps(results, indent=1)) if as_json else print_table(results)


if __name__ == "__main__":
    main()
