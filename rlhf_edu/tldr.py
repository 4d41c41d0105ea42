"""A world of forum posts in which a summary can be judged exactly: the small sibling of TL;DR (DPO paper, section 6.2).

A grammar writes posts about something a person did to the writer's property, between asides that have nothing to do
with it or name people, things and sums that are beside the point. Every fact is a phrase of one slot of `SLOTS`, and
no phrase belongs to two slots, so what a text states can be read off by its phrases: that is the whole judge.
Word order is not judged: "Tom broke my lamp" and "my lamp broke Tom" state the same phrases.
"""

import dataclasses
import functools
import re
import zlib

import datasets
import numpy as np

from .data import MINI
from .errors import UserError
from .models import load_classifier, load_policy
from .tokens import END, PAD, load_tokenizer
from .training import rng

FOLDER = MINI / "tldr"
MARK = "\nTL;DR:"
CONTEXT, LONGEST_SUMMARY = 192, 56  # tokens: of prompt and summary together, of a summary with EOS
WORD_COST = 0.01  # of `score`: a fact is worth 1/8 to 1/5, an aside of eight words costs 0.08
STYLES = ("forum", "news")

SLOTS = {  # slot: its phrases
    "relation": "roommate, sister, brother, boss, neighbor, cousin, nephew, niece, landlord, coworker, teacher, friend",
    "name": "Adam, Alice, Anna, Ben, Carl, Clara, David, Diana, Elena, Emma, Eric, Eva, Felix, Frank, Grace, Hanna, "
    "Hugo, Ida, Ivan, Jack, Jana, Karl, Kate, Laura, Leo, Lily, Lucas, Mara, Mark, Nina, Noah, Oscar, Paul, Rosa, Sam, "
    "Sara, Simon, Tina, Tom, Zoe",
    "action": "broke, lost, sold, stole, hid, burned, ruined, borrowed, kept, dropped",
    "object": "guitar, bike, laptop, phone, camera, watch, lamp, car, couch, jacket, ring, piano, tent, mirror, table, "
    "fridge, drone, violin",
    "when": ", ".join(
        f"{number} {unit}"
        for number in ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
        for unit in ("days", "weeks", "months")
    ),
    "place": "party, office, beach, wedding, gym, library, hospital, airport, church, school, market, station",
    "amount": ", ".join(
        f"{n} dollars" for n in (40, 50, 60, 70, 80, 90, 120, 150, 200, 250, 300, 400, 500, 600, 800, 900)
    ),
    "request": "call the police, move out, see a lawyer, write a letter, change the locks, ask for money, "
    "tell the family, forgive and forget, say sorry, go home, buy a new one, leave for good",
    "age": ", ".join(map(str, range(18, 36))),
    "town": "Athens, Berlin, Cairo, Dublin, Lima, Lisbon, London, Madrid, Oslo, Paris, Prague, Rome, Vienna, Warsaw",
}
SLOTS = {slot: phrases.split(", ") for slot, phrases in SLOTS.items()}
KEY = tuple(SLOTS)[:8]  # age and town are true but beside the point
# the share of posts that have a slot; all have the others
OPTIONAL = {"when": 0.9, "place": 0.6, "amount": 0.7, "age": 0.4, "town": 0.3}
STATES = {phrase.lower(): (slot, phrase) for slot, phrases in SLOTS.items() for phrase in phrases}
_PHRASES = re.compile(r"\b(" + "|".join(sorted(map(re.escape, STATES), key=len, reverse=True)) + r")\b")

