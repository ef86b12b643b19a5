"""Several machines: the folder that they share, or the folders that they have, and where all begin."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.invariant, pytest.mark.once]

#: Two ranks, each the only one of a machine, enter `output_folder`; checkpoints are folders with a file `whole`.
CODE = """
import os
from pathlib import Path
from types import SimpleNamespace
from accelerate import PartialState
from llava_compodistill.errors import CompoDistillError
from llava_compodistill.train import output, resume

PartialState(cpu=True, backend="gloo")
rank = int(os.environ["RANK"])
output.SHOWN_AFTER = 0.3
resume.damage = lambda folder, verify=False: None if (folder / "whole").exists() else "it is torn"
resume.name_missing_states = lambda *args: None
resume.checkpoint_to_resume = lambda folder, *args, **options: resume.last_complete(folder)
resume.is_finished = lambda folder, made_with: (Path(folder) / "finished").exists()
args = SimpleNamespace(
    process_index=rank, local_process_index=0, world_size=2, save_on_each_node={each},
    output_dir={folder!r} + {own!r}[rank],
    made_with={{}}, resume_anyway=False, verify_checkpoints=False, trust_checkpoint=False,
)
try:
    with output.output_folder(args) as start:
        print("BEGINS AT", start and os.path.basename(start), "in", os.path.basename(args.output_dir))
except CompoDistillError as error:
    print("REFUSED", type(error).__name__, error)
"""


@pytest.fixture
def enter(ranks, tmp_path):
    """Two machines enter their folders; what each says."""

    def run(first, second, each=True):
        own = ("first", "second") if second is not None else ("first", "first")
        for name, checkpoints in zip(own, (first, second), strict=True):
            for checkpoint, whole in (checkpoints or {}).items():
                (tmp_path / name / checkpoint).mkdir(parents=True)
                if whole:
                    (tmp_path / name / checkpoint / "whole").touch()
        log = tmp_path / "log"
        done = ranks.python(CODE.format(each=each, folder=f"{tmp_path}/", own=own), log, 2, machines=True)
        assert done.ok, done.text
        texts = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
        return [next(line for line in text.splitlines() if line.startswith(("BEGINS", "REFUSED"))) for text in texts]

    return run


def test_machines_with_folders_of_their_own_begin_at_the_newest_checkpoint_that_both_have(enter):
    # One was killed before it had sealed what the other has.
    found = enter({"checkpoint-2": True, "checkpoint-4": True}, {"checkpoint-2": True, "checkpoint-4": False})
    assert found == ["BEGINS AT checkpoint-2 in first", "BEGINS AT checkpoint-2 in second"]


def test_machines_without_a_checkpoint_in_common_are_refused(enter):
    found = enter({"checkpoint-2": True}, {})
    assert all(each.startswith("REFUSED CheckpointError --output_dir ") for each in found)
    assert "no checkpoint in common (checkpoint-2 on rank 0, nothing on rank 1). Copy one to all" in found[0]


def test_new_machines_begin_at_the_beginning(enter):
    assert enter({}, {}) == ["BEGINS AT None in first", "BEGINS AT None in second"]


def test_a_folder_that_is_not_shared_is_refused_on_all_machines(enter, tmp_path):
    found = enter({"checkpoint-2": True}, {}, each=False)
    assert len(set(found)) == 1 and found[0].startswith("REFUSED OutputError --output_dir ")
    assert "is not the first machine's folder on rank 1" in found[0] and "--save_on_each_node True" in found[0]
    assert enter({}, None, each=False) == ["BEGINS AT checkpoint-2 in first"] * 2
