"""Random sizes, dtypes, layouts and options of the gradients against the reference."""

from cases import DTYPES, GATES, LAYOUTS, relayout, repeat
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_backward import TRAINING, assert_close, call_of, kernel, reference, without_tiny_numbers
from test_properties import shapes

from nbdelta.testing import Shape

ARRAYS = ("q", "k", "v", "g", "beta", "initial_state", "do", "dht")


@given(
    shape=shapes(max_tokens=80),
    option=st.sampled_from(TRAINING),
    gate=st.sampled_from(GATES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    log_decay=st.sampled_from([None, None, 0.0, "mixed", -316.0]),
    beta_max=st.sampled_from([1.0, 2.0]),
    repeated=st.lists(st.tuples(st.sampled_from(ARRAYS), st.integers(0, 2)), max_size=2),
    layouts=st.lists(st.sampled_from([None, *LAYOUTS]), min_size=8, max_size=8),
)
# every token puts its v in the place of the whole state: the gates' gradients are 0
@example(
    shape=Shape(1, 2, 1, 1, 1, 1),
    option="no-beta",
    gate="gda",
    dtype="float32",
    seed=0,
    log_decay=None,
    beta_max=1.0,
    repeated=[],
    layouts=[None] * 8,
)
def test_gradients(shape, option, gate, dtype, seed, log_decay, beta_max, repeated, layouts):
    # the norm of one number is itself: nothing is left of its gradient but what rounding leaves
    assume(shape.K > 1 or option not in ("l2norm", "everything"))
    call = call_of(option, gate, shape, dtype, seed, log_decay=log_decay, beta_max=beta_max)
    for name, layout in zip(ARRAYS, layouts, strict=True):
        call[name] = relayout(call.get(name), layout)
    for name, axis in repeated:
        call[name] = repeat(call[name], axis)
    got, expected = kernel(call), reference(call)
    if dtype != "float64":  # float32 has no numbers for some gradients of hard gates
        got, expected = without_tiny_numbers(got), without_tiny_numbers(expected)
    assert_close(got, expected, call, dtype)
