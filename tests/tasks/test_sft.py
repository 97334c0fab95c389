"""What of a prompt, a completion or a conversation is learnt, and how it is counted."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftkit.errors import DataError
from peftkit.tasks.completions import IGNORED
from peftkit.tasks.sft import Sft, SftConfig

WORDS = ["one", "two", "three", "four", "five", "six", "plus", "is", "ask", "say", "user", "bot"]
SPECIAL = ["[UNK]", "[BOS]", "[EOS]", "[PAD]"]
UNK, BOS, EOS, PAD = range(4)
CHAT = (
    "[BOS]{% for m in messages %}"
    "{% if m.role == 'assistant' %}bot {{ m.content }} [EOS] {% else %}user {{ m.content }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}bot {% endif %}"
)


def make_tokenizer(*, frame="[BOS] $A", pad="[PAD]", eos="[EOS]", chat=None, limit=64):
    """One id a word; `frame` is what its post-processor makes of a text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[BOS]", BOS), ("[EOS]", EOS)]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[BOS]",
        unk_token="[UNK]",
        eos_token=eos,
        pad_token=pad,
        model_max_length=limit,
    )
    made.chat_template = chat
    return made


def ids(text):
    return [len(SPECIAL) + WORDS.index(word) for word in text.split()]


def write(folder, train, validation):
    for name, rows in (("train", train), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sums(count, start=0):
    """Questions of 3 to 8 words with answers of 1 to 3."""
    made = []
    for i in range(start, start + count):
        numbers = [WORDS[(i // 6**k) % 6] for k in range(3)] + ["one"] * (i % 6)
        made.append({"q": " ".join(numbers), "a": " ".join(["is", "two", "six"][: 1 + i % 3])})
    return made


def make(folder, **changes):
    section = {"type": "sft", "dataset": str(folder), "holdout_fraction": 0.0, "max_length": 64}
    return Sft(SftConfig(**section | {"prompt": "ask {q} say", "completion": " {a}"} | changes))


def chats(*contents):
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path, sums(20), sums(7, start=100))


def problems_of(task, tokenizer=None):
    with pytest.raises(DataError) as caught:
        task.load(tokenizer or make_tokenizer(), seed=0)
    return caught.value.problems


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            initializer_range=0.4,
        )
    ).eval()


# What is learnt


@pytest.mark.parametrize("frame", ["[BOS] $A", "[BOS] $A [EOS]", "$A", "$A [EOS]"])
def test_the_completion_and_one_eos_are_learnt_the_prompt_and_the_bos_are_not(tmp_path, frame):
    folder = write(tmp_path, [{"q": "one plus two", "a": "is three"}], sums(2, start=50))
    row = make(folder).load(make_tokenizer(frame=frame), seed=0).train.rows[0]
    opening = [BOS] if frame.startswith("[BOS]") else []
    asked = [*opening, *ids("ask one plus two say")]
    learnt = [*ids("is three"), EOS]
    assert row["input_ids"] == asked + learnt
    assert row["labels"] == [IGNORED] * len(asked) + learnt


@pytest.mark.parametrize("pad", ["[PAD]", "[EOS]", None])
def test_padding_is_not_learnt_and_an_eos_that_pads_elsewhere_is(data, pad):
    task = make(data)
    rows = task.load(make_tokenizer(pad=pad), seed=0).train.rows
    batch = task.collate(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 2
    for row, labels, mask, n in zip(
        rows, batch["labels"], batch["attention_mask"], lengths, strict=True
    ):
        assert labels[n - 1] == EOS == row["input_ids"][-1]
        assert set(labels[n:].tolist()) <= {IGNORED}
        assert mask.tolist() == [1] * n + [0] * (len(labels) - n)
        assert (labels == EOS).sum() == 1


def test_rows_are_padded_on_the_right_where_the_tokeniser_pads_on_the_left(data):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    task = make(data)
    batch = task.collate(task.load(tokenizer, seed=0).train.rows)
    assert (batch["input_ids"][:, 0] == BOS).all()


def test_a_text_that_brings_its_bos_along_has_one(tmp_path):
    folder = write(tmp_path, [{"q": "one", "a": "two"}], sums(2, start=50))
    task = make(folder, prompt="[BOS] ask {q}")
    assert task.load(make_tokenizer(), seed=0).train.rows[0]["input_ids"].count(BOS) == 1


def test_a_completion_that_ends_with_the_eos_gets_no_second_one(tmp_path):
    folder = write(tmp_path, [{"q": "one", "a": "two [EOS]"}], sums(2, start=50))
    assert make(folder).load(make_tokenizer(), seed=0).train.rows[0]["input_ids"][-2:] == [
        *ids("two"),
        EOS,
    ]


def test_without_a_prompt_every_token_is_learnt(data):
    row = make(data, prompt="", completion="{q}").load(make_tokenizer(), seed=0).train.rows[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_the_first_token_of_a_row_is_never_an_item(data):
    """Nothing comes before it, so nothing predicts it."""
    task = make(data, prompt="", completion="{q}")
    rows = task.load(make_tokenizer(frame="$A"), seed=0).train.rows
    batch = task.collate(rows)
    labels = batch.pop("labels")
    assert task.loss_items(labels) == sum(len(row["input_ids"]) - 1 for row in rows)
    with torch.no_grad():
        columns = task.predictions(model()(**batch), labels)
    assert columns["loss_items"].sum() == task.loss_items(labels)


@pytest.mark.parametrize("frame", ["[BOS] $A", "[BOS] $A [EOS]", "$A"])
def test_what_is_trained_after_is_what_the_model_is_asked_with(data, frame):
    """Training ids = serving ids."""
    tokenizer = make_tokenizer(frame=frame)
    task = make(data)
    for raw, row in zip(sums(20), task.load(tokenizer, seed=0).train.rows, strict=True):
        asked = task.encode(tokenizer, [[raw["q"]]])[0]["input_ids"]
        unlearnt = sum(label == IGNORED for label in row["labels"])
        assert row["input_ids"][:unlearnt] == asked


def test_what_a_model_is_asked_with_is_padded_on_the_left_and_has_no_labels(data):
    task = make(data)
    batch = task.collate(task.encode(make_tokenizer(), [["one"], ["one plus two"]]))
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0].tolist()[:2] == [PAD, PAD]
    with pytest.raises(DataError, match=r"a list of 1 strings \(q\)"):
        task.encode(make_tokenizer(), [["one", "two"]])


def test_what_was_asked_in_between_does_not_move_the_labels(data):
    task, tokenizer = make(data), make_tokenizer()
    rows = task.load(tokenizer, seed=0).train.rows
    before = task.collate(rows)
    task.encode(tokenizer, [["one"]])
    after = task.collate(rows)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_prompt_without_columns_is_followed_by_the_text(data):
    tokenizer = make_tokenizer()
    task = make(data, prompt="say ", completion="{q}")
    task.load(tokenizer, seed=0)
    assert task.encode(tokenizer, [["one"]])[0]["input_ids"] == [BOS, *ids("say one")]
    with pytest.raises(DataError, match="an empty text has no token"):
        make(data, prompt="", completion="{q}").encode(make_tokenizer(frame="$A"), [[""]])


class Merging:
    """Makes one token of two words, as byte pairs may at the seam."""

    def __init__(self, seam="say one", **how):
        self.inner, self.seam = make_tokenizer(**how), ids(seam)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, texts, **how):
        found = self.inner(texts, **how)
        if isinstance(texts, list):
            for row in found["input_ids"]:
                for i in range(len(row) - 1):
                    if row[i : i + 2] == self.seam:
                        row[i : i + 2] = [UNK]
        return found


def test_a_prompt_keeps_its_tokens_where_the_completion_would_change_its_last(tmp_path):
    rows = [{"q": "two", "a": "one"}, {"q": "six", "a": "two"}]
    task = make(write(tmp_path, rows, sums(2, start=50)))
    found = task.load(Merging(), seed=0)
    assert found.train.rows[0]["input_ids"] == [BOS, *ids("ask two say one"), EOS]
    assert found.cleaning["tokenised_apart"] == 1


# Conversations


def test_every_answer_of_a_conversation_is_learnt_and_nothing_else(tmp_path):
    turns = chats("one plus two", "three", "plus one", "four")
    folder = write(tmp_path, [{"m": turns}], [{"m": chats("six", "five")}])
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    tokenizer = make_tokenizer(chat=CHAT)
    row = task.load(tokenizer, seed=0).train.rows[0]
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert learnt == [*ids("three"), EOS, *ids("four"), EOS]
    assert row["input_ids"].count(BOS) == 1
    asked = task.encode(tokenizer, [["one plus two"]])[0]["input_ids"]
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"][len(asked)] == ids("three")[0]


def test_a_template_without_an_eos_gets_one(tmp_path):
    folder = write(tmp_path, [{"m": chats("one", "two")}], [{"m": chats("six", "five")}])
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    row = task.load(make_tokenizer(chat=CHAT.replace(" [EOS]", "")), seed=0).train.rows[0]
    assert row["labels"][-2:] == [*ids("two"), EOS]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    """As one does that drops the thoughts of all answers but the last."""
    forgetful = CHAT.replace(
        "bot {{ m.content }}", "bot {% if loop.last %}{{ m.content }}{% endif %}"
    )
    folder = write(
        tmp_path, [{"m": chats("one", "two", "three", "four")}], [{"m": chats("six", "five")}]
    )
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    assert problems_of(task, make_tokenizer(chat=forgetful)) == [
        "train: row 0: the chat template writes message 1 otherwise once others follow it"
    ]


def test_conversations_that_the_template_refuses_are_one_line(tmp_path):
    strict = "{{ raise_exception('roles must alternate') }}"
    rows = [{"m": chats("one", "two")}] * 3
    folder = write(tmp_path, rows, [{"m": chats("six", "five")}])
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    assert problems_of(task, make_tokenizer(chat=strict)) == [
        "train: row 0 and 2 more: the chat template refuses it: roles must alternate",
        "validation: row 0: the chat template refuses it: roles must alternate",
    ]


def test_numbers_are_written_out_and_a_missing_one_is_named(tmp_path):
    folder = write(tmp_path, [{"q": 1, "a": 2.5}, {"q": 3, "a": 4.0}], [{"q": 5, "a": 6.0}])
    assert len(make(folder).load(make_tokenizer(), seed=0).train.rows) == 2
    write(folder, [{"q": 1, "a": 2.5}, {"q": 3, "a": float("nan")}], [{"q": 5, "a": 6.0}])
    assert problems_of(make(folder)) == ["train: column 'a': row 1: nan is no text"]


def conversations(folder, *rows, chat=CHAT):
    """The train rows of conversations, and what cleaning counted."""
    write(folder, [{"m": row} for row in rows], [{"m": chats("six", "five")}])
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    found = task.load(make_tokenizer(chat=chat), seed=0)
    return found.train.rows, found.cleaning


def learnt(row):
    return [label for label in row["labels"] if label != IGNORED]


def test_a_turn_keeps_its_tokens_where_the_answer_would_change_its_last(tmp_path):
    """As an answer that begins with a newline does after a template that ends with one."""
    folder = write(
        tmp_path, [{"m": chats("six", "one", "two", "three")}], [{"m": chats("six", "five")}]
    )
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    found = task.load(Merging("bot one", chat=CHAT), seed=0)
    assert learnt(found.train.rows[0]) == [*ids("one"), EOS, *ids("three"), EOS]
    assert UNK not in found.train.rows[0]["input_ids"]
    assert found.cleaning["tokenised_apart"] == 1


def test_a_template_that_ends_the_last_answer_alone_is_taken(tmp_path):
    """As one that puts an eos after the whole conversation."""
    ends = CHAT.replace(" [EOS]", "").replace(
        "{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}[EOS]{% endif %}"
    )
    (row,), _ = conversations(tmp_path, chats("one", "two", "three", "four"), chat=ends)
    assert learnt(row) == [*ids("two"), *ids("four"), EOS]


def test_a_template_that_writes_the_date_writes_always_the_same_or_is_refused(tmp_path):
    dated = "{% if not date_string %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated += "{{ 'one' if '2024' in date_string else 'six' }} "
    (row,), _ = conversations(tmp_path, chats("one", "two"), chat=dated + CHAT)
    assert row["input_ids"][0] == ids("one")[0]
    with pytest.raises(DataError, match="writes today's date"):
        conversations(tmp_path, chats("one", "two"), chat="{{ strftime_now('%Y') }} " + CHAT)


def test_calls_of_tools_reach_the_template(tmp_path):
    calls = CHAT.replace(
        "{{ m.content }} [EOS]",
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %} [EOS]",
    )
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "plus"}]}
    (row,), _ = conversations(tmp_path, [*chats("one"), called], chat=calls)
    assert learnt(row) == [*ids("plus"), EOS]


