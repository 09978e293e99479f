"""Picture world: a small world of pictures, words and knowledge that the project generates, and a scorer for it."""

from .dataset import PictureWorldSizes, build_howtos, build_pairs, build_texts
from .scorer import PictureScore, read_picture, score_picture
from .world import IMAGE_SIZE, Picture, PictureObject, render, sample_picture


__all__ = [
    "IMAGE_SIZE",
    "Picture",
    "PictureObject",
    "PictureScore",
    "PictureWorldSizes",
    "build_howtos",
    "build_pairs",
    "build_texts",
    "read_picture",
    "render",
    "sample_picture",
    "score_picture",
]
