"""transformers' mixins for image processors, processors and tokenizers, run on ours.

No test body is here: expectations that cannot hold are turned off by the suite's own knobs, each with its reason.
"""

from __future__ import annotations

import tempfile
import unittest

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_tokenization_common import TokenizerTesterMixin
from transformers import PreTrainedTokenizerFast

from jam_hf import JamImageProcessor, JamProcessor
from jam_hf.training.tokenizer import train_tokenizer


SENTENCES = [
    "This is a test of a tokenizer: lower newer wider, 12 34 56.",
    "A small red circle in the top left; the quick brown fox jumps over the lazy dog.",
    "Please write a picture and say in words what it shows!",
]
NUM_CODES = 16
IMAGE_SEQ_LENGTH = 4


def small_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES * 3, 400, NUM_CODES)


class JamImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent: unittest.TestCase):
        super().__init__(
            parent,
            do_resize=True,
            size={"shortest_edge": 20},
            do_center_crop=True,
            crop_size={"height": 18, "width": 18},
            do_convert_rgb=True,
            do_normalize=True,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": JamImageProcessor}  # the table of the library's own models does not know ours


class ImageProcessor(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = JamImageProcessingTester

    @unittest.skip("torchvision has no build for torch on the CPU: the backend is PIL, everywhere")
    def test_new_models_require_torchvision_backend(self) -> None:
        pass


class Processor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = JamProcessor

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        return small_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> JamImageProcessor:
        return JamImageProcessor.from_size(16)

    @staticmethod
    def prepare_processor_dict() -> dict:
        return {"image_seq_length": IMAGE_SEQ_LENGTH}


class Tokenizer(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = PreTrainedTokenizerFast

    @classmethod
    def setUpClass(cls) -> None:
        """As the mixin's, which would open a file of text that the source distribution lacks."""
        cls.tmpdirname = tempfile.mkdtemp()
        small_tokenizer().save_pretrained(cls.tmpdirname)
        cls.from_pretrained_id = [cls.tmpdirname]
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]
        cls._data = "\n".join(SENTENCES)
