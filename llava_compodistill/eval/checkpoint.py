"""What an evaluation asks of a checkpoint's folder before anything is loaded: whether it is one, and its template."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..hosts.files import read_object
from ..hosts.llava.default_templates import CAPTIONS_ALONE, DEFAULT_TEMPLATES

#: By model type.
TEMPLATES = DEFAULT_TEMPLATES


def check_checkpoint(model_path: str, model_base: str | None = None) -> None:
    """Whether there is a LLaVA checkpoint that loads without code of its own, before anything is read or written.

    A type that only resembles a LLaVA model's would go to LLaVA's builder, which trusts the code that a checkpoint
    brings along.

    Raises:
        DataError: when there is no such folder, it holds something else, or it or its base wants code of its own to be
            run. A name on the hub passes.
    """
    path = Path(model_path)
    if not path.is_dir():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model_path) and not path.parent.is_dir():
            return  # owner/name, and no folder is called like the owner
        raise DataError(f"checkpoint not found: {model_path}")
    kind = _model_type(path)
    if kind not in TEMPLATES:
        if "llava" in kind.lower():
            raise DataError(
                f"{path / 'config.json'}: model_type {kind!r} is not supported: there are {', '.join(TEMPLATES)}."
            )
        raise DataError(
            f"{path / 'config.json'}: model_type {kind!r} is no LLaVA model. A LoRA or adapter folder has its own "
            "config.json of a llava_… type."
        )
    for folder in filter(None, (model_path, model_base)):
        config = Path(folder) / "config.json"
        if config.is_file() and "auto_map" in _config(Path(folder)):
            raise DataError(
                f"{config}: its auto_map names code of the checkpoint's own, which is never run here. If the model is "
                "an ordinary one, delete that entry."
            )


def check_template(name: str) -> None:
    """Raise TemplateError when LLaVA and the plugin know no such conversation template."""
    from ..hosts.llava import register
    from ..hosts.llava.templates import use_template

    register(train=True)
    use_template(name)


def template_of(model_path: str, report: Callable[[str], None] = lambda text: None) -> str:
    """The conversation template that a checkpoint was trained under, as its config.json says; where it does not, that
    of the model's type, which is reported.

    Raises:
        DataError: when the model's type is not known.
    """
    path = Path(model_path)
    try:
        kind = _model_type(path)
    except DataError as error:
        way = "name the conversation template with --conv-mode (CONV_MODE=… for scripts/eval)"
        raise DataError(f"{error} Or {way}.") from None
    made_with = _config(path).get("compodistill")
    template = made_with.get("template") if isinstance(made_with, dict) else None
    if isinstance(template, str) and template not in ("", CAPTIONS_ALONE):
        return template
    guess = TEMPLATES[kind]
    report(
        f"{path / 'config.json'} names no conversation template: {guess} is taken, that of the model type {kind}. "
        "--conv-mode (CONV_MODE) names another."
    )
    return guess


def prompt_of(model_path: str, template: str) -> str:
    """What a question stands in under a template, word for word, for this checkpoint."""
    from ..hosts.llava.conversations import prompt_under

    marked = _config(Path(model_path)).get("mm_use_im_start_end")
    return prompt_under(template, "<im_start><image><im_end>" if marked else "<image>")


def _model_type(path: Path) -> str:
    kind = _config(path).get("model_type")
    if kind is None:
        raise DataError(f"{path / 'config.json'} does not tell the model's type: is {path} a checkpoint's folder?")
    return str(kind).removesuffix("_sparse")


def _config(path: Path) -> dict[str, Any]:
    """A folder's config.json; empty where there is none."""
    path = path / "config.json"
    return read_object(path) if path.exists() else {}
