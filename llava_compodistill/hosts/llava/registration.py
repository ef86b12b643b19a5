"""register() and unregister(): give LLaVA the plugin's models, towers, adapters, templates and loader, and take them
back.

Real extension points first (AutoConfig, AutoModelForCausalLM, conv_templates); where LLaVA imports by name, the name
is rebound at its consumer. Every rebound symbol's signature is checked before anything is changed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from ... import compat
from ...errors import HostError
from .host import SUPPORTED_REVISIONS, import_llava
from .images import ImagesOfLlava, checked_padding

#: (module, symbol) -> the parameters that the supported revisions have.
SIGNATURES = {
    ("llava.model.llava_arch", "build_vision_tower"): ["vision_tower_cfg", "kwargs"],
    ("llava.model.llava_arch", "build_vision_projector"): ["config", "delay_load", "kwargs"],
    ("llava.model.builder", "load_pretrained_model"): [
        "model_path",
        "model_base",
        "model_name",
        "load_8bit",
        "load_4bit",
        "device_map",
        "device",
        "use_flash_attn",
        "kwargs",
    ],
    ("llava.mm_utils", "expand2square"): ["pil_img", "background_color"],
    ("llava.train.train", "preprocess"): ["sources", "tokenizer", "has_image"],
}
TRAIN_MODULE = "llava.train.train"

#: (module, symbol) -> what was there before; ABSENT where nothing was.
_originals: dict[tuple[str, str], Any] = {}
_ABSENT = object()
_templates: list[str] = []


def registered() -> bool:
    """Whether LLaVA in this process knows the plugin."""
    return bool(_originals)


def register(train: bool = False) -> None:
    """Make LLaVA know the plugin. Calling it again is harmless.

    Args:
        train: also import `llava.train.train` and give it the plugin's templates. Evaluation does not need it.

    Raises:
        HostError: when LLaVA is missing, broken, or a revision whose symbols differ from the supported ones.
    """
    try:
        compat.check_transformers()
    except ImportError as error:
        raise HostError(str(error)) from error
    import_llava("llava.model.builder")
    if train:
        import_llava(TRAIN_MODULE)
    wanted = [key for key in SIGNATURES if key[0] in sys.modules and key not in _originals]
    for key in wanted:
        _check_signature(*key)
    replacements = _replacements()
    for key in wanted:
        module, symbol = key
        _rebind(module, symbol, replacements[key](getattr(sys.modules[module], symbol)))
    if TRAIN_MODULE in sys.modules and (TRAIN_MODULE, "Image") not in _originals:
        _rebind(TRAIN_MODULE, "Image", ImagesOfLlava())
    repair = compat.output_capturing_repair()
    if repair is not None:
        _rebind(*repair)
    _register_models()
    _register_templates()


def unregister() -> None:
    """Put back everything that `register()` changed. (transformers offers no way to forget an AutoConfig entry; it
    stays and does no harm.)"""
    for (module, symbol), original in reversed(list(_originals.items())):
        if original is _ABSENT:
            delattr(sys.modules[module], symbol)
        else:
            setattr(sys.modules[module], symbol, original)
    _originals.clear()
    if _templates:
        from llava.conversation import conv_templates

        for name in _templates:
            conv_templates.pop(name, None)
        _templates.clear()


def _replacements() -> dict[tuple[str, str], Callable[[Callable], Callable]]:
    from .loader import dispatching_loader
    from .templates import checked_preprocess

    return {
        ("llava.model.llava_arch", "build_vision_tower"): _tower_builder,
        ("llava.model.llava_arch", "build_vision_projector"): _projector_builder,
        ("llava.model.builder", "load_pretrained_model"): dispatching_loader,
        ("llava.mm_utils", "expand2square"): checked_padding,
        (TRAIN_MODULE, "preprocess"): checked_preprocess,
    }


def _tower_builder(original: Callable) -> Callable:
    from .model import has_own_tower
    from .trained_towers import build_own_tower
    from .vision_towers import SiglipVisionTower, is_siglip, tower_name

    def build_vision_tower(vision_tower_cfg, **kwargs):
        name = tower_name(vision_tower_cfg)
        if name is not None and has_own_tower(vision_tower_cfg):
            return build_own_tower(name, vision_tower_cfg, **kwargs)
        if name is not None and is_siglip(name):
            return SiglipVisionTower(name, args=vision_tower_cfg, **kwargs)
        return original(vision_tower_cfg, **kwargs)

    return build_vision_tower


def _projector_builder(original: Callable) -> Callable:
    from .taf import PROJECTOR_TYPE, build_taf_projector

    def build_vision_projector(config, delay_load=False, **kwargs):
        if getattr(config, "mm_projector_type", "linear") == PROJECTOR_TYPE:
            return build_taf_projector(config, original)
        return original(config, delay_load=delay_load, **kwargs)

    return build_vision_projector


def _check_signature(module: str, symbol: str) -> None:
    function = getattr(sys.modules[module], symbol, None)
    found = list(inspect.signature(function).parameters) if callable(function) else None
    if found != SIGNATURES[module, symbol]:
        raise HostError(
            f"{module}.{symbol} has the parameters {found}, not {SIGNATURES[module, symbol]}: this LLaVA is not one "
            f"of the supported revisions ({'; '.join(SUPPORTED_REVISIONS)})."
        )


def _rebind(module: str, symbol: str, value: Any) -> None:
    target = sys.modules[module]
    _originals[module, symbol] = getattr(target, symbol, _ABSENT)
    setattr(target, symbol, value)


def _register_models() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from .language_models import OWN_CLASSES

    for model in OWN_CLASSES:
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        for cls in (config, model):
            if ("llava.model", cls.__name__) not in _originals:
                _rebind("llava.model", cls.__name__, cls)


def _register_templates() -> None:
    from llava.conversation import conv_templates

    from .templates import TEMPLATES

    for name, template in TEMPLATES.items():
        if name not in conv_templates:
            conv_templates[name] = template
            _templates.append(name)
