"""The rivals' terms against their formulas on whole logits, hidden states and attention, gradients included."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from factory import make_batch, make_model

from llava_compodistill.losses.features import feature_distance
from llava_compodistill.losses.relation import head_gram, relation_loss
from llava_compodistill.losses.release import sink_filtered_loss
from llava_compodistill.methods import find_method
from llava_compodistill.methods.heads import _assign
from llava_compodistill.record.merge import record_merge
from llava_compodistill.train.arguments import TrainingArguments
from llava_compodistill.train.objective import Objective

LAYOUTS = ["qIqqIqaaqa", "Iqa", "qqqaa", "qqIqaqaa"]  # two images, one, none, one behind a prompt
VOCAB = 91  # the real one; the heads have 96 and 128 rows


@pytest.fixture
def pair(siglip, monkeypatch):
    # transformers 4.37 fills eager attention's mask with float64's smallest number in torch's default dtype.
    monkeypatch.setattr(torch, "full", partial(torch.full, dtype=torch.float64))
    teacher = make_model(siglip, hidden=48, layers=6, heads=6, vocab=128, seed=1, attention="eager")
    return make_model(siglip, seed=2, attention="eager"), teacher.requires_grad_(False)


def whole(model, inputs):
    """Logits, hidden states and attention of all positions, and where the tokens are."""
    with record_merge(model) as recorder:
        outputs = model(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
    return outputs, recorder.batch


def run(pair, folder, method, **changes):
    """The sums of a method's terms in the dft stage, the objective, and both models' whole passes."""
    student, teacher = pair
    torch.manual_seed(3)  # the terms' own weights
    values = {"stage": "dft", "use_cpu": True, "report_to": "none", "method": method}
    values |= {"student_layers": "0,2,3", "teacher_layers": "1,2,3,4,5", **changes}
    args = TrainingArguments(str(folder), **values)
    objective = Objective(student, teacher, args.chosen_method.terms("dft", args), VOCAB)
    for module in objective.modules.values():
        module.double()
    batch = make_batch(LAYOUTS)
    inputs = {**batch.inputs, "use_cache": False}
    with objective.running():
        sums = objective(student, inputs)
        sum(found.loss for found in sums.values()).backward()
        for found in sums.values():
            found.loss = found.loss.detach()
    theirs = whole(teacher, batch.inputs)
    mine = whole(student, batch.inputs)
    return sums, objective, mine, theirs


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(pair, objective, expected):
    """Those of all losses together, against those of the reference's loss."""
    student, _ = pair
    found = gradients(student)
    modules = {name: gradients(module) for name, module in objective.modules.items()}
    student.zero_grad()
    for module in objective.modules.values():
        module.zero_grad()
    expected.backward()
    for name, value in gradients(student).items():
        # float32 sums inside the chunked op
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name, module in objective.modules.items():
        for key, value in gradients(module).items():
            torch.testing.assert_close(modules[name][key], value, atol=1e-7, rtol=1e-5)
        assert modules[name], "the map is trained"


def answer_terms(mine, theirs, shifted=True):
    """L_LM and L_KL, sums over the answer rows, on whole logits."""
    (outputs, batch), (teacher, _) = mine, theirs
    targets = batch.labels[:, 1:]
    rows = targets != -100
    lm = F.cross_entropy(outputs.logits[:, :-1][rows], targets[rows], reduction="sum")
    if shifted:
        kl = divergence(outputs.logits[:, :-1][rows], teacher.logits[:, :-1][rows])
    else:
        rows = batch.labels != -100
        kl = divergence(outputs.logits[rows], teacher.logits[rows], vocab=96)
    return lm, kl.sum()


def divergence(student, teacher, vocab=VOCAB):
    student, teacher = student[:, :vocab].log_softmax(-1), teacher.detach()[:, :vocab].softmax(-1)
    return (torch.xlogy(teacher, teacher) - teacher * student).sum(-1)


