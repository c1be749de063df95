from dataclasses import fields, replace

import pytest
import torch

from dawm.data.batches import BatchLoader, RowStream
from dawm.data.transitions import Segments, Transitions


def numbered(*shape, observation_size=3, action_size=2):
    """Transitions in which no two numbers are equal."""
    sizes = [(*shape, observation_size), (*shape, action_size), shape, (*shape, observation_size), shape]
    tensors, first = [], 0
    for size in sizes:
        count = torch.Size(size).numel()
        tensors.append(torch.arange(first, first + count, dtype=torch.float32).view(size))
        first += count
    return Transitions(*tensors)


def assert_same(first, second):
    for field in fields(first):
        torch.testing.assert_close(
            getattr(first, field.name), getattr(second, field.name), rtol=0, atol=0, msg=f"{field.name} differs"
        )


@pytest.mark.parametrize("shape", [(4,), (2, 4), (0,)])
def test_unpack_inverts_pack(shape):
    transitions = numbered(*shape)
    assert transitions.pack().shape == (*shape, 2 * 3 + 2 + 2)
    assert_same(Transitions.unpack(transitions.pack(), 3, 2), transitions)


def test_rows_stay_together_in_index_and_cat():
    transitions = numbered(6)
    chosen = transitions[torch.tensor([4, 1])]
    assert torch.equal(chosen.pack(), transitions.pack()[[4, 1]])
    transitions = replace(transitions, real=torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    cat = Transitions.cat([transitions[:2], transitions[2:]])
    assert_same(cat, transitions)
    assert cat[1:3].real.tolist() == [0, 1]
    assert len(transitions[:2]) == 2


def test_segments_index_every_field():
    segments = Segments(*(torch.arange(5.0) + 10 * i for i in range(7)))
    assert [float(getattr(segments[3], f.name)) for f in fields(Segments)] == [3, 13, 23, 33, 43, 53, 63]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_hands_frozen_batches_over_unchanged(precision, make_trainer, recorder):
    """Lightning refuses frozen dataclasses where a precision plugin converts its input; these two must not."""
    sent = numbered(3, 2)
    loader = BatchLoader(lambda count: sent, [(RowStream(0), 0)], updates=3, updates_per_step=3)
    make_trainer(3, precision=precision).fit(recorder, loader)
    assert len(recorder.batches) == 3
    for k, batch in enumerate(recorder.batches):
        assert_same(batch, sent[k])
