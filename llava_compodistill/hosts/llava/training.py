"""What training takes from LLaVA: the base classes of our arguments, data set and trainer, and two constants."""

from __future__ import annotations

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