def test_conversations_of_one_system_message_are_known_by_their_answers(tmp_path):
    rows = [
        [{"role": "system", "content": "say"}, {"role": "assistant", "content": word}]
        for word in ("one", "two")
    ]
    found, cleaning = conversations(tmp_path, *rows)
    assert (len(found), cleaning["removed_from_train"]) == (2, 0)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no list of messages"),
        ([{"role": "user"}], "a message is {'role': 'user'"),
        ([{"role": "boss", "content": "one"}], "role 'boss' is none of system, user, assistant"),
        ([{"role": "user", "content": "one"}], "no message is the assistant's"),
        ([{"role": "assistant", "content": "one"}], "it begins with an answer"),
    ],
)
def test_no_conversation_is_a_line_with_its_row(tmp_path, messages, reason):
    good = {"m": chats("one", "two")}
    folder = write(
        tmp_path, [good, {"m": messages}, {"m": messages}], [{"m": chats("six", "five")}]
    )
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    (line,) = problems_of(task, make_tokenizer(chat=CHAT))
    assert line.startswith(f"train: column 'm': row 1 and 1 more: {reason}")


# What is cut, dropped and counted


def test_cut_and_fully_masked_examples_are_counted_and_the_latter_left_out(tmp_path):
    """A prompt that fills the row leaves nothing to learn."""
    lengths = [1, 3, 9, 12]
    train = [{"q": " ".join(["one"] * n), "a": "two"} for n in lengths]
    validation = [{"q": " ".join(["six"] * n), "a": "two"} for n in (1, 12)]
    task = make(write(tmp_path, train, validation), max_length=8)
    found = task.load(make_tokenizer(), seed=0)
    assert [row["source_row"] for row in found.train.rows] == [0, 1]
    assert found.cleaning["truncated"] == 3
    assert found.cleaning["fully_masked"] == 3
    assert [row["source_row"] for row in found.validation.rows] == [0]
    assert max(found.train.lengths + found.validation.lengths) == 8


