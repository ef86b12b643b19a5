"""The only room that patches forwards: what a pass leaves behind, and that nothing of it stays on the models."""

from __future__ import annotations

import json
import math

import pytest
import torch
from factory import make_batch, make_model, save_tower
from torch.utils._python_dispatch import TorchDispatchMode

from llava_compodistill import compat
from llava_compodistill.methods import find_method
from llava_compodistill.pair import Pair
from llava_compodistill.record.attention import attention_modules, capture_visual_attention
from llava_compodistill.record.encoding import encode_for
from llava_compodistill.record.forward import Needs, record
from llava_compodistill.record.merge import record_merge
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective

LAYOUTS = ["qIqqIqaaqa", "Iqa", "qqqaa"]


def arguments(folder, **changes) -> TrainingArguments:
    values = {"output_dir": str(folder), "stage": "dft", "use_cpu": True, "report_to": "none"}
    return TrainingArguments(**{**values, "student_layers": "0,2,3", "teacher_layers": "1,2,3,4,5", **changes})


def make_objective(student, teacher, args, vocab_size=91) -> Objective:
    terms = find_method(args.method).terms(args.stage, args)
    return Objective(student, teacher, terms, vocab_size, args.attention_map_impl)


@pytest.fixture
def pair(siglip):
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
    return make_model(siglip, seed=2, dtype=torch.float32), teacher.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# What a pass leaves behind
# ---------------------------------------------------------------------------------------------------------------------
def test_a_pass_holds_what_was_asked_for(siglip):
    model = make_model(siglip, dtype=torch.float32)
    batch = make_batch(LAYOUTS, dtype=torch.float32)
    needs = Needs(
        head=frozenset({"answer", "visual"}),
        groups=frozenset({(1,), (0, 2)}),
        hidden=frozenset({(0, "text"), (3, "answer")}),
    )
    with torch.no_grad():
        with record_merge(model) as recorder:
            whole = model(**batch.inputs, use_cache=False, output_hidden_states=True)
            merged = recorder.batch
        with record_merge(model) as other, capture_visual_attention(model, [0, 1, 2], lambda: other.batch) as capture:
            model(**batch.inputs, use_cache=False)
        with record(model, needs) as recorder:
            outputs = model(**batch.inputs, use_cache=False)
        found = recorder.latest
    assert outputs.logits.shape == (3, 1, 1), "no logits that nobody asked for"
    answers = merged.answer_mask()
    logits = whole.logits[answers]
    weight, bias = found.head["answer"].weights
    torch.testing.assert_close(found.head["answer"].hidden @ weight.t(), logits)
    assert bias is None and torch.equal(found.head["answer"].targets, merged.answer_targets())
    assert found.head["visual"].hidden.shape == (int(merged.visual.sum()), 32)
    torch.testing.assert_close(found.maps[(1,)], capture.maps[1])
    torch.testing.assert_close(found.maps[(0, 2)], (capture.maps[0] + capture.maps[2]) / 2)
    torch.testing.assert_close(found.hidden[0, "text"], whole.hidden_states[1][merged.real & ~merged.visual])
    assert found.hidden[3, "answer"].shape == (int(answers.sum()), 32)


def test_what_leaves_the_model_is_what_on_end_makes_of_it(siglip):
    model = make_model(siglip, dtype=torch.float32)
    batch = make_batch(LAYOUTS, dtype=torch.float32)

    def on_head(latest):
        return latest.head["answer"].hidden.sum()[None]

    options = {"on_head": on_head, "on_end": lambda latest: {"named": latest.returned.sum()}}
    with record(model, Needs(head=frozenset({"answer"})), **options):
        outputs = model(**batch.inputs, use_cache=False)
    assert outputs.keys() == {"named"} and outputs["named"].requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Nothing stays
# ---------------------------------------------------------------------------------------------------------------------
def state(*models):
    """Everything that hangs on instances, hooks included."""
    found = []
    for model in models:
        for name, module in model.named_modules():
            entries = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
            hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._buffers))
            found.append((name, entries, hooks))
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_what_others_have_put_on_the_instances_stands_there_again(pair, tmp_path, fails):
    """accelerate hooks quantised and offloaded modules by replacing `forward` on the instance."""
    student, teacher = pair
    for model in pair:  # transformers 5 leaves hooks of its own at the first call
        model(**make_batch(["qIa"], dtype=torch.float32).inputs, use_cache=False)
    hooked = [student, student.lm_head, teacher.lm_head, attention_modules(student)[2], attention_modules(teacher)[1]]
    calls = []
    for number, module in enumerate(hooked):
        plain = module.forward

        def forward(*args, plain=plain, number=number, **kwargs):
            calls.append(number)
            return plain(*args, **kwargs)

        module.forward = forward
    objective = make_objective(student, teacher, arguments(tmp_path))
    before = state(student, teacher)
    batch = make_batch(LAYOUTS, dtype=torch.float32)
    if fails:
        batch.inputs["images"] = batch.inputs["images"][:, :1]  # the encoder takes three channels
        with pytest.raises(RuntimeError), objective.running():
            objective(student, batch.inputs)
    else:
        with objective.running():
            assert state(student, teacher) != before
            objective(student, batch.inputs)
        assert {0, 3, 4} <= set(calls), "the hooks ran"
    assert state(student, teacher) == before
    assert [module.forward.__name__ for module in hooked] == ["forward"] * len(hooked)
    calls.clear()
    student(**make_batch(["qIa"], dtype=torch.float32).inputs, use_cache=False)
    assert {0, 1, 3} <= set(calls)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing waits
