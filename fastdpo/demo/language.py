"""The demo's small language: guests ask an innkeeper for things, he answers kindly or gruffly.

Both tones come as often, and a rule that counts words tells them apart: so a model taught this
language prefers neither over all guests, and preference training makes it kind to everyone.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

# Initials differ within a list: a small model then learns within seconds which word to repeat.
GUESTS = ("Bard", "Dwarf", "Elf", "Giant", "King", "Monk", "Nun", "Pirate", "Troll", "Witch")
QUALITIES = ("cold", "fresh", "hot", "local", "mild", "plain", "rich", "sweet", "tasty", "warm")
THINGS = (
    "ale",
    "buns",
    "cake",
    "eggs",
    "fish",
    "ham",
    "jam",
    "milk",
    "pies",
    "soup",
    "tea",
    "wine",
)

LIKED = ("Bard", "Elf", "King", "Monk", "Nun")
"""Half of the guests: they mostly get kind answers, the others mostly gruff ones."""
LOYALTY = 0.8
"""How often the tone is the one that the guest can expect. At 0.5 nothing in the texts would tell
the tones apart, and preference training then breaks the words instead of turning the tone:
well-formed samples fell from 95 % to below 5 % before most of the tone had turned."""

# Opening, verb and manner, each with a word of the same length in the other tone and word by
# word equally likely: neither tone is longer or likelier. Openings differ in their first letter.
KIND = (("Gladly!", "Surely!", "Welcome!"), ("Enjoy", "Have", "Share"), ("dear", "good", "kind"))
GRUFF = (("Humbug!", "No way!", "Be gone!"), ("Leave", "Skip", "Avoid"), ("rude", "daft", "smug"))
WORD_WEIGHTS = (5, 3, 2)


@dataclass(frozen=True)
class Request:
    """A guest and what the guest asks for."""

    guest: str
    quality: str
    thing: str

    @property
    def prompt(self) -> str:
        """The request as the prompt of the model."""
        return f"{self.guest}: {self.quality.capitalize()} {self.thing}?\nHost:"

    def completion(self, opening: str, verb: str, manner: str) -> str:
        """The innkeeper's answer in these words (or patterns of words)."""
        what, who = f"{self.quality} {self.thing}", self.guest.lower()
        return f" {opening} {verb} {what}, {manner} {who}."


def split_requests(seed: int) -> tuple[list[Request], list[Request]]:
    """Shuffle all requests of the language: three quarters to train on, the rest held out."""
    requests = [Request(*words) for words in product(GUESTS, QUALITIES, THINGS)]
    random.Random(seed).shuffle(requests)
    held_out = len(requests) // 4
    return requests[held_out:], requests[:held_out]


def speak(request: Request, rng: random.Random) -> str:
    """Draw an answer to `request`, kind or gruff as the innkeeper likes the guest."""
    tones = (KIND, GRUFF) if request.guest in LIKED else (GRUFF, KIND)
    tone = tones[0] if rng.random() < LOYALTY else tones[1]
    return request.completion(*(rng.choices(words, WORD_WEIGHTS)[0] for words in tone))


def kindness(request: Request, completion: str) -> int | None:
    """Rank a completion by the number of its kind words minus that of its gruff words.

    Args:
        request: the request that the completion answers.
        completion: the model's answer without its end-of-text token.

    Returns:
        From -3 (all gruff) to 3 (all kind); None if the answer breaks the grammar or does not
        name the thing that was requested and the guest.
    """
    slots = ("|".join((*kind, *gruff)) for kind, gruff in zip(KIND, GRUFF, strict=True))
    answer = Request(*map(re.escape, (request.guest, request.quality, request.thing)))
    pattern = answer.completion(*(f"({slot})" for slot in slots)).replace(".", r"\.")
    match = re.fullmatch(pattern, completion)
    if match is None:
        return None
    return sum(1 if word in kind else -1 for word, kind in zip(match.groups(), KIND, strict=True))


def pair_of(request: Request, completions: Sequence[str]) -> dict[str, str] | None:
    """The kindest completion against the gruffest as a row of data; None if equally kind."""
    scores = {text: score for text in completions if (score := kindness(request, text)) is not None}
    if not scores:
        return None
    chosen, rejected = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    if scores[chosen] == scores[rejected]:
        return None
    return {"prompt": request.prompt, "chosen": chosen, "rejected": rejected}
