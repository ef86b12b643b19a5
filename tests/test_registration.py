"""register() and unregister(): what they rebind and bring back, and what a foreign or broken LLaVA gives."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import tiny

from llava_compodistill.errors import HostError
from llava_compodistill.hosts.llava import register, registered, registration, unregister

register(train=True)

from llava import conversation  # noqa: E402

from llava_compodistill.hosts.llava.templates import TEMPLATES  # noqa: E402


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
        if name == {module!r}:
            raise {error}

sys.meta_path.insert(0, Break())
from llava_compodistill.errors import HostError
from llava_compodistill.hosts.llava import register
try:
    register({train})
except HostError as error:
    print("HOST ERROR", error)
"""


@pytest.mark.long
def test_the_cause_of_a_broken_or_missing_install_is_shown():
    """LLaVA's bare `except: pass` would say: cannot import name 'LlavaLlamaForCausalLM'."""
    broken = 'ImportError("libbroken.so.3: cannot open shared object file")'
    missing = 'ModuleNotFoundError("no", name="llava")'
    codes = [
        BREAK.format(module="llava.model.llava_arch", error=broken, train=""),
        BREAK.format(module="llava.train.llava_trainer", error=broken, train="train=True"),
        BREAK.format(module="llava", error=missing, train=""),
    ]
    *broken_ones, (_, missing_one) = tiny.python_each(codes, sys.path)
    for _, printed in broken_ones:
        assert "HOST ERROR LLaVA was found but cannot be imported" in printed, printed
        assert "libbroken.so.3" in printed and "cannot import name" not in printed
    assert "HOST ERROR LLaVA was not found. Run inside a LLaVA checkout" in missing_one, missing_one
