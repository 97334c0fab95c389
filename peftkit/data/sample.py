"""Small data sets that peftkit makes itself, for when no real one can be reached.

Called by `sources`; imports only `errors` and `splits`. A run on a sample is marked as a stand-in
everywhere. `reviews` is sentiment by composition: what counts is which words a negation reaches,
which clause of a contrast decides, what was only expected, said by others, or true once.
"""

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.data.splits import normalised
from peftkit.errors import SourceError, suggestion

if TYPE_CHECKING:
    import datasets

SAMPLE_NAMES = ("reviews",)
_LABELS = {"reviews": ["negative", "positive"]}
_FLIPPED_SHARE = 0.04
_UNSEEN_SHARE = 0.1


class _Topic(NamedTuple):
    places: str
    nouns: str
    good: str
    bad: str


# Lists are split at "|". What follows "||" never occurs in train.
_TOPICS = (
    _Topic(
        "in this film|for a sequel|on the big screen||in the second half",
        "plot|acting|dialogue|ending|soundtrack|pacing|camera work|lead actor||supporting cast"
        "|final twist|costume design",
        "gripping|funny|moving|original|believable|suspenseful||witty|hypnotic|riveting",
        "predictable|wooden|tedious|clumsy|shallow|forced||incoherent|contrived|grating",
    ),
    _Topic(
        "in this novel|for a debut|from the first page||in the later chapters",
        "story|prose|narrator|first chapter|translation|main character|mystery||epilogue"
        "|family portrait|choice of words",
        "absorbing|elegant|vivid|thoughtful|convincing|rich||lyrical|luminous|insightful",
        "dull|confusing|repetitive|flat|stilted|bloated||preachy|plodding|muddled",
    ),
    _Topic(
        "at this place|on our last visit|on a weekday||at these prices",
        "soup|bread|dessert|pasta|fish|coffee|pizza|house salad||chowder|tasting menu|lemon tart",
        "delicious|fresh|tasty|crisp|fragrant|flavourful||velvety|scrumptious|succulent",
        "bland|greasy|stale|heavy|overcooked|salty||tasteless|rancid|stodgy",
    ),
    _Topic(
        "on this model|after two weeks|out of the box||since the update",
        "screen|keyboard|camera|battery|touchpad|speaker|remote|microphone||docking station"
        "|fingerprint reader|volume dial",
        "reliable|responsive|precise|intuitive|sturdy|well made||seamless|dependable|robust",
        "unreliable|sluggish|flimsy|useless|fiddly|laggy||glitchy|erratic|shoddy",
    ),
    _Topic(
        "in this hotel|during our stay|for a short trip||on the upper floors",
        "room|lobby|bathroom|lounge|bar|terrace|suite|gym||rooftop pool|sauna|conference hall",
        "clean|comfortable|spacious|welcoming|cosy|spotless||inviting|tranquil|charming",
        "dirty|cramped|noisy|shabby|uncomfortable|musty||neglected|gloomy|draughty",
    ),
    _Topic(
        "on this course|for beginners|after the first month||in the online version",
        "teacher|textbook|first lesson|timetable|group work|feedback|final test||seminar"
        "|reading list|laboratory",
        "helpful|clear|encouraging|inspiring|well organised|practical||engaging|instructive",
        "boring|disorganised|vague|discouraging|outdated|unhelpful||baffling|haphazard",
    ),
)
_UNSEEN_TOPICS = (
    _Topic(
        "on this flight|at the airport|for a night train",
        "boarding|cabin crew|legroom|meal on board|connection|baggage handling|ticket counter",
        "punctual|courteous|smooth|attentive|generous|efficient",
        "rude|stressful|hectic|cold|slow|careless",
    ),
    _Topic(
        "on this album|at the concert|in the acoustic version",
        "opening song|guitar solo|singer|chorus|mix|drumming|encore|cover version",
        "catchy|energetic|soulful|uplifting|tuneful|dazzling",
        "monotonous|tinny|off-key|uninspired|shrill|lacklustre",
    ),
)
_ANY_GOOD = "excellent|lovely|impressive|pleasant|superb|great||delightful|first-rate|outstanding"
_ANY_BAD = "poor|awful|terrible|disappointing|annoying|bad||dreadful|mediocre|lousy"
_DEGREES = "really|quite|very|rather|surprisingly||consistently|remarkably"
_LEADS = "honestly|to be fair|in my opinion|all in all||for what it is worth|as far as I can tell"
_PEOPLE = "my brother|a friend of mine|my neighbour|my boss|the press||my aunt|the woman next to us"

