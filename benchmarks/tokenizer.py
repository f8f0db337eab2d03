#!/usr/bin/env python3
"""Encoding speed of this project's tokenizer beside the `tokenizers` package, on the same text, in one run.

    .venv/bin/python benchmarks/tokenizer.py TOKENIZER_JSON TEXT… [--probe build/tokenizer_probe]

TEXT: .txt or .txt.xz files whose documents end with a line `<|endoftext|>`. Both sides encode the same list of
documents that is already in memory, on 1 and on 2 threads, alternately; the best of the runs counts.
"""
import argparse
import lzma
import os
import platform
import struct
import subprocess
import time

PARALLEL, THREADS = "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"


def read_documents(paths):
    documents = []
    for path in paths:
        with (lzma.open if path.endswith(".xz") else open)(path, "rb") as file:
            documents += [d for d in file.read().split(b"<|endoftext|>\n") if d]
    return documents


def package_seconds(tokenizer_file, documents):
    """One run in a child: the package's thread pool is fixed when first used."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    texts = [d.decode() for d in documents]
    begin = time.perf_counter()
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.perf_counter() - begin
    return sum(len(e.ids) for e in encodings), seconds


def package_run(arguments, threads):
    environment = os.environ | {PARALLEL: "true" if threads > 1 else "false", THREADS: str(threads)}
    command = [os.sys.executable, __file__, arguments.tokenizer, *arguments.text, "--package-run"]
    tokens, seconds = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout.split()
    return int(tokens), float(seconds)


def own_run(arguments, threads, framed):
    command = [arguments.probe, "time", arguments.tokenizer, str(threads), "1"]
    tokens, seconds = subprocess.run(command, input=framed, stdout=subprocess.PIPE, check=True).stdout.split()
    return int(tokens), float(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--probe", default=os.path.join(os.path.dirname(__file__), "../build/tokenizer_probe"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--package-run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    documents = read_documents(arguments.text)
    if arguments.package_run:
        print(*package_seconds(arguments.tokenizer, documents))
        return
    framed = b"".join(struct.pack("<I", len(d)) + d for d in documents)
    size = sum(map(len, documents))
    import tokenizers

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; tokenizers {tokenizers.__version__}; "
          f"{len(documents)} documents, {size / 1e6:.1f} MB, best of {arguments.runs} runs")
    for threads in (1, 2):
        own, package = [], []
        for _ in range(arguments.runs):
            package.append(package_run(arguments, threads))
            own.append(own_run(arguments, threads, framed))
        assert own[0][0] == package[0][0], f"{own[0][0]} tokens here, {package[0][0]} from the package"
        ours, theirs = min(s for _, s in own), min(s for _, s in package)
        print(f"{threads} thread{'s' * (threads > 1)}: oryx {size / ours / 1e6:7.1f} MB/s, "
              f"tokenizers {size / theirs / 1e6:6.1f} MB/s, {theirs / ours:.1f}x")


if __name__ == "__main__":
    main()
