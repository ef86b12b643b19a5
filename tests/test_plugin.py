"""What register() gives LLaVA: models, towers, templates, the loader; and that it can be taken back."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import factory
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from llava_compodistill import models
from llava_compodistill.plugin import HostError, register, registered, registration, unregister
from llava_compodistill.plugin.host import import_llava, import_llava_train

register(train=True)

from llava import conversation  # noqa: E402
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX  # noqa: E402
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token  # noqa: E402

from llava_compodistill.plugin.loader import (  # noqa: E402
    CheckpointError,
    checkpoint_kind,
    dispatching_loader,
    load_extra_weights,
    load_model,
    read_weights,
)
from llava_compodistill.plugin.templates import TEMPLATES, SampleError, prepare_tokenizer, use_template  # noqa: E402
from llava_compodistill.plugin.vision_towers import SiglipVisionTower  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# register and unregister
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def unregistered():
    unregister()
    yield
    unregister()
    register(train=True)


def symbols():
    found = {key: getattr(sys.modules[key[0]], key[1]) for key in registration.SIGNATURES}
    for name in ("LlavaQwen2Config", "LlavaQwen2ForCausalLM"):
        found["llava.model", name] = getattr(sys.modules["llava.model"], name, None)
    return found, dict(conversation.conv_templates)


def test_registering_rebinds_and_unregistering_brings_everything_back(unregistered):
    before, templates = symbols()
    assert not registered() and not set(TEMPLATES) & set(templates)
    assert before["llava.model", "LlavaQwen2ForCausalLM"] is None
    register(train=True)
    after, _ = symbols()
    assert registered() and all(after[key] is not before[key] for key in before)
    assert set(TEMPLATES) <= set(conversation.conv_templates)
    register(train=True)
    register()
    assert symbols()[0] == after, "registering again wraps nothing twice"
    unregister()
    assert symbols() == (before, templates) and not registered()
    assert not hasattr(sys.modules["llava.model"], "LlavaQwen2ForCausalLM")
    unregister()  # harmless


def test_a_template_of_the_users_is_neither_replaced_nor_removed(unregistered, monkeypatch):
    mine = copy.deepcopy(TEMPLATES["qwen_1_5"])
    monkeypatch.setitem(conversation.conv_templates, "qwen_2", mine)
    register()
    assert conversation.conv_templates["qwen_2"] is mine
    unregister()
    assert conversation.conv_templates["qwen_2"] is mine


@pytest.mark.parametrize("key", registration.SIGNATURES, ids=lambda key: key[1])
def test_another_signature_is_another_revision(unregistered, monkeypatch, key):
    def changed(something, different=None):
        raise AssertionError("never called")

    monkeypatch.setattr(sys.modules[key[0]], key[1], changed)
    before, templates = symbols()
    with pytest.raises(
        HostError, match=rf"(?s){key[1]} has the parameters \['something', 'different'\].*c121f04.*1\.2\.2"
    ):
        register(train=True)
    assert symbols() == (before, templates) and not registered(), "nothing is half-registered"


def test_a_symbol_that_is_gone_is_another_revision(unregistered, monkeypatch):
    monkeypatch.delattr("llava.model.builder.load_pretrained_model")
    with pytest.raises(HostError, match="load_pretrained_model has the parameters None"):
        register()


def test_the_rebound_symbols_keep_their_signatures():
    for (module, name), parameters in registration.SIGNATURES.items():
        found = list(inspect.signature(getattr(sys.modules[module], name)).parameters)
        assert found == parameters or name == "build_vision_projector" and found == parameters, (module, name)


BREAK = """
import importlib.abc, sys

class Break(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {broken!r}:
            raise ImportError("libbroken.so.3: cannot open shared object file")

sys.meta_path.insert(0, Break())
from llava_compodistill.plugin import HostError, register
try:
    register({train})
except HostError as error:
    print("HOST ERROR", error)
"""


@pytest.mark.parametrize(
    "broken, train", [("llava.model.llava_arch", ""), ("llava.train.llava_trainer", "train=True")]
)
def test_the_real_cause_of_a_broken_install_is_shown(broken, train):
    """LLaVA's bare `except: pass` would say: cannot import name 'LlavaLlamaForCausalLM'."""
    code = BREAK.format(broken=broken, train=train)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=tiny.environment())
    assert "HOST ERROR LLaVA was found but cannot be imported" in done.stdout, done.stdout + done.stderr
    assert "libbroken.so.3" in done.stdout and "cannot import name" not in done.stdout