# ---------------------------------------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    """Counts what waits for a GPU: values that Python reads, and results whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += boolean or any(part in name for part in self.NAMES)
        return function(*args, **(kwargs or {}))


def test_no_layer_makes_the_device_wait(pair, tmp_path):
    """A micro-batch reads as many values with six aligned layers as with one."""
    student, teacher = pair
    batch = make_batch(LAYOUTS, dtype=torch.float32)
    counts = {}
    for student_layers, teacher_layers in (("1", "1"), ("0,1,2,3", "0,1,2,3,4,5")):
        bands = {"student_layers": student_layers, "teacher_layers": teacher_layers}
        # (On a CPU the op looks at its index to check it; the eager one does so once a call, on CPUs alone.)
        objective = make_objective(student, teacher, arguments(tmp_path, **bands))
        with Waits() as waits, objective.running():
            sums = objective(student, batch.inputs)
            sum(part.loss for part in sums.values()).backward()
        counts[student_layers] = waits.count
    on_cpu = 2 * (4 + 6 - 2)  # the op's check of its index, two values a call
    assert counts["0,1,2,3"] - counts["1"] <= on_cpu, counts


# ---------------------------------------------------------------------------------------------------------------------
# Sliding windows
# ---------------------------------------------------------------------------------------------------------------------
def test_a_window_shorter_than_the_sequences_is_refused_before_training(siglip, tmp_path):
    options = {"family": "mistral", "attention": "eager", "dtype": torch.float32, "tokenizer_model_max_length": 64}
    teacher = make_model(siglip, layers=6, seed=1, sliding_window=32, **options).requires_grad_(False)
    student = make_model(siglip, seed=2, sliding_window=None, **options)
    with pytest.raises(ValueError, match="Layer 1 attends within a window of 32 tokens.*can have 64.*--vat False"):
        make_objective(student, teacher, arguments(tmp_path))
    make_objective(student, teacher, arguments(tmp_path, vat=False))
    for model in (student, teacher):
        model.config.tokenizer_model_max_length = 32
    make_objective(student, teacher, arguments(tmp_path))


def test_a_sequence_beyond_the_window_is_refused_where_there_is_no_limit(siglip):
    model = make_model(siglip, "mistral", attention="eager", dtype=torch.float32, sliding_window=20)
    with record_merge(model) as recorder, capture_visual_attention(model, [1], lambda: recorder.batch) as capture:
        model(**make_batch(["qIa"], dtype=torch.float32).inputs, use_cache=False)
        assert capture.maps[1].shape[1] == 18
        with pytest.raises(ValueError, match="Layer 1 attends within a window of 20 tokens.*35"):
            model(**make_batch(["qIqIa"], dtype=torch.float32).inputs, use_cache=False)


@pytest.mark.parametrize("options", [{}, {"use_sliding_window": True, "max_window_layers": 2}, {"sliding_window": 64}])
@pytest.mark.parametrize("family, attention", [("qwen2", "eager"), ("qwen2", "sdpa"), ("mistral", "eager")])
@torch.no_grad()
def test_the_window_of_a_layer_is_what_the_model_sees(siglip, family, attention, options):
    """A key beyond the window changes nothing in a layer that has one, and something in a layer that has none."""
    model = make_model(siglip, family, attention=attention, dtype=torch.float32, **{"sliding_window": 8, **options})
    if family == "mistral" and len(options) > 1:
        pytest.skip("Mistral has one window for all layers")
    length = 20
    embeds = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0))
    other = embeds.clone()
    other[0, 0] += 1.0
    for number in range(len(attention_modules(model))):
        window = compat.sliding_window(model.config, number)
        seen = _last_row_sees_first_key(model, number, embeds, other)
        assert seen == (window is None or window >= length), (number, window)


