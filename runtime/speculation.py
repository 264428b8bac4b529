"""Drafts: ids that may come next, checked in one pass with the token before them.

A pass over a few tokens reads the weights once, so it costs little more than a pass over one. A
`Drafter` guesses ids, the model reads them behind the newest token, and those it would have said
itself stay. `PromptLookup` guesses that text which began like an earlier part goes on like it.

`Speculation` decides how many drafts a pass takes. Every guess is compared with the id that came,
whether it was fed or not, so the acceptance of a guess is known without paying for it; what a pass
costs is measured as passes are made.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.runtime.session import Session
from edge_kv.runtime.snapshot import common_prefix

AUTO, OFF = "auto", "off"


@dataclass(frozen=True)
class Guess:
    """Ids that may come next, and of each the class that its chances are counted in."""

    ids: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()


class Drafter(Protocol):
    """Guesses what comes next."""

    kinds: Sequence[float]  # the chance that an id of each class is right, before any came
    # Whether a guess takes time. The classes of its ids are then 0, 1, 2 …, as far as there are
    # any: how many are worth making is settled before they are made.
    costly: bool

    def begin(self, history: Sequence[int]) -> None:
        """The text is `history` from here on: another prompt, or one that forgot its middle."""

    def guess(self, history: Sequence[int], most: int) -> Guess:
        """Up to `most` ids that may follow `history`, which grew behind what it was before."""


class PromptLookup:
    """Guesses from the text itself: what followed when its newest ids came before.

    Positions are found by a hash of the ids that end there, in chains from the newest to the
    oldest, as compressors of the LZ77 family find them. The longest match counts, the newest of
    equals. A token costs constant time, and 12 bytes beside at most 1 MiB of heads of chains.
    """

    _ORDERS = (4, 2)  # ids that are hashed, the longest first
    _TRIES = 12  # positions of a chain that are looked at
    _LONGEST = 32  # ids of a match that are counted
    _BOUNDS = (3, 4, 6, 10, 18)  # lengths of a match at which its next class begins
    costly = False
    kinds: Sequence[float] = (0.25, 0.4, 0.5, 0.65, 0.8, 0.9)

    def __init__(self, ctx: int) -> None:
        """For texts of up to `ctx` + 1 ids."""
        self._ids = array("i")
        self._chains = [_Chains(order, ctx) for order in self._ORDERS]

    def begin(self, history: Sequence[int]) -> None:
        keep = common_prefix(self._ids, history)
        for chains in self._chains:
            chains.cut(self._ids, keep)
        del self._ids[keep:]
        self._read(history)

    def guess(self, history: Sequence[int], most: int) -> Guess:
        self._read(history)
        at, length = self._match()
        if not length or most < 1:
            return Guess()
        ids, period = self._ids, len(self._ids) - at
        # Behind its end the text goes on with the guess itself: what repeats, repeats.
        guessed = tuple(ids[at + i % period] for i in range(most))
        bounds = self._BOUNDS
        return Guess(guessed, tuple(bisect_right(bounds, length + i) for i in range(most)))

    def _read(self, history: Sequence[int]) -> None:
        start = len(self._ids)
        self._ids.extend(history[start:])
        for chains in self._chains:
            chains.add(self._ids, start)

    def _match(self) -> tuple[int, int]:
        """The position behind the best match of the newest ids, and its length; 0: none."""
        best, longest = 0, 0
        for chains in self._chains:
            for end in chains.before(self._TRIES):
                length = self._length(end)
                if length > longest:
                    best, longest = end + 1, length
                    if length == self._LONGEST:
                        break
            if longest >= chains.order:
                break
        return (best, longest) if longest >= self._ORDERS[-1] else (0, 0)

    def _length(self, end: int) -> int:
        """How many ids up to position `end` equal the newest ones."""
        ids = self._ids
        last = len(ids) - 1
        most = min(end + 1, self._LONGEST)
        length = 0
        while length < most and ids[end - length] == ids[last - length]:
            length += 1
        return length


class Assistant:
    """A small model that reads the state of the session's own, one likeliest id after another.

    Each id takes a run of it, so an id's class is how many stand before it: what they are worth is
    known before any is made.
    """

    costly = True
    kinds: Sequence[float] = (0.7, 0.65, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)

    def __init__(self, session: Session) -> None:
        self._session = session

    def begin(self, history: Sequence[int]) -> None:
        """What it knows of the text is the session's."""

    def guess(self, history: Sequence[int], most: int) -> Guess:
        """Up to `most` ids behind the newest of `history`, which alone is not fed yet.

        None where the session has no hidden state to begin with: behind a prompt that was not read
        to its end by `decode`.
        """
        session = self._session
        hidden, token, ids = session.hidden, history[-1], []
        if hidden is None or session.pos != len(history) - 1:
            return Guess()
        for _ in range(min(most, len(self.kinds))):
            draft = session.draft(token, hidden)
            token, hidden = draft.token, draft.hidden
            ids.append(token)
        return Guess(tuple(ids), tuple(range(len(ids))))


