"""Small data sets that peftkit makes itself, for when no real one can be reached.

Called by `sources`; imports only `errors` and `splits`. A run on a sample is marked as a stand-in
everywhere. `reviews` is sentiment by composition: negation, and contrasts in which the main clause
decides, so that counting words is not enough.
"""

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.data.splits import normalised
from peftkit.errors import SourceError, suggestion

if TYPE_CHECKING:
    import datasets

SAMPLE_NAMES = ("reviews",)
_LABELS = {"reviews": ["negative", "positive"]}


class _Topic(NamedTuple):
    places: str
    nouns: str
    good: str
    bad: str


# Lists are split at "|". Train draws from the front of each, validation evenly: the words at the
# ends are rare in train.
_TOPICS = (
    _Topic(
        "in this film|for a sequel|on the big screen|in the second half",
        "plot|acting|dialogue|ending|soundtrack|pacing|camera work|lead performance|script|editing"
        "|opening scene|chemistry between the leads|supporting cast|final twist",
        "gripping|funny|moving|original|believable|tense|witty|inventive|tender|hypnotic",
        "predictable|wooden|tedious|clumsy|shallow|forced|incoherent|lifeless|contrived|grating",
    ),
    _Topic(
        "in this novel|for a debut|from the first page|in the later chapters",
        "story|prose|narrator|first chapter|translation|main character|plot|mystery|setting"
        "|middle section|family portrait|historical detail|epilogue|choice of words",
        "absorbing|elegant|vivid|thoughtful|convincing|rich|lyrical|sharp|humane|luminous",
        "dull|confusing|repetitive|flat|stilted|bloated|preachy|implausible|plodding|muddled",
    ),
    _Topic(
        "at this place|on our last visit|for a weekday lunch|at these prices",
        "soup|bread|dessert|pasta|fish|coffee|pizza|house salad|curry|grilled lamb|chowder"
        "|tasting menu|mushroom risotto|lemon tart",
        "delicious|fresh|tasty|light|fragrant|flavourful|balanced|wholesome|velvety|comforting",
        "bland|greasy|stale|heavy|overcooked|salty|soggy|watery|tasteless|rancid",
    ),
    _Topic(
        "on this model|after two weeks|out of the box|since the update",
        "screen|keyboard|camera|battery|touchpad|speaker|remote|microphone|companion app|stylus"
        "|docking station|fingerprint reader|motion sensor|volume dial",
        "reliable|responsive|precise|intuitive|sturdy|well made|handy|polished|seamless|dependable",
        "unreliable|sluggish|flimsy|useless|fiddly|laggy|defective|glitchy|erratic|shoddy",
    ),
    _Topic(
        "in this hotel|during our stay|for a short trip|on the upper floors",
        "room|lobby|bathroom|lounge|bar|breakfast room|terrace|suite|spa|gym|rooftop pool|sauna"
        "|conference hall|reading room",
        "clean|comfortable|spacious|welcoming|cosy|spotless|inviting|tranquil|charming|well kept",
        "dirty|cramped|noisy|shabby|uncomfortable|musty|neglected|chaotic|gloomy|draughty",
    ),
)
_ANY_GOOD = "good|great|excellent|lovely|impressive|pleasant|superb|delightful|first-rate|memorable"
_ANY_BAD = "bad|poor|awful|terrible|disappointing|annoying|dreadful|mediocre|lousy|forgettable"
_DEGREES = "really|quite|very|rather|surprisingly|consistently|truly|remarkably"
_LEADS = "honestly|to be fair|in my opinion|all in all|for what it is worth|as far as I can tell"

