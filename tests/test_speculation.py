"""Drafts without a model: what is guessed, how much of it is fed, and that it never costs much."""

import numpy as np
import pytest

from edge_kv.runtime.speculation import Assistant, Guess, PromptLookup, Speculation

# Passes of 1 … 8 tokens, in passes of one: kernels made for them, and others.
COSTS = {
    "few-token kernels": (1, 1.05, 1.12, 1.2, 1.3, 1.4, 1.5, 1.6),
    "plain kernels": (1, 1.2, 1.5, 1.9, 2.15, 2.4, 2.65, 2.9),
    "half of a token each": (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5),
    "nothing saved": (1, 2, 3, 4, 5, 6, 7, 8),
}
DRAFTS = 7


def matches(history):
    """Every earlier position behind which the text goes on, with the ids that match before it."""
    last = len(history) - 1
    for end in range(last):
        length = 0
        while length <= end and history[end - length] == history[last - length]:
            length += 1
        yield end + 1, min(length, PromptLookup._LONGEST)


def best_guess(history, count):
    """What a search through all of `history` guesses, and the length of its match."""
    at, length = max(matches(history), key=lambda m: (m[1], m[0]), default=(0, 0))
    if length < 1:
        return (), 0
    text = list(history)
    for i in range(count):
        text.append(text[at + i])
    return tuple(text[len(history) :]), length


class Thorough(PromptLookup):
    _TRIES = 10**9


@pytest.mark.parametrize("letters", [2, 5, 40])
def test_the_longest_and_newest_match_is_found(letters):
    rng = np.random.default_rng(letters)
    lookup = Thorough(400)
    history = []
    lookup.begin(history)
    for token in rng.integers(0, letters, 400).tolist():
        history.append(token)
        ids, length = best_guess(history, DRAFTS)
        guess = lookup.guess(history, DRAFTS)
        assert guess.ids == ids
        assert bool(guess.kinds) == bool(length)
    assert guess.kinds == tuple(sorted(guess.kinds))  # what goes on matches longer