def test_llava_kd(pair, tmp_path):
    sums, objective, mine, theirs = run(pair, tmp_path, "llava_kd")
    (outputs, batch), (teacher, _) = mine, theirs
    visual_kl, relation = [], []
    for sample, places in enumerate(batch.visual):
        if not places.any():
            continue
        student_logits = outputs.logits[sample, places][:, :VOCAB]
        teacher_logits = teacher.logits[sample, places][:, :VOCAB].detach()
        visual_kl.append(divergence(student_logits, teacher_logits).mean())
        r_s, r_t = (logits @ logits.T for logits in (student_logits, teacher_logits))
        relation.append(1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm()))
    assert len(visual_kl) == 3
    expected = {"visual_kl": sum(visual_kl), "relation": sum(relation)}
    for name, value in expected.items():
        assert float(sums[name].loss) == pytest.approx(float(value), rel=1e-5), name
        assert float(sums[name].loss) > 1e-3
    assert [objective.term(name).weight for name in expected] == [1.0, 0.5]
    lm, kl = answer_terms(mine, theirs)
    assert float(sums["answers"].loss) == pytest.approx(float(lm + kl), rel=1e-5)
    assert_same_gradients(pair, objective, lm + kl + sum(expected.values()))


@pytest.mark.parametrize("distance, kind", [("mse", "mlp"), ("cosine", "linear")])
def test_llavadi(pair, tmp_path, distance, kind):
    options = f'{{"distance": "{distance}", "map": "{kind}"}}'
    sums, objective, mine, theirs = run(pair, tmp_path, "llavadi", method_options=options)
    (outputs, batch), (teacher, _) = mine, theirs
    module = objective.term("features").module
    assert len(module) == (3 if kind == "mlp" else 1)
    losses = []
    for sample, places in enumerate(batch.real):
        mapped = module(outputs.hidden_states[-1][sample, places])
        target = teacher.hidden_states[-1][sample, places].detach()
        if distance == "mse":
            losses.append(((mapped - target) ** 2).mean())
        else:
            losses.append((1 - (mapped * target).sum(-1) / (mapped.norm(dim=-1) * target.norm(dim=-1))).mean())
    assert float(sums["features"].loss) == pytest.approx(float(sum(losses)), rel=1e-6)
    lm, kl = answer_terms(mine, theirs)
    assert_same_gradients(pair, objective, lm + kl + sum(losses))


def test_align_kd(pair, tmp_path):
    sums, objective, mine, theirs = run(pair, tmp_path, "align_kd", method_options='{"k": 5}')
    (outputs, batch), (teacher, _) = mine, theirs
    heads, tokens = (objective.term(name).module for name in ("first_attention", "visual_features"))
    attention, features = [], []
    for sample, visual in enumerate(batch.visual):
        keys = visual.nonzero().flatten()
        if not len(keys):
            continue
        length = int(batch.real[sample].sum())
        queries = [row for row in range(length) if not visual[row] and row > keys[0]]
        a_t = teacher.attentions[0][sample].detach()
        a_s = outputs.attentions[0][sample][:, queries][:, :, keys]
        mapped = torch.einsum("ot,tqk->oqk", heads.weight[:, :, 0, 0], a_t[:, queries][:, :, keys])
        attention.append(((mapped + heads.bias[:, None, None] - a_s) ** 2).mean())
        v_s, v_t = outputs.hidden_states[0][sample, keys], teacher.hidden_states[0][sample, keys].detach()
        squared = ((v_t @ tokens.weight.T + tokens.bias - v_s) ** 2).mean(-1)
        attended = a_t.mean(0)[:length][:, keys].sum(0)
        features.append(squared.mean() + squared[attended.argsort(descending=True)[:5]].mean())
    assert float(sums["first_attention"].loss) == pytest.approx(float(sum(attention)), rel=1e-6)
    assert float(sums["visual_features"].loss) == pytest.approx(float(sum(features)), rel=1e-6)
    lm, kl = answer_terms(mine, theirs)
    assert_same_gradients(pair, objective, lm + kl + sum(attention) + sum(features))


