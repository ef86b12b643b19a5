"""Stands for LLaVA's `llava.eval.model_vqa_loader`: the same flags, prompts and answers file, but through the engine.

    python -m llava_compodistill.eval.vqa_loader --model-path … --question-file … --image-folder … --answers-file …

scripts/eval/*.sh call it with ENGINE=1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import CompoDistillError, DataError, RecordsError, TemplateError
from ..hosts.llava.images import most_pixels
from .benchmarks.llava import read_questions
from .checkpoint import check_checkpoint, check_template
from .records import write_lines
from .requests import Answer

if TYPE_CHECKING:
    from .engine import Engine


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_compodistill.eval.vqa_loader", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="base model of a LoRA checkpoint")
    parser.add_argument("--question-file", type=Path, required=True, help="JSON lines: question_id, image, text")
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--answers-file", type=Path, required=True, help="JSON lines; begun anew")
    parser.add_argument("--conv-mode", default="llava_v1", help="conversation template (default: %(default)s)")
    parser.add_argument("--num-chunks", type=int, default=1, help="into how many parts the questions are cut")
    parser.add_argument("--chunk-idx", type=int, default=0, help="which of them is asked, from 0")
    parser.add_argument("--temperature", type=float, default=0, help="0: answers are decoded greedily")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float16 on cuda, as LLaVA's module"
    )
    parser.add_argument("--image-workers", type=int, help="processes that read images ahead of the model")
    return parser


def chunk(questions: Sequence[Any], count: int, number: int) -> Sequence[Any]:
    """Part `number` of `count`, cut as LLaVA's `get_chunk` cuts.

    Raises:
        DataError: for a part that is not there: parts of equal length may be fewer than `count`.
    """
    if count < 1:
        raise DataError(f"--num-chunks {count}: must be 1 or more.")
    size = math.ceil(len(questions) / count)
    parts = math.ceil(len(questions) / size)
    if not 0 <= number < parts:
        raise DataError(
            f"--chunk-idx {number}: {len(questions)} questions in {count} chunks (--num-chunks) of {size} make "
            f"{parts}, numbered from 0."
        )
    return questions[number * size : (number + 1) * size]


def template_for(model_name: str, conv_mode: str) -> str:
    """The template that LLaVA's module asks under: it takes a model with "plain" in its name for a pretrained one.

    Raises:
        TemplateError: when there is no such template.
    """
    if "plain" not in model_name or "finetune" in model_name.lower() or "mmtag" in conv_mode:
        check_template(conv_mode)
        return conv_mode
    try:
        check_template(f"{conv_mode}_mmtag")
    except TemplateError as error:
        raise TemplateError(
            f'LLaVA\'s model_vqa_loader asks a model with "plain" in its name ({model_name}) under the template '
            f"{conv_mode}_mmtag, and there is none. Rename the folder."
        ) from error
    print(
        f'{model_name} has "plain" in its name: it is asked under {conv_mode}_mmtag, as LLaVA does.', file=sys.stderr
    )
    return f"{conv_mode}_mmtag"


def ask(
    engine: Engine, questions: Sequence[dict[str, Any]], images: Path, answers: Path, model_name: str, longest: int
) -> None:
    """Ask questions and write LLaVA's answers.

    Questions on one image are asked together, so the answers come in another order than the questions; each is in the
    file as soon as it is there, and at the end the file has the questions' order. A question whose image cannot be
    read does not stop the others.

    Args:
        questions: with question_id, image and text.
        images: folder of their images.
        answers: JSON lines with question_id, prompt, text, answer_id, model_id and metadata.
        longest: most tokens of an answer.

    Raises:
        DataError: when questions are left without an answer; names the first.
    """
    import shortuuid  # of LLaVA's requirements, and asked for by nothing else here

    requests = [Answer(str(images / question["image"]), question["text"], longest) for question in questions]
    entries: dict[int, dict[str, Any]] = {}
    # Line by line: a kill loses nothing that was answered.
    with answers.open("w", buffering=1, encoding="utf-8") as file, tqdm(total=len(questions), desc=model_name) as bar:

        def write(number: int, text: str | DataError) -> None:
            bar.update()
            if isinstance(text, DataError):
                return
            question = questions[number]
            entries[number] = {
                "question_id": question["question_id"],
                "prompt": question["text"],
                "text": text,
                "answer_id": shortuuid.uuid(),
                "model_id": model_name,
                "metadata": {},
            }
            file.write(json.dumps(entries[number]) + "\n")

        with engine.expecting(dict.fromkeys(request.image for request in requests)):
            responses = engine.run(requests, done=write, keep_going=True)
    write_lines(answers, (entries[number] for number in sorted(entries)))
    wrong = [response for response in responses if isinstance(response, DataError)]
    if wrong:
        raise DataError(f"{len(wrong)} of {len(questions)} questions have no answer, the others are kept: {wrong[0]}")


def run(args: argparse.Namespace) -> None:
    """Check everything that needs no model, then load it and ask.

    Raises:
        CompoDistillError: for flags, questions, images or a checkpoint that will not do.
    """
    if args.temperature != 0:
        raise DataError(
            f"--temperature {args.temperature:g}: the engine decodes greedily (0). LLaVA's own module can sample: "
            "llava-compodistill run llava.eval.model_vqa_loader."
        )
    for flag, value in (("--max_new_tokens", args.max_new_tokens), ("--batch-size", args.batch_size)):
        if value < 1:
            raise DataError(f"{flag} {value}: must be 1 or more.")
    if (args.image_workers or 0) < 0:
        raise DataError(f"--image-workers {args.image_workers}: must be 0 or more.")
    most_pixels()  # a limit that is none shows now
    questions = chunk(read_questions(args.question_file, args.image_folder), args.num_chunks, args.chunk_idx)
    check_checkpoint(args.model_path, args.model_base)
    try:
        args.answers_file.parent.mkdir(parents=True, exist_ok=True)
        args.answers_file.open("a").close()
    except OSError as error:
        raise RecordsError(f"--answers-file {args.answers_file} cannot be written: {error}.") from None

    import torch

    from ..hosts.llava.host import import_llava
    from .as_llava import AsLlava
    from .loading import load_engine
    from .pictures import workers_by_default

    on_gpu = torch.cuda.is_available()
    workers = args.image_workers
    model_name = import_llava("llava.mm_utils").get_model_name_from_path(args.model_path)
    engine = load_engine(
        args.model_path,
        template_for(model_name, args.conv_mode),
        model_base=args.model_base,
        dtype=args.dtype or ("float16" if on_gpu else "float32"),
        batch_size=args.batch_size,
        image_workers=workers_by_default(on_gpu, args.num_chunks) if workers is None else workers,
        kind=AsLlava,
    )
    ask(engine, questions, args.image_folder, args.answers_file, model_name, args.max_new_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"Stopped; {args.answers_file} holds what was answered.", file=sys.stderr)
        return 130
    except CompoDistillError as error:
        print(f"vqa_loader: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
