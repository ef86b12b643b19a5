"""This package's checkpoints as a model of lmms-eval, found there through an entry point (`lmms_eval.models`):

    lmms-eval --model llava_compodistill --model_args pretrained=CKPT --tasks pope,mme --batch_size 16

For an environment that has lmms-eval (pip install 'llava-compodistill[lmms]'); LLaVA's own pins are older.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from ..errors import DataError
from .checkpoint import check_checkpoint, template_of
from .loading import load_engine
from .requests import Answer, Continuation, Request

logger = logging.getLogger(__name__)

MANIFEST = ModelManifest(model_id="llava_compodistill", simple_class_path=f"{__name__}.LlavaCompoDistill")


class LlavaCompoDistill(lmms):
    """A LLaVA checkpoint that answers lmms-eval's requests, each on one image, through `engine.Engine`.

    Args:
        pretrained: checkpoint folder.
        conv_template: conversation template; by default what the model's type asks for.
        model_base: base model of a LoRA checkpoint.
        batch_size: sequences at a time.
        device: cuda, cuda:N or cpu; under `accelerate launch` each process takes its own.
        dtype: float32, bfloat16 or float16.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        conv_template: str | None = None,
        model_base: str | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str | None = None,
    ):
        super().__init__()
        # Ranks wait for the slowest one, which may take longer than the ten minutes that are usual.
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=52))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        check_checkpoint(pretrained, model_base)
        template = conv_template or template_of(pretrained, logger.warning)
        options = {"model_base": model_base, "device": device, "dtype": dtype, "batch_size": int(batch_size)}
        self.engine = load_engine(pretrained, template, **options, open_image=self._open)
        self._visuals: dict[str, tuple[Any, tuple]] = {}

    @property
    def device(self) -> Any:
        return self.engine.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Texts, decoded greedily and cut at the first of `until`."""
        asked, cuts = [], []
        for context, options, *place in (request.args for request in requests):
            if options.get("do_sample") or (options.get("temperature") or 0) > 0:
                _warn_once("lmms-eval asks for sampling; answers are decoded greedily.")
            until = options.get("until") or []
            cuts.append([until] if isinstance(until, str) else list(until))
            asked.append(Answer(*self._question(context, *place), int(options.get("max_new_tokens", 128))))
        texts = self._run(asked)
        for number, stops in enumerate(cuts):
            for stop in filter(None, stops):
                texts[number] = texts[number].split(stop)[0]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(loss, whether it is the greedy answer) of each target: the mean negative log-probability of its tokens, the
        end token included. lmms-eval's tasks take the option with the smallest, as its own LLaVA model gives it,
        whatever the name says. (Release 0.7.3 turns these pairs into text before it scores them, so that its
        `multiple_choice` tasks fail there with every model.)"""
        asked = []
        for context, target, *place in (request.args for request in requests):
            answer = target if isinstance(target, str) else target(self._doc(*place[1:]))
            asked.append(Continuation(*self._question(context, *place), answer.strip()))
        return [(-value, greedy) for value, greedy in self._run(asked)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("llava_compodistill answers single questions; this task asks several in a row.")

    def _question(self, context: str, visual: Any, *place: Any) -> tuple[str, str]:
        """(the image's name, the prompt); lmms-eval gives what opens an image, not where it lies."""
        name = "/".join(map(str, (*place[1:], place[0])))
        self._visuals[name] = (visual, place)
        return name, context.replace("<image>", "").strip()

    def _doc(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _open(self, name: str) -> Any:
        visual, place = self._visuals[name]
        images = [image for image in visual(self._doc(*place)) or [] if image is not None]
        if len(images) != 1 or not hasattr(images[0], "convert"):
            raise DataError(f"{name}: llava_compodistill reads one image a question, this has {len(images)} visuals.")
        return images[0].convert("RGB")

    def _run(self, asked: list[Request]) -> list[Any]:
        with tqdm(total=len(asked), disable=self.rank != 0, desc="llava_compodistill") as bar:
            return self.engine.run(asked, done=lambda *_: bar.update())


_WARNED: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        logger.warning(text)