def release_reference(student, teacher):
    """One sample's loss, entry by entry: [N_v, N_v] each."""
    count = len(student)
    limits = [float(a.detach().mean() + a.detach().std()) for a in (student, teacher)]
    pooled = []
    for attention in (student, teacher):
        means = []
        for key in range(count):
            kept = [
                attention[query, key]
                for query in range(count)
                if student[query, key] <= limits[0] and 0 < teacher[query, key] <= limits[1]
            ]
            means.append(sum(kept) / len(kept) if kept else attention.new_zeros(()))
        pooled.append(torch.stack(means))
    return 1 - pooled[0] @ pooled[1] / (pooled[0].norm() * pooled[1].norm())


@pytest.mark.parametrize("shifted", [False, True])
def test_release(pair, tmp_path, shifted):
    """With the unshifted L_KL of the authors' code, or with the paper's."""
    options = {"method_options": '{"shifted_kl": true}'} if shifted else {}
    sums, objective, mine, theirs = run(pair, tmp_path, "release", **options)
    (outputs, batch), (teacher, _) = mine, theirs
    losses = []
    for sample, visual in enumerate(batch.visual):
        keys = visual.nonzero().flatten()
        for layer, group in [(0, (1, 2, 3)), (2, (2, 3, 4)), (3, (3, 4, 5))] if len(keys) else []:
            student = outputs.attentions[layer][sample].mean(0)[keys][:, keys]
            target = torch.stack([teacher.attentions[t][sample].mean(0)[keys][:, keys] for t in group]).mean(0)
            losses.append(release_reference(student, target.detach()))
    assert float(sums["attention"].loss) == pytest.approx(float(sum(losses)), rel=1e-5)
    lm, kl = answer_terms(mine, theirs, shifted=shifted)
    found = sums["answers"].logged["kl"] if shifted else sums["kl"].loss
    assert float(found) == pytest.approx(float(kl), rel=1e-5) and ("kl" in sums) != shifted
    assert_same_gradients(pair, objective, lm + kl + sum(losses))


def test_release_takes_the_layers_of_the_authors_code(siglip, tmp_path):
    models = [make_model(siglip, hidden=16, heads=2, layers=depth, seed=depth) for depth in (24, 40)]
    args = TrainingArguments(str(tmp_path), stage="dft", method="release", use_cpu=True, report_to="none")
    objective = Objective(*models, args.chosen_method.terms("dft", args), VOCAB)
    term = objective.term("attention")
    assert term.student_layers == list(range(8, 15))
    assert term.groups == [list(range(first, first + 5)) for first in range(13, 20)]


def test_the_released_loss_of_rounded_maps():
    torch.manual_seed(1)
    student, teacher = (torch.rand(1, 9, 9).tril().bfloat16() for _ in range(2))
    found = sink_filtered_loss(student, teacher)
    expected = release_reference(student[0].double(), teacher[0].double())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_changes_nothing_in_the_released_loss():
    torch.manual_seed(0)
    student, teacher = (torch.rand(1, 6, 6, dtype=torch.float64).tril() for _ in range(2))
    expected = sink_filtered_loss(student, teacher)
    assert float(expected) == pytest.approx(float(release_reference(student[0], teacher[0])))
    student, teacher = (F.pad(a, (0, 3, 0, 3), value=0.7) for a in (student, teacher))
    visual = torch.tensor([[True] * 6 + [False] * 3])
    torch.testing.assert_close(sink_filtered_loss(student, teacher, visual), expected)
    empty = sink_filtered_loss(student.requires_grad_(), teacher, torch.zeros(1, 9, dtype=torch.bool))
    assert empty.requires_grad and empty.item() == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 0.02)])
