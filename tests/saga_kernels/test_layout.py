import pytest
import torch

from saga_kernels import GroupLayout


def test_offsets_follow_the_packed_order():
    layout = GroupLayout([4, 2, 3], [[1, 5], [], [2]])
    assert (layout.groups, layout.tokens) == (3, 17)
    assert layout.segment_offsets.tolist() == [0, 4, 5, 10, 12, 15, 17]
    assert layout.segment_prefix.tolist() == [0, 0, 0, 3, 4, 4]
    assert layout.segment_offsets.dtype == layout.segment_prefix.dtype == torch.int32
    assert [layout.prefix_slice(i) for i in range(3)] == [slice(0, 4), slice(10, 12), slice(12, 15)]
    assert layout.completion_slice(0, 1) == slice(5, 10)
    assert layout.completion_slice(2, 0) == slice(15, 17)


def test_queries_are_of_the_last_tokens_of_a_prefix():
    layout = GroupLayout([4, 2], [[1, 5], [2]], [3, 0])
    assert (layout.tokens, layout.queries) == (14, 11)
    assert layout.segment_offsets.tolist() == [0, 4, 5, 10, 12, 14]
    assert layout.query_offsets.tolist() == [0, 3, 4, 9, 9, 11]
    assert layout.prefix_queries(0) == slice(0, 3) and layout.prefix_queries(1) == slice(9, 9)
    assert layout.completion_queries(0, 1) == slice(4, 9) and layout.completion_queries(1, 0) == slice(9, 11)
    assert layout.visible(0) == (slice(0, 0), slice(0, 2))  # the prefix's second token
    assert layout.visible(5) == (slice(0, 4), slice(5, 7))
    assert layout.visible(10) == (slice(10, 12), slice(12, 14))


@pytest.mark.parametrize("queries", [[5, 0], [-1, 0], [1]])
def test_queries_that_no_prefix_has_are_refused(queries):
    with pytest.raises(ValueError, match="^prefix_queries"):
        GroupLayout([4, 2], [[1], [1]], queries)


@pytest.mark.parametrize(
    ("prefixes", "completions", "named"),
    [
        ([], [], "prefix_lengths"),
        ([3, 0], [[1], [1]], r"prefix_lengths\[1\]"),
        ([3], [[1, 0]], r"completion_lengths\[0\]\[1\]"),
        ([3], [[1], [1]], "completion_lengths"),
    ],
)
def test_impossible_lengths_are_refused_by_name(prefixes, completions, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        GroupLayout(prefixes, completions)


def test_a_completion_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="^g: got 2, accepted is 0 to 1"):
        GroupLayout([3], [[1, 1]]).completion_slice(0, 2)