def test_a_split_with_nothing_to_learn_is_refused(data):
    lines = problems_of(make(data, max_length=3))
    assert [line.split(":")[0] for line in lines] == ["train", "validation"]
    assert "raise max_length (3)" in lines[0]


def test_a_prompt_of_validation_is_not_trained_on_whatever_follows_it(tmp_path):
    train = [*sums(10), {"q": "SIX  plus six", "a": "is one"}]
    found = make(write(tmp_path, train, [{"q": "six plus six", "a": "two"}])).load(
        make_tokenizer(), seed=0
    )
    assert found.cleaning["removed_from_train"] == 1
    assert len(found.train.rows) == 10


@pytest.mark.parametrize("prompt", ["", "say"])
def test_where_all_are_asked_the_same_rows_are_known_by_what_follows(tmp_path, prompt):
    folder = write(tmp_path, [*sums(10), {"q": "six plus six"}], [{"q": "SIX plus  six"}])
    task = make(folder, prompt=prompt, completion=" {q}", holdout_fraction=0.2)
    found = task.load(make_tokenizer(), seed=0)
    assert found.cleaning["removed_from_train"] == 1
    assert (len(found.train.rows), len(found.holdout.rows)) == (8, 2)


def test_the_same_seed_gives_the_same_parts_and_digests(data):
    one, two, other = (
        make(data, holdout_fraction=0.3).load(make_tokenizer(), seed=seed) for seed in (1, 1, 2)
    )
    assert one == two
    assert one.holdout != other.holdout
    held = {tuple(row["input_ids"]) for row in one.holdout.rows}
    assert held
    assert not held & {tuple(row["input_ids"]) for row in one.train.rows}