def test_the_relation_of_logits_without_the_logits(bias, dtype, tolerance):
    torch.manual_seed(0)
    weights = [torch.randn(9001, size, dtype=torch.float64) for size in (12, 20)]
    biases = [torch.randn(9001, dtype=torch.float64) if bias else None for _ in range(2)]
    hidden = [torch.randn(7, size, dtype=torch.float64) for size in (12, 20)]
    given = [
        [None if t is None else t.to(dtype).requires_grad_() for t in group] for group in (weights, biases, hidden)
    ]
    grams = [head_gram(weight, b, 9000) for weight, b in zip(*given[:2], strict=True)]
    found = relation_loss(given[2][0], grams[0], given[2][1], grams[1])
    found.backward()
    exact = [[None if t is None else t.detach().double().requires_grad_() for t in group] for group in given]
    relations = []
    for weight, b, states in zip(*exact, strict=True):
        logits = states @ weight.T + (0 if b is None else b)
        relations.append(logits[:, :9000] @ logits[:, :9000].T)
    r_s, r_t = relations[0], relations[1].detach()
    expected = 1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm())
    expected.backward()
    assert float(found) == pytest.approx(float(expected), abs=tolerance)
    for mine, reference in zip((group[0] for group in given), (group[0] for group in exact), strict=True):
        if mine is not None:
            error = (mine.grad.double() - reference.grad).norm() / reference.grad.norm()
            assert error < max(tolerance, 1e-9), error
    assert given[2][1].grad is None and given[0][1].grad is None, "the teacher"
    assert relation_loss(given[2][0], grams[0], given[2][0], grams[0]).item() == pytest.approx(0, abs=1e-6)


def test_features_of_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of \['mse', 'cosine'\], got 'l1'"):
        feature_distance(torch.zeros(1, 2), torch.zeros(1, 2), "l1")


# ---------------------------------------------------------------------------------------------------------------------
# Head by head
# ---------------------------------------------------------------------------------------------------------------------
def test_heads_find_their_own(siglip, tmp_path):
    """The teacher is the student with its heads in another order: each is given itself, and nothing is to learn."""
    student = make_model(siglip, heads=4, kv_heads=4, seed=2)
    teacher = make_model(siglip, heads=4, kv_heads=4, seed=2)
    order, size = [2, 0, 3, 1], 8
    rows = torch.cat([torch.arange(size) + size * head for head in order])
    for layer in teacher.get_model().layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            projection.weight.data = projection.weight.data[rows]
            if projection.bias is not None:
                projection.bias.data = projection.bias.data[rows]
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data[:, rows]
    args = TrainingArguments(
        str(tmp_path), stage="dft", use_cpu=True, report_to="none", attention_heads="matched",
        student_layers="1,2", teacher_layers="1,2",
    )  # fmt: skip
    objective = Objective(student, teacher.requires_grad_(False), args.chosen_method.terms("dft", args), VOCAB)
    batch = {**make_batch(LAYOUTS).inputs, "use_cache": False}
    with objective.running():
        before = float(objective(student, batch)["attention"].loss)
    found = objective.calibrate([batch])
    objective.use(found)
    assert found["attention"]["heads"] == [[(layer, order.index(head)) for head in range(4)] for layer in (1, 2)]
    with objective.running():
        after = float(objective(student, batch)["attention"].loss)
    assert before > 0.01 and abs(after) < 1e-9


def test_a_head_by_head_loss_is_the_mean_over_heads(pair, tmp_path):
    sums, objective, mine, theirs = run(pair, tmp_path, "compodistill", attention_heads="matched")
    (outputs, batch), (teacher, _) = mine, theirs
    term = objective.term("attention")
    losses = []
    for layer, heads in zip((0, 2, 3), term.assigned, strict=True):
        for sample, visual in enumerate(batch.visual):
            keys = visual.nonzero().flatten()
            if not len(keys):
                continue
            rows = range(int(keys[0]), int(batch.real[sample].sum()))
            for head, (at, other) in enumerate(heads):
                for row in rows:
                    a = outputs.attentions[layer][sample, head, row, keys]
                    b = teacher.attentions[at][sample, other, row, keys].detach()
                    losses.append((1 - a @ b / (a.norm() * b.norm())) / (len(rows) * len(heads) * 3))
    assert float(sums["attention"].loss) == pytest.approx(float(sum(losses)), rel=1e-6)
    lm, kl = answer_terms(mine, theirs)
    assert_same_gradients(pair, objective, lm + kl + sum(losses))


