"""Under which conversation template a checkpoint is asked where its config.json names none. Imports nothing heavy."""

from __future__ import annotations

#: Model types that the plugin's loader takes, and the conversation template of each, where nothing names one.
DEFAULT_TEMPLATES = {
    "llava_qwen2": "qwen_1_5",
    "llava_qwen3": "qwen_1_5",
    "llava_llama": "v1",
    "llava": "v1",
    "llava_mistral": "mistral_instruct",
}
#: Pre-training's template holds no question: nothing can be asked under it.
CAPTIONS_ALONE = "plain"
