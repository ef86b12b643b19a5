"""What scripts/eval/*.sh do around LLaVA's `model_vqa_loader` or ours: ask what is left, and join the answers.

Either begins its file anew at every start, so a killed run would lose what it had. Here it is only ever given the
questions that have no answer yet. An answer is known by its question's id and text: ids alone repeat (MME has two
questions an image, TextVQA several).

    ANSWERS.jsonl           the whole, in the order of the questions, when all are answered
    ANSWERS.jsonl.run.json  what made them: checkpoint, template, questions, and what asked
    ANSWERS/N_I.jsonl       the shares of this start
    ANSWERS/kept.jsonl      what earlier starts answered
    ANSWERS/left.jsonl      the questions of this start
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecordsError
from .benchmarks.llava import read_answers, read_questions
from .checkpoint import check_checkpoint, template_of
from .records import check_run, fingerprint, made_with, write_lines, write_run

AGAIN = "MODEL_NAME=… (`eval --name …`) keeps others under another name; OVERWRITE=1 (`eval --overwrite`) asks again."
#: What asks, where a run does not say it.
LLAVA = "LLaVA's model_vqa_loader"
Key = tuple[str, str]


def begin(
    questions: Path, answers: Path, about: dict[str, Any], overwrite: bool = False, images: Path | None = None
) -> int:
    """Gather what is answered and write ANSWERS/left.jsonl; returns how many questions that is.

    Args:
        questions: LLaVA's question file, a JSON object a line with question_id, image and text.
        answers: the file that `join` will write.
        about: what the answers are made with; going on with another's is an error.
        images: where the questions' images have to be.

    Raises:
        RecordsError: for answers of another run or to other questions, and for missing images, naming file and line;
            nothing is touched then.
    """
    asked = read_questions(questions, images)
    about = {**about, "questions": len(asked), "fingerprint": fingerprint(asked)}
    folder = answers.with_suffix("")
    if overwrite:
        for path in (answers, *_parts(folder)):
            path.unlink(missing_ok=True)
    found = _found(asked, questions, [answers, *_parts(folder)])
    if found or answers.is_file():
        check_run(answers, about, AGAIN, unsaid={"asked_by": LLAVA, "dtype": about.get("dtype")})
    write_run(answers, about)
    left = _unanswered(asked, found)
    if not left and answers.is_file():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "kept.jsonl", (entry for entries in found.values() for entry in entries))
    for path in _parts(folder):
        if path.name != "kept.jsonl":
            path.unlink()
    write_lines(folder / "left.jsonl", left)
    return len(left)


def join(questions: Path, answers: Path) -> int:
    """Write ANSWERS.jsonl from the shares and what was kept, in the order of the questions; returns their number.

    Raises:
        RecordsError: when questions are left without an answer; what there is stays.
    """
    asked = read_questions(questions)
    folder = answers.with_suffix("")
    found = _found(asked, questions, _parts(folder))
    left = _unanswered(asked, found)
    if left:
        raise RecordsError(
            f"{folder}: {len(left)} of {len(asked)} questions have no answer; run this again, it asks those."
        )
    write_lines(answers, (found[_key(question)].pop(0) for question in asked))
    for path in (*_parts(folder), folder / "left.jsonl"):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
    return len(asked)


def asked_by(engine: bool, dtype: str = "") -> str:
    """What asks, as a run and its summary say it: in another precision a few answers are others."""
    return LLAVA if not engine else f"engine in {dtype}" if dtype else "engine"


def shares(left: int, gpus: int) -> int:
    """Into how many parts LLaVA's `get_chunk` can cut `left` questions: `gpus`, or fewer where its last parts would
    not exist."""
    return math.ceil(left / math.ceil(left / gpus)) if left else 0


def _found(asked: Sequence[dict], questions: Path, files: Iterable[Path]) -> dict[Key, list[dict]]:
    """The answers that lie in files, by question."""
    wanted = Counter(map(_key, asked))
    found: dict[Key, list[dict]] = defaultdict(list)
    for path in files:
        if not path.is_file():
            continue
        for number, entry in enumerate(read_answers(path), start=1):
            key = (str(entry["question_id"]), entry["prompt"])
            if key not in wanted:
                raise RecordsError(
                    f"{path}, line {number}: question {key[0]!r} with this text is not in {questions}: these answer "
                    f"another file. {AGAIN}"
                )
            if entry in found[key]:
                continue  # LLaVA numbers its answers: a kill came while this one was moved
            found[key].append(entry)
            if len(found[key]) > wanted[key]:
                raise RecordsError(f"{path}, line {number}: question {key[0]!r} is answered once more. {AGAIN}")
    return found


def _unanswered(asked: Sequence[dict], found: dict[Key, list[dict]]) -> list[dict]:
    there = Counter({key: len(entries) for key, entries in found.items()})
    left = []
    for question in asked:
        if there[_key(question)]:
            there[_key(question)] -= 1
        else:
            left.append(question)
    return left


def _key(question: dict) -> Key:
    return str(question["question_id"]), question["text"]


def _parts(folder: Path) -> list[Path]:
    return [path for path in [folder / "kept.jsonl", *sorted(folder.glob("*_*.jsonl"))] if path.is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    """`begin` prints how many questions are left, into how many shares they go, and the template they are asked under;
    `join` how many are answered."""
    parser = argparse.ArgumentParser(prog="python -m llava_compodistill.eval.llava_answers", description=main.__doc__)
    parser.add_argument("do", choices=("begin", "join"))
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--model", default="", help="checkpoint folder")
    parser.add_argument("--model-base", default="")
    parser.add_argument("--template", default="", help="default: the checkpoint's, else by the model's type")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--engine", type=int, choices=(0, 1), default=0, help="1: vqa_loader asks, not LLaVA's module")
    parser.add_argument("--dtype", choices=("", "float32", "bfloat16", "float16"), default="", help="of the engine")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu", help="decides the default precision")
    parser.add_argument("--overwrite", type=int, choices=(0, 1), default=0)
    args = parser.parse_args(argv)
    try:
        if args.do == "join":
            print(join(args.questions, args.answers))
        else:
            if args.model:
                check_checkpoint(args.model, args.model_base)
            # Standard output is what the script reads.
            template = args.template or template_of(args.model, lambda text: print(text, file=sys.stderr))
            more = {"model_base": args.model_base, "max_new_tokens": args.max_new_tokens}
            # LLaVA's builder loads in fp16, and `llava-compodistill run` in fp32 where there is no GPU.
            dtype = args.dtype if args.engine else ""  # LLaVA's own module takes none
            more["dtype"] = dtype or ("float16" if args.device == "cuda" else "float32")
            more["asked_by"] = asked_by(bool(args.engine), dtype)
            about = made_with(args.model, template, **more)
            left = begin(args.questions, args.answers, about, bool(args.overwrite), args.images)
            print(left, shares(left, args.gpus), template)
    except ValueError as error:  # RecordsError, DataError
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