def test_a_missing_llava_says_how_to_get_it():
    code = BREAK.format(broken="nothing", train="").replace(
        'raise ImportError("libbroken',
        'raise ModuleNotFoundError("no", name="llava")\n            raise ImportError("libbroken',
    )
    code = code.replace("'nothing'", "'llava'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=tiny.environment())
    assert "HOST ERROR LLaVA was not found. Run inside a LLaVA checkout" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Language models
# ---------------------------------------------------------------------------------------------------------------------
def checkpoint_folder(path: Path, model, tokenizer: Path) -> Path:
    """A LLaVA checkpoint folder of a model, as any LLaVA training would have saved it."""
    weights = {name: value.clone() for name, value in model.state_dict().items() if "vision_tower" not in name}
    model.save_pretrained(path, state_dict=weights)
    for file in tokenizer.iterdir():
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(world, siglip, tmp_path_factory):
    """{family: folder} of random LLaVA models with a vocabulary padded beyond the tokenizer's."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {}
    for family in ("qwen2", "llama", "mistral"):
        model = factory.make_model(siglip, family, vocab=1024, dtype=torch.float32)
        folders[family] = checkpoint_folder(root / f"llava-{family}", model, world["tokenizer"])
    return folders


def load(path, base=None, **options):
    loader = import_llava("llava.model.builder").load_pretrained_model
    return loader(str(path), base, get_model_name_from_path(str(path)), device="cpu", **options)


CLASSES = {"qwen2": "LlavaQwen2ForCausalLM", "llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}


@pytest.mark.parametrize("family", CLASSES)
def test_the_loader_gives_the_right_class_with_every_weight(checkpoints, family):
    path = checkpoints[family]
    tokenizer, model, processor, context = load(path)
    assert type(model).__name__ == CLASSES[family] and context == 2048
    saved = load_file(path / "model.safetensors")
    loaded = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    assert model.get_input_embeddings().num_embeddings == 1024 > len(tokenizer), "a padded vocabulary is not shrunk"
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 1024
    assert {p.dtype for p in model.parameters()} == {torch.float32} and {
        p.device.type for p in model.parameters()
    } == {"cpu"}
    assert not model.training and model.get_vision_tower().is_loaded
    assert processor.crop_size["height"] == factory.PIXELS


def test_query_key_and_value_biases_survive(checkpoints):
    saved = load_file(checkpoints["qwen2"] / "model.safetensors")
    _, model, _, _ = load(checkpoints["qwen2"])
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj", "v_proj"):
            bias = getattr(layer.self_attn, part).bias
            name = f"model.layers.{layer.self_attn.layer_idx}.self_attn.{part}.bias"
            assert bias.abs().max() > 0.1 and torch.equal(bias, saved[name])


@pytest.mark.parametrize("name", ["my-lora-model", "mpt-7b", "prompt-tuned", "mistral-like", "plain", "LLaVA-Lora"])
def test_the_folders_name_does_not_matter(checkpoints, tmp_path, name):
    path = tmp_path / name
    path.symlink_to(checkpoints["qwen2"])
    _, model, _, _ = load(path)
    assert type(model).__name__ == "LlavaQwen2ForCausalLM"
    assert model.get_vision_tower().is_loaded


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_loader_honours_dtype(checkpoints, key):
    _, model, _, _ = load(checkpoints["qwen2"], **{key: torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the vision tower too"
    ids = torch.tensor([[IMAGE_TOKEN_INDEX, 5, 6]])
    pixels = torch.zeros(1, 3, factory.PIXELS, factory.PIXELS, dtype=torch.bfloat16)
    assert model(input_ids=ids, images=pixels).logits.dtype in (torch.bfloat16, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_default_device_falls_back_to_the_cpu(checkpoints):
    loader = import_llava("llava.model.builder").load_pretrained_model
    with pytest.warns(UserWarning, match="No CUDA device"):
        _, model, _, _ = loader(str(checkpoints["llama"]), None, "llava-llama")
    assert next(model.parameters()).device.type == "cpu" and next(model.parameters()).dtype == torch.float32


def test_other_model_types_go_to_llavas_own_loader(world, tmp_path):
    calls = []
    loader = dispatching_loader(lambda *args, **kwargs: calls.append((args, kwargs)) or "original")
    assert loader(str(world["qwen-student"]), None, "qwen", device="cpu", device_map="cpu") == "original"
    (tmp_path / "mpt").mkdir()
    (tmp_path / "mpt" / "config.json").write_text(json.dumps({"model_type": "llava_mpt"}))
    assert loader(str(tmp_path / "mpt"), None, "llava-mpt") == "original"
    assert calls[0][0][:3] == (str(world["qwen-student"]), None, "qwen") and calls[0][1]["device"] == "cpu"
    assert len(calls) == 2


def test_images_change_the_answer_and_generation_works(checkpoints):
    _, model, _, _ = load(checkpoints["qwen2"])
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6, 7]])
    images = torch.rand(2, 1, 3, factory.PIXELS, factory.PIXELS)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    first, second = (model(input_ids=ids, images=pixels).logits for pixels in images)
    assert (first[:, -1] - second[:, -1]).abs().max() > 1e-3
    # Greedy decoding, step by step without a cache, from the merged embeddings.
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images[0])[4]
    expected = []
    for _ in range(6):
        token = model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
        expected.append(int(token))
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], dim=1)
    assert model.generate(ids, images=images[0], **options)[0].tolist() == expected
    assert model.generate(ids[:, 2:], **options).shape[1] == 6  # without an image
    with pytest.raises(ValueError, match="not `inputs_embeds`"):
        model.generate(inputs_embeds=embeds)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of the wrong kind
# ---------------------------------------------------------------------------------------------------------------------
def test_checkpoint_kinds_and_unfinished_folders(checkpoints, world, dpt_path, tmp_path):
    assert checkpoint_kind(str(checkpoints["llama"])) == "full"
    assert checkpoint_kind(str(world["llama"])) == "base"
    assert checkpoint_kind(str(dpt_path)) == "adapter"
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint_kind(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoint_kind(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights: training may have stopped"):
        checkpoint_kind(str(tmp_path / "empty"))


def test_a_base_model_is_no_teacher(world):
    with pytest.raises(
        CheckpointError, match="--teacher_model_path .*qwen-teacher is a language model without vision"
    ):
        models.load_teacher(str(world["qwen-teacher"]))


def test_an_adapter_needs_its_language_model(dpt_path, world):
    with pytest.raises(CheckpointError, match="holds an adapter only: name its language model"):
        load_model(str(dpt_path))
    _, model, _, _ = load(dpt_path, str(world["qwen-student"]))
    assert type(model).__name__ == "LlavaQwen2ForCausalLM"


def test_an_adapter_that_does_not_fit_is_refused(checkpoints, tmp_path):
    model = load_model(str(checkpoints["qwen2"]))
    adapter = {name: value.clone() for name, value in model.state_dict().items() if "mm_projector" in name}
    path = str(tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="is missing: the checkpoint is incomplete"):
        load_extra_weights(model, path)
    for wrong, message in (
        ({name: value for name, value in adapter.items() if "bias" not in name}, "missing .*mm_projector.0.bias"),
        ({**adapter, "model.mm_projector.9.weight": torch.zeros(1)}, "unknown .*mm_projector.9.weight"),
        ({name: torch.zeros(3) for name in adapter}, "does not fit the model in config.json.*size mismatch"),
    ):
        torch.save(wrong, path)
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            load_extra_weights(model, path)
    torch.save({f"base_model.model.{name}": value + 1 for name, value in adapter.items()}, path)
    load_extra_weights(model, path)
    assert torch.equal(model.state_dict()["model.mm_projector.0.bias"], adapter["model.mm_projector.0.bias"] + 1)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PAYLOAD_FOLDER"],))


def test_a_bin_file_cannot_run_code(tmp_path, monkeypatch, checkpoints, dpt_path, world):
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "executed"))
    path = tmp_path / "evil" / "mm_projector.bin"
    shutil.copytree(dpt_path, path.parent)
    torch.save({"model.mm_projector.0.weight": Payload()}, path)
    model = load_model(str(checkpoints["qwen2"]))
    for read in (
        lambda: read_weights(str(path)),
        lambda: load_extra_weights(model, str(path)),
        lambda: load(path.parent, str(world["qwen-student"])),
    ):
        with pytest.raises(Exception, match="(?i)weights.only|refused"):
            read()
    assert not (tmp_path / "executed").exists()


def test_an_unknown_language_model_is_named():
    from llava_compodistill.plugin.language_models import model_class

    with pytest.raises(
        ValueError, match="model_type 'gpt2' in config.json: supported language models are llama, mistral, qwen2"
    ):
        model_class("gpt2")


def test_a_tower_that_has_moved(checkpoints, siglip, tmp_path):
    path = tmp_path / "llava-moved"
    shutil.copytree(checkpoints["qwen2"], path)
    config = json.loads((path / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "gone" / "siglip")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: mm_vision_tower .*gone/siglip is not there"):
        load(path)
    teacher = models.load_teacher(str(path), vision_tower=str(siglip))
    assert teacher.get_vision_tower().vision_tower_name == teacher.config.mm_vision_tower == str(siglip)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Vision towers
# ---------------------------------------------------------------------------------------------------------------------
def tower_config(path, **changes):
    return SimpleNamespace(**{"mm_vision_tower": str(path), "mm_vision_select_layer": -2, **changes})


def build_tower(path, **changes):
    return sys.modules["llava.model.llava_arch"].build_vision_tower(tower_config(path, **changes))


def test_siglip_gives_every_patch(siglip):
    from transformers import SiglipVisionModel

    tower = build_tower(siglip)
    assert type(tower) is SiglipVisionTower
    pixels = torch.rand(2, 3, factory.PIXELS, factory.PIXELS)
    with torch.no_grad():
        expected = SiglipVisionModel.from_pretrained(siglip)(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (2, factory.PATCHES, factory.WIDTH)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(tower(list(pixels))), expected, atol=1e-5, rtol=1e-5)
    assert tower.num_patches == factory.PATCHES and tower.num_patches_per_side == 4
    assert tower.hidden_size == factory.WIDTH and tower.image_processor.crop_size == {"height": 56, "width": 56}
    assert not any(p.requires_grad for p in tower.parameters())
    assert tower(pixels.bfloat16()).dtype == torch.bfloat16
    assert tower.dummy_feature.shape == (1, factory.WIDTH)


def test_so400m_at_384_has_729_visual_tokens(tmp_path):
    from transformers import SiglipVisionConfig

    SiglipVisionConfig(hidden_size=1152, image_size=384, patch_size=14).save_pretrained(tmp_path)
    tower = SiglipVisionTower(str(tmp_path), tower_config(tmp_path), delay_load=True)
    assert not tower.is_loaded and tower.num_patches == 729 and tower.hidden_size == 1152


def test_a_whole_siglip_folder_gives_its_vision_half(tmp_path):
    """As on the hub: google/siglip-so400m-patch14-384 holds a text model too."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(build_tower(tmp_path)(pixels), expected, atol=1e-6, rtol=1e-5)


def test_clip_still_goes_to_llavas_tower(tmp_path):
    tower = build_tower(factory.save_tower(tmp_path / "clip", "clip"))
    assert type(tower).__name__ == "CLIPVisionTower" and type(tower).__module__.startswith("llava.")
    assert tower(torch.rand(1, 3, 56, 56)).shape == (1, factory.PATCHES, factory.WIDTH), "without the class token"


def test_an_unknown_feature_selection_is_refused(siglip):
    with pytest.raises(ValueError, match="mm_vision_select_feature 'cls': must be patch or cls_patch"):
        build_tower(siglip, mm_vision_select_feature="cls")


# ---------------------------------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(str(world["tokenizer"]), use_fast=False)


@pytest.fixture
def template(monkeypatch):
    monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)
    return use_template


