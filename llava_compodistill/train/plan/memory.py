"""What a GPU holds at the peaks of a stage, by term: the formulas.

An optimizer step has six moments at which memory can be at its highest (PHASES): the teacher's forward, the answer
loss, the attention loss, the backward pass at its first and at its last layer, and the optimizer's own step. For each,
`phases` lists what is there, in bytes.

Symbols: B samples of N tokens, T = B N; D, L, H, H_kv, d, I, V of a language model; c bytes of a number that the step
computes with, s of one in the residual stream; K aligned student layers; R answer rows. What autograd keeps of a
decoder layer is counted tensor by tensor (current transformers: RMSNorm in float32, SDPA or FlashAttention, grouped
keys not expanded), and tests/test_plan.py holds the count against autograd's own.

Sources. Weights and their precision: `pair.student.student_dtype`, `set_trainable`. Maps: ops/visual_attention and
losses/attention. Head: ops/answer_loss. ZeRO: Rajbhandari et al., arXiv 1910.02054 (16-bit weights and gradients, 12
bytes a trained weight for the float32 copy and Adam's moments), and the settings in scripts/zero2.json and zero3.json.
Not verified on a GPU, where kernels have workspaces of their own: these are in the reserve.
"""

from __future__ import annotations

from ...pair.layers import match_layers, visual_understanding_layers
from .configs import LanguageModel, Tower
from .setup import TEACHER_BYTES, Models, Setup

#: Elements of a chunk's buffer in ops/visual_attention and in ops/answer_loss (CHUNK_ELEMENTS there).
MAP_CHUNK = {"cuda": 1 << 26, "cpu": 1 << 19}
HEAD_CHUNK = {"cuda": 1 << 25, "cpu": 1 << 21}
#: Head sizes of the Triton kernels, which need no chunk.
TRITON_HEAD_SIZES = (16, 32, 64, 128, 256)
#: stage3_max_live_parameters in scripts/zero3.json.
ZERO3_LIVE = 1_000_000_000

PHASES = {
    "teacher": "the teacher's forward",
    "answers": "the answer loss",
    "attention": "the attention loss",
    "backward": "the backward pass, at the last layer",
    "backward ends": "the backward pass, at the first layer and the embedding",
    "step": "the optimizer's step",
}

Terms = dict[str, float]


# ---------------------------------------------------------------------------------------------------------------------
# What is there all the time
# ---------------------------------------------------------------------------------------------------------------------
def lora_parameters(model: LanguageModel, rank: int) -> int:
    """r (inputs + outputs) for each linear map of a layer (Hu et al., arXiv 2106.09685)."""
    return model.layers * rank * sum(inputs + outputs for inputs, outputs in model.linears)


def trained_parameters(models: Models, setup: Setup) -> int:
    """Weights that are trained: MLP_S or the adapter, and with it the language model or its LoRA."""
    count = models.trained_adapter.parameters
    if setup.full:
        return count + models.student.parameters
    return count + (lora_parameters(models.student, setup.lora_rank) if setup.trains_llm else 0)


