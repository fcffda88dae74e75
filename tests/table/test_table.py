"""The contract of the counter table, clause by clause, over both tables."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from statbuffer import BufferFull, Stopped

MAX, MIN = 2**63 - 1, -(2**63)


def take(table, now, limit=1_000):
    return table.take_due(now, limit)[0]


# Counting


def test_increments_add_up_and_a_take_moves_them_out(table):
    table.increment("a")
    table.increment("a", 4)
    table.increment("b", count=-2)
    assert (table.count("a"), table.count("b"), table.count("c"), len(table)) == (5, -2, 0, 2)
    assert table.totals() == (3, 3)
    assert take(table, 110.0) == {"a": 5, "b": -2}
    assert (table.count("a"), len(table), table.totals()) == (0, 0, (3, 0))


@pytest.mark.parametrize("key", ["text", b"bytes", 7, 2.5, None, ("a", 1), frozenset("ab")])
def test_a_key_is_anything_hashable(table, key):
    table.increment(key, 3)
    assert take(table, 110.0) == {key: 3}


@pytest.mark.parametrize("count", [True, False, 1.0, "1", None, b"1"])
def test_a_count_that_is_no_int_is_refused_with_its_value(table, count):
    with pytest.raises(TypeError, match="expected an int; nothing was counted") as caught:
        table.increment("a", count)
    assert repr(count) in str(caught.value)
    assert len(table) == 0


def test_an_int_of_a_subclass_counts(table):
    class Pages(int):
        pass

    table.increment("a", Pages(5))
    assert table.count("a") == 5


def test_a_count_whose_repr_raises_does_not_hide_the_error(table):
    class Nasty:
        def __repr__(self) -> str:
            raise OSError

    with pytest.raises(TypeError, match="<Nasty whose repr raises>"):
        table.increment("a", Nasty())


def test_an_unhashable_key_is_refused(table):
    for call in (lambda: table.increment([]), lambda: table.update([[]]), lambda: table.increment({}, 2)):
        with pytest.raises(TypeError, match=r"unhashable|as a dict key"):
            call()
    assert table.totals() == (0, 0)


@pytest.mark.parametrize("count", [MAX + 1, MIN - 1, 10**30, -(10**30)])
def test_a_count_of_more_than_64_bits_is_refused(table, count):
    with pytest.raises(OverflowError, match="expected an int of 64 bits; nothing was counted"):
        table.increment("a", count)
    assert table.totals() == (0, 0)


@pytest.mark.parametrize(("first", "second"), [(MAX, 1), (1, MAX), (MIN, -1), (-1, MIN), (2**62, 2**62), (MIN, MIN)])
def test_a_sum_past_64_bits_is_refused_and_changes_nothing(table, first, second):
    table.increment("a", first)
    with pytest.raises(OverflowError, match=r"do not fit into 64 bits; nothing was counted"):
        table.increment("a", second)
    assert (table.count("a"), table.totals()) == (first, (first, first))
    table.increment("a", -1 if first > 0 else 1)
    assert abs(table.count("a")) == abs(first) - 1


def test_the_totals_may_pass_64_bits(table):
    for number in range(20):
        table.increment(number, MAX)
    assert table.totals() == (20 * MAX, 20 * MAX)
    for number in range(7):
        table.increment(number, MIN)
    assert table.totals() == (20 * MAX + 7 * MIN, 20 * MAX + 7 * MIN)
    taken = take(table, 111.0, limit=10)
    assert table.totals()[1] + sum(taken.values()) == table.totals()[0]
    table.put_back(taken, delay=1.0, born=100.0)
    assert table.totals() == (20 * MAX + 7 * MIN, 20 * MAX + 7 * MIN)


def test_zero_makes_no_key_and_a_sum_of_zero_is_dropped(table):
    table.increment("a", 0)
    assert len(table) == 0
    table.increment("a", 5)
    table.increment("a", 0)
    table.increment("a", -5)
    table.increment("b")
    assert table.items() == [("b", 1)]
    assert take(table, 110.0) == {"b": 1}
    assert len(table) == 0
    with pytest.raises(TypeError):
        table.increment("a", 0.0)


# update


@pytest.mark.parametrize(
    "source",
    [
        ["a", "b", "a"],
        ("a", "b"),
        {"a", "b"},
        {"a": 3, "b": -1},
        Counter("aab"),
        "abca",
        b"ab",
        {"a": 1}.keys(),
        range(3),
        [],
    ],
)
def test_update_counts_as_counter_does(table, source):
    table.update(source)
    table.update(source if isinstance(source, dict) else iter(source))
    expected = Counter(source)
    expected.update(source)
    assert dict(table.items()) == dict(expected)


def test_update_takes_text_as_the_iterable_it_is_and_any_mapping(table):
    table.update("abca")
    table.update(Counter({"a": 10}))
    assert dict(table.items()) == {"a": 12, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("counts", "error"),
    [
        ({"a": 1, "b": "x", "c": 1}, TypeError),
        (["a", [], "c"], TypeError),
        ({"a": 1, "b": 2**64}, OverflowError),
        (5, TypeError),
    ],
)
def test_update_counts_what_stands_before_the_item_that_raises(table, counts, error):
    with pytest.raises(error):
        table.update(counts)
    assert dict(table.items()) == ({} if counts == 5 else {"a": 1})


def test_update_of_a_dict_that_changes_meanwhile_raises_as_dicts_do(make):
    source = {"a": 1, "b": 2}
    table = make(check_key=lambda key: source.update({key + "x": 1}))
    with pytest.raises(RuntimeError, match="changed"):
        table.update(source)


# When a key is due


def test_a_key_is_due_an_interval_after_its_first_increment(table, now):
    table.increment("a")
    now.now = 105.0
    table.increment("a")
    table.increment("b")
    assert table.next_due() == 110.0
    assert take(table, 109.999) == {}
    assert take(table, 110.0) == {"a": 2}
    assert table.next_due() == 115.0
    assert take(table, 115.0) == {"b": 1}
    assert table.next_due() is None


def test_a_due_tick_is_never_early_and_late_by_a_tick_at_most(make, now):
    table = make(interval=0.7, tick=0.25)
    for moment in (100.0, 100.01, 100.24, 100.3, 107.77):
        now.now = moment
        table.increment("a")
        due = table.next_due()
        assert moment + 0.7 <= due < moment + 0.7 + 0.25
        assert take(table, due) == {"a": 1}


def test_jitter_is_uniform_over_its_width(make):
    table = make(interval=10.0, jitter=20.0)
    table.update(range(10_000))
    taken = [len(take(table, 100.0 + second, 10**6)) for second in range(10, 32)]
    assert taken[0] <= 5
    assert sum(taken) == 10_000
    assert all(380 < number < 630 for number in taken[1:21]), taken


def test_a_take_is_limited_and_the_rest_stays_due(table):
    table.update(range(25))
    sizes = []
    while counts := take(table, 110.0, limit=10):
        sizes.append(len(counts))
        assert table.next_due() == (-math.inf if len(table) else None) or not len(table)
    assert sizes == [10, 10, 5]


def test_make_due_has_everything_taken_and_new_keys_wait(table, now):
    table.increment("a")
    now.now = 104.0
    table.increment("b")
    table.make_due()
    assert table.next_due() == -math.inf
    table.increment("c")
    assert take(table, now.now) == {"a": 1, "b": 1}
    assert (table.count("c"), table.next_due()) == (1, 114.0)


def test_take_all_needs_no_time(table):
    table.update("abc")
    assert len(table.take_all(2)[0]) == 2
    assert len(table.take_all(2)[0]) == 1
    assert table.take_all(2) == ({}, math.inf)


def test_one_key_can_be_made_due_and_waits_a_whole_interval_when_seen_again(table, now):
    table.update(["a", "b"])
    assert not table.make_key_due("nobody")
    assert table.make_key_due("a")
    assert take(table, now.now) == {"a": 1}
    now.now = 105.0
    table.increment("a")
    assert take(table, 112.0) == {"b": 1}
    assert take(table, 115.0) == {"a": 1}


# Putting back


def test_put_back_adds_to_what_came_in_since_and_sets_the_time_anew(table, now):
    table.update({"a": 5, "b": 1})
    taken = take(table, 110.0)
    now.now = 111.0
    table.increment("a", 2)
    table.put_back(taken, delay=30.0, born=100.0)
    assert (table.count("a"), table.count("b"), table.totals()) == (7, 1, (8, 8))
    assert take(table, 140.0) == {}
    assert take(table, 141.0) == {"a": 7, "b": 1}


def test_put_back_heeds_neither_the_bound_nor_the_close(make):
    table = make(max_keys=1)
    table.increment("a")
    taken = take(table, 110.0)
    table.increment("b")
    table.close()
    table.put_back(taken | {"c": 0}, delay=0.0, born=100.0)
    assert dict(table.items()) == {"a": 1, "b": 1}


def test_put_back_past_64_bits_waits_beside_the_cell(table, unraisable):
    table.increment("a", MAX)
    taken = take(table, 110.0)
    table.increment("a", 5)
    table.put_back(taken, delay=0.0, born=100.0)
    assert isinstance(unraisable[0], OverflowError)
    assert table.totals() == (MAX + 5, MAX + 5)
    assert table.count("a") == MAX + 5
    assert len(table) == 2
    total = 0
    for _ in range(3):
        counts = table.take_all(10)[0]
        assert all(MIN <= count <= MAX for count in counts.values())
        total += sum(counts.values())
    assert (total, table.totals()[1]) == (MAX + 5, 0)


def test_age_survives_a_put_back(table, now):
    assert table.oldest() == math.inf
    table.increment("a")
    now.now = 120.0
    table.increment("b")
    assert table.oldest() == 100.0
    taken, born = table.take_due(115.0, 10)
    assert (taken, born) == ({"a": 1}, 100.0)
    assert table.oldest() == 120.0
    table.put_back(taken, delay=50.0, born=born)
    assert table.oldest() == 100.0


def test_entries_left_behind_in_the_wheel_are_sifted(make, now):
    table = make(interval=1_000.0)
    for number in range(20_000):
        table.increment("hot")
        table.make_key_due("hot")
        assert take(table, now.now) == {"hot": 1}, number
    table.increment("hot")
    for number in range(300):
        table.increment(number)
    assert len(take(table, 1_200.0, 10**6)) == 301


# Hooks


def test_check_key_is_asked_once_for_each_new_key_and_can_refuse(make):
    asked = []

    def check(key):
        asked.append(key)
        if key == "bad":
            raise TypeError("bad key")

    table = make(check_key=check)
    for key in ("a", "a", "b", "a"):
        table.increment(key)
    with pytest.raises(TypeError, match="bad key"):
        table.increment("bad")
    assert (asked, table.totals()) == (["a", "b", "bad"], (4, 4))


def test_a_full_table_takes_known_keys_only(make):
    table = make(max_keys=2)
    table.update("ab")
    with pytest.raises(BufferFull) as caught:
        table.increment("c")
    assert (caught.value.key, caught.value.max_keys) == ("c", 2)
    table.increment("a")
    assert table.totals() == (3, 3)


def test_on_full_can_name_another_key_or_make_room(make):
    folding = make(max_keys=1, on_full=lambda _key: "other")
    folding.update("abcb")
    assert dict(folding.items()) == {"a": 1, "other": 3}

    table = make(max_keys=1, on_full=lambda key: (table.take_all(10), key)[1])
    table.update("abc")
    assert dict(table.items()) == {"c": 1}


def test_wake_is_called_when_something_is_due_earlier_than_all_else(make, now):
    rings = []
    table = make(wake=lambda: rings.append(now.now) or True)
    table.increment("a")
    table.increment("b")
    now.now = 105.0
    table.increment("c")
    assert rings == [100.0]
    table.put_back({"d": 1}, delay=1.0, born=90.0)
    assert rings == [100.0, 105.0]
    table.take_all(100)
    table.increment("e")
    assert len(rings) == 3


def test_a_wake_that_was_not_heard_is_repeated_with_the_next_new_key(make, unraisable):
    answers = iter([False, OSError("no thread"), True, True])
    calls = []

    def wake():
        answer = next(answers)
        calls.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    table = make(wake=wake)
    table.update("aabbcd")
    assert len(calls) == 3
    assert [str(error) for error in unraisable] == ["no thread"]
    assert table.totals() == (6, 6)


# Life


def test_a_closed_table_accepts_nothing_and_gives_all(table):
    table.increment("a")
    bound, update = table.increment, table.update
    table.close()
    assert table.closed
    for call in (lambda: bound("a"), lambda: bound("b"), lambda: update(["a"]), lambda: update({"a": 1})):
        with pytest.raises(Stopped, match="nothing was counted"):
            call()
    assert take(table, 110.0) == {"a": 1}
    table.open()
    bound("a")
    assert table.totals() == (2, 1)


def test_a_table_closed_by_a_hook_accepts_nothing(make):
    table = make(check_key=lambda _key: table.close())
    with pytest.raises(Stopped):
        table.increment("a")
    assert table.totals() == (0, 0)


def test_forget_leaves_an_empty_table_that_works(table, now):
    bound = table.increment
    table.update(range(100))
    table.take_due(110.0, 50)
    table.forget()
    assert (len(table), table.totals(), table.next_due(), table.oldest()) == (0, (0, 0), None, math.inf)
    bound("a")
    assert take(table, 110.0) == {"a": 1}


def test_release_gives_memory_back_only_when_nothing_is_pending(table):
    table.update(range(10_000))
    table.release()
    assert len(table) == 10_000
    take(table, 110.0, 10**6)
    table.release()
    table.increment("a")
    assert table.count("a") == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_long_random_life_balances(make, now, seed):
    rng = random.Random(seed)
    table = make(jitter=5.0)
    accepted = taken = 0
    flying: list[dict] = []
    for _ in range(5_000):
        key, n = rng.randrange(50), rng.randrange(-3, 10)
        table.increment(key, n)
        accepted += n
        now.now += rng.random()
        if rng.random() < 0.1:
            flying.append(table.take_due(now.now, rng.randrange(1, 20))[0])
        if flying and rng.random() < 0.1:
            table.put_back(flying.pop(), delay=rng.random() * 20, born=100.0)
        if flying and rng.random() < 0.05:
            taken += sum(flying.pop().values())
        in_flight = sum(sum(counts.values()) for counts in flying)
        assert table.totals() == (accepted, accepted - taken - in_flight)
