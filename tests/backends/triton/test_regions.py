"""Drawn regions: every kernel computes what the graph means, for every size, stride and dtype."""

from __future__ import annotations

import hypothesis
from hypothesis import given

from benchmarks.triton_regions import Drawn, check, regions


@hypothesis.settings(max_examples=40)
@given(regions)
def test_kernels_are_as_close_to_float64_as_torch(drawn: Drawn):
    found = check(drawn)
    hypothesis.assume(found is not None)
    fusible, inside = found.covered
    assert fusible == inside, found.program.outside