def resident(models: Models, setup: Setup) -> Terms:
    """Weights and optimizer states, in bytes on each GPU.

    AdamW keeps two float32 numbers a trained weight; DeepSpeed also a float32 copy of it, all spread over the GPUs. In
    ZeRO-3 the student's weights are spread, too, and those that are in use are gathered, up to ZERO3_LIVE. The teacher
    is counted whole on every GPU (`--teacher_placement replicate`): `auto`, the default, may spread or offload its
    layers. The encoder is the student's where it is the same.
    """
    student, c = models.student, setup.compute
    trained = trained_parameters(models, setup)
    llm = student.parameters * (setup.trained if setup.full else setup.held)
    if setup.trains_llm and setup.lora_rank:
        llm += lora_parameters(student, setup.lora_rank) * setup.trained
    adapters = models.trained_adapter.parameters * setup.trained + models.fetched * c
    tower = models.tower.parameters * c
    terms: Terms = {}
    if setup.zero == 3:
        live = min(student.parameters, ZERO3_LIVE) * c
        # An encoder that the teacher uses, too, is gathered in its own calls: it is part of the student.
        spread = (llm + adapters + tower) / setup.gpus
        terms["student: weights (ZeRO-3 share)"] = spread
        terms["student: gathered weights"] = live if setup.gpus > 1 else 0.0
    else:
        terms["student: language model"] = llm
        terms["student: adapter"] = adapters
        terms["vision encoder" + (" (shared)" if setup.has_teacher and not models.teacher_tower else "")] = tower
    if setup.has_teacher:
        terms["teacher: weights"] = teacher_weights(models, setup)
        if models.teacher_tower:
            terms["teacher: vision encoder"] = models.teacher_tower.parameters * c
    shares = setup.gpus if setup.zero else 1
    terms["optimizer states"] = trained * (12 if setup.zero else 8) / shares
    return terms


def teacher_weights(models: Models, setup: Setup) -> float:
    """The frozen teacher's, without its encoder: of float8 the matrices of its layers have a byte a weight, and a
    scale a row (`pair.float8`)."""
    teacher, c = models.teacher, TEACHER_BYTES[setup.teacher_dtype] or setup.compute
    total = float(c * (teacher.parameters + models.teacher_adapter.parameters))
    if setup.teacher_dtype == "float8":
        rows = teacher.layers * sum(outputs for _, outputs in teacher.linears)
        total += teacher.matrices * (1 - c) + c * rows
    return total


def gradients(models: Models, setup: Setup) -> float:
    """Bytes of the gradients that are kept between micro-batches, on each GPU.

    ZeRO-2 and ZeRO-3 keep a share. DDP has buckets as large as all gradients beside them.
    """
    trained = trained_parameters(models, setup) * setup.trained
    if setup.zero:
        return trained / setup.gpus
    return trained * (2 if setup.gpus > 1 else 1)


def gradient_buckets(models: Models, setup: Setup) -> float:
    """Gradients on their way to their share: two buckets of D^2 numbers (transformers' `auto` for
    reduce_bucket_size, overlap_comm), and as many that are being filled."""
    if not setup.zero or not setup.trains_llm:
        return 0.0
    return 3 * min(models.student.hidden**2, trained_parameters(models, setup)) * setup.trained


# ---------------------------------------------------------------------------------------------------------------------
# The student's activations
# ---------------------------------------------------------------------------------------------------------------------
def stream_bytes(setup: Setup) -> int:
    """s: the residual stream has the embedding's precision."""
    return setup.held


def saved_by_layer(model: LanguageModel, setup: Setup, aligned: bool = False) -> float:
    """Bytes that autograd keeps of one decoder layer, its input included where that is kept.

    Each norm: its input in float32 (4 T D; of a float32 stream the stream itself) and a factor a row; with trained
    weights also the normed input. Attention: q, k, v, output (c T d (2 H + 2 H_kv)) and the softmax's log-sum (4 T H).
    The gated network: gate, its SiLU, up (3 c T I). Linear maps that are trained keep their inputs: the norms'
    outputs, and the product of gate and up. Autocast makes a copy for each linear map, and one of each weight.
    An aligned layer keeps no map here: the map op keeps q and k, which are kept already, but where the stream is in
    float32 and autocast casts them for attention: there as they are, on a GPU cast; and (Triton) a log-sum-exp a row
    and head.
    """
    t, c, s = setup.tokens, setup.compute, stream_bytes(setup)
    d, wide, q, kv = model.hidden, model.intermediate, model.query_size, model.kv_size
    total = 2 * t * (4 * d + 4) + c * t * (2 * q + 2 * kv) + 4 * t * model.heads + 3 * c * t * wide
    if model.qk_norm:
        total += 4 * t * (q + kv) + 4 * t * (model.heads + model.kv_heads)
        total += setup.full * c * t * (q + kv)
    if setup.full:
        total += 2 * s * t * d + c * t * wide + c * t * d * (5 if setup.autocast else 2)
    if setup.autocast and setup.held == 4:
        total += c * model.matrices / model.layers
    if setup.trains_llm and setup.lora_rank:
        total += _saved_by_lora(model, setup)
    if aligned:
        wide_heads = setup.autocast and s == 4
        cuda = setup.device == "cuda"
        total += wide_heads * (2 if cuda else 4) * t * (q + kv) + cuda * 4 * t * model.heads
    return total