# {n} noun, {a} adjective, {d} degree. A negated frame says the opposite of its adjective; a decoy
# holds a negation word that leaves the adjective as it is.
_PLAIN = (
    "the {n} was {a}|the {n} was {d} {a}|I found the {n} {a}|the {n} felt {d} {a}"
    "|the {n} turned out to be {a}|the {n} struck me as {d} {a}"
)
_NEGATED = (
    "the {n} was not {a}|the {n} was never {a}|I did not find the {n} {a}|the {n} was hardly {a}"
    "|nobody could call the {n} {a}|the {n} was anything but {a}|the {n} was not at all {a}"
    "|I would not say that the {n} was {a}"
)
_DECOYS = (
    "the {n} was nothing if not {a}|there is no doubt that the {n} was {a}"
    "|the {n} never stopped being {a}|I could not believe how {a} the {n} was"
    "|I did not expect the {n} to be this {a}|nobody can deny that the {n} was {a}"
)
# {main} decides the label, {other} says the opposite, {same} agrees.
_CONTRASTS = (
    "although {other}, {main}|{main}, although {other}|{other}, but {main}"
    "|{main}, even though {other}|even though {other}, {main}|while {other}, {main}"
    "|{main}, while admittedly {other}|{other}; still, {main}|it is true that {other}, yet {main}"
    "|{main}, and never mind that {other}"
)
_AGREEMENTS = (
    "{main}, and {same}|{main} and {same}|{main}; also, {same}|{main}; not only that, {same}"
)

# The shares put a bag of words at about four right answers in five.
_FRAMES = ((_PLAIN, 0.74), (_NEGATED, 0.13), (_DECOYS, 0.13))
_SHAPES = (("{main}", 0.45), (_AGREEMENTS, 0.25), (_CONTRASTS, 0.3))


def make_sample(name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split; the same on every machine and in every process.

    `reviews`: `sentence` and `label` (0 negative, 1 positive), 4,000 train and 800 validation
    rows, labels balanced, no sentence twice.

    Raises:
        SourceError: no sample has this name.
    """
    if name not in SAMPLE_NAMES:
        raise SourceError(f"sample:{name}: unknown sample, {suggestion(name, SAMPLE_NAMES)}")
    # A string seed is hashed by SHA-512, not by the process's own string hash.
    rng = random.Random("peftkit reviews 1")
    seen: set[str] = set()
    validation = _rows(_Writer(rng, skew=1.0), 800, seen)
    return {"train": _rows(_Writer(rng, skew=2.0), 4000, seen), "validation": validation}


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
    writer.rng.shuffle(rows)
    return rows


class _Writer:
    """Draws sentences of a given sentiment; `skew` 1 draws evenly, more prefers a list's front."""

    def __init__(self, rng: random.Random, *, skew: float) -> None:
        self.rng = rng
        self.skew = skew

    def sentence(self, *, positive: bool) -> str:
        topic = self.rng.choice(_TOPICS)
        noun = second = self._pick(topic.nouns)
        while second == noun:
            second = self._pick(topic.nouns)
        text = self._pick(self._weighted(_SHAPES)).format(
            main=self._clause(topic, noun, positive=positive),
            same=self._clause(topic, second, positive=positive),
            other=self._clause(topic, second, positive=not positive),
        )
        if self.rng.random() < 0.3:
            text = f"{self._pick(_LEADS)}, {text}"
        if self.rng.random() < 0.3:
            text = f"{text} {self._pick(topic.places)}"
        return f"{text[0].upper()}{text[1:]}."

    def _clause(self, topic: _Topic, noun: str, *, positive: bool) -> str:
        frames = self._weighted(_FRAMES)
        good_word = positive != (frames is _NEGATED)
        words = f"{topic.good}|{_ANY_GOOD}" if good_word else f"{topic.bad}|{_ANY_BAD}"
        return self._pick(frames).format(n=noun, a=self._pick(words), d=self._pick(_DEGREES))

    def _weighted(self, choices: tuple[tuple[str, float], ...]) -> str:
        texts, weights = zip(*choices, strict=True)
        return str(self.rng.choices(texts, weights)[0])

    def _pick(self, words: str) -> str:
        choices = words.split("|")
        return choices[int(len(choices) * self.rng.random() ** self.skew)]