@pytest.mark.parametrize("seed", range(6))
def test_a_text_that_goes_back_is_as_one_that_was_read_anew(seed):
    """Rewinds, other prompts and slides: what is guessed depends on the text alone."""
    rng = np.random.default_rng(seed)
    lookup = PromptLookup(300)
    history = [1]
    for _ in range(60):
        match rng.integers(4):
            case 0:
                history = history[: int(rng.integers(1, len(history) + 1))]
            case 1 if len(history) > 20:
                history = history[:4] + history[len(history) // 2 :]
            case _:
                history = history + rng.integers(0, 4, int(rng.integers(1, 40))).tolist()
        history = history[:300]
        lookup.begin(history)
        for token in rng.integers(0, 4, int(rng.integers(0, 6))).tolist():
            history = [*history[:299], token]
            lookup.begin(history)
        fresh = PromptLookup(300)
        fresh.begin(history)
        assert lookup.guess(history, DRAFTS) == fresh.guess(history, DRAFTS)


def test_what_repeats_goes_on_beyond_its_end():
    lookup = PromptLookup(64)
    history = [9, 1, 2, 3, 1, 2, 3, 1]
    lookup.begin(history)
    assert lookup.guess(history, 7).ids == (2, 3, 1, 2, 3, 1, 2)
    assert lookup.guess(history, 2).ids == (2, 3)
    assert lookup.guess(history, 0) == Guess()


def test_a_long_text_costs_little_memory_and_time():
    """Chains of one hash are as long as the text here; a guess looks at a few of them."""
    lookup = PromptLookup(32_768)
    history = [7] * 20_000 + [8]
    lookup.begin(history[:-1])
    assert lookup.guess(history[:-1], 4).ids == (7, 7, 7, 7)
    held = [a for c in lookup._chains for a in (c._newest, c._older)] + [lookup._ids]
    assert sum(len(a) * a.itemsize for a in held) <= 16 * 20_000 + (3 << 19)
    lookup.begin([5])
    assert len(lookup._ids) == len(lookup._chains[0]._older) == 1
    assert all(at <= 0 for at in lookup._chains[0]._newest)


class Knowing:
    """A costly drafter whose ids are right by chance: `rate` of them, one after another."""

    costly = True
    kinds = Assistant.kinds
    drafting = 0.15  # of a pass of one token, for each draft

    def __init__(self, prompt, text, rate):
        self.text, self.start, self.rate = text, len(prompt), rate
        self.rng, self.made = np.random.default_rng(1), 0

    def begin(self, history):
        pass

    def guess(self, history, most):
        at = len(history) - self.start
        said = [t if self.rng.random() < self.rate else -1 for t in self.text[at : at + most]]
        ids = tuple(said + [-1] * (most - len(said)))
        self.made += most
        return Guess(ids, tuple(range(most)))


def speed(prompt, text, costs, speculation, noise=0.0, steps=None, knowing=None):
    """Tokens a second against plain decoding, where the model says `text` whatever it is fed."""
    rng = np.random.default_rng(0)
    history = list(prompt)
    speculation.begin(history)
    spent, at, sizes = 0.0, 0, []
    while at < len(text):
        made = knowing.made if knowing else 0
        drafts = speculation.drafts(history, min(DRAFTS, len(text) - at - 1))
        drafting = (knowing.made - made) * knowing.drafting if knowing else 0
        came = []
        for draft in (*drafts, None):
            came.append(text[at])
            at += 1
            if draft != came[-1]:
                break
        history += came
        slow = 1 + noise * abs(rng.standard_normal())
        spent += (costs[len(drafts)] + drafting) * slow
        sizes.append(len(drafts))
        speculation.passed(len(drafts), came, costs[len(drafts)] * slow, drafting * slow)
    if steps is not None:
        steps += sizes
    return len(text) * (1 + noise * np.sqrt(2 / np.pi)) / spent


def texts():
    """Texts of very different kinds, as a prompt and what comes behind it."""
    rng = np.random.default_rng(3)
    words = [rng.integers(10, 400, int(rng.integers(1, 5))).tolist() for _ in range(120)]

    def prose(count, skew):
        picks = np.minimum(rng.zipf(skew, count), len(words)) - 1
        return [token for p in picks for token in words[p]]

    text = prose(2000, 1.4)
    lines = [prose(6, 1.6) for _ in range(80)]
    edited = [t for n, line in enumerate(lines) for t in (line if n % 9 else [5, *line[2:]])]
    bursts = [t for _ in range(12) for t in (*text[:90], *rng.integers(0, 6, 90).tolist())]
    return {
        "prose": (text[:300], text[300:2300]),
        "no repeats": (list(range(200)), list(range(200, 1500))),
        "noise of two letters": ([1], rng.integers(0, 2, 2000).tolist()),
        "noise of nine letters": ([1], rng.integers(0, 9, 2000).tolist()),
        "copy": (text[:900], text[:900]),
        "edit": ([t for line in lines for t in line], edited),
        "bursts": (text[:200], bursts),
        "short": (text[:50], text[50:90]),
    }


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_drafts_never_cost_two_percent(costs, noise):
    for name, (prompt, text) in texts().items():
        gain = speed(prompt, text, COSTS[costs], Speculation(PromptLookup(4096)), noise)
        allowed = 0.01 + 1.5 / len(text)  # what may be lost at any time
        assert gain >= 1 - allowed, (name, gain)


@pytest.mark.parametrize("costs", COSTS)
def test_free_text_behind_copied_text_costs_few_passes(costs):
    """What was right in one text is soon known not to be in the next."""
    speculation, all_texts = Speculation(PromptLookup(4096)), texts()
    for turn in range(6):
        for name in ("copy", "edit"):
            prompt, text = all_texts[name]
            speed(prompt, text[:128], COSTS[costs], speculation, 0.1)
        for name in ("prose", "noise of nine letters", "noise of two letters", "no repeats"):
            prompt, text = all_texts[name]
            gain = speed(prompt, text[300 * turn % 900 :][:64], COSTS[costs], speculation)
            assert 64 / gain <= 64 + 1.75, (name, gain)


def test_copied_text_is_fast():
    for name in ("copy", "edit"):
        prompt, text = texts()[name]
        fast = speed(prompt, text, COSTS["few-token kernels"], Speculation(PromptLookup(4096)))
        slow = speed(prompt, text, COSTS["plain kernels"], Speculation(PromptLookup(4096)))
        assert fast > 3 and slow > 1.8, (name, fast, slow)


def test_a_fixed_number_is_fed_wherever_there_is_a_guess():
    steps = []
    prompt, text = texts()["noise of two letters"]
    speed(prompt, text, COSTS["nothing saved"], Speculation(PromptLookup(4096), fixed=3), 0, steps)
    assert set(steps[20:-5]) == {3}


class Told:
    """A drafter that guesses what it is told, all of one class."""

    costly = False
    kinds = (0.5,)

    def __init__(self):
        self.ids = ()

    def begin(self, history):
        pass

    def guess(self, history, most):
        return Guess(self.ids[:most], (0,) * min(most, len(self.ids)))


def test_a_pass_that_was_held_up_does_not_end_drafts():
    """Something else ran meanwhile: that is no loss of the drafts that were in the pass."""
    told, fed = Told(), []
    told.ids = (1,) * DRAFTS
    speculation = Speculation(told)
    speculation.begin([])
    for step in range(120):
        count = len(speculation.drafts([], DRAFTS))
        fed.append(count)
        cost = COSTS["few-token kernels"][count] + 40 * (step % 12 == 0)
        speculation.passed(count, [1] * (count + 1), cost)
    assert all(count == DRAFTS for count in fed[20:])


def test_what_was_never_fed_is_judged_by_what_came():
    """Guesses that turn out right are fed in the end, though none was fed at first."""
    told = Told()
    told.kinds = (0.01,)
    speculation = Speculation(told)
    told.ids = (1,) * DRAFTS
    speculation.begin([])
    counts = []
    for _ in range(20):
        counts.append(len(speculation.drafts([], DRAFTS)))
        speculation.passed(counts[-1], [1] * (counts[-1] + 1), COSTS["plain kernels"][counts[-1]])
    assert counts[0] == 0 and counts[-1] == DRAFTS


def test_a_slow_pass_is_not_believed_for_ever():
    """Passes of several tokens that were slow in a bad moment are tried again, ever less often."""
    told = Told()
    told.ids = (1,) * DRAFTS
    speculation = Speculation(told)
    speculation.begin([])
    slow, tried = 9.0, []
    for step in range(3000):
        count = len(speculation.drafts([], DRAFTS))
        tried += [step] * bool(count)
        cost = 1.0 if not count else slow if step < 1500 else 1.1
        speculation.passed(count, [1] * (count + 1), cost)
    early = [s for s in tried if s < 1500]
    assert len(early) < 8
    assert len([s for s in tried if s >= 2800]) > 195


# --- a drafter of the artifact beside the text itself --------------------------------------------


def both(name, costs, rate, noise=0.0):
    """Gains of prompt lookup, of a drafter that is right at `rate`, and of the two together."""
    prompt, text = texts()[name]
    found = []
    for lookup, drafter in ((True, False), (False, True), (True, True)):
        knowing = Knowing(prompt, text, rate)
        drafters = [*([PromptLookup(4096)] if lookup else []), *([knowing] if drafter else [])]
        used = knowing if drafter else None
        gain = speed(prompt, text, COSTS[costs], Speculation(*drafters), noise, knowing=used)
        found.append(gain)
    return found


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_two_drafters_never_cost_two_percent(costs, rate):
    for name, (_, text) in texts().items():
        allowed = 0.01 + 1.5 / len(text)
        gain = both(name, costs, rate, 0.2)[2]
        assert gain >= 1 - allowed, (name, gain)


@pytest.mark.parametrize("costs", ["few-token kernels", "plain kernels"])
def test_each_drafter_is_fed_where_it_is_the_better_one(costs):
    """What is copied comes from the text, what is new from the model's drafter: neither is lost."""
    for name in ("copy", "edit", "no repeats", "noise of nine letters", "prose", "bursts"):
        lookup, knowing, together = both(name, costs, 0.75)
        assert together >= 0.95 * max(lookup, knowing), (name, lookup, knowing, together)
    lookup, knowing, together = both("bursts", costs, 0.75)
    assert together > 1.05 * max(lookup, knowing)


def test_a_fixed_number_is_that_of_the_drafter_that_is_usually_right():
    """A long match is worth more than the model's drafter, a short one or none is worth less."""
    prompt = [*range(30), 99, *range(20)]
    speculation = Speculation(PromptLookup(64), Knowing(prompt, [-5] * 9, 1.0), fixed=3)
    speculation.begin(prompt)
    assert speculation.drafts(prompt, DRAFTS) == (20, 21, 22)
    for history in ([*prompt, 70], [*prompt, 70, 3, 4]):
        speculation.begin(history)
        assert speculation.drafts(history, DRAFTS) == (-5,) * 3
    assert speculation.drafts(history, 2) == (-5,) * 2


def test_what_the_text_guesses_is_judged_though_another_was_fed():
    told, history = Told(), [7]
    told.kinds, told.ids = (0.01,), (1,) * DRAFTS
    speculation = Speculation(told, Knowing(history, [1] * 4000, 1.0))
    speculation.begin(history)
    fed = []
    for _ in range(60):
        drafts = speculation.drafts(history, DRAFTS)
        fed.append(speculation._chosen)
        history += [1] * (len(drafts) + 1)
        dear = 0.15 * len(drafts) if fed[-1] and fed[-1].drafter is not told else 0
        speculation.passed(len(drafts), [1] * (len(drafts) + 1), 1 + 0.05 * len(drafts), dear)
    assert any(way and way.drafter is not told for way in fed[:8])
    assert all(way and way.drafter is told for way in fed[-8:])
