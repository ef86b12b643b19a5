"""What training takes from LLaVA: the base classes of our arguments, data set and trainer, and two constants."""

from __future__ import annotations

from typing import Any

from .host import import_llava

_train = import_llava("llava.train.train")
_trainer = import_llava("llava.train.llava_trainer")
_constants = import_llava("llava.constants")

ModelArguments = _train.ModelArguments
DataArguments = _train.DataArguments
TrainingArguments = _train.TrainingArguments
LazySupervisedDataset = _train.LazySupervisedDataset
DataCollatorForSupervisedDataset = _train.DataCollatorForSupervisedDataset
LLaVATrainer = _trainer.LLaVATrainer
LengthGroupedSampler = _trainer.LengthGroupedSampler

#: Label of a position that has no loss, and the token id that stands for an image until LLaVA merges it in.
IGNORE_INDEX = _constants.IGNORE_INDEX
IMAGE_TOKEN_INDEX = _constants.IMAGE_TOKEN_INDEX


def preprocess_multimodal(sources: Any, data_args: Any) -> Any:
    """LLaVA's: puts `<image>` where its models expect it. Changes the conversations in place."""
    return _train.preprocess_multimodal(sources, data_args)


def preprocess(sources: Any, tokenizer: Any, has_image: bool) -> dict[str, Any]:
    """LLaVA's, by way of what the plugin has put in its place (`templates.checked_preprocess`)."""
    return _train.preprocess(sources, tokenizer, has_image=has_image)
