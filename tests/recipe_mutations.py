"""Faulty recipes by the thousand: what people and accidents do to a YAML file.

Each mutation takes the text of a valid recipe and a generator, and gives the bytes of a broken one
and what its message must hold, or None where the result may even be valid.
"""

import random
import re
import string
from collections.abc import Callable

Mutant = tuple[bytes, str | None]

WRONG_VALUES = (
    "[1, 2]", "{a: 1}", "{type: lora}", "[[[]]]", "''", "null", "yes", "nan", ".nan", "-.inf",
    "1e999", "9" * 300, "9" * 5000, "-1", "1e-4", "'1e-4'", "fast", "true", "0x1F", "|\n    text",
    '"\\n"', '"\\0"', '"\\ud800"', '"\\U00110000"', "!!python/name:os.system", "!x 1", "*a", "&a 1",
    "<<", "2024-01-01", "🙂", '"\\x1b[31m"', "- 1", "a: b", "@", "`", "%", "\t", "x" * 3000,
)  # fmt: skip
JUNK = [bytes([i]) for i in (*range(32), 0x7F, 0x85, 0xA0, 0xC0, 0xFF)] + [
    s.encode() for s in "\ufeff\u2028é🙂{}[]:,-?&*!|>%@`'\"#"
]


def keys(text: str) -> list[tuple[int, str]]:
    """Lines (from 0) with a key, and the key."""
    found = [(i, re.match(r"\s*([a-z_0-9]+):", line)) for i, line in enumerate(text.split("\n"))]
    return [(i, match[1]) for i, match in found if match]


def _with_line(text: str, number: int, new: str | None) -> bytes:
    lines = text.split("\n")
    lines[number : number + 1] = [] if new is None else [new]
    return "\n".join(lines).encode()


def typo(text: str, rng: random.Random) -> Mutant:
    number, key = rng.choice([pair for pair in keys(text) if len(pair[1]) > 4])
    i = rng.randrange(len(key) - 1)
    letter = rng.choice(string.ascii_lowercase)
    wrong = rng.choice(
        [key[:i] + key[i + 1 :], key[:i] + letter + key[i:], key[:i] + letter + key[i + 1 :]]
    )
    if wrong in {name for _, name in keys(text)}:
        return typo(text, rng)
    line = text.split("\n")[number].replace(key, wrong, 1)
    return _with_line(text, number, line), f":{number + 1}: "


def duplicate(text: str, rng: random.Random) -> Mutant:
    number, key = rng.choice(
        [pair for pair in keys(text) if not text.split("\n")[pair[0]].endswith(":")]
    )
    line = text.split("\n")[number]
    problem = f":{number + 2}: "
    return _with_line(text, number, f"{line}\n{line}"), f"{problem}|{key}: duplicate key"


def wrong_value(text: str, rng: random.Random) -> Mutant:
    number, _ = rng.choice(keys(text))
    line = text.split("\n")[number]
    value = rng.choice(WRONG_VALUES)
    return _with_line(text, number, f"{line.partition(':')[0]}: {value}"), None


def wrong_number(text: str, rng: random.Random) -> Mutant:
    names = {"learning_rate", "num_train_epochs", "r", "seed", "holdout_fraction"}
    number, key = rng.choice([pair for pair in keys(text) if pair[1] in names])
    line = text.split("\n")[number]
    value = rng.choice(["fast", "'1e-4'", "yes", "[1]", "{a: 1}", "null", "-1", ".nan", "true"])
    return _with_line(
        text, number, f"{line.partition(':')[0]}: {value}"
    ), f":{number + 1}: |{key}: "


def deleted_line(text: str, rng: random.Random) -> Mutant:
    return _with_line(text, rng.randrange(text.count("\n")), None), None


def deleted_section(text: str, rng: random.Random) -> Mutant:
    section = rng.choice(["base", "task", "method", "training"])
    return re.sub(rf"(?m)^{section}:\n( .*\n)+", "", text).encode(), f"{section}: missing key"


def flattened_section(text: str, rng: random.Random) -> Mutant:
    section = rng.choice(["base", "task", "method", "training"])
    value = rng.choice(["lora", "3", "null", "[]", "''", "[a, {b: c}]"])
    new = re.sub(rf"(?m)^{section}:\n( .*\n)+", f"{section}: {value}\n", text)
    return new.encode(), f"{section}: must be a mapping"


def unknown_type(text: str, rng: random.Random) -> Mutant:
    number, _ = rng.choice([pair for pair in keys(text) if pair[1] == "type"])
    value = rng.choice(["loar", "3", "[lora]", "{}", "true", "'a b'", '"\\n"', "lora\u00e9"])
    return _with_line(text, number, f"  type: {value}"), f":{number + 1}: |.type: "


def alias_bomb(text: str, rng: random.Random) -> Mutant:
    levels = [f"a0: &a0 [{', '.join(['x'] * 9)}]"]
    for i in range(1, rng.randint(2, 40)):
        levels.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    bomb = "\n".join(levels)
    front = rng.random() < 0.5
    return (f"{bomb}\n{text}" if front else f"{text}{bomb}\n").encode(), "anchors and aliases"


def deep(text: str, rng: random.Random) -> Mutant:
    levels = rng.choice([21, 100, 5_000, 40_000])
    opened = rng.choice(["[", "{a: ", "[{a: "])
    return f"{text}deep: {opened * levels}".encode(), "nested deeper than 20 levels"


def huge(text: str, rng: random.Random) -> Mutant:
    extra = rng.choice(
        [
            "".join(f"k{i}: 1\n" for i in range(2000)),
            "".join(f"k{i}: 1\n" for i in range(100_000)),
            "wide: [" + "x, " * 60_000 + "]\n",
            "learning_rate" * 15_000 + ": 1\n",
            "# note\n" * 30_000 + "x: 1\n",
            "long: '" + "\n" * 200_000 + "'\n",
        ]
    )
    return f"{text}{extra}".encode(), ""


def junk(text: str, rng: random.Random) -> Mutant:
    content = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content))
        content[place : place + rng.randint(0, 3)] = rng.choice(JUNK)
    return bytes(content), None


def cut(text: str, rng: random.Random) -> Mutant:
    content = text.encode()
    return content[: rng.randrange(len(content))], None


def indented(text: str, rng: random.Random) -> Mutant:
    number = rng.randrange(text.count("\n"))
    line = text.split("\n")[number]
    return _with_line(text, number, rng.choice([" ", "   ", "\t", "- ", "? "]) + line), None


def noise(text: str, rng: random.Random) -> Mutant:
    return rng.randbytes(rng.randint(0, 400)), None


MUTATIONS: tuple[Callable[[str, random.Random], Mutant], ...] = (
    typo,
    duplicate,
    wrong_value,
    wrong_number,
    deleted_line,
    deleted_section,
    flattened_section,
    unknown_type,
    alias_bomb,
    deep,
    huge,
    junk,
    cut,
    indented,
    noise,
)


def mutants(texts: list[str], count: int, seed: int) -> list[tuple[str, Mutant]]:
    """`count` mutants with the name and number of each; the same for the same seed."""
    made = []
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        mutate = MUTATIONS[i % len(MUTATIONS)]
        made.append((f"{mutate.__name__} {seed}/{i}", mutate(rng.choice(texts), rng)))
    return made