OPENINGS = (
    "hello r/{topic}, first post here.", "long post, sorry.", "throwaway account, you know why.", "this is a strange story.",
    "I never thought that I would write here.", "I need advice, r/{topic}.", "I am an old reader of r/{topic}.",
)  # fmt: skip
TOPICS = ("advice", "family", "money", "life")
STORY = {  # style: sentences with the person, the deed and the thing
    "forum": (
        "my {relation} {name} {action} my {object}.",
        "so my {relation}, {name}, {action} my {object}.",
        "I have a {relation}, {name}, who {action} my {object}.",
        "my {object} is gone: my {relation} {name} {action} it.",
        "I have a problem with my {relation}. {name}, that is the name, {action} my {object}.",
    ),
    "news": (
        "a {relation} {action} the {object} of a reader. the name of the {relation} is {name}.",
        "{name}, the {relation} of a reader, {action} a {object}.",
        "a {object} is the problem of a reader. {name} {action} it, a {relation}.",
    ),
}
DETAILS = {  # style: slot: sentences with it
    "forum": {
        "when": ("this was {when} ago.", "it happened {when} ago.", "that day was {when} ago, and I am still angry."),
        "place": ("we were at the {place}.", "it happened at the {place}.", "people saw it at the {place}."),
        "amount": ("it cost me {amount}.", "I paid {amount} for it.", "a new {object} costs {amount}."),
        "age": ("I am {age}.", "I am {age} years old and tired."),
        "town": ("I live in {town}.", "this is in {town}, by the way."),
    },
    "news": {
        "when": ("{when} ago the day of this story began.", "the people here still know that day, {when} ago."),
        "place": ("at the {place} it happened.", "the {place}, where people saw it, is still open."),
        "amount": ("{amount}, that is what it cost.", "the reader paid {amount}."),
        "age": ("the reader is {age} years old.",),
        "town": ("{town} is where this happened.",),
    },
}  # fmt: skip
REQUESTS = {
    "forum": ("should I {request}?", "is it wrong to {request}?", "I want to {request}, what do you think?",
              "do you think that I should {request}?"),
    "news": ("the reader wants to {request}.", "to {request}, is it wrong, the reader wants to know."),
}  # fmt: skip
ASIDES = {  # beside the point; the second kind names people, things and sums of another story
    "forum": (
        ("it is raining again today.", "my cat is asleep on the bed.", "I drink too much coffee.", "sorry for my english.",
         "I do not sleep well.", "the summer was very hot this year.", "I like to cook in the evening.",
         "my back hurts, I work too much.", "there is a good film on tonight.", "nobody reads this, I know.",
         "I write this in the kitchen.", "the bus was late again this morning.", "all windows are open.",
         "my cat wants to sleep where I sleep."),
        ("my {relation} {name} says that I worry too much.", "I told {name} and we laughed.",
         "last year I bought a {object} for {amount}.", "{when} ago I began a new job.",
         "I was at the {place} this morning.", "some people say that I should {request}, but no.",
         "{name} has an old {object} too."),
    ),
    "news": (
        ("it is raining in the evening.", "the summer was hot.", "nobody was asleep.", "the bus to work was late.",
         "people like a strange story.", "the coffee there is good."),
        ("{name} from work, a {relation} too, laughed.", "a {object} is not new for {name}.",
         "last year it was {amount}.", "the job of {name} began {when} ago.", "the {place} is old.",
         "to {request} is what some people like."),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Post:
    """text: what is to be summarized; facts: slot of `SLOTS` -> phrase, only the slots this post has."""

    text: str
    facts: dict
    style: str = "forum"

    @property
    def prompt(self) -> str:
        return self.text + MARK


def posts(count: int, seed: int = 0, style: str = "forum") -> list[Post]:
    """The first `count` posts of this seed. "forum" is what the policies learn; "news" tells the same kind of
    stories in the third person, in other sentences and another order: out of distribution."""
    if style not in STYLES:
        raise UserError(f"there are no posts of style {style!r}: use one of {', '.join(STYLES)}")
    if count < 0:
        raise UserError(f"{count} posts are asked for: take 0 or more")
    rng(seed)  # says what a seed must be, also where no post is drawn
    return [_post(rng(seed, 101, STYLES.index(style), number), style) for number in range(count)]


def _post(generator, style: str) -> Post:
    facts = _values(generator)
    facts = {slot: facts[slot] for slot in SLOTS if generator.random() < OPTIONAL.get(slot, 1)}
    story = [_one(generator, STORY[style]).format(**facts)]
    details = [
        _one(generator, sentences).format(**facts)
        for slot, sentences in DETAILS[style].items()
        if slot in facts
    ]
    details = [details[i] for i in generator.permutation(len(details))]
    ending = [_one(generator, REQUESTS[style]).format(**facts)]
    sentences = (
        [*story, *details, *ending] if style == "forum" else [*details[:1], *ending, *details[1:], *story]
    )
    for _ in range(int(generator.integers(5))):
        kind = ASIDES[style][int(generator.random() < 0.55)]
        aside = _one(generator, kind).format(**_values(generator, facts))
        if aside not in sentences:
            sentences.insert(int(generator.integers(len(sentences) + 1)), aside)
    if style == "forum" and generator.random() < 0.6:
        sentences.insert(0, _one(generator, OPENINGS).format(topic=_one(generator, TOPICS)))
    return Post(" ".join(sentences), facts, style)


def _values(generator, besides: dict | None = None) -> dict:
    """A phrase for each slot, none of them in `besides`."""
    besides = besides or {}
    return {
        slot: _one(generator, [p for p in phrases if p != besides.get(slot)])
        for slot, phrases in SLOTS.items()
    }


def _one(generator, choices):
    return choices[int(generator.integers(len(choices)))]


def reference_summary(post: Post, seed: int = 0) -> str:
    """What a hurried person would write: true throughout, but facts are left out and asides slip in."""
    generator = rng(seed, 103, zlib.crc32(post.text.encode()))
    share = _one(generator, (0.5, 0.7, 0.85, 1.0))
    kept = [s for s in KEY if s in post.facts and (generator.random() < share or s == "object")]
    kept += [slot for slot in ("age", "town") if slot in post.facts and generator.random() < 0.25]
    asides = int(generator.choice(3, p=(0.6, 0.3, 0.1)))
    return write_summary(post, kept, generator, asides=asides)


def full_summary(post: Post, seed: int = 0) -> str:
    """All key facts and nothing else."""
    return write_summary(post, [slot for slot in KEY if slot in post.facts], rng(seed, 107))


def write_summary(post: Post, slots, generator, *, asides: int = 0) -> str:
    """A summary that states the facts of these slots, "object" among them, in a phrasing drawn from `generator`."""
    facts = {slot: post.facts[slot] for slot in slots}
    forum = post.style == "forum"
    my, self_, want = ("my", "I", "should I") if forum else ("the", "the reader", "the reader wants to")
    who = {
        (True, True): _one(generator, (f"{my} {{relation}} {{name}}", f"{{name}}, {my} {{relation}},")),
        (True, False): f"{my} {{relation}}",
        (False, True): "{name}",
        (False, False): "somebody",
    }["relation" in facts, "name" in facts]
    what = f"{who} {{action}} {my} {{object}}"
    if "action" not in facts:
        what = f"trouble with {who} about {my} {{object}}"
    added = [
        text
        for slot, text in (("when", " {when} ago"), ("place", " at the {place}"))
        if slot in facts
    ]  # fmt: skip
    parts = [what + "".join(added[i] for i in generator.permutation(len(added)))]
    if "amount" in facts:
        parts.append(_one(generator, ("it cost {amount}", "{amount}", "that is {amount}")))
    sentences = [_one(generator, ("", "", "so ", "long story: ")) + ", ".join(parts) + "."]
    if {"age", "town"} & set(facts):
        verbs = [v for s, v in (("age", "{age} years old"), ("town", "from {town}")) if s in facts]
        sentences.insert(0, f"{self_} am " * forum + f"{self_} is " * (not forum) + " and ".join(verbs) + ".")
    if "request" in facts:
        mark = "?" if forum else "."
        sentences.append(_one(generator, (f"{want} {{request}}{mark}", "{request}?", f"{self_} " + "want"
                         + "s" * (not forum) + " to {request}.")))  # fmt: skip
    for _ in range(asides):
        sentences.insert(int(generator.integers(len(sentences) + 1)), _one(generator, ASIDES[post.style][0]))
    return " ".join(sentences).format(**facts)


def statements(text: str) -> set[tuple[str, str]]:
    """The (slot, phrase) pairs that a text states."""
    return {STATES[phrase] for phrase in _PHRASES.findall(text.lower())}


def judge_summary(post: Post, summary: str) -> dict:
    """Exact counts, and `score` = (key facts stated - inventions) / key facts of the post - 0.01 * words.

    faithful: share of the stated facts that are the post's; covered: share of the post's key facts that are stated
    (both 0 where nothing is); invented: stated facts that are not the post's, whether made up or taken from an aside;
    ended: whether it ends with a full stop or a question mark. An empty summary has score 0; inventing is worse.
    """
    if not isinstance(summary, str):
        raise UserError(
            f"a summary must be text, but this one is a {type(summary).__name__}: decode it first"
        )
    stated, true = statements(summary), set(post.facts.items())
    key = {(slot, phrase) for slot, phrase in true if slot in KEY}
    right, invented, words = len(stated & key), len(stated - true), len(re.findall(r"[^\s.,:?!]+", summary))
    return {
        "faithful": len(stated & true) / len(stated) if stated else 0.0,
        "covered": right / len(key),
        "invented": invented,
        "words": words,
        "ended": summary.rstrip().endswith((".", "?")),
        "score": (right - invented) / len(key) - WORD_COST * words,
    }


def scores(some_posts, summaries) -> np.ndarray:
    """(n,) `judge_summary(...)["score"]` of each."""
    if len(some_posts) != len(summaries):
        raise UserError(f"{len(some_posts)} posts do not go with {len(summaries)} summaries: give one each")
    return np.array([judge_summary(p, s)["score"] for p, s in zip(some_posts, summaries, strict=True)])


def dataset(count: int, seed: int = 0, style: str = "forum") -> datasets.Dataset:
    """Posts with one reference summary each, as TRL takes them: {"prompt", "completion"}."""
    rows = posts(count, seed, style)
    return datasets.Dataset.from_list(
        [{"prompt": p.prompt, "completion": reference_summary(p, seed)} for p in rows]
    )


def vocabulary() -> list[str]:
    """Every word that the grammar can write, and the marks between them."""
    texts = [*OPENINGS, "somebody trouble with about ago at from am is so long story should"]
    for style in STYLES:
        texts += [*STORY[style], *REQUESTS[style], *ASIDES[style][0], *ASIDES[style][1]]
        texts += [sentence for sentences in DETAILS[style].values() for sentence in sentences]
    texts = [re.sub(r"\{\w+\}", " ", text) for text in texts] + [p for ps in SLOTS.values() for p in ps]
    texts += [f"r/{topic}" for topic in TOPICS]
    return sorted({word for text in texts for word in re.findall(r"[^\s.,:?]+", text) if word != "r/"})


def make_tokenizer():
    """One token a word, with the space before it, and one for each of . , : ? and the mark; round trips exactly."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [END, PAD, MARK, "<|unknown|>", ".", ",", ":", "?", *(f"▁{word}" for word in vocabulary())]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|unknown|>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex("[.,:?]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_tokens([AddedToken(MARK, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, unk_token="<|unknown|>",
        clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
    )  # fmt: skip


@functools.cache
def tokenizer():
    """The shipped one."""
    return load_tokenizer(FOLDER / "tokenizer")


def load(name: str = "sft"):
    """(model, tokenizer) of a shipped checkpoint: "sft", "dpo", "ppo", "preferred_ft" or "reward"."""
    if name not in (names := ("sft", "preferred_ft", "dpo", "ppo", "reward")):
        raise UserError(f"there is no checkpoint {name!r} of the TL;DR world: use one of {', '.join(names)}")
    return (load_classifier if name == "reward" else load_policy)(FOLDER / name), tokenizer()