CONVERSATIONS = {
    "one round": [("What color is the square?", "Red")],
    "rounds": [
        ("How many?", "2 objects"),
        ("Where is it? Left, or right?", "left of a red circle"),
        ("Sure?", "Yes."),
    ],
    "odd text": [(" two  spaces\nand a line", "Über 12,5%\n\n- a\n- b"), ("日本語?", "  leading")],
    "newline first": [("\nWhat?", "\nRed")],
}


def turns(rounds, image=False):
    out = []
    for number, (question, answer) in enumerate(rounds):
        question = f"<image>\n{question}" if image and number == 0 else question
        out += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return out


def prompt_of(version, rounds, image, answered=None):
    """LLaVA's own prompt; the last answer open when `answered` rounds are given."""
    conv = conversation.conv_templates[version].copy()
    for number, turn in enumerate(turns(rounds, image)):
        if answered is not None and number > 2 * answered:
            conv.append_message(conv.roles[1], None)
            break
        conv.append_message(conv.roles[number % 2], turn["value"])
    return conv.get_prompt()


def tokens_of(tokenizer, text, image):
    return tokenizer_image_token(text, tokenizer) if image else tokenizer(text).input_ids


def preprocess(version, sources, tokenizer, image):
    use_template(version)
    return import_llava_train().preprocess(sources, tokenizer, has_image=image)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("rounds", CONVERSATIONS)
