"""Hypothesis strategies for models: each draws a `Network`, a module in eval mode with inputs.

- `networks()`: convolutions, linear maps and norms in every geometry that matters to a fold;
- `convolutional()`, `residual()`, `transformers()`, `spiking()`: whole models of these families;
- `programs()`: free-form graphs over a wide range of ops;
- `graphs()`: any of them.

    @given(strategies.graphs())
    def test_it(network):
        network.module(*network.inputs, **network.kwargs)

A network prints as the module or the code that it is, so a failing example can be read and run.
Smaller networks and plainer options shrink first. All compute in float64 with values of order one,
and all are deterministic: drawn values depend on seeds that are drawn too.
"""

from hypothesis import strategies as _st

from graphopt.testing.strategies.cnns import convolutional as convolutional
from graphopt.testing.strategies.folds import networks as networks
from graphopt.testing.strategies.network import Network as Network
from graphopt.testing.strategies.programs import programs as programs
from graphopt.testing.strategies.residuals import residual as residual
from graphopt.testing.strategies.spikes import spiking as spiking
from graphopt.testing.strategies.transformer import transformers as transformers


def graphs() -> _st.SearchStrategy[Network]:
    """A network of any kind; free-form programs are the most frequent."""
    return _st.one_of(
        programs(), programs(), networks(), convolutional(), residual(), transformers(), spiking()
    )
