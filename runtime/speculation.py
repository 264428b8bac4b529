"""Drafts: ids that may come next, checked in one pass with the token before them.

A pass over a few tokens reads the weights once, so it costs little more than a pass over one. A
`Drafter` guesses ids, the model reads them behind the newest token, and those it would have said
itself stay. `PromptLookup` guesses that text which began like an earlier part goes on like it, an
`Assistant` is a small model of its own.

`Speculation` decides for every pass whose drafts it takes and how many. A guess that cost nothing
is compared with the ids that came whether it was fed or not, so its acceptance is known without
paying for it; what passes and drafts cost is measured as they are made.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from edge_kv.errors import ConfigError
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
    equals, and be it of one id: what is copied with changes goes on behind the first id that is
    as before. A token costs constant time, and 16 bytes beside at most 1.5 MiB of heads of chains.
    """

    _ORDERS = (4, 2, 1)  # ids that are hashed, the longest first
    _TRIES = 12  # positions of a chain that are looked at
    _LONGEST = 32  # ids of a match that are counted
    _BOUNDS = (2, 3, 4, 6, 10, 18)  # lengths of a match at which its next class begins
    costly = False
    kinds: Sequence[float] = (0.15, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9)

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
                if length > longest and length >= chains.order:  # else only the hash is the same
                    best, longest = end + 1, length
                    if length == self._LONGEST:
                        break
            if longest:
                break
        return best, longest

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

    def __init__(self) -> None:
        self._passes: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    @property
    def largest(self) -> int:
        """Tokens of the largest pass that was measured."""
        return max(self._medians)

    def __contains__(self, tokens: int) -> bool:
        """Whether a pass of so many was measured."""
        return tokens in self._medians

    def add(self, tokens: int, seconds: float) -> None:
        """A pass of `tokens` took `seconds`. The first of a size, which sets up, is not counted."""
        if tokens not in self._passes:
            self._passes[tokens] = deque(maxlen=self._WINDOW)
            return
        self._passes[tokens].append(seconds)
        self._medians[tokens] = median(self._passes[tokens])

    def forget(self) -> None:
        """Of passes of several tokens, all that was measured."""
        self._passes, self._medians = {1: self._passes[1]}, {1: self._medians[1]}

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