def _last_row_sees_first_key(model, number, embeds, other) -> bool:
    """Whether the last output of one layer, put first in the model, depends on the first token."""
    layers = model.get_model().layers
    order = list(layers)
    kinds = getattr(model.config, "layer_types", None)
    try:
        model.get_model().layers = torch.nn.ModuleList([order[number]])
        if kinds is not None:
            model.config.layer_types = [kinds[number]]
        count, model.config.num_hidden_layers = model.config.num_hidden_layers, 1
        outputs = [
            model.get_model()(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1] for x in (embeds, other)
        ]
    finally:
        model.get_model().layers, model.config.num_hidden_layers = layers, count
        if kinds is not None:
            model.config.layer_types = kinds
    return not torch.equal(*outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration of adaptive matching
# ---------------------------------------------------------------------------------------------------------------------
def distances_by_hand(student, teacher, batch, pixels):
    """KL(teacher || student) of rows over visual keys, from maps of each model by itself."""
    maps = []
    for model, images in ((student, batch.inputs["images"]), (teacher, pixels)):
        inputs = {**batch.inputs, "images": images.to(model.dtype)}
        layers = range(model.config.num_hidden_layers)
        with record_merge(model) as recorder, capture_visual_attention(model, layers, lambda r=recorder: r.batch) as c:
            model(**inputs, use_cache=False)
            rows = recorder.batch.attention_rows("all")
            columns = recorder.batch.visual_index >= 0
        maps.append({layer: attention.double() for layer, attention in c.maps.items()})
    has_image = columns.any(dim=1)
    found = []
    for mine in maps[0].values():
        row = []
        for theirs in maps[1].values():
            p, q = (m / m.sum(-1, keepdim=True).clamp(min=1e-300) for m in (theirs, mine))
            kl = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)
            each = (kl * rows).sum(1)[has_image] / rows.sum(1)[has_image]
            row.append(float(each.mean()))
        found.append(row)
    return torch.tensor(found)


@torch.no_grad()
def test_calibration_sees_what_training_sees(siglip, tmp_path):
    """Another tower with another normalisation, a teacher in bfloat16 beside a student in float32."""
    tower = save_tower(tmp_path / "siglip-own")
    processor_file = tower / "preprocessor_config.json"
    text = processor_file.read_text()
    assert "image_mean" in text
    settings = json.loads(text) | {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.3, 0.2, 0.5]}
    processor_file.write_text(json.dumps(settings))
    teacher = make_model(tower, hidden=48, layers=6, heads=6, vocab=128, seed=1, dtype=torch.float32)
    student = make_model(siglip, seed=2, dtype=torch.float32)
    args = arguments(tmp_path, layer_matching="adaptive", attention_map_impl="eager")
    batch = make_batch(["qIqqa", "Iqaa"], dtype=torch.float32)
    pair = Pair.of(student, teacher)
    assert not pair.shares_encoder
    pixels = batch.inputs["images"]
    mean, std = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
    theirs = (pixels * 0.5 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = distances_by_hand(student, teacher, batch, theirs)[[0, 2, 3]][:, 1:]

    objective = make_objective(student, teacher, args)
    found = objective.calibrate([batch.inputs])
    torch.testing.assert_close(torch.tensor(found["attention"]["distances"]), expected, atol=2e-3, rtol=2e-2)
    narrow = make_objective(student, teacher.bfloat16(), args).calibrate([batch.inputs])
    torch.testing.assert_close(torch.tensor(narrow["attention"]["distances"]), expected, atol=0.1, rtol=0.2)
    assert not torch.equal(
        torch.tensor(narrow["attention"]["distances"]), torch.tensor(found["attention"]["distances"])
    )
    objective.use(found)
    assert all(len(group) == 1 for group in objective.term("attention").groups)


@torch.no_grad()
def test_calibration_shares_the_encoder_and_keeps_to_the_implementation(pair, tmp_path, monkeypatch):
    from llava_compodistill.ops import visual_attention

    student, teacher = pair
    objective = make_objective(
        student, teacher, arguments(tmp_path, layer_matching="adaptive", attention_map_impl="eager")
    )
    used = []
    for name, function in list(visual_attention.IMPLEMENTATIONS.items()):
        monkeypatch.setitem(
            visual_attention.IMPLEMENTATIONS,
            name,
            lambda *args, name=name, function=function, **kw: used.append(name) or function(*args, **kw),
        )
    encoded = []
    student.get_vision_tower().register_forward_hook(lambda *args: encoded.append(1))
    objective.calibrate([make_batch(LAYOUTS, dtype=torch.float32).inputs] * 2)
    assert len(encoded) == 2, "once a batch for both models"
    assert set(used) == {"eager"} and len(used) == 2 * (3 + 5)


def test_encode_for_a_student_alone_changes_nothing(pair):
    student, _ = pair
    with encode_for(Pair.of(student, None)):
        assert "encode_images" not in vars(student)
    assert math.isfinite(student(**make_batch(["qIa"], dtype=torch.float32).inputs).loss.item())