# Loss and metrics


def test_loss_is_that_of_the_model_itself_and_counts_by_tokens(data):
    task, bare = make(data), model()
    rows = task.load(make_tokenizer(), seed=0).train.rows
    summed = []
    for row in rows:
        batch = task.collate([row])
        items = task.loss_items(batch["labels"])
        summed.append(float(bare(**batch).loss.detach()) * items)
    batch = task.collate(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = bare(**batch)
    assert float(task.loss(outputs, labels)) == pytest.approx(sum(summed), abs=1e-4)
    columns = {k: v.numpy() for k, v in task.predictions(outputs, labels).items()}
    assert columns["loss"].tolist() == pytest.approx(summed, abs=1e-5)
    assert columns["loss_items"].sum() == task.loss_items(labels)
    scores = task.metrics(columns)
    assert scores["perplexity"] == pytest.approx(np.exp(sum(summed) / task.loss_items(labels)))
    hits = sum(
        int((outputs.logits[i, :-1].argmax(-1) == labels[i, 1:]).sum()) for i in range(len(rows))
    )
    assert scores["token_accuracy"] == hits / task.loss_items(labels)
    smoothed = float(task.loss(outputs, labels, label_smoothing=0.2))
    assert abs(smoothed - sum(summed)) > 0.1


# Sections and data that do not fit


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "{q.__class__}"}, "is no column"),
        ({"prompt": "{q[0]}"}, "is no column"),
        ({"prompt": "{q!r}"}, "is no column"),
        ({"prompt": "{q:>9}"}, "is no column"),
        ({"prompt": "{}"}, "is no column"),
        ({"prompt": "{0}"}, "is no column"),
        ({"prompt": "{q"}, "a brace that is meant as such is written twice"),
        ({"completion": "always this"}, "names no column"),
        ({"messages_column": "m"}, "conversations have no `prompt` and `completion`"),
        ({"validation_split": "train"}, "evaluating on the training split"),
        ({"max_length": 1}, "greater than or equal to 2"),
    ],
)
def test_a_section_that_means_nothing_is_refused(tmp_path, changes, reason):
    with pytest.raises(ValidationError, match=reason):
        make(tmp_path, **changes)


def test_braces_that_are_written_twice_are_text(tmp_path):
    folder = write(tmp_path, [{"q": "one", "a": "two"}], sums(2, start=50))
    task = make(folder, prompt="{{q}} {q}")
    assert task.load(make_tokenizer(), seed=0).train.rows[0]["input_ids"][1:3] == [UNK, *ids("one")]


def test_every_problem_of_data_and_tokeniser_is_named_at_once(tmp_path):
    folder = write(tmp_path, [{"q": "one", "a": None}], [{"q": "two"}])
    lines = problems_of(make(folder, max_length=100), make_tokenizer(eos=None))
    assert lines == [
        "train: column 'a': row 0: None is no text",
        "validation: no column 'a'; Choices: q",
        "max_length: 100 is over the tokeniser's limit; at most 64",
        "tokeniser: it has no eos token, so no model could learn to stop",
    ]


def test_conversations_need_a_chat_template(tmp_path):
    folder = write(tmp_path, [{"m": chats("one", "two")}], [{"m": chats("six", "five")}])
    task = make(folder, messages_column="m", prompt="{prompt}", completion="{completion}")
    (line,) = problems_of(task)
    assert line.startswith("messages_column: the tokeniser has no chat template")
