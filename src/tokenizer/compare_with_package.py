#!/usr/bin/env python3
"""Ids equal to those of the `tokenizers` package, on text made to be hard; run by CTest.

    compare_with_package.py PROBE [--all-code-points]

Trains small tokenizers of each supported form and compares. When the environment names a tokenizer.json
(ORYX_TEST_TOKENIZER) it is compared too, and with ORYX_TEST_CORPUS (.txt or .txt.xz) on that whole text.
Exit code 77 (skipped) without the package.
"""
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import tempfile

try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
except ImportError:
    print("the tokenizers package is not installed: nothing to compare with")
    sys.exit(77)

SPLIT = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Not known to the splitter: goes through PCRE2.
    "general": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
}
HARD = ("'sStTrReEvVmMlLdD\u017f\u212a \t\r\n\v\f\x1c\x1f\x85\u00a0\u1680\u180e\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
        "09\u00bd\u2167\u0663\U0001d7ce\u4e00\u4e2d\uac00\u1100\u1161\u11a8e\u0301\u0327\u0334\u0345\u00e9\u1e0b\u0323"
        "\u0915\u093c\u0958\u0f73\u2126\uf900\u0130\u00df\u01c5\u02bc!?.,-_<|>\x00\x7f\U0001f600\U0001f1e9\u200d"
        "\ue000\U000f0000\U0010ffff\ufffd\ufffe")


def split_form(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(pre_tokenizer, normalizer=None, added=(), ignore_merges=False, text=()):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens(list(added))
    return tokenizer


def training_text(random_):
    scripts = [(0x61, 0x7A), (0x41, 0x5A), (0x3B1, 0x3C9), (0x430, 0x44F), (0x4E00, 0x4E40), (0x905, 0x939),
               (0xAC00, 0xAC40), (0x621, 0x64A), (0x1F600, 0x1F620), (0xE0, 0xFF)]
    words = []
    for _ in range(3000):
        low, high = random_.choices(scripts, weights=[20, 3] + [1] * (len(scripts) - 2))[0]
        words.append("".join(chr(random_.randint(low, high)) for _ in range(random_.randint(1, 7))))
    weights = [1 / (i + 1) for i in range(len(words))]
    joints = [" "] * 30 + ["\n", "\n\n", "\r\n", "  ", "    ", "'s ", "'LL ", ", ", ". ", " 1234 ", "5", "\t", "--", "!!\n"]
    return ["".join(w + random_.choice(joints) for w in random_.choices(words, weights, k=300)) for _ in range(60)]


def hard_documents(random_):
    documents = ["", " ", "\n", "a", "'", "'s", " '", "\r\n", "a" * 100, " " * 100_000, "\n" * 5000, "\r\n" * 5000,
                 " \n" * 5000, "!" * 5000, "1" * 5000, "'ll" * 2000, "e\u0301" * 3000, "\u0327\u0301" * 3000,
                 "".join(random_.choices("abcdefgh", k=1 << 20)), "x" * 100_000, "\U0001f600" * 20_000,
                 "a" + " " * 5000 + "b" + " " * 5000 + "\nc", "<|endoftext|>", "<|endoftext|><|endoftext|>", "<|endoftext"]
    for _ in range(4000):
        documents.append("".join(random_.choices(HARD, k=random_.randint(1, 40))))
    for _ in range(1000):
        parts = ["<|endoftext|>", "<left>", "<right>", "<both>", "<normal\u00e9>", "<normale\u0301>", "\u212b", "<lef"]
        documents.append("".join(random_.choice(parts) if random_.random() < 0.4 else random_.choice(HARD)
                                 for _ in range(random_.randint(1, 15))))
    return documents


def every_character(all_code_points):
    """Each character beside a letter, a space, a digit, a line break and itself."""
    # In ideographs, syllables and what is not assigned neighbours are alike.
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (
        all_code_points or c < 0x3400 or 0xA000 <= c < 0xAC00 or 0xF900 <= c < 0x17000 or 0x1B000 <= c < 0x20000
        or c % 32 < 2)]
    text = [f"x{chr(c)} {chr(c)}{chr(c)}1{chr(c)}\n" for c in codes]
    return ["".join(text[i : i + 1000]) for i in range(0, len(text), 1000)]


def frame(documents):
    return b"".join(struct.pack("<I", len(d)) + d for d in documents)


def unframe(output, item):
    at, out = 0, []
    while at < len(output):
        (count,) = struct.unpack_from("<I", output, at)
        out.append(output[at + 4 : at + 4 + count * item])
        at += 4 + count * item
    return out


def probe(arguments, documents):
    return subprocess.run([PROBE, *arguments], input=frame([d.encode() for d in documents]),
                          stdout=subprocess.PIPE, check=True).stdout