def test_too_few_teacher_heads_are_used_again():
    assert _assign(torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.2, 0.6]])) == [0, 0, 1]
    assert sorted(_assign(torch.rand(3, 5))) != [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------
TERMS = {
    "llava_kd": {"lm", "kl", "visual_kl", "relation"},
    "llavadi": {"lm", "kl", "features"},
    "align_kd": {"lm", "kl", "first_attention", "visual_features"},
    "release": {"lm", "kl", "attention"},
}


@pytest.mark.parametrize("method", TERMS)
def test_a_rival_trains_and_accumulates(dft, method):
    """And samples without an image go along."""
    options = {"method": method, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}
    _, whole_batch = dft("whole", per_device_train_batch_size=4, **options)
    _, parts = dft("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for ours, theirs in zip(parts, whole_batch, strict=True):
        assert TERMS[method] <= ours.keys()
        for name in TERMS[method] | {"loss"}:
            assert math.isfinite(ours[name]) and ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name
    assert parts[1]["lm"] != parts[0]["lm"]


@pytest.mark.parametrize(
    "method, terms", [("llava_kd", ["kl", "visual_kl", "relation"]), ("release", ["kl", "attention"])]
)
def test_an_identical_teacher_leaves_nothing_to_distil(dft, sharp_teacher, method, terms):
    bands = {"student_layers": "1,2,4", "teacher_layers": "1,2,4"}
    _, log = dft(model_name_or_path=sharp_teacher, method=method, max_steps=1, **bands)
    assert log[0]["lm"] > 1 and all(abs(log[0][name]) < 1e-5 for name in terms), log[0]


@pytest.mark.parametrize("method", TERMS)
def test_bf16_stays_near_fp32(dft, method):
    options = {"method": method, "max_steps": 1}
    _, exact = dft("fp32", **options)
    _, rounded = dft("bf16", bf16=True, **options)
    # The sink filter's choice jumps where an entry lies at its limit: see test_the_released_loss_of_rounded_maps.
    for name in TERMS[method] - ({"attention"} if method == "release" else set()):
        assert rounded[0][name] == pytest.approx(exact[0][name], rel=0.03, abs=3e-3), name


def test_a_relation_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    weight, hidden = torch.randn(300, 12), torch.randn(7, 12)
    other, theirs = torch.randn(300, 20), torch.randn(7, 20)

    def loss():
        return relation_loss(hidden, head_gram(weight), theirs, head_gram(other))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss()
    assert torch.equal(found, loss())


@pytest.mark.parametrize("options", [{"method": "align_kd"}, {"attention_heads": "matched"}], ids=str)
def test_gradient_checkpointing_changes_nothing(dft, options):
    """It runs layers again in the backward, which has to meet the same operations."""
    options = {**options, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}
    _, plain = dft("plain", **options)
    _, checkpointed = dft("checkpointed", gradient_checkpointing=True, **options)
    for ours, theirs in zip(checkpointed, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["lm"] == theirs["lm"]


@pytest.mark.parametrize("method", ["llava_kd", "align_kd", "release"])
def test_a_rival_pretrains_the_adapter_alone(dft, world, method):
    data = world["data"] / "pretrain.json"
    trainer, log = dft(method=method, stage="dpt", version="plain", data_path=data, max_steps=1)
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    own = {name for name in names if "mm_projector" not in name}
    assert all("distillation" in name for name in own) and len(own) < len(names)
    assert (TERMS[method] - {"attention"}) <= log[0].keys()


def test_options_are_checked():
    assert find_method("llava_kd", {"gamma": 1}).options["gamma"] == 1
    with pytest.raises(
        ValueError, match="--method_options delta: method llava_kd has the options: alpha, beta, gamma"
    ):
        find_method("llava_kd", {"delta": 1})
    with pytest.raises(ValueError, match="--method_options gamma: 'much' must be a value like its default, 0.5"):
        find_method("llava_kd", {"gamma": "much"})


@pytest.mark.parametrize("options, message", [("{", "no JSON"), ("[1]", "must be a JSON object")])
def test_options_that_cannot_be_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"--method_options .*{message}"):
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", method_options=options)