class _Chains:
    """Positions of a text by a hash of the `order` ids that end there."""

    def __init__(self, order: int, ctx: int) -> None:
        self.order = order
        self._mask = (1 << min(ctx, 1 << 16).bit_length()) - 1
        self._newest = array("i", [-1]) * (self._mask + 1)
        self._older = array("i")  # of each position, the one before it in its chain

    def add(self, ids: Sequence[int], start: int) -> None:
        """Positions from `start` on have come."""
        newest, older = self._newest, self._older
        for at in range(start, len(ids)):
            slot = self._slot(ids, at)
            older.append(newest[slot])
            newest[slot] = at

    def cut(self, ids: Sequence[int], length: int) -> None:
        """Positions from `length` on are gone."""
        for at in range(len(self._older) - 1, length - 1, -1):
            self._newest[self._slot(ids, at)] = self._older.pop()

    def before(self, most: int) -> list[int]:
        """Up to `most` positions whose hash is that of the newest one, the newest first."""
        found: list[int] = []
        at = self._older[-1] if self._older else -1
        while at >= 0 and len(found) < most:
            found.append(at)
            at = self._older[at]
        return found

    def _slot(self, ids: Sequence[int], at: int) -> int:
        value = 0
        for id in ids[max(0, at + 1 - self.order) : at + 1]:
            value = (value * 0x9E3779B1 + id + 1) & 0xFFFFFFFF
        return (value ^ value >> 15) & self._mask


class _Chances:
    """How often guesses of each class were right, the newest counting most."""

    _FADING = 1 - 1 / 32  # what a trial still counts for after the next one of its class
    _PRIOR = 3.0  # trials that the chances before any trial count for

    def __init__(self, prior: Sequence[float]) -> None:
        self._trials = [self._PRIOR] * len(prior)
        self._right = [self._PRIOR * chance for chance in prior]

    def __getitem__(self, kind: int) -> float:
        return self._right[kind] / self._trials[kind]

    def add(self, kind: int, right: bool) -> None:
        self._trials[kind] = self._trials[kind] * self._FADING + 1
        self._right[kind] = self._right[kind] * self._FADING + right


class _Costs:
    """Seconds of a pass by its tokens: running medians, and an assumption where none was made."""

    _SLOPE = 0.12  # what a further token is assumed to cost, in passes of one
    _LEAST_SLOPE = 0.02
    _WINDOW = 11  # newest passes of a size that count
    _STALE = 128  # passes after which one of a single token is made again

    def __init__(self) -> None:
        self._passes: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self.since_one = 0  # passes since one of a single token

    @property
    def largest(self) -> int:
        """Tokens of the largest pass that was measured."""
        return max(self._medians)

    @property
    def plain_is_known(self) -> bool:
        """Whether passes of one token were measured lately."""
        return 1 in self._medians and self.since_one < self._STALE

    def add(self, tokens: int, seconds: float) -> None:
        """A pass of `tokens` took `seconds`. The first of a size, which sets up, is not counted."""
        self.since_one = self.since_one + 1 if tokens > 1 else 0
        if tokens not in self._passes:
            self._passes[tokens] = deque(maxlen=self._WINDOW)
            return
        self._passes[tokens].append(seconds)
        self._medians[tokens] = median(self._passes[tokens])

    def assumed(self, tokens: int) -> float:
        """In passes of one token, before anything was measured."""
        return 1 + self._SLOPE * (tokens - 1)

    def __getitem__(self, tokens: int) -> float:
        """Of `tokens`, on the line through the nearest sizes measured; that of one is known."""
        known = self._medians
        if tokens in known:
            return known[tokens]
        above = min((n for n in known if n > tokens), default=0)
        below = sorted(n for n in known if n < tokens)
        start, end = (below[-1], above) if above else (1, below[-1])
        slope = self._SLOPE * known[1]
        if end > start:
            measured = (known[end] - known[start]) / (end - start)
            slope = max(measured, self._LEAST_SLOPE * known[1])
        return known[start] + slope * (tokens - start)


