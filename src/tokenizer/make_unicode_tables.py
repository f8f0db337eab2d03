#!/usr/bin/env python3
"""Writes unicode_tables.inc: the Unicode data that makes token ids equal those of the `tokenizers` package.

Letters and numbers are asked of the package's own regex engine, and what its NFC knows is asked of its
normalizer, so the tables follow the package whatever the Unicode version of the distribution's libraries.
Combining classes and decompositions never change once a character is assigned, so their values may come
from Python's unicodedata, which must be at least as new as the package's normalizer.

    python make_unicode_tables.py > unicode_tables.inc
"""
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
NFC, NFD = normalizers.NFC(), normalizers.NFD()


def matching(pattern):
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    kept = set()
    for i in range(0, len(CHARACTERS), 4096):
        text = "".join(c + "\0" for c in CHARACTERS[i : i + 4096])
        kept.update(*(piece for piece, _ in remove.pre_tokenize_str(text)))
    return [ord(c) for c in CHARACTERS if c not in kept]


def ranges(pairs):
    """(code, value) in order of code -> (first, last, value)."""
    out = []
    for code, value in pairs:
        if out and out[-1][1] == code - 1 and out[-1][2] == value:
            out[-1][1] = code
        else:
            out.append([code, code, value])
    return out


def emit(kind, name, rows):
    print(f"inline constexpr {kind} {name}[] = {{")
    line = "   "
    for row in rows:
        item = " {" + ",".join(f"{v:#x}" for v in row) + "},"
        if len(line + item) > 110:
            print(line)
            line = "   "
        line += item
    print(line)
    print("};\n")


def combining_class(character):
    """The class, or 0 where the package's normalizer does not know it: then it never moves past a mark."""
    value = unicodedata.combining(character)
    lower, higher = "\u0334", "\u0345"  # classes 1 and 240
    moves = (NFD.normalize_str("a" + character + lower) != "a" + character + lower
             or NFD.normalize_str("a" + higher + character) != "a" + higher + character)
    return value if moves else 0


def decompositions(composed):
    """(code, first[, second]) of one step, for the characters that NFC puts together again, or the others."""
    for character in CHARACTERS:
        fields = unicodedata.decomposition(character).split()
        if not fields or fields[0].startswith("<") or NFD.normalize_str(character) == character:
            continue
        if composed == (NFC.normalize_str(character) == character):
            yield ord(character), *(int(field, 16) for field in fields)


print(f"// Made by make_unicode_tables.py with tokenizers {tokenizers.__version__}. Included by unicode.cc only.")
print("// clang-format off\n")
for name, pattern in (("kLetters", r"\p{L}"), ("kNumbers", r"\p{N}")):
    emit("Range", name, [r[:2] for r in ranges((c, 0) for c in matching(pattern))])
marks = ((ord(c), combining_class(c)) for c in CHARACTERS if unicodedata.combining(c))
emit("CombiningRange", "kCombiningClasses", ranges((c, v) for c, v in marks if v))
emit("Decomposition", "kCompositions", decompositions(composed=True))
emit("Decomposition", "kOnlyDecompositions", decompositions(composed=False))
print("// clang-format on")
