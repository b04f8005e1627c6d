"""The layout: aligned storages, cut between, views of any stride."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelcache.dataplane.image import ALIGNMENT_BYTES, View, covered, lay_out


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(512, 8192))
def test_storages_lie_in_order_aligned_and_never_across_a_cut(sizes, segment_bytes):
    image = lay_out(sizes, segment_bytes)
    assert [place.size_bytes for place in image.storages] == sizes
    assert [i for segment in image.segments for i in segment.storages] == list(range(len(sizes)))
    offset = 0
    for index, segment in enumerate(image.segments):
        assert segment.offset_bytes == offset
        offset += segment.size_bytes
        end = 0
        for i in segment.storages:
            place = image.storages[i]
            assert place.segment == index
            assert place.offset_bytes == end
            assert place.offset_bytes % ALIGNMENT_BYTES == 0
            end = -(-(place.offset_bytes + place.size_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        assert end == segment.size_bytes
        assert segment.size_bytes <= segment_bytes or len(segment.storages) == 1
    assert image.size_bytes == offset


def test_nothing_has_no_segments():
    assert lay_out([]).segments == ()


def test_a_segment_below_the_alignment_is_refused():
    with pytest.raises(ValueError, match="at least 512, got 100"):
        lay_out([1], 100)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(20)[3:9],
        torch.randn(9, 9).diagonal(),
        torch.tensor(3.0),
        torch.randn(4).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.view_as_complex(torch.randn(3, 2)),
        torch.randn(6).to(torch.float8_e4m3fn),
        torch.arange(5).to(torch.uint16),
    ],
    ids=lambda tensor: f"{tensor.dtype} of {tuple(tensor.shape)} by {tensor.stride()}",
)
def test_a_view_over_the_same_bytes_is_the_same_tensor(tensor):
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    view = View.of(tensor, tensor.storage_offset() * tensor.itemsize)
    again = view.over(flat)
    assert (again.dtype, again.shape, again.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert again.data_ptr() == tensor.data_ptr()
    assert view.is_contiguous == tensor.is_contiguous()


def test_a_view_knows_whether_it_touches_all_of_its_extent():
    assert View.of(torch.ones(3, 4).t(), 0).is_dense
    assert not View.of(torch.ones(9, 9).diagonal(), 0).is_dense
    assert not View.of(torch.ones(1).expand(5), 0).is_dense
    assert View.of(torch.ones(0, 4), 0).extent_bytes == 0


def test_covered_ranges_are_merged_and_end_with_the_storage():
    views = [View.of(torch.ones(4), offset) for offset in (0, 16, 8, 40)]
    assert covered(views, 1000) == [(0, 32), (40, 56)]
    assert covered(views, 50) == [(0, 32), (40, 50)]
    assert covered([], 10) == []


def test_a_view_within_another_takes_nothing_away_from_what_is_covered():
    whole, inside = (View(torch.uint8, (size,), (1,), start) for start, size in ((0, 100), (10, 20)))
    assert covered([whole, inside], 100) == covered([inside, whole], 100) == [(0, 100)]
