"""Sampling and preprocessing against arithmetic by hand and transformers' image processor."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transforms import Preprocessing, resize_frames, sample_indices


def test_segment_centres_and_windows():
    assert sample_indices(16, 8).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert sample_indices(100, 4).tolist() == [12, 37, 62, 87]
    assert sample_indices(3, 5).tolist() == [0, 1, 2, 2, 2]
    assert sample_indices(100, 4, stride=10).tolist() == [34, 44, 54, 64]
    assert sample_indices(5, 4, stride=3).tolist() == [0, 3, 4, 4]
    assert sample_indices(10, 4, stride=-3).tolist() == [0, 3, 6, 9]
    assert sample_indices(9, 4, stride=-3).tolist() == [1, 3, 5, 7]  # a window of 3 * 3 + 1 does not fit


@given(
    available=st.integers(1, 500),
    num_frames=st.integers(1, 64),
    stride=st.integers(-9, 9),
    seed=st.integers(0, 9) | st.none(),
)
def test_indices_always_ascend_inside_the_video(available, num_frames, stride, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    indices = sample_indices(available, num_frames, stride, rng)
    assert len(indices) == num_frames and indices[0] >= 0 and indices[-1] < available
    assert (np.diff(indices) >= 0).all()
    if stride < 0:
        full = available > (num_frames - 1) * -stride
        again = None if seed is None else np.random.default_rng(seed)
        assert (indices == sample_indices(available, num_frames, -stride if full else 0, again)).all()
        assert not full or (np.diff(indices) == -stride).all()
    if available >= num_frames and stride == 0:
        edges = np.arange(num_frames + 1) * available / num_frames
        assert (indices >= np.floor(edges[:-1])).all() and (indices < np.ceil(edges[1:])).all()


def test_training_jitters_and_covers_every_frame():
    drawn = {int(i) for seed in range(60) for i in sample_indices(16, 8, rng=np.random.default_rng(seed))}
    assert drawn == set(range(16))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}},
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "resample": 3},
        {
            "size": {"shortest_edge": 48},
            "crop_size": {"height": 48, "width": 48},
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.5, 0.6, 0.7],
        },
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "do_normalize": False},
        {"do_resize": False, "crop_size": {"height": 48, "width": 48}},
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "rescale_factor": 1 / 127.5},
    ],
)
@pytest.mark.parametrize("shape", [(70, 99), (99, 70), (64, 64)])
def test_pixels_equal_the_image_processor(fields, shape):
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    processor = VideoMAEImageProcessorPil(**fields)
    clip = torch.randint(0, 256, (3, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor([list(clip.numpy())], return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    ours = Preprocessing.from_dict(processor.to_dict(), 48)
    found = ours.normalise(ours.pixels(clip)[None])
    step = ours.rescale_factor / min(ours.std)  # one grey level
    assert found.shape == expected.shape
    levels = 7 if ours.interpolation == "bicubic" else 1  # on noise: overshoots are clipped after each pass
    assert (found - expected).abs().max() <= 1.01 * levels * step
    assert (found - expected).abs().mean() < 0.3 * step


def test_lanczos_becomes_what_is_closest_to_it():
    """VideoPrism's preprocessing has it."""
    rough = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = resize_frames(rough, (96, 128), "bicubic")
    picture = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((48, 48), Image.Resampling.LANCZOS)).astype(int)
    distance = {}
    for code in (0, 1, 2):
        rules = Preprocessing.from_dict(
            {"resample": code, "size": {"height": 48, "width": 48}, "do_normalize": False}, 48
        )
        distance[code] = np.abs(rules.pixels(clip)[0].permute(1, 2, 0).numpy() - expected).mean()
    assert distance[1] < distance[2] / 2 < distance[0] / 2, distance


@pytest.mark.parametrize(
    "fields",
    [{}, {"offset": False, "rescale_factor": 1 / 255}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3]}],
)
def test_offset_means_what_it_means_to_vivit(fields):
    """By default VivitImageProcessor maps the greys 0 to 255 to -1 to 1, then subtracts the mean."""
    from transformers import VivitImageProcessor

    processor = VivitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, **fields)
    clip = torch.arange(256, dtype=torch.uint8).repeat(27).view(1, 3, 48, 48)
    expected = torch.from_numpy(np.stack(processor([list(clip.numpy())])["pixel_values"][0]))
    ours = Preprocessing.from_dict(processor.to_dict(), 48)
    assert torch.allclose(ours.normalise(ours.pixels(clip)[None])[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="offset needs do_rescale"):
        Preprocessing.from_dict(processor.to_dict() | {"offset": True, "do_rescale": False}, 48)


def test_image_size_scales_resize_and_crop():
    fields = {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "image_mean": [0] * 3,
        "image_std": [1] * 3,
    }
    ours = Preprocessing.from_dict(fields, 112)
    assert ours.resize == (128,) and ours.pixels(torch.zeros(1, 3, 300, 500, dtype=torch.uint8)).shape == (
        1,
        3,
        112,
        112,
    )


@pytest.mark.parametrize("old", [{"size": 224}, {"size": [224, 224]}, {"size": {"shortest_edge": 224}}])
def test_older_spellings(old):
    fields = old | {"crop_size": 224, "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert Preprocessing.from_dict(fields, 224).pixels(torch.zeros(2, 3, 240, 320, dtype=torch.uint8)).shape[-2:] == (
        224,
        224,
    )