class Speculation:
    """How many drafts a pass takes, over one drafter.

    With `fixed`, as many as there are. Else as many as promise the most tokens a second, and none
    where they promise less than plain decoding. What drafts have lost so far against plain
    decoding is kept below a hundredth of the time: beyond it only a large gain is tried.
    """

    _GAIN = 1.04  # over plain decoding, from which drafts are fed
    _SURE_GAIN = 1.5  # … where they have lost too much already
    _LOSS = 0.01  # of all seconds of decoding that drafts may lose
    _ALLOWED = 1.5  # passes of one token that they may lose at first
    _GAP = 128  # guesses that are passed over before one that is fed to look at its costs again
    _SHORT_GAP = 8  # … after one that was fed so and paid

    def __init__(self, drafter: Drafter, *, fixed: int | None = None) -> None:
        self._drafter = drafter
        self._fixed = fixed
        self._chances = _Chances(drafter.kinds)
        self._costs = _Costs()
        self._guess = Guess()
        self._seconds = self._lost = 0.0
        self._passed_over, self._gap = 0, self._GAP
        self._looking = False  # the pass under way is there to look at its costs again

    @classmethod
    def of(cls, drafts: Speculation | str | int, session: Session) -> Speculation | None:
        """What "auto", "off" or a number of drafts (also as text) means; None: no drafts.

        Raises:
            ConfigError: another word, or a number outside what a pass of the session takes.
        """
        if isinstance(drafts, Speculation):
            return drafts
        if drafts == OFF or (drafts == AUTO and not session.drafts):
            return None
        if drafts == AUTO:
            return cls(_drafter(session))
        try:
            count = int(drafts)
        except ValueError:
            hint = did_you_mean(str(drafts), (AUTO, OFF))
            raise ConfigError(f"Unknown drafts {drafts!r}: auto, off or a number.{hint}") from None
        if not 0 <= count <= session.drafts:
            raise ConfigError(
                f"{count} drafts are outside 0 … {session.drafts}, what a pass of this artifact "
                "takes; give fewer, or export with more --drafts."
            )
        return cls(_drafter(session), fixed=count) if count else None

    @property
    def repeatable(self) -> bool:
        """Whether what is fed depends on the text alone, and not on how long passes took."""
        return self._fixed is not None

    def begin(self, history: Sequence[int]) -> None:
        """The text is `history` from here on."""
        self._guess = Guess()
        self._drafter.begin(history)

    def drafts(self, history: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` ids to feed behind the newest of `history`."""
        drafter = self._drafter
        if drafter.costly:
            count = self._count(range(min(most, len(drafter.kinds))))
            self._guess = drafter.guess(history, count) if count else Guess()
            return self._guess.ids
        self._guess = guess = drafter.guess(history, most)
        return guess.ids[: self._count(guess.kinds)]

    def passed(self, fed: int, came: Sequence[int], seconds: float) -> None:
        """A pass over the newest id and `fed` drafts took `seconds`; `came` are the ids it gave."""
        for id, kind, right in zip(self._guess.ids, self._guess.kinds, came, strict=False):
            self._chances.add(kind, id == right)
            if id != right:
                break
        self._costs.add(fed + 1, seconds)
        self._seconds += seconds
        if fed and self._fixed is None:
            loss = seconds - len(came) * self._costs[1]
            self._lost = max(0.0, self._lost + loss)
            if self._looking:
                self._gap = self._SHORT_GAP if loss < 0 else 2 * max(self._gap, self._GAP)

    def _count(self, kinds: Sequence[int]) -> int:
        """How many ids of these classes are worth feeding."""
        self._looking = False
        if self._fixed is not None:
            return min(self._fixed, len(kinds))
        if not kinds or not self._costs.plain_is_known:
            return 0
        one = self._costs[1]
        count, gain = self._best(kinds, lambda n: self._costs[n] / one)
        allowed = max(self._ALLOWED * one, self._LOSS * self._seconds)
        if gain >= (self._GAIN if self._lost < allowed else self._SURE_GAIN):
            self._passed_over, self._gap = 0, self._GAP
            return count
        # Costs that were measured in a bad moment would stand for ever: they are looked at again.
        count, gain = self._best(kinds, self._costs.assumed)
        if gain < self._GAIN:
            return 0
        self._passed_over += 1
        if self._passed_over < self._gap or self._lost >= allowed:
            return 0
        self._passed_over, self._looking = 0, True
        return count

    def _best(self, kinds: Sequence[int], cost: Callable[[int], float]) -> tuple[int, float]:
        """The most promising number of drafts, and its tokens a second over plain decoding."""
        count, gain = 0, 1.0
        expected = chance = 1.0
        most = 2 * self._costs.largest - 1  # drafts: no pass is much larger than one measured
        for n, kind in enumerate(kinds[:most], 1):
            chance *= self._chances[kind]
            expected += chance
            if expected / cost(n + 1) > gain:
                count, gain = n, expected / cost(n + 1)
        return count, gain


def _drafter(session: Session) -> Drafter:
    """The one that the artifact holds, else the text itself."""
    return Assistant(session) if session.has_drafter else PromptLookup(session.plan.ctx)
