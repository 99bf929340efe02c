"""The channel between ranks, and the masks that follow from an agreed state alone."""

from __future__ import annotations

import numpy as np
import pytest
from torch import distributed as dist

from cacompile.controller.agreed import FREE, OFF, ON, Agreed
from cacompile.controller.divergence import compare, compare_states, digest
from cacompile.errors import ConvAwareError
from cacompile.state import channel, replicas
from cacompile.state.channel import Channel


def agreed(keep: list[float], **values: object) -> Agreed:
    count = len(keep)
    fresh = {
        "places": [0, 3],
        "blocks": [1, count - 1],
        "of_block": np.arange(count),
        "turn": np.zeros(count, int),
        "role": np.zeros(count, int),
        "seed": 0,
        "key": 1,
        "warmup_steps": 0,
        "max_age": 20,
        "every": 1000,
        "keep": np.array(keep),
        "phase": np.full(count, -1.0),
        "age": np.zeros(count, np.int64),
        "on": np.ones(count, bool),
        "pinned": np.full(count, FREE, np.int8),
        "readable": np.ones(count, bool),
        "shown": {},
    }
    return Agreed(**{**fresh, **values})


def run(state: Agreed, steps: int) -> np.ndarray:
    """Masks [steps, blocks]."""
    found = []
    for step in range(1, steps + 1):
        state.end_step()
        state.draw(step, np.full(2, step))
        found.append(state.on)
    return np.array(found)


def test_masks_follow_from_what_was_said() -> None:
    first = agreed([1.0, 0.5, 0.25, 0.5])
    second = Agreed.of(first.to_dict())
    masks = run(first, 40)
    assert (masks == run(second, 40)).all() and first.columns() == second.columns()
    assert masks[:, 0].all() and abs(masks[:, 2].mean() - 0.25) < 0.05


def test_warm_up_age_readings_and_pins() -> None:
    assert run(agreed([0.0, 0.0], warmup_steps=6), 5).all()
    assert (run(agreed([0.0, 0.0], max_age=3), 8)[:, 0] == [0, 0, 0, 1, 0, 0, 0, 1]).all()
    unread = agreed([0.0, 0.0], every=4, readable=np.array([False, True]))
    assert (run(unread, 8)[:, 0] == [0, 0, 1, 0, 0, 0, 1, 0]).all()
    pins = run(agreed([0.0, 1.0], pinned=np.array([ON, OFF], np.int8)), 8)
    assert pins[:, 0].all() and not pins[:, 1].any()


def test_what_is_agreed_already_goes_on() -> None:
    before, after = agreed([0.5, 0.5, 0.5]), agreed([0.5, 0.5, 0.5], places=[3, 7], blocks=[2, 1])
    run(before, 3)
    after.carry(before.by_place())
    assert (after.phase[:2] == before.phase[1:]).all() and after.phase[2] == -1.0


def test_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "PIECE", 64)
    store = dist.HashStore()
    leader, other = (Channel(store, "x", rank, 2) for rank in range(2))
    assert other.hello() is None and leader.told(3) is None
    leader.greet({"every": 2})
    other.tell({"clock": 2, "score": np.arange(100.0)})
    assert other.hello() == {"every": 2} and (leader.told(3)[0]["score"] == np.arange(100.0)).all()
    assert leader.told(2) is None
    other.tell({"clock": 4, "score": np.zeros(100)})
    assert leader.told(4)[0]["clock"] == 2 and leader.told(6)[0]["clock"] == 4
    for clock in (2, 4):
        leader.decide(0, clock, {"parts": [np.full(50, clock)]})
    assert (other.decision(0, 4)["parts"][0] == 4).all()
    keys = store.num_keys()
    leader.clear(before=4)
    assert store.num_keys() < keys and (other.decision(0, 4)["parts"][0] == 4).all()


def test_what_differs_is_named() -> None:
    one = {"version": "1", "names": {0: "up", 2: "down"}, "options": [{"seed": 0}], "option_of": {0: 0}}
    compare(one, one, 0, 1)
    compare(one, {**one, "option_of": {}}, 0, 1)  # not met yet
    for other, words in (
        ({"version": "2"}, "version of cacompile must be the same on all ranks, got '1' on rank 0 and '2' on rank 3"),
        ({"names": {0: "up"}}, "parameters that an optimizer steps must .* 'down' on rank 0 and None on rank 3"),
        ({"options": [{"seed": 5}]}, "option 'seed', with which up is compiled, must .* 0 on rank 0 and 5 on rank 3"),
    ):
        with pytest.raises(ConvAwareError, match=words):
            compare(one, {**one, **other}, 0, 3)
    ours, theirs = digest([4, 4], {"masks": b"1"}), digest([4, 4], {"masks": b"2"})
    compare_states(ours, ours, 0, 1)
    with pytest.raises(ConvAwareError, match="ranks 0 and 1 have drifted apart: masks differ"):
        compare_states(ours, theirs, 0, 1)


def test_a_restarted_process_does_not_hear_what_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(replicas, "group_store", lambda group: store)
    replicas._store(None).set("hello", "before")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not replicas._store(None).check(["hello"])
