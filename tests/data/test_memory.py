from __future__ import annotations

import gc

from detrcli.data.memory import recycled

SHAPE = (2, 3, 700, 700)


def test_memory_comes_back_when_the_last_view_has_gone():
    first = recycled(SHAPE)
    place = first.data_ptr()
    view = first[1, 0]
    view.fill_(7)
    del first
    gc.collect()
    other = recycled(SHAPE)
    assert other.data_ptr() != place  # the view still reads it
    other.fill_(1)
    assert (view == 7).all()
    del view
    gc.collect()
    assert recycled((2, 3, 690, 700)).data_ptr() == place


def test_a_small_batch_does_not_hold_large_memory():
    large = recycled(SHAPE)
    place = large.data_ptr()
    del large
    gc.collect()
    assert recycled((4,)).data_ptr() != place