class _Way:
    """One drafter: what its guesses are worth, and what they take."""

    _ASSUMED = 0.06  # what a costly guess is assumed to take, in passes of one
    _WINDOW = 11  # newest bursts of guesses that count
    GAP = 128  # guesses that are passed over before one that is fed to look at its costs again

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.chances = _Chances(drafter.kinds)
        self.guess = Guess()
        self._times: deque[float] | None = None  # seconds a guess; None: none was made
        self._each = -1.0  # their median; below 0: not known
        self.passed_over, self.gap = 0, self.GAP

    def kinds(self, history: Sequence[int], most: int) -> Sequence[int]:
        """The classes of up to `most` guesses, which are made if that takes no time."""
        self.guess = Guess()
        if self.drafter.costly:
            return range(min(most, len(self.drafter.kinds)))
        self.guess = self.drafter.guess(history, most)
        return self.guess.kinds

    def ids(self, history: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` guesses, or as many as there are."""
        if self.drafter.costly:
            self.guess = self.drafter.guess(history, count)
        return self.guess.ids[:count]

    def learn(self, came: Sequence[int]) -> None:
        """What was guessed may be compared with the ids that came."""
        for id, kind, right in zip(self.guess.ids, self.guess.kinds, came, strict=False):
            self.chances.add(kind, id == right)
            if id != right:
                break

    def took(self, count: int, seconds: float) -> None:
        """`count` guesses took `seconds`. The first ones, which set up, are not counted."""
        if self._times is None:
            self._times = deque(maxlen=self._WINDOW)
            return
        self._times.append(seconds / count)
        self._each = median(self._times)

    def cost(self, count: int, costs: _Costs, *, assumed: bool = False) -> float:
        """A pass with so many guesses, in passes of one token.

        By what passes and guesses were measured to take, or as before anything was measured.
        """
        each = self._ASSUMED if self.drafter.costly else 0.0
        if assumed:
            return count * each + costs.assumed(count + 1)
        if self._each >= 0:
            each = self._each / costs[1]
        return count * each + costs[count + 1] / costs[1]

    def best(
        self, kinds: Sequence[int], costs: _Costs, room: float, *, assumed: bool
    ) -> tuple[int, float]:
        """The most promising number of drafts, and its tokens a second over plain decoding.

        They may cost `room` passes of one token.
        """
        count, gain = 0, 1.0
        most = 2 * costs.largest - 1  # drafts: no pass is much larger than one measured
        for n, tokens in enumerate(_expected(kinds[:most], self.chances), 1):
            cost = self.cost(n, costs, assumed=assumed)
            if cost > 1 + room:
                break
            if tokens / cost > gain:
                count, gain = n, tokens / cost
        return count, gain


class Speculation:
    """Whose drafts a pass takes, and how many.

    With `fixed`, as many as there are, of the drafter that usually has the most right. Else the n
    that promises the most tokens a second. In passes of one token,

        gain(n) = (1 + p1 + p1 p2 + … + p1 p2 … pn) / cost(n),

    where cost(n) is what a pass of n + 1 tokens and n guesses were measured to take, and p what
    guesses of a class were right, the newest counting most. A gain below 1.04 is left alone.

    Drafts may lose a pass of one token against plain decoding, and no more: n is such that
    lost + cost(n) - 1 <= 1, the left side being what is lost where none comes. A pass that gave m
    tokens adds cost(n) - m to `lost`, which is at least -2 within a text and is forgotten by 1/128
    with each pass: text that drafts do nothing for takes 0.8 % and one pass longer at most.
    """

    _GAIN = 1.04  # over plain decoding, from which drafts are fed
    _ALLOWED = 1.0  # passes of one token that drafts may lose …
    _WON = 2.0  # … beyond what they won, of which so much is counted …
    _FORGOTTEN = 1 / 128  # … and what of a loss or a gain is forgotten with each pass
    _STALE = 128  # passes after which one of a single token is made again

    def __init__(self, *drafters: Drafter, fixed: int | None = None) -> None:
        self._ways = [_Way(drafter) for drafter in drafters]
        self._fixed = fixed
        self._costs = _Costs()
        self._chosen: _Way | None = None  # whose drafts are in the pass under way
        self._looking = False  # one is in it to look at the costs again
        self._since_one = 0  # passes since one of a single token
        self._lost = 0.0  # passes of one token; below 0: won

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
            return cls(*_drafters(session))
        try:
            count = int(drafts)
        except ValueError:
            raise ConfigError(f"Drafts {drafts!r} must be auto, off or a number.") from None
        if not 0 <= count <= session.drafts:
            raise ConfigError(
                f"{count} drafts are outside 0 … {session.drafts}, what a pass of this artifact "
                "takes; give fewer, or export with more --drafts."
            )
        return cls(*_drafters(session), fixed=count) if count else None

    @property
    def repeatable(self) -> bool:
        """Whether what is fed depends on the text alone, and not on how long passes took."""
        return self._fixed is not None

    def begin(self, history: Sequence[int]) -> None:
        """The text is `history` from here on."""
        self._lost = max(0.0, self._lost)
        for way in self._ways:
            way.guess = Guess()
            way.drafter.begin(history)

    def drafts(self, history: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` ids to feed behind the newest of `history`."""
        kinds = [(way, way.kinds(history, most)) for way in self._ways]
        self._looking = False
        self._chosen, count = self._choice(kinds) if self._fixed is None else self._usual(kinds)
        return self._chosen.ids(history, count) if self._chosen else ()

    def passed(self, fed: int, came: Sequence[int], seconds: float, drafting: float = 0.0) -> None:
        """A pass over the newest id and `fed` drafts took `seconds`; `came` are the ids it gave.

        The drafts had taken `drafting` seconds before it.
        """
        for way in self._ways:
            way.learn(came)
        costs = self._costs
        faster = self._looking and fed > 0 and seconds < (costs[1] + costs[fed + 1]) / 2
        costs.add(fed + 1, seconds)
        self._since_one = self._since_one + 1 if fed else 0
        self._lost *= 1 - self._FORGOTTEN
        if fed and self._chosen:
            self._chosen.took(fed, drafting)
            if self._fixed is None:
                loss = self._chosen.cost(fed, costs) - len(came)
                self._lost = max(-self._WON, self._lost + loss)
        if faster:
            costs.forget()

    def _usual(self, offers: list[tuple[_Way, Sequence[int]]]) -> tuple[_Way | None, int]:
        """The drafter that has the most right before anything was measured, and a fixed number."""
        best: tuple[_Way | None, int] = (None, 0)
        most = 1.0
        for way, kinds in offers:
            fed = kinds[: self._fixed]
            for tokens in _expected(fed, way.drafter.kinds):
                if tokens > most:
                    best, most = (way, len(fed)), tokens
        return best

    def _choice(self, offers: list[tuple[_Way, Sequence[int]]]) -> tuple[_Way | None, int]:
        """The drafter whose guesses are worth feeding most, and how many of them; None: none."""
        if self._since_one >= self._STALE or 1 not in self._costs:
            return None, 0
        room = self._ALLOWED - self._lost
        best: tuple[_Way | None, int] = (None, 0)
        most = self._GAIN
        for way, kinds in offers:
            count, gain = way.best(kinds, self._costs, room, assumed=False)
            if gain >= most:
                best, most = (way, count), gain
        if best[0]:
            best[0].passed_over, best[0].gap = 0, _Way.GAP
            return best
        # Costs that were measured in a bad moment would stand for ever: one draft looks at them.
        for way, kinds in offers:
            gain = way.best(kinds, self._costs, room, assumed=True)[1]
            way.passed_over += gain >= self._GAIN
            if way.passed_over >= way.gap and room > 0:
                way.passed_over, way.gap, self._looking = 0, 2 * way.gap, True
                return way, 1
        return None, 0


class _Shares(Protocol):
    def __getitem__(self, kind: int) -> float: ...


def _expected(kinds: Sequence[int], chances: _Shares) -> Iterator[float]:
    """Tokens that a pass gives on average, with 1, 2 … guesses of these classes."""
    tokens = chance = 1.0
    for kind in kinds:
        chance *= chances[kind]
        tokens += chance
        yield tokens


def _drafters(session: Session) -> list[Drafter]:
    """The text itself, and what the artifact holds to draft for its model."""
    lookup = PromptLookup(session.plan.ctx)
    return [lookup, Assistant(session)] if session.has_drafter else [lookup]