@pytest.mark.parametrize("version", ["qwen_1_5", "qwen_2", "qwen_base"])
def test_training_sees_what_evaluation_asks(template, tokenizer, version, rounds, image):
    conversation_rounds = CONVERSATIONS[rounds]
    batch = preprocess(version, [turns(conversation_rounds, image)], tokenizer, image)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert len(ids) == len(labels) and ids.count(IMAGE_TOKEN_INDEX) == int(image)
    if rounds != "newline first":  # there an answer is generated after a prompt that has ended, and tokenized so
        assert ids == tokens_of(tokenizer, prompt_of(version, conversation_rounds, image), image)
    # What is asked for each answer is what stands before it.
    starts = [p for p, label in enumerate(labels) if label != IGNORE_INDEX and labels[p - 1] == IGNORE_INDEX]
    assert len(starts) == len(conversation_rounds)
    for number, start in enumerate(starts):
        if number == 0 or rounds != "newline first":
            asked = prompt_of(version, conversation_rounds, image, answered=number)
            assert ids[:start] == tokens_of(tokenizer, asked, image)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("version, end", [("qwen_1_5", "<|im_end|>"), ("qwen_base", "<|endoftext|>")])
def test_labels_are_exactly_the_answers_and_their_end_tokens(template, tokenizer, version, end, image):
    for rounds in CONVERSATIONS.values():
        batch = preprocess(version, [turns(rounds, image)], tokenizer, image)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        space = " " if version == "qwen_base" else ""  # LLaVA puts it between "ASSISTANT:" and the answer
        expected = [tokenizer(space + answer, add_special_tokens=False).input_ids for _, answer in rounds]
        end_token = tokenizer.convert_tokens_to_ids(end)
        learned = [label for label in labels if label != IGNORE_INDEX]
        assert learned == [token for answer in expected for token in [*answer, end_token]]


