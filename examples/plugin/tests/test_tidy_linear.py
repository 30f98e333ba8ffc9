"""The pass is proved, and right wherever it applies."""

import pytest
from tidy_linear import TidyLinear

from graphopt.testing import check, prove


@pytest.mark.parametrize("rewrite", TidyLinear.rewrites, ids=str)
def test_it_is_proved(rewrite):
    assert prove(rewrite).proved


@pytest.mark.parametrize("rewrite", TidyLinear.rewrites, ids=str)
def test_it_is_right_wherever_it_applies(rewrite):
    assert check(rewrite, max_examples=10) > 0