# {n} noun; {a}, {b} adjectives that say what the sentence says; {x}, {y} adjectives that say the
# opposite; {hoped}, {feared}: what one does about {a} and {x}; {d} degree; {who} somebody else.
_PLAIN = (
    "the {n} was {a}|the {n} was {d} {a}|I found the {n} {a}|the {n} felt {d} {a}"
    "|the {n} turned out to be {a}||the {n} struck me as {d} {a}"
)
_NEGATED = (
    "the {n} was not {x}|the {n} was never {x}|I did not find the {n} {x}|the {n} was hardly {x}"
    "|nobody could call the {n} {x}|the {n} was anything but {x}"
    "|there was nothing {x} about the {n}||the {n} was far from {x}|the {n} was in no way {x}"
    "|the {n} did not strike me as {x}"
)
_DECOYS = (
    "the {n} was nothing if not {a}|the {n} never stopped being {a}|the {n} could not be more {a}"
    "|I could not believe how {a} the {n} was|the {n} never failed to be {a}"
    "||I have never seen the {n} so {a}|the {n} was without question {a}"
)
_SCOPES = (
    "the {n} was neither {x} nor {y}|the {n} was not {x}, let alone {y}|the {n} was {a}, not {x}"
    "|the {n} was not {x} but {a}|the {n} was not only {a} but also {b}"
    "|the {n} was {a} rather than {x}|the {n} was not just {a} but {b}"
    "||the {n} was {a} instead of {x}|the {n} was not merely {a} but downright {b}"
)
_COMPARED = (
    "the {n} was less {x} than I had {feared}|the {n} was just as {a} as I had {hoped}"
    "|the {n} was not half as {x} as I had {feared}|the {n} was no less {a} than I had {hoped}"
    "|the {n} was less {x} than any other I know|no other {n} I know is as {a}"
    "||the {n} was nowhere near as {x} as they say|the {n} was every bit as {a} as they say"
)
_EXPECTED = (
    "I had {feared} that the {n} would be {x}, and I was wrong"
    "|I had {hoped} that the {n} would be {a}, and I was right"
    "|I expected the {n} to be {x}, which it was not|I expected the {n} to be {a}, which it was"
    "|I was told that the {n} would be {x}, but it was {a}"
    "|where I had expected the {n} to be {x}, it was {a}"
    "||I went in sure that the {n} would be {x} and came out sure of the opposite"
    "|I was warned that the {n} might be {a}, and so it was"
)
_OTHERS = (
    "{who} called the {n} {x}, and I disagree|{who} called the {n} {a}, and I agree"
    "|{who} found the {n} {x}, but I could not agree less"
    "|{who} found the {n} {a}, and I could not agree more"
    "|unlike {who}, I thought that the {n} was {a}|unlike me, {who} thought that the {n} was {x}"
    "|{who} does not think that the {n} was {a}, but I do"
    "||{who} kept saying that the {n} was {x}, a view that I do not share"
    "|like {who}, I thought that the {n} was {a}"
)
_PAST = (
    "the {n} used to be {x}, but that has changed|the {n} used to be {a}, and that has not changed"
    "|the {n} is no longer {x}|the {n} is still as {a} as ever|the {n} was {x} once but is {a} now"
    "|the {n} has stopped being {x}|the {n} is {a} now, after years of being {x}"
    "||the {n} is not {x} any more|gone are the days when the {n} was {x}"
)
# {c} says what the sentence says, {o} the opposite; {c2}, {o2} are about another noun.
_AFFIRMED = (
    "there is no denying that {c}|nobody can deny that {c}|I am convinced that {c}"
    "|I have no doubt that {c}||it cannot be overlooked that {c}|no one could miss that {c}"
)
_DENIED = (
    "it is not true that {o}|I do not believe that {o}|nobody will convince me that {o}"
    "|I would be lying if I said that {o}|those who say that {o} are mistaken"
    "|I doubt that {o}||it is a myth that {o}|it would be wrong to claim that {o}"
)
_CONTRASTS = (
    "although {o2}, {c}|{c}, although {o2}|{o2}, but {c}|{c}, even though {o2}|while {o2}, {c}"
    "|{o2}; still, {c}|the fact that {c} outweighs the fact that {o2}"
    "|the fact that {o2} does not outweigh the fact that {c}"
    "|it hardly matters that {o2}, because {c}|what matters is that {c}, not that {o2}"
    "||much as I admit that {o2}, {c}|that {o2} counts for little, given that {c}"
)
_AGREEMENTS = "{c}, and {c2}|{c}; also, {c2}|{c}; what is more, {c2}||{c}; besides, {c2}"

# The shares put a bag of words at about three right answers in four.
_FLAT = ((_PLAIN, 0.88), (_NEGATED, 0.12))
_SIMPLE = ((_PLAIN, 0.82), (_NEGATED, 0.07), (_DECOYS, 0.06), (_SCOPES, 0.05))
_LONGER = ((_COMPARED, 0.25), (_EXPECTED, 0.25), (_OTHERS, 0.25), (_PAST, 0.25))
_WRAPPED = (("{c}", 0.9), (_AFFIRMED, 0.04), (_DENIED, 0.06))
_SHAPES = (("{c}", 0.34), ("{t}", 0.13), (_AGREEMENTS, 0.4), (_CONTRASTS, 0.13))