def test_a_conversation_that_begins_with_the_model_loses_that_turn(template, tokenizer):
    rounds = turns(CONVERSATIONS["rounds"])
    first = preprocess("qwen_1_5", [[{"from": "gpt", "value": "Hello"}, *rounds]], tokenizer, False)
    assert torch.equal(first["input_ids"][0], preprocess("qwen_1_5", [rounds], tokenizer, False)["input_ids"][0])


def test_a_tokenizer_that_begins_with_bos(template, world):
    """As in evaluation: one BOS at the beginning, with and without an image, and none in between."""
    tokenizer = spare_tokenizer(bos=True)
    rounds = [("a b", "c d"), ("d", "a")]
    for image in (True, False):
        batch = preprocess("qwen_1_5", [turns(rounds, image)], tokenizer, image)
        ids = batch["input_ids"][0].tolist()
        assert ids == tokens_of(tokenizer, prompt_of("qwen_1_5", rounds, image), image)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert batch["labels"][0][0] == IGNORE_INDEX


def test_a_sample_without_a_label_is_an_error(template, tokenizer):
    with pytest.raises(SampleError, match=r"(?s)no label is left.*template 'qwen_1_5' \(MPT\) with Qwen2Tokenizer"):
        preprocess("qwen_1_5", [[{"from": "human", "value": "What?"}]], tokenizer, False)
    # LLaVA's v1 assumes a tokenizer with BOS; with Qwen's it would train on nothing and say so once a sample.
    with pytest.raises(
        SampleError, match=r"(?s)template 'v1' \(TWO\) with Qwen2Tokenizer.*Qwen needs --version qwen_1_5"
    ):
        preprocess("v1", [turns(CONVERSATIONS["one round"], True)], tokenizer, True)
    with pytest.raises(
        SampleError, match=r"(?s)another tokenizer under the template 'v1' .*Qwen needs --version qwen_1_5"
    ):
        preprocess("v1", [turns(CONVERSATIONS["rounds"], True)], tokenizer, True)
    with pytest.raises(SampleError, match="a turn is from 'system'"):
        preprocess("qwen_1_5", [[{"from": "system", "value": "x"}]], tokenizer, False)


def test_an_unknown_template_is_an_error(template):
    with pytest.raises(ValueError, match="--version 'chatml' is no conversation template. Known: .*qwen_1_5"):
        use_template("chatml")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------