def _saved_by_lora(model: LanguageModel, setup: Setup) -> float:
    """For each linear map: the dropped-out input of A, the dropout's mask, and A's output.

    The mask is a byte a number on CUDA; on a CPU it has the precision of the input, float32 for float32 adapters.
    """
    t, c, r = setup.tokens, setup.compute, setup.lora_rank
    mask = 0 if not setup.lora_dropout else 1 if setup.device == "cuda" else setup.trained
    total = sum(t * inputs * (c + mask) + c * t * r for inputs, _ in model.linears)
    if setup.autocast:
        total += c * lora_parameters(model, r) / model.layers
    return total


def student_activations(models: Models, setup: Setup) -> tuple[float, float]:
    """(kept from the forward to the backward, made again for one layer by gradient checkpointing), in bytes.

    With checkpointing each layer keeps its input alone (s T D). Beside the layers: the last norm, and the adapter's
    input.
    """
    student, t, s = models.student, setup.tokens, stream_bytes(setup)
    outside = t * (4 * student.hidden + 4) + setup.full * s * t * student.hidden
    trained = models.trained_adapter
    places = setup.batch * models.tower.patches
    outside += places * trained.inputs * (setup.trained + (setup.compute if setup.autocast else 0))
    outside += places * trained.outputs * setup.compute * 2 * (trained.depth - 1)
    aligned = len(aligned_layers(models)[0]) if setup.aligns else 0
    plain, tapped = (saved_by_layer(student, setup, aligned=kind) for kind in (False, True))
    if setup.checkpointing:
        return outside + student.layers * s * t * student.hidden, plain
    return outside + (student.layers - aligned) * plain + aligned * tapped, 0.0


def cast_weights(models: Models, setup: Setup) -> float:
    """Casts of trained weights that autocast keeps until the forward is over; without checkpointing, the graph keeps
    them anyway (`saved_by_layer`)."""
    if not (setup.autocast and setup.checkpointing and setup.trains_llm):
        return 0.0
    rank = setup.lora_rank
    return setup.compute * (lora_parameters(models.student, rank) if rank else models.student.matrices)


def backward_work(models: Models, setup: Setup) -> float:
    """Gradients of a layer's activations on their way back (two of the gated network's width, one of the stream), and
    of the largest weight before it is added to what is kept."""
    student, t = models.student, setup.tokens
    work = 2 * setup.compute * t * student.intermediate + stream_bytes(setup) * t * student.hidden
    if setup.full and not setup.zero and setup.accumulation > 1:
        work += setup.trained * student.hidden * student.intermediate
    return work


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps and answer rows
# ---------------------------------------------------------------------------------------------------------------------
def aligned_layers(models: Models) -> tuple[list[int], list[list[int]]]:
    """The student's aligned layers and the teacher's group for each (the default bands and matching)."""
    student = visual_understanding_layers(models.student.layers)
    return student, match_layers(student, visual_understanding_layers(models.teacher.layers))


def map_bytes(models: Models, setup: Setup) -> float:
    """One head-averaged map of a micro-batch, 4 B N N_v."""
    return 4.0 * setup.tokens * models.tower.patches


def map_work(model: LanguageModel, setup: Setup) -> float:
    """What the map op needs while it runs: nothing to speak of with Triton, four buffers of a chunk without."""
    if setup.device == "cuda" and model.head_size in TRITON_HEAD_SIZES:
        return 0.0
    elements = setup.batch * model.heads * setup.length**2
    return 4.0 * 4 * min(elements, MAP_CHUNK[setup.device])


