"""oryx prepare: text files in, token shards out, nothing left behind on failure."""

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from safetensors import safe_open

ORYX = Path(sys.argv.pop(1)).resolve()
END = 256


def byte_symbols():
    """The printable character of each byte in a byte-level tokenizer.json."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def write_tokenizer(path):
    """Ids 0 to 255 are the bytes, then the end of text, then a merge of a and b."""
    symbols = byte_symbols()
    vocabulary = {symbol: b for b, symbol in enumerate(symbols)} | {"ab": 257}
    path.write_text(json.dumps({
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]}}))


class Prepare(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.output = self.root / "shards"

    def tearDown(self):
        self.folder.cleanup()

    def run_prepare(self, *files, tokenizer="bytes", output="shards", stdin=b"", options=()):
        return subprocess.run([ORYX, "prepare", "--tokenizer", tokenizer, "--output", output, *options, *files],
                              input=stdin, capture_output=True, cwd=self.root)

    def prepare(self, *files, **arguments):
        done = self.run_prepare(*files, **arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.decode()

    def tokens(self):
        tokens, documents = [], 0
        for path in sorted(self.output.glob("*.safetensors")):
            with safe_open(path, "np") as shard:
                tokens += shard.get_tensor("tokens").tolist()
                documents += int(shard.metadata()["documents"])
                self.assertEqual(shard.metadata()["vocabulary"], "257")
                self.assertEqual(shard.metadata()["tokenizer"], "bytes")
        return tokens, documents

    def write(self, name, content):
        (self.root / name).write_bytes(content)
        return name

    def test_documents(self):
        self.write("a.txt", b"one\n<|endoftext|>\n<|endoftext|>\ntwo <|endoftext|>\r\n\xff")
        (self.root / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": ""}\n'))
        (self.root / "c.txt.xz").write_bytes(lzma.compress(b"four"))
        out = self.prepare("a.txt", "b.jsonl.gz", "-", "c.txt.xz", stdin=b"input", options=["--json"])
        expected = [b"one\n", b"two <|endoftext|>\r\n\xff", b"three", b"input", b"four"]
        tokens, documents = self.tokens()
        self.assertEqual(tokens, [t for text in expected for t in [*text, END]])
        self.assertEqual(documents, 5)
        result = json.loads(out)
        self.assertEqual((result["documents"], result["tokens"], result["bytes"]),
                         (5, len(tokens), sum(map(len, expected))))
        self.assertFalse((self.output / "tokenizer.json").exists())

    def test_directory_and_shards(self):
        (self.root / "texts").mkdir()
        for name in ("2.txt", "1.txt", "3.txt"):
            self.write(f"texts/{name}", name.encode() * 100)
        self.output.mkdir()  # an empty one is fine
        self.prepare("texts", options=["--shard-tokens", "200"])
        tokens, documents = self.tokens()
        self.assertEqual(tokens, [t for name in (b"1.txt", b"2.txt", b"3.txt") for t in [*name * 100, END]])
        self.assertEqual(documents, 3)
        self.assertEqual(len(list(self.output.iterdir())), 8)

    def test_threads_and_long_documents_change_nothing(self):
        draw = random.Random(1)
        words = ["ab", "aab", "abba", "b", "it's", "\n", "  ", "ab,", "<|endoftext|>", "\u4e2d"]
        long = " ".join(draw.choices(words, k=2_000_000))  # of more than one piece and batch
        self.write("a.txt", long.encode() + b"\n<|endoftext|>\n" + "\n<|endoftext|>\n".join(words[:8]).encode())
        write_tokenizer(self.root / "t.json")
        shards = []
        for threads in ("1", "3"):
            self.prepare("a.txt", tokenizer="t.json", options=["--threads", threads])
            self.assertEqual((self.output / "tokenizer.json").read_bytes(), (self.root / "t.json").read_bytes())
            shards.append((self.output / "tokens-00000.safetensors").read_bytes())
            os.rename(self.output, self.root / f"with-{threads}")
        self.assertEqual(shards[0], shards[1])
        with safe_open(self.root / "with-1/tokens-00000.safetensors", "np") as shard:
            tokens = shard.get_tensor("tokens").tolist()
        table = [bytes([i]) for i in range(256)] + [b"<|endoftext|>\n", b"ab"]
        text = b"".join(map(table.__getitem__, tokens))
        self.assertEqual(text, (self.root / "a.txt").read_bytes() + b"<|endoftext|>\n")
        # Every a that stands before a b has merged: no cut came between them.
        self.assertNotIn((ord("a"), ord("b")), set(zip(tokens, tokens[1:])))

    def fails(self, message, *files, code=1, **arguments):
        before = sorted(self.root.rglob("*"))
        done = self.run_prepare(*files, **arguments)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertIn(message, done.stderr.decode())
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertEqual(done.stdout, b"")
        self.assertEqual(sorted(self.root.rglob("*")), before)

    def test_makes_the_directories_above(self):
        self.prepare(self.write("good.txt", b"text\n"), output="new/above/shards")
        self.assertTrue((self.root / "new/above/shards/tokens-00000.safetensors").is_file())

    def test_errors_leave_nothing(self):
        good = self.write("good.txt", b"text\n" * 1000)
        self.fails("no text in empty.txt, -", self.write("empty.txt", b"<|endoftext|>\n"), "-")
        self.fails("no such file or directory: missing.txt", good, "missing.txt")
        self.fails("notes.md is no text file", self.write("notes.md", b"text"))
        (self.root / "none").mkdir()
        self.fails("no text files in none", "none")
        self.fails("cut.txt.xz: the xz data is cut off", good, self.write("cut.txt.xz", lzma.compress(b"x")[:-9]))
        self.fails("bad.jsonl line 2: malformed JSON", self.write("bad.jsonl", b'{"text": "a"}\n{"text"\n'))
        self.fails("cannot open the tokenizer no.json", good, tokenizer="no.json")
        self.fails("broken.json: malformed", good, tokenizer=self.write("broken.json", b"{"))
        self.fails("shard-tokens is 0", good, options=["--shard-tokens", "0"], code=2)
        self.fails("threads is 0", good, options=["--threads", "0"], code=2)
        self.write("file", b"")
        self.fails("file is not a directory", good, output="file/shards")
        self.fails("exists and is no directory", good, output="file")
        self.output.mkdir()
        self.write("shards/precious", b"")
        self.fails("is not empty", good)

    def test_interrupt_leaves_nothing(self):
        process = subprocess.Popen([ORYX, "prepare", "--tokenizer", "bytes", "--output", self.output, "-"],
                                   stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        document = b"text\n" * (1 << 20) + b"<|endoftext|>\n"
        try:
            for _ in range(3):
                process.stdin.write(document)
            while not list(self.root.iterdir()):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            for _ in range(100):
                process.stdin.write(document)
        except BrokenPipeError:
            pass
        self.assertEqual(process.wait(60), 130)
        process.stderr.close()
        process.stdin.close()
        self.assertEqual(list(self.root.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