def spare_tokenizer(bos=False, **special):
    """A word tokenizer, with the special tokens that are asked for and no other."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "c", "d", "<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "user", "assistant", "system"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    given = {"eos_token": "</s>", "unk_token": "<unk>", **({"bos_token": "<s>"} if bos else {}), **special}
    out = PreTrainedTokenizerFast(tokenizer_object=inner, **given)
    out.add_tokens(["<|im_end|>", "<|im_start|>"], special_tokens=True)
    return out


@pytest.mark.parametrize("version", ["qwen_1_5", "qwen_base", "plain", "v1"])
@pytest.mark.parametrize(
    "eos, pad", [("<|im_end|>", "<|endoftext|>"), ("<|endoftext|>", "<|endoftext|>"), ("<|endoftext|>", None)]
)
def test_padding_is_never_the_end_token(template, world, version, eos, pad):
    """The configurations of Qwen's chat and base models."""
    tokenizer = AutoTokenizer.from_pretrained(str(world["tokenizer"]), use_fast=False, eos_token=eos, pad_token=pad)
    for _ in range(2):  # a prepared tokenizer that was saved is prepared again in the next stage
        prepare_tokenizer(tokenizer, use_template(version))
        assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        stop = {"qwen_1_5": "<|im_end|>", "qwen_base": "<|endoftext|>"}.get(version, eos)
        assert tokenizer.eos_token == stop
        assert len(tokenizer) <= 1024, "no token is added"
    sample = (
        preprocess(version, [turns(CONVERSATIONS["one round"], True)], tokenizer, True) if version != "v1" else None
    )
    if sample is not None:
        assert tokenizer.pad_token_id not in sample["input_ids"][0]


def test_llamas_padding_is_its_unknown_token(template):
    tokenizer = spare_tokenizer(bos=True)
    prepare_tokenizer(tokenizer, use_template("v1"))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", "</s>")


def test_a_tokenizer_with_nothing_to_pad_with_is_an_error(template):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    with pytest.raises(ValueError, match="no token to pad with .* end token '</s>': set pad_token"):
        prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"), use_template("v1"))


# ---------------------------------------------------------------------------------------------------------------------
# The rest
# ---------------------------------------------------------------------------------------------------------------------
def test_taf_is_built_from_the_config_alone(checkpoints, siglip):
    teacher = load_model(str(checkpoints["llama"]))
    student = factory.make_model(siglip, "qwen2", hidden=24, heads=4, teacher=teacher, dtype=torch.float32)
    adapter = student.get_model().mm_projector
    assert adapter.student_map[0].weight.shape == (24, 32) and len(adapter.student_map) == 1
    for name, value in teacher.get_model().mm_projector.state_dict().items():
        assert torch.equal(adapter.teacher_adapter.state_dict()[name], value)
    features = torch.rand(2, 16, factory.WIDTH, requires_grad=True)
    out = adapter(features)
    expected = adapter.student_map(teacher.get_model().mm_projector(features))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(adapter(teacher.get_model().mm_projector(features), from_teacher=True), expected)
    adapter.requires_grad_(True)  # as LLaVA's own code does
    adapter(features).sum().backward()
    assert adapter.student_map[0].weight.grad is not None
    assert all(p.grad is None for p in adapter.teacher_adapter.parameters()) and features.grad is None
    config = AutoConfig.from_pretrained(checkpoints["qwen2"])
    config.mm_projector_type = "taf"
    with pytest.raises(ValueError, match="the config has no `taf_teacher_projector_type`: give --teacher_model_path"):
        sys.modules["llava.model.llava_arch"].build_vision_projector(config)


def test_two_layers_of_mlp_s_and_no_chains(checkpoints):
    from llava_compodistill.taf import TAFProjector, taf_config

    deep = TAFProjector(torch.nn.Linear(4, 6), 6, 5, depth=2)
    assert [type(layer).__name__ for layer in deep.student_map] == ["Linear", "GELU", "Linear"]
    assert deep(torch.rand(3, 4)).shape == (3, 5)
    with pytest.raises(ValueError, match="TAF depth 3: MLP_S has 1 or 2"):
        TAFProjector(torch.nn.Linear(4, 6), 6, 5, depth=3)
    with pytest.raises(ValueError, match="chains of TAF adapters"):
        taf_config(SimpleNamespace(mm_projector_type="taf", hidden_size=8))


def test_weights_without_biases_are_noticed(checkpoints, tmp_path):
    """A Qwen checkpoint that lost its biases (loaded and saved as Llama) does not load as if nothing were missing."""
    path = tmp_path / "llava-lost"
    shutil.copytree(checkpoints["qwen2"], path)
    weights = load_file(path / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "_proj.bias" not in n}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="q_proj.bias"):
        load_model(str(path))