def eager_maps(models: Models, setup: Setup) -> tuple[float, float]:
    """(student, teacher): the attention matrices that eager attention with output_attentions would keep instead.

    Each student layer a softmax in float32 and its 16-bit copy, L B H N^2 (4 + c); the teacher returns c bytes each.
    """

    def matrices(model: LanguageModel) -> float:
        return float(model.layers * setup.batch * model.heads * setup.length**2)

    c = setup.compute
    return matrices(models.student) * (4 + c if c < 4 else 4), matrices(models.teacher) * c


def chunk_rows(vocab: int, rows: int, device: str) -> int:
    """Rows whose logits exist at a time (ops/answer_loss/head.py, rows_per_chunk)."""
    return min(rows, max(32, HEAD_CHUNK[device] // vocab // 32 * 32))


def answer_work(models: Models, setup: Setup) -> tuple[float, float]:
    """(at work, kept until the backward): bytes of the answer loss.

    Kept: answer rows of both models, the gradient of the student's (c R D each), and that of a trained head, made in
    the same pass. At work, with a teacher: the student's log-probabilities, the teacher's and their difference in
    float32, and one model's logits. Where the common vocabulary is smaller, the student's twice, and from the second
    chunk on a copy of the logits beside the teacher's probabilities of the chunk before. Without a teacher:
    log-probabilities and logits, and the log-probabilities of the chunk before.
    """
    student, c, rows = models.student, setup.compute, setup.rows
    size = chunk_rows(student.vocab, rows, setup.device)
    kept = 2.0 * c * rows * student.hidden
    each = (8 if rows > size else 4) + c
    if setup.distils:
        kept += c * rows * models.teacher.hidden
        each = 12 + c if setup.whole_vocabulary else 16 + (2 if rows > size else 1) * c
    work = float(size * student.vocab * each)
    head = student.embedding * setup.trained if setup.full else 0
    if setup.autocast and setup.held == 4:
        work += student.embedding * c  # the head's cast
    if setup.full and setup.trained < 4 and rows > size:
        # A 16-bit head's gradient is made afterwards, by blocks of the vocabulary.
        blocks = size * student.vocab / 2 * (12 + 2 * c)
        return max(work, head + blocks) - head, kept + head
    return work, kept + head


# ---------------------------------------------------------------------------------------------------------------------
# Teacher, encoder, optimizer at work
# ---------------------------------------------------------------------------------------------------------------------
def forward_work(model: LanguageModel, setup: Setup) -> float:
    """A forward without a graph: the widest moment of a layer, in the gated network (stream, its norm, gate, up, their
    product) or in a norm (stream, and three float32 numbers for each of its)."""
    t, c, d = setup.tokens, setup.compute, model.hidden
    return float(max(2 * c * t * d + 3 * c * t * model.intermediate, 2 * c * t * d + 12 * t * d))


def encoder_work(tower: Tower, setup: Setup) -> float:
    """An encoder that hands out the hidden states of all layers, and its widest moment, in a feed-forward network."""
    places, c = setup.batch * tower.positions, setup.compute
    return float(c * places * (tower.hidden * (tower.layers + 3) + 2 * tower.intermediate))


def optimizer_work(models: Models, setup: Setup) -> float:
    """On CUDA AdamW runs in one kernel (adamw_torch_fused, the default there) and keeps nothing; on a CPU it keeps one
    weight's square roots and their quotient. Under DeepSpeed the gradients' share in float32."""
    trained = trained_parameters(models, setup)
    if setup.device == "cpu":
        largest = models.student.embedding if setup.full else models.trained_adapter.parameters
        return 8.0 * largest
    shares = setup.gpus if setup.zero else 1
    widened = 4.0 if setup.zero and setup.compute < 4 else 0.0
    return trained * widened / shares


# ---------------------------------------------------------------------------------------------------------------------
# The moments
# ---------------------------------------------------------------------------------------------------------------------
def phases(models: Models, setup: Setup) -> dict[str, Terms]:
    """For each moment of PHASES that the stage has, its terms in bytes. The reserve is not among them."""
    always = resident(models, setup)
    kept, recomputed = student_activations(models, setup)
    grown = gradients(models, setup)
    # Without accumulation gradients appear while activations go; DDP's buckets are there from the beginning.
    buckets_of_ddp = grown / 2 if setup.gpus > 1 and not setup.zero else 0.0
    before = grown if setup.accumulation > 1 else buckets_of_ddp
    buckets = gradient_buckets(models, setup)
    answer, answer_kept = answer_work(models, setup)
    casts, back = cast_weights(models, setup), backward_work(models, setup)
    count, one = 0, 0.0
    if setup.aligns:
        count, one = len(aligned_layers(models)[0]), map_bytes(models, setup)
    result: dict[str, Terms] = {}
    if setup.has_teacher:
        tower = models.teacher_tower or models.tower
        c, places = setup.compute, setup.batch * tower.patches
        visual = c * places * (tower.hidden + models.teacher.hidden)
        work = forward_work(models.teacher, setup) + visual
        if setup.teacher_dtype == "float8":  # a matrix as a product takes it, cast and scaled
            work += 2 * c * max(inputs * outputs for inputs, outputs in models.teacher.linears)
        if setup.aligns:
            # In its aligned layers the network's tensors are not there yet: a new map, the means, and the op's own.
            taps = (count + 1) * one + map_work(models.teacher, setup)
            taps += c * setup.tokens * (2 * models.teacher.hidden + 2 * models.teacher.query_size)
            work = max(work + count * one, taps + visual)
        work = max(work, encoder_work(tower, setup))
        result["teacher"] = {**always, "gradients": before, "teacher at work": work}
    forward = {**always, "gradients": before, "student: activations": kept + casts}
    result["answers"] = {
        **forward,
        "attention maps": 2 * count * one,
        # The whole sequence of last hidden states waits beside its answer rows.
        "answer rows and logits": answer + answer_kept + stream_bytes(setup) * setup.tokens * models.student.hidden,
    }
    if setup.aligns:
        # Kept of each layer: a float32 gradient and a byte mask; at work: both maps masked and scaled, and a product.
        loss = 2 * count * one + (count - 1) * 1.25 * one + 5.25 * one
        result["attention"] = {**forward, "attention maps": loss, "answer rows and logits": answer_kept}
    head = models.student.embedding * setup.trained if setup.full else 0.0
    begins = before if setup.accumulation > 1 or setup.zero else before + head
    result["backward"] = {
        **always,
        "gradients": begins,
        "gradient buckets": buckets,
        "student: activations": kept,
        "student: layer made again": recomputed,
        "student: backward at work": back,
        "attention maps": 2 * count * one + (map_work(models.student, setup) if count else 0.0),
    }
    # LLaVA embeds each sample by itself: one dense gradient is being added to that of the samples before it.
    dense = head * min(2, setup.batch)
    layer = saved_by_layer(models.student, setup) if setup.checkpointing or setup.trains_llm else 0.0
    result["backward ends"] = {
        **always,
        "gradients": grown - (0.0 if setup.accumulation > 1 or setup.zero or models.student.tied else head),
        "gradient buckets": buckets,
        "student: layer made again": layer + back if layer + back > dense else 0.0,
        "embedding's gradients": dense if dense >= layer + back else 0.0,
        "attention maps": count * one,
    }
    result["step"] = {**always, "gradients": grown, "optimizer at work": optimizer_work(models, setup)}
    return {name: {term: size for term, size in terms.items() if size} for name, terms in result.items()}


def peak(models: Models, setup: Setup) -> tuple[str, Terms]:
    """The moment with the most memory, and its terms in bytes."""
    found = phases(models, setup)
    name = max(found, key=lambda key: sum(found[key].values()))
    return name, found[name]
