"""A draw returns the first K contributing pairs in the order drawn, in whatever order they finish."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saga_fast.encoder import VisualFeatures
from saga_fast.runtime.oom import OomBackoff
from saga_fast.supervisor.draw import Candidates, draw_contributing, draw_pairs
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.rollout import PairRollouts, RolloutEngine, Sampling
from saga_fast.supervisor.supervisor import Supervisor

from .tiny_models import EOS, decoder_of, pair_prefix, random_features, random_model

FIRST_ID = 1 << 20


def test_pairs_are_balanced_and_distinct():
    labels = torch.arange(8).repeat_interleave(4)
    pairs = draw_pairs(labels, 32, seed=3, first_id=FIRST_ID)
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    assert same.tolist() == [True, False] * 16
    assert len({tuple(pair) for pair in pairs.tolist()}) == 32 and (pairs[:, 0] != pairs[:, 1]).all()


def test_no_two_seeds_and_no_two_draws_of_a_run_have_the_same_pairs():
    labels = torch.arange(8).repeat_interleave(4)
    seeds, steps = (0, 3, 3 + 2**24, 3 + 2**32, 2**63 - 1), (0, 1, 2**12, 2**12 + 1, 2**31)
    places = [(seed, (step << 20) + drawn) for seed in seeds for step in steps for drawn in (0, 32)]
    drawn = {draw_pairs(labels, 32, *place).numpy().tobytes() for place in places}
    assert len(drawn) == len(places)
    assert drawn == {draw_pairs(labels, 32, *place).numpy().tobytes() for place in places}


class Timetable:
    """An engine whose pair i is done after `lengths[i]` syncs, and generates one token per sync, its own id."""

    def __init__(self, lengths: list[int], slots: int) -> None:
        self.lengths, self.slots, self.going, self.made = lengths, slots, {}, 0

    @property
    def pair_ids(self) -> set[int]:
        return set(self.going)

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.going)

    def admit(self, features: VisualFeatures, pair_ids: list[int]) -> None:
        assert features.tokens[:, 0, 0].tolist() == [2 * (i - FIRST_ID) + side for i in pair_ids for side in (0, 1)]
        self.going |= {i: 0 for i in pair_ids}
        assert len(self.going) <= self.slots

    def advance(self) -> list[PairRollouts]:
        self.going = {i: syncs + 1 for i, syncs in self.going.items()}
        self.made += len(self.going)
        return self.drop([i for i, syncs in self.going.items() if syncs == self.lengths[i - FIRST_ID]])

    def drop(self, pair_ids) -> list[PairRollouts]:
        dropped = sorted(self.going.keys() & set(pair_ids))
        return [PairRollouts(i, [[i] * self.going.pop(i), []]) for i in dropped]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.booleans(), max_size=30),
    st.integers(1, 8),
    st.sampled_from([1, 2, 8]),
    st.floats(0.05, 1),
    st.integers(0, 99),
)
def test_a_draw_keeps_the_first_in_order_and_accounts_for_every_token(contributes, wanted, slots, rate, seed):
    count = len(contributes)
    lengths = [random.Random(seed + i).randint(1, 9) for i in range(count)]
    engine = Timetable(lengths, slots)

    def judge(completions, same):
        assert same == [group[0][0] % 2 == 0 for group in completions]
        right = [[1.0, 0.0 if contributes[group[0][0] - FIRST_ID] else 1.0] for group in completions]
        return torch.tensor(right), torch.ones(len(same), 2, dtype=torch.bool)

    draw = draw_contributing(
        SimpleNamespace(engine=engine, judge=judge, slots=slots),
        Candidates(
            VisualFeatures(torch.arange(2.0 * count)[:, None, None], ()),
            torch.arange(2 * count).view(-1, 2),
            [(0, i % 2) for i in range(count)],
            FIRST_ID,
        ),
        wanted,
        rate,
        OomBackoff(),
    )
    kept = [i for i in range(count) if contributes[i]][:wanted]
    decided = kept[-1] + 1 if len(kept) == wanted else count
    assert [pair.completions[0] for pair in draw.pairs] == [[FIRST_ID + i] * lengths[i] for i in range(decided)]
    assert [i for i, pair in enumerate(draw.pairs) if pair.contributes] == kept
    assert draw.same == [i % 2 == 0 for i in range(decided)]
    assert not engine.going and draw.wasted == engine.made - sum(lengths[:decided])


@pytest.fixture(scope="module")
def prefix_cache():
    return PrefixCache(decoder_of(random_model(torch.float32, seed=3)), pair_prefix())


class Judge(Supervisor):
    """A supervisor of a random model, which has its own opinion of completions."""

    def __init__(self, prefix_cache: PrefixCache, slots: int, judge) -> None:
        self.prefix_cache, self.slots, self.judge, self.eos_token_ids = prefix_cache, slots, judge, (EOS, 11, 23)
        self.sampling = Sampling(group_size=4, temperature=1.0, top_p=0.95, max_new_tokens=40, seed=2)
        self._engine = None


def drawn_with(prefix_cache: PrefixCache, slots: int, judge, backoff: OomBackoff | None = None) -> tuple:
    pairs = torch.tensor([[i, (5 * i + 3) % 10] for i in range(10)])
    features = random_features(10, dtype=torch.float32)
    supervisor = Judge(prefix_cache, slots, judge)
    candidates = Candidates(features, pairs, [(0, 0), (0, 1)] * 5, 77)
    draw = draw_contributing(supervisor, candidates, 3, 0.5, backoff or OomBackoff())
    return draw, [(pair.completions, pair.contributes) for pair in draw.pairs]


def by_length(completions, same):
    rewards = [[float(len(c) % 3 == 0) for c in group] for group in completions]
    return torch.tensor(rewards), torch.ones(len(same), 4, dtype=torch.bool)


@pytest.mark.filterwarnings("ignore:roll out. out of memory")
@pytest.mark.parametrize("what,slots", [("__init__", 3), ("_admit", 2), ("advance", 1)])
def test_out_of_memory_a_draw_goes_on_in_fewer_slots_to_the_same(prefix_cache, monkeypatch, what, slots):
    whole, expected = drawn_with(prefix_cache, 8, by_length)
    real, engines = getattr(RolloutEngine, what), []

    def short(self, *arguments):
        if self not in engines:
            engines.append(self)
        found = real(self, *arguments)  # fails late, with its work half done
        if self.slots > slots and (what != "advance" or any(row.cached > 15 for row in self.rows)):
            raise torch.OutOfMemoryError("not that many")
        return found

    monkeypatch.setattr(RolloutEngine, what, short)
    backoff = OomBackoff()
    draw, found = drawn_with(prefix_cache, 8, by_length, backoff)
    assert found == expected and draw.same == whole.same
    assert [engine.slots for engine in engines] == [8 >> n for n in range(len(engines))]
    assert engines[-1].slots <= slots and backoff.log() == {"limit_roll_out": engines[-1].slots}


def test_a_draw_for_which_one_slot_is_too_much_says_so(prefix_cache, monkeypatch):
    def short(self, *arguments):
        raise torch.OutOfMemoryError("nothing fits")

    monkeypatch.setattr(RolloutEngine, "advance", short)
    with (
        pytest.raises(torch.OutOfMemoryError, match="^nothing fits"),
        pytest.warns(UserWarning, match="with 2 at once"),
    ):
        drawn_with(prefix_cache, 2, by_length)


def test_completions_and_choice_do_not_depend_on_slots(prefix_cache):
    one, two, eight = (drawn_with(prefix_cache, slots, by_length) for slots in (1, 2, 8))
    assert one[1] == two[1] == eight[1]
    assert one[0].contributing == 3 and 3 < len(one[0].pairs) < 10, "too easy a draw"
    assert len({len(c) for pair in one[0].pairs for c in pair.completions}) > 5, "answers alike in length hide much"
    assert one[0].wasted == 0 and eight[0].wasted > 0


def test_a_pair_whose_logits_are_not_finite_does_not_contribute(prefix_cache, monkeypatch):
    broken = 77 + 1
    real = RolloutEngine._sample

    def sample(self, logits, row_id, step):
        logits[(row_id // 4 == broken) & (row_id % 4 == 2) & (step == 5)] = float("nan")
        return real(self, logits, row_id, step)

    def judge(completions, same):
        return torch.tensor([[1.0, 0.0, 1.0, 0.0]] * len(same)), torch.ones(len(same), 4, dtype=torch.bool)

    fine, _ = drawn_with(prefix_cache, 2, judge)
    monkeypatch.setattr(RolloutEngine, "_sample", sample)
    draw, _ = drawn_with(prefix_cache, 2, judge)
    assert [(pair.broken, pair.contributes) for pair in draw.pairs] == [(i == 1, i != 1) for i in range(4)]
    assert draw.pairs[1].rewards.tolist() == [0] * 4 and draw.summary()["pairs_broken"] == 1
    assert [draw.pairs[i].completions for i in (0, 2)] == [fine.pairs[i].completions for i in (0, 2)]
