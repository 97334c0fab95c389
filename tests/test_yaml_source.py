import math
import random
import string

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.yaml_source import MAX_BYTES, MAX_DEPTH, MAX_NODES, dump, parse, printable, scalar


def problems(text):
    with pytest.raises(RecipeError) as caught:
        parse(text, "x.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        # Numbers and truth values in YAML 1.1, texts in 1.2:
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        (".", "."),
        ("1e", "1e"),
        ("tRue", "tRue"),
        ("١", "١"),
    ],
)
def test_unquoted_scalars_follow_yaml_1_2(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    if text:
        assert parse(f"a: {text}", "x.yaml").value == {"a": value}


def test_not_a_number_is_a_number():
    assert math.isnan(scalar(".nan"))


@pytest.mark.parametrize("text", ["1e-4", "true", "null", "7", ""])
def test_quoted_scalars_are_texts(text):
    value = parse(f"a: '{text}'\nb: \"{text}\"\nc: |\n  {text}\n", "x.yaml").value
    assert [value["a"], value["b"], value["c"].strip()] == [text] * 3


def test_every_key_and_item_has_its_line():
    text = "# note\na:\n  b: 1\n  c:\n    - x\n    - y: 2\n\nd: |\n  text\ne: {f: 3}\n"
    document = parse(text, "x.yaml")
    assert document.value == {"a": {"b": 1, "c": ["x", {"y": 2}]}, "d": "text\n", "e": {"f": 3}}
    assert document.lines == {
        (): 2,
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1): 6,
        ("a", "c", 1, "y"): 6,
        ("d",): 8,
        ("e",): 10,
        ("e", "f"): 10,
    }


def test_every_duplicate_is_listed_with_both_lines():
    assert problems("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n'a': 3\n") == [
        "x.yaml:5: b.c: duplicate key, first on line 3",
        "x.yaml:6: a: duplicate key, first on line 1",
        "x.yaml:7: a: duplicate key, first on line 1",
    ]


def test_a_merge_key_is_a_key_like_any_other():
    assert parse("<<: {a: 1}\nb: 2", "x.yaml").value == {"<<": {"a": 1}, "b": 2}


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ANCHORS = "anchors and aliases are not allowed; write the value out"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, f"x.yaml:1: {ANCHORS}"),
        ("a: 1\nb: *a\n", f"x.yaml:2: {ANCHORS}"),
        ("a: &x 1\n", f"x.yaml:1: {ANCHORS}"),
        ("&x a: 1\n", f"x.yaml:1: {ANCHORS}"),
        (
            "a: !!python/object/apply:os.system [x]",
            "tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
        ),
        ("a: 1\nb: !!str 2", "x.yaml:2: tag 'tag:yaml.org,2002:str' is not allowed"),
        ("a: !x%0Ay 2", "x.yaml:1: tag '!x\\ny' is not allowed"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: a second document starts here; write one only"),
        ("a: [1\n", "x.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: 2: 3\n", "x.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\nb: \x00\n", "x.yaml:2: not valid YAML: character #x0000 is not allowed"),
        (
            "a: 1\n\tb: 2\n",
            "x.yaml:2: not valid YAML: found character '\\t' that cannot start any token",
        ),
        (
            'a: "\\U00110000"',
            "x.yaml: not valid YAML: an escape sequence or a version is out of range",
        ),
        (
            f"%YAML 1.{'1' * 5000}\n---\na: 1",
            "x.yaml: not valid YAML: an escape sequence or a version is out of range",
        ),
        ("a: 1\n? [b]\n: 2\n", "x.yaml:2: a key must be plain text"),
        ('a:\n  b: "x\\0"', "x.yaml:2: a.b: holds a NUL or half a character"),
        ('a: ["\\ud800"]', "x.yaml:1: a.0: holds a NUL or half a character"),
        ('a: 1\n"\\udfff": 1', "x.yaml:2: a key holds a NUL or half a character"),
        ('"a\\nb": 1\n"a\\nb": 2', "x.yaml:2: a\\nb: duplicate key, first on line 1"),
    ],
)
def test_what_is_refused_is_named_with_its_line(text, problem):
    (found,) = problems(text)
    assert found.removeprefix("x.yaml:1: ") == problem.removeprefix("x.yaml:1: ")
    assert found.startswith("x.yaml")


@pytest.mark.parametrize("text", ["{}", "a: {v}", "- {v}"])
def test_depth_is_bounded_from_the_first_level_too_many(text):
    own = text.count("{v}")
    text = text if own else "{v}"
    allowed = MAX_DEPTH - own
    parse(text.replace("{v}", "[" * allowed + "]" * allowed), "x.yaml")
    message = f"x.yaml:1: nested deeper than {MAX_DEPTH} levels"
    assert problems(text.replace("{v}", "[" * (allowed + 1) + "]" * (allowed + 1))) == [message]
    assert problems(text.replace("{v}", "[" * 100_000)) == [message]
    assert problems(text.replace("{v}", "{a: " * 50_000)) == [message]
    assert problems("- " * 100_000) == [message]


def test_the_number_of_nodes_is_bounded():
    # The list and its key's mapping count too.
    items = MAX_NODES - 3
    assert len(parse("a: [" + "x, " * items + "]", "x.yaml").value["a"]) == items
    assert problems("a: [" + "x, " * (items + 1) + "]") == [
        f"x.yaml:1: more than {MAX_NODES} keys and values"
    ]


def test_the_size_is_bounded():
    assert parse("a: " + "x" * (MAX_BYTES - 3), "x.yaml").value["a"][0] == "x"
    assert problems("a: " + "x" * (MAX_BYTES - 2)) == [f"x.yaml: larger than {MAX_BYTES} bytes"]


@pytest.mark.parametrize(
    ("text", "value"), [("", None), ("# note", None), ("\ufeffa: 1", {"a": 1})]
)
def test_empty_files_and_byte_order_marks(text, value):
    assert parse(text, "x.yaml").value == value


def test_what_dump_writes_parse_reads_back():
    values = ["1e-4", "08", "1e5", "no", "null", "~", "", "-.5", "12:30", "a: b", "# x", " x ", "é"]
    values += ["a\nb", "\u2028", "'", '"', "*a", "&a", "!t", 1e-5, 1e22, 0.1, 3, True, None, [], {}]
    shared = ["a"]
    values += [shared, shared, {"1": {"true": "1"}}]
    text = dump({"list": values})
    assert parse(text, "x.yaml").value == {"list": values}
    assert "&" not in dump([shared, shared])


def test_random_texts_survive_dump_and_parse():
    rng = random.Random(0)
    alphabet = string.printable[:95] + "\n\té漢🙂" + "0123456789.eE+-_~" * 4
    values = ["".join(rng.choices(alphabet, k=rng.randint(0, 8))) for _ in range(1500)]
    read = parse(dump(values), "x.yaml").value
    assert read == values
    assert yaml.safe_load(dump(values)) == values


def test_printable_is_one_line_of_bounded_length():
    assert printable("lora_alpha") == "lora_alpha"
    assert printable("a\nb\x1b[31m") == "a\\nb\\u001b[31m"
    assert printable("x" * 90) == "x" * 80 + "…"
    assert printable("\ud800").isascii()