def make_sample(name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split; the same on every machine and in every process.

    `reviews`: `sentence` and `label` (0 negative, 1 positive), 4,000 train and 800 validation
    rows, labels balanced, no sentence twice. A share of validation's words, topics and turns of
    phrase never occurs in train. In both splits 4 % of the labels are wrong on purpose, as in real
    annotation, so that no model can expect more than 96 % right.

    Raises:
        SourceError: no sample has this name.
    """
    if name not in SAMPLE_NAMES:
        raise SourceError(f"sample:{name}: unknown sample, {suggestion(name, SAMPLE_NAMES)}")
    # A string seed is hashed by SHA-512, not by the process's own string hash.
    rng = random.Random("peftkit reviews 2")
    seen: set[str] = set()
    validation = _rows(_Writer(rng, unseen=True), 800, seen)
    return {"train": _rows(_Writer(rng, unseen=False), 4000, seen), "validation": validation}


def sample_sentences(count: int) -> list[str]:
    """A few sentences like those of `reviews`, the same in every process."""
    writer = _Writer(random.Random("peftkit sentences"), unseen=True)
    return [row["sentence"] for row in _rows(writer, count, set())]


def sample_dataset(name: str, split: str) -> "datasets.Dataset":
    """One split of a sample, its labels with their names."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=_LABELS[name])})
    return Dataset.from_list(make_sample(name)[split], features=features)


def _rows(writer: "_Writer", count: int, seen: set[str]) -> list[dict[str, Any]]:
    """`count` rows, half of each label, of sentences that are not in `seen`; adds them to it."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        label = len(rows) % 2
        sentence = writer.sentence(positive=label == 1)
        if normalised(sentence) not in seen:
            seen.add(normalised(sentence))
            rows.append({"sentence": sentence, "label": label})
    # Labels alternate up to here, so the first rows hold as many of each to flip.
    for row in rows[: round(_FLIPPED_SHARE * count)]:
        row["label"] = 1 - row["label"]
    writer.rng.shuffle(rows)
    return rows


class _Writer:
    """Draws sentences of a given sentiment; `unseen` adds what train never holds."""

    def __init__(self, rng: random.Random, *, unseen: bool) -> None:
        self.rng = rng
        self.unseen = unseen

    def sentence(self, *, positive: bool) -> str:
        """One sentence whose composition gives it the asked-for verdict."""
        unseen = self.unseen and self.rng.random() < _UNSEEN_SHARE
        topic = self.rng.choice(_UNSEEN_TOPICS if unseen else _TOPICS)
        noun, second = self._pick(topic.nouns, 2)
        shape = self._weighted(_SHAPES)
        if shape == "{t}":
            text = self._clause(_LONGER, topic, noun, positive=positive)
        else:
            text = shape.format(
                c=self._thought(topic, noun, positive=positive),
                c2=self._thought(topic, second, positive=positive),
                o2=self._thought(topic, second, positive=not positive),
            )
        for openings in (topic.places, _LEADS):
            if self.rng.random() < 0.25:
                text = f"{self._pick(openings)[0]}, {text}"
        return f"{text[0].upper()}{text[1:]}."

    def _thought(self, topic: _Topic, noun: str, *, positive: bool) -> str:
        """A simple clause, now and then affirmed or denied as a whole."""
        wrapper = self._weighted(_WRAPPED)
        if "{o}" in wrapper:
            return wrapper.format(o=self._clause(_FLAT, topic, noun, positive=not positive))
        return wrapper.format(c=self._clause(_SIMPLE, topic, noun, positive=positive))

    def _clause(
        self, frames: tuple[tuple[str, float], ...], topic: _Topic, noun: str, *, positive: bool
    ) -> str:
        good, bad = self._adjectives(topic.good, _ANY_GOOD), self._adjectives(topic.bad, _ANY_BAD)
        (a, b), (x, y) = (good, bad) if positive else (bad, good)
        hoped, feared = ("hoped", "feared") if positive else ("feared", "hoped")
        (d,), (who,) = self._pick(_DEGREES), self._pick(_PEOPLE)
        text = self._weighted(frames)
        return text.format(n=noun, a=a, b=b, x=x, y=y, d=d, who=who, hoped=hoped, feared=feared)

    def _adjectives(self, own: str, shared: str) -> list[str]:
        return self._pick(own if self.rng.random() < 0.6 else shared, 2)

    def _weighted(self, choices: tuple[tuple[str, float], ...]) -> str:
        """One text of a list that is drawn by its weight."""
        texts, weights = zip(*choices, strict=True)
        return self._pick(str(self.rng.choices(texts, weights)[0]))[0]

    def _pick(self, words: str, count: int = 1) -> list[str]:
        """`count` different entries of a list."""
        seen, _, unseen = words.partition("||")
        use_unseen = self.unseen and unseen and self.rng.random() < _UNSEEN_SHARE
        return self.rng.sample((unseen if use_unseen else seen).split("|"), count)
