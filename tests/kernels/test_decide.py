"""The way of a product: what the operations do with each answer is `test_dispatch`'s matter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacompile.kernels.decide import Way, decide


@pytest.mark.parametrize("has_tiles", [True, False])
@pytest.mark.parametrize("sliceable", [True, False])
def test_all_and_nothing_need_no_kernel(has_tiles: bool, sliceable: bool) -> None:
    known = {"has_tiles": has_tiles, "sliceable": sliceable}
    assert decide(1.0, **known) is Way.WHOLE and decide(0.0, **known) is Way.NOTHING
    assert decide(None, **known) is (Way.TILES if has_tiles else Way.EVERYTHING)


@given(live=st.floats(0.001, 0.999), below=st.floats(0, 2), has_tiles=st.booleans(), sliceable=st.booleans())
def test_some_on(live: float, below: float, has_tiles: bool, sliceable: bool) -> None:
    way = decide(live, has_tiles=has_tiles, sliceable=sliceable, tiles_below=below)
    if has_tiles and live < below:
        assert way is Way.TILES
    else:
        assert way is (Way.SLICES if sliceable else Way.EVERYTHING)
