"""Where the words of a prompt's turns lie in its rendered text.

A turn's words are what changes in the text when the turn says something else, whatever the template
writes around them:

    <s><system> Be brief. </system><user> Sky? </user><assistant> Blue. </assistant><user> Grass
                `-------'                `--'                                              `----
                 system                  first                                             later
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastdpo.data.normalize import Messages

_SYSTEM = ("system", "developer")
_OTHER_WORDS = "\ue000"  # of no language


@dataclass(frozen=True, slots=True)
class PromptTurns:
    """Places in a prompt, as characters of its text or as its tokens.

    Attributes:
        system: the first place of the words of a leading system turn, and the one behind them;
            both are `first` where there is none.
        first: where the words of the first other turn begin.
        later: where those of the later turns of its role begin.
    """

    system: tuple[int, int]
    first: int
    later: tuple[int, ...] = ()

    def places(self) -> Iterator[int]:
        """All places in order."""
        yield from (*self.system, self.first, *self.later)


def find_turns(
    messages: Messages, text: str, render: Callable[[Messages], str]
) -> PromptTurns | None:
    """Find the turns of a rendered prompt, in characters.

    Args:
        messages: the turns.
        text: how they were rendered.
        render: renders other turns likewise; one rendering for each turn that is looked for.

    Returns:
        None where there is none but a system turn, or the template does not show a turn's words.
    """
    opens = bool(messages) and messages[0]["role"] in _SYSTEM
    if len(messages) <= opens:
        return None
    role = messages[opens]["role"]

    def words(index: int) -> tuple[int, int]:
        other = {**messages[index], "content": _OTHER_WORDS}
        changed = render([*messages[:index], other, *messages[index + 1 :]])
        start = _alike(text, changed)
        longest = min(len(text), len(changed)) - start
        return start, len(text) - min(longest, _alike(text[::-1], changed[::-1]))

    first = words(int(opens))[0]
    later = [words(i)[0] for i in range(opens + 1, len(messages)) if messages[i]["role"] == role]
    found = PromptTurns(words(0) if opens else (first, first), first, tuple(later))
    places = list(found.places())
    return found if places == sorted(places) and places[-1] < len(text) else None


def _alike(text: str, other: str) -> int:
    """How many characters two texts share at their start, found by bisection."""
    least, most = 0, min(len(text), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if text[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def keep_turns(prompt: list[int], keep: int, turns: PromptTurns) -> list[int] | None:
    """Shorten a prompt to at most `keep` tokens by its oldest turns.

    What stands before the first turn's words stays: the system turn, and the header of a turn of
    this role. Then come the words of the first later turn of the role from which on all fits. Of
    the last one, if it is too long itself, the end of its words stays; of a system turn for which
    it leaves no room, the end of its words, a quarter of what is kept at most.

    Returns:
        None where `keep` tokens do not hold the headers, or a turn begins behind the prompt.
    """
    if len(prompt) <= keep:
        return prompt
    start, end = turns.system
    first, later = turns.first, turns.later
    if max(turns.places()) >= len(prompt):
        return None
    for place in later:
        if first + len(prompt) - place <= keep:
            return prompt[:first] + prompt[place:]
    room = keep - start - (first - end)
    if room < 2:
        return None
    longest = len(prompt) - (later[-1] if later else first)
    of_turn = min(longest, max(room - room // 4, room - (end - start)))
    of_system = room - of_turn
    system = prompt[:start] + prompt[end - of_system : first]
    return system + prompt[len(prompt) - of_turn :]
