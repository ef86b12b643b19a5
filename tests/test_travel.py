"""Batches on their way to the device: pixels rounded before it, every tensor pinned, copies that nobody waits for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from factory import make_batch, make_model, save_tower
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from llava_compodistill.hosts.llava import register

register(train=True)

from llava_compodistill.hosts.llava.training import DataCollatorForSupervisedDataset  # noqa: E402
from llava_compodistill.pair import Pair  # noqa: E402
from llava_compodistill.pair.tokens import TEACHER  # noqa: E402
from llava_compodistill.train import facts, travel  # noqa: E402
from llava_compodistill.train.arguments import TrainingArguments  # noqa: E402
from llava_compodistill.train.facts import CountingCollator  # noqa: E402
from llava_compodistill.train.objective import Objective  # noqa: E402
from llava_compodistill.train.teacher_text import TeacherTextCollator  # noqa: E402


def collator(pixels=None):
    tokenizer = SimpleNamespace(pad_token_id=0, model_max_length=64)
    single = DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    return CountingCollator(TeacherTextCollator(single, single), 16, 64, None, pixels)


def samples(*sizes):
    text = {"input_ids": torch.tensor([5, -200, 6, 7]), "labels": torch.tensor([-100, -100, -100, 7])}
    theirs = {**text, "aligned": torch.tensor([[0, 0]])}
    return [{**text, TEACHER: theirs, "image": torch.rand(3, size, size)} for size in sizes]


def tensors(value):
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for each in values for tensor in tensors(each)]


@pytest.mark.parametrize("sizes, images", [((8, 8), 1), ((8, 6), 2)])
def test_all_of_a_batch_is_pinned(monkeypatch, sizes, images):
    """By PyTorch's own function, which here marks what a GPU's driver would pin."""
    batch = next(iter(DataLoader(samples(*sizes), batch_size=2, collate_fn=collator())))
    assert len(tensors(batch)) == 3 + images + 4
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: torch.ones_like(self, dtype=torch.float16))
    pinned = pin_memory(batch)
    assert [tensor.dtype for tensor in tensors(pinned)] == [torch.float16] * len(tensors(batch))
    assert pinned.keys() == batch.keys() and pinned[facts.KEY] is batch[facts.KEY]
    # What is asked of the text is asked of the tensors that stay.
    kept = facts.BatchFacts.of(batch, 16, 64).text
    assert kept["input_ids"] is batch["input_ids"] and kept[TEACHER]["labels"] is batch[TEACHER]["labels"]


@pytest.mark.parametrize("sizes", [(8, 8), (8, 6)])
def test_pixels_are_rounded_by_the_collator(sizes):
    given = samples(*sizes)
    batch = collator(torch.bfloat16)(given)
    for image, sample in zip(batch["images"], given, strict=True):
        assert torch.equal(image, sample["image"].bfloat16())
    assert next(iter(collator()(given)["images"])).dtype == torch.float32


def test_copies_are_not_waited_for_from_pinned_memory_to_a_gpu():
    def told(pinned, device):
        loader = SimpleNamespace(_non_blocking=False)
        args = SimpleNamespace(dataloader_pin_memory=pinned, device=torch.device(device))
        return travel.without_waiting(loader, args)._non_blocking

    assert told(True, "cuda") and not told(False, "cuda") and not told(True, "cpu")


def test_nor_in_a_run_that_skips_what_it_has_seen(monkeypatch):
    """accelerate makes a loader anew for it."""
    made = SimpleNamespace(_non_blocking=False)
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", lambda loader, number: made)
    args = SimpleNamespace(dataloader_pin_memory=True, device=torch.device("cuda"))
    with travel.resuming_without_waiting(args):
        assert transformers.trainer.skip_first_batches("loader", 3)._non_blocking is True
    assert transformers.trainer.skip_first_batches("loader", 3) is made


def test_the_loader_of_a_run_has_what_is_set(dft):
    trainer, _ = dft(max_steps=1)
    loader = trainer.get_train_dataloader()
    assert loader._non_blocking is False, "accelerate's own name for it"


def test_a_run_in_bf16_reads_its_pixels_in_it(dft):
    trainer, log = dft(max_steps=1, bf16=True)
    samples = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    image = next(sample for sample in samples if sample["image"].any())
    text = next(sample for sample in samples if not sample["image"].any())
    assert image["image"].dtype == trainer.data_collator.pixels == torch.bfloat16
    assert trainer.data_collator([image, text])["images"].dtype == torch.bfloat16


def make_pair(siglip, dtype, other=None):
    teacher = make_model(siglip if other is None else other, layers=3, seed=1, dtype=torch.float32)
    student = make_model(siglip, layers=3, seed=2, dtype=torch.float32).train()
    student.get_vision_tower().to(dtype)
    return student, teacher.requires_grad_(False)


def test_which_pixels_can_be_rounded(siglip, tmp_path):
    student, teacher = make_pair(siglip, torch.bfloat16)
    assert Pair.of(student, teacher).pixel_dtype == torch.bfloat16
    assert Pair.of(student, None).pixel_dtype == torch.bfloat16
    assert Pair.of(*make_pair(siglip, torch.float16)).pixel_dtype == torch.float16
    assert Pair.of(*make_pair(siglip, torch.float32)).pixel_dtype is None
    student.get_model().mm_projector = torch.nn.Identity()
    assert Pair.of(student, None).pixel_dtype is None, "features reach the language model as they are"
    other = save_tower(tmp_path / "clip", "clip")
    assert Pair.of(*make_pair(siglip, torch.bfloat16, other)).pixel_dtype is None, "the teacher prepares them anew"


@pytest.mark.parametrize("method", ["sft", "compodistill", "align_kd"])
def test_rounded_pixels_give_the_same_bits(siglip, tmp_path, method):
    """Losses and gradients of a micro-batch in bf16."""
    student, teacher = make_pair(siglip, torch.bfloat16)
    args = TrainingArguments(
        str(tmp_path), stage="dft", method=method, use_cpu=True, report_to="none", bf16=True,
        student_layers="0,1", teacher_layers="0,1,2",
    )  # fmt: skip
    objective = Objective(student, teacher if args.distilled else None, args.chosen_method.terms("dft", args), 91)
    inputs = {**make_batch(["qIqaa", "Iqa", "qaa"], dtype=torch.float32).inputs, "use_cache": False}
    found = []
    for dtype in (torch.float32, objective.pair.pixel_dtype):
        student.zero_grad()
        with objective.running(), torch.autocast("cpu", dtype=torch.bfloat16):
            sums = objective(student, {**inputs, "images": inputs["images"].to(dtype)})
            sum(each.loss for each in sums.values()).backward()
        grads = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
        found.append([*(each.loss.detach() for each in sums.values()), *grads])
    assert len(found[0]) > 20 and all(map(torch.equal, *found))
