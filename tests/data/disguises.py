"""Rows for the tests that keep splits apart, and copies of a text that only look different."""


def sentence(row):
    return row["sentence"]


def rows_of(count, prefix="row"):
    return [{"sentence": f"{prefix} number {i}", "label": i % 2} for i in range(count)]


def disguise(text, rng):
    """Equal to `text` once normalised; `rng` picks how it differs."""
    wide = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in "aeiou"})
    forms = [
        str.upper,
        str.title,
        lambda t: f"  {t}\n",
        lambda t: t.replace(" ", "\u00a0 \t"),
        lambda t: t.translate(wide),
    ]
    return rng.choice(forms)(text)