def compare(name, tokenizer, path, documents):
    """Number of documents whose ids differ."""
    wrong, everything = 0, documents
    for mode in ("allow", "plain"):
        documents = everything if mode == "allow" else [d for d in everything if "<" in d]
        tokenizer.encode_special_tokens = mode == "plain"
        got = [list(struct.unpack(f"<{len(ids) // 4}i", ids)) for ids in unframe(probe(["encode", path, mode], documents), 4)]
        want = [e.ids for e in tokenizer.encode_batch_fast(documents, add_special_tokens=False)]
        assert len(got) == len(want)
        different = [i for i in range(len(want)) if got[i] != want[i]]
        wrong += len(different)
        for i in different[:3]:
            first = next((k for k in range(min(len(got[i]), len(want[i]))) if got[i][k] != want[i][k]), -1)
            print(f"{name} ({mode}): document {i} {documents[i][:60]!r} differs at token {first}: "
                  f"{got[i][max(first - 2, 0):first + 6]}, expected {want[i][max(first - 2, 0):first + 6]}")
    print(f"{name}: {len(everything)} documents, {wrong} differ", flush=True)
    return wrong


def compare_nfc(random_):
    marked = [c for c in range(0xC0, 0x20000) if not 0xD800 <= c < 0xE000 and (
        normalizers.NFD().normalize_str(chr(c)) != chr(c) or 0x300 <= c < 0x370 or 0x1100 <= c < 0x1200)]
    documents = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000 and c]
    documents += ["".join(chr(random_.choice(marked)) if random_.random() < 0.7 else random_.choice(HARD)
                          for _ in range(random_.randint(2, 10))) for _ in range(50_000)]
    want = [normalizers.NFC().normalize_str(d) for d in documents]
    got = [d.decode() for d in unframe(probe(["nfc"], documents), 1)]
    different = [i for i in range(len(want)) if got[i] != want[i]]
    for i in different[:5]:
        print(f"NFC of {ascii(documents[i])}: {ascii(got[i])}, expected {ascii(want[i])}")
    print(f"NFC: {len(documents)} texts, {len(different)} differ", flush=True)
    return len(different)


def forms(text):
    flags = [AddedToken("<left>", lstrip=True, normalized=False), AddedToken("<right>", rstrip=True, normalized=False),
             AddedToken("<both>", lstrip=True, rstrip=True, normalized=True, special=True)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    yield "gpt2", train(byte_level, text=text)
    yield "llama3", train(split_form(SPLIT["llama3"]), ignore_merges=True, text=text)
    yield "qwen2", train(split_form(SPLIT["qwen2"]), normalizers.NFC(), text=text,
                         added=[AddedToken("<normal\u00e9>", normalized=True), AddedToken("\u212b", normalized=True)])
    yield "added tokens", train(byte_level, text=text, added=flags)
    yield "prefix space", train(pre_tokenizers.ByteLevel(add_prefix_space=True), text=text, added=flags)
    yield "prefix space after a split", train(pre_tokenizers.Sequence([
        pre_tokenizers.Split("e", "isolated"), pre_tokenizers.Split(Regex(SPLIT["general"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]), text=text)
    yield "general pattern", train(split_form(SPLIT["general"]), text=text)


def older_unicode(documents):
    """Without what PCRE2 may not know: letters and numbers that came after Unicode 14."""
    import unicodedata

    def known(c):
        return unicodedata.category(c) != "Cn" or ord(c) >= 0xF0000
    return ["".join(c for c in d if known(c)) for d in documents]


def main():
    random_ = random.Random(1)
    documents = hard_documents(random_)
    characters = every_character("--all-code-points" in sys.argv)
    wrong = compare_nfc(random_)
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in forms(training_text(random_)):
            path = os.path.join(folder, "tokenizer.json")
            tokenizer.save(path)
            if name in ("gpt2", "llama3", "qwen2"):
                wrong += compare(name, tokenizer, path, documents + characters)
            elif name == "general pattern":
                wrong += compare(name, tokenizer, path, older_unicode(documents + characters))
            else:
                wrong += compare(name, tokenizer, path, documents)
            if name == "gpt2":  # the same file with merges in their older form, as strings
                with open(path) as file:
                    content = json.load(file)
                content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
                with open(path, "w") as file:
                    json.dump(content, file)
                wrong += compare("merges as strings", tokenizer, path, documents[:2000])
    real = os.environ.get("ORYX_TEST_TOKENIZER")
    if real:
        wrong += compare(real, Tokenizer.from_file(real), real, documents + characters)
        corpus = os.environ.get("ORYX_TEST_CORPUS")
        if corpus:
            with (lzma.open if corpus.endswith(".xz") else open)(corpus, "rt", encoding="utf-8", newline="") as file:
                text = file.read()
            wrong += compare(corpus, Tokenizer.from_file(real), real, [text, *text.split("<|endoftext|>\n")])
    sys.exit(1 if wrong else 0)


PROBE = sys.argv[1]
main()
