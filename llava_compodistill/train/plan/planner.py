"""What fits, how long it takes, and what to change where nothing fits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...errors import PlanError
from . import flops, memory
from .configs import LANGUAGE_MODELS, LanguageModel
from .setup import GIB, Models, Setup

#: What a card loses to the CUDA context, communication buffers, workspaces and fragmentation: GiB, and a share of the
#: card. An assumption.
RESERVE_GIB, RESERVE_SHARE = 1.5, 0.05


@dataclass(frozen=True)
class Stage:
    """A stage by the scripts' defaults, and assumptions about its data.

    Attributes:
        script: of the repository's scripts.
        trains_llm, distils: as in `memory.Setup`.
        global_batch: Table 8 of the paper.
        samples: LLaVA-Pretrain's 558,128 captions; LLaVA-mix's 665,298 conversations.
        text, answers: mean tokens of a sample beside its image, and those of them that are answers. Assumptions.
        longest: most text tokens that a sample is assumed to have, where the length limit is higher.
    """

    script: str
    trains_llm: bool
    distils: bool
    global_batch: int
    samples: int
    text: int
    answers: int
    longest: int | None = None


_CAPTIONS = {"global_batch": 256, "samples": 558_128, "text": 32, "answers": 24, "longest": 256}
_INSTRUCTIONS = {"global_batch": 128, "samples": 665_298, "text": 200, "answers": 120}
#: method -> its stages, in order (the classes in methods/ have the same recipes).
RECIPES: dict[str, dict[str, Stage]] = {
    "compodistill": {
        "dpt": Stage("dpt.sh", False, True, **_CAPTIONS),
        "dft": Stage("dft.sh", True, True, **_INSTRUCTIONS),
        "sft": Stage("sft.sh", True, False, **_INSTRUCTIONS),
    },
    "sft": {
        "pt": Stage("baseline_sft.sh", False, False, **_CAPTIONS),
        "sft": Stage("baseline_sft.sh", True, False, **_INSTRUCTIONS),
    },
}
RECIPES["kd"] = RECIPES["compodistill"]
#: method -> the stages that train L_ADL.
ALIGNED = {"compodistill": ("dft",), "kd": (), "sft": ()}


@dataclass(frozen=True)
class Machine:
    """The GPUs.

    Attributes:
        memory: GiB of each.
        reserve: GiB of each that are not counted on.
        tflops: dense 16-bit peak of each, in TFLOP/s.
        mfu: the share of it that is reached.
        measured: FLOP/s of each by stage, in place of the two; from a calibration file.
    """

    gpus: int
    memory: float
    reserve: float
    tflops: float
    mfu: float
    measured: dict[str, float] = field(default_factory=dict)

    def rate(self, stage: str, dtype: str) -> float:
        """FLOP/s of one GPU; of a stage that was not measured, the mean of those that were."""
        if self.measured:
            return self.measured.get(stage, sum(self.measured.values()) / len(self.measured))
        return self.mfu * self.tflops * 1e12 * flops.RATE[dtype]


@dataclass(frozen=True)
class Request:
    """What is to be planned; None stands for the stage's own value.

    Attributes:
        max_length: the scripts' MAX_LENGTH.
        batch: micro-batch; None for the largest that fits.
    """

    models: Models
    machine: Machine
    method: str = "compodistill"
    lora_rank: int = 0
    dtype: str = "bf16"
    teacher_dtype: str = "auto"
    zero: int = 2
    checkpointing: bool = True
    max_length: int = 2048
    global_batch: int | None = None
    samples: int | None = None
    text: int | None = None
    answers: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Change:
    """Something to change where nothing fits.

    Attributes:
        what: in words.
        settings: of the scripts.
        peak: GiB of a micro-batch of one sample with this change and those before it in the list.
        fits: whether that is enough.
    """

    what: str
    settings: str
    peak: float
    fits: bool


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage.

    Attributes:
        setup: with the largest micro-batch that fits; with one sample where none does.
        moment: key of `memory.PHASES` at which memory is highest.
        terms: what is there then, in bytes, the reserve included.
        moments: bytes at each moment, the reserve included.
        eager: bytes of attention matrices (student, teacher) that eager attention would keep instead of the maps.
        useful, executed: FLOPs of a sample.
        seconds: of the stage.
        changes: what to change where nothing fits, cheapest first.
    """

    name: str
    stage: Stage
    setup: Setup
    fits: bool
    moment: str
    terms: dict[str, float]
    moments: dict[str, float]
    eager: tuple[float, float] | None
    global_batch: int
    samples: int
    mean_length: int
    answers: int
    steps: int
    useful: float
    executed: float
    seconds: float
    trained: int
    changes: list[Change]

    @property
    def total(self) -> float:
        """Bytes at the peak, the reserve included."""
        return sum(self.terms.values())


def plan_stage(request: Request, name: str) -> StagePlan:
    """Plan one stage.

    Raises:
        PlanError: for a global batch that the GPUs cannot share, a micro-batch that does not divide it, and a length
            limit that an image alone fills.
    """
    stage, machine = RECIPES[request.method][name], request.machine
    global_batch = request.global_batch or stage.global_batch
    if global_batch % machine.gpus:
        raise PlanError(
            f"--global-batch {global_batch}: is no multiple of --gpus {machine.gpus}. Change one of them "
            "(the scripts refuse it, too)."
        )
    each = global_batch // machine.gpus
    sizes = [size for size in range(1, each + 1) if each % size == 0]
    if request.batch is not None:
        if request.batch not in sizes:
            raise PlanError(
                f"--batch {request.batch}: the {each} samples that each GPU has in a step are no multiple of it. "
                f"Possible are {', '.join(map(str, sizes))}."
            )
        sizes = [request.batch]
    limit = machine.memory * GIB
    setups = [_setup(request, stage, name, size, each) for size in sizes]
    fitting = [setup for setup in setups if _peak(request, setup)[1] <= limit]
    setup = fitting[-1] if fitting else setups[0]
    moment, total = _peak(request, setup)
    reserve = machine.reserve * GIB
    moments = {key: sum(terms.values()) + reserve for key, terms in memory.phases(request.models, setup).items()}
    terms = {**memory.phases(request.models, setup)[moment], "reserve (assumed)": reserve}
    visual = request.models.tower.patches
    mean = min(visual + (stage.text if request.text is None else request.text), setup.length)
    answers = min(stage.answers if request.answers is None else request.answers, mean - visual)
    samples = request.samples or stage.samples
    executed = flops.executed(request.models, setup, mean, answers)
    return StagePlan(
        name=name,
        stage=stage,
        setup=setup,
        fits=bool(fitting),
        moment=moment,
        terms=terms,
        moments=moments,
        eager=memory.eager_maps(request.models, setup) if setup.aligns else None,
        global_batch=global_batch,
        samples=samples,
        mean_length=mean,
        answers=answers,
        steps=flops.steps(samples, global_batch),
        useful=flops.useful(request.models, setup, mean, answers),
        executed=executed,
        seconds=samples * executed / (machine.rate(name, request.dtype) * machine.gpus),
        trained=memory.trained_parameters(request.models, setup),
        changes=[] if fitting else changes(request, stage, name),
    )


def _setup(request: Request, stage: Stage, name: str, batch: int, each: int) -> Setup:
    visual = request.models.tower.patches
    length = request.max_length
    if stage.longest is not None:
        length = min(length, visual + stage.longest)
    if length <= visual:
        raise PlanError(
            f"--max-length {request.max_length}: an image alone has {visual} tokens in this encoder. Raise it."
        )
    return Setup(
        trains_llm=stage.trains_llm,
        distils=stage.distils,
        aligns=name in ALIGNED[request.method],
        lora_rank=request.lora_rank if stage.trains_llm else 0,
        dtype=request.dtype,
        teacher_dtype=request.teacher_dtype,
        zero=request.zero,
        gpus=request.machine.gpus,
        checkpointing=request.checkpointing,
        batch=batch,
        length=length,
        rows=batch * (length - visual),  # every text token an answer: the most there can be
        accumulation=each // batch,
    )


def _peak(request: Request, setup: Setup) -> tuple[str, float]:
    name, terms = memory.peak(request.models, setup)
    return name, sum(terms.values()) + request.machine.reserve * GIB


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing fits
# ---------------------------------------------------------------------------------------------------------------------
def changes(request: Request, stage: Stage, name: str) -> list[Change]:
    """What to change, in order of cost, each on top of those before it, up to the first that fits.

    Time (checkpointing), communication (ZeRO-2, ZeRO-3), the teacher's precision, what is trained (LoRA), what is read
    (shorter samples), and last another model.
    """
    found: list[Change] = []
    each = (request.global_batch or stage.global_batch) // request.machine.gpus
    limit = request.machine.memory * GIB
    visual = request.models.tower.patches

    def attempt(what: str, settings: str, changed: Request) -> bool:
        peak = _peak(changed, _setup(changed, stage, name, 1, each))[1]
        found.append(Change(what, settings, peak / GIB, peak <= limit))
        return peak <= limit

    if request.batch not in (None, 1):
        request = replace(request, batch=None)
        if attempt("a micro-batch of 1", "BATCH=1", request):
            return found
    if not request.checkpointing:
        request = replace(request, checkpointing=True)
        if attempt("gradient checkpointing: one forward of the layers more", "GRADIENT_CHECKPOINTING=True", request):
            return found
    if request.zero < 2 and request.machine.gpus > 1:
        request = replace(request, zero=2)
        if attempt("ZeRO-2: gradients and optimizer states spread over the GPUs", "LAUNCHER=deepspeed", request):
            return found
    if request.zero < 3 and request.machine.gpus > 1 and stage.trains_llm:
        request = replace(request, zero=3)
        settings = "LAUNCHER=deepspeed DEEPSPEED_CONFIG=scripts/zero3.json"
        if attempt("ZeRO-3: the student's weights, too; gathered in every pass", settings, request):
            return found
    if stage.distils and request.teacher_dtype != "float8":
        request = replace(request, teacher_dtype="float8")
        if attempt("the teacher's layers in 8 bits: slightly other targets", "--teacher_dtype float8", request):
            return found
    if stage.trains_llm and not request.lora_rank:
        request = replace(request, lora_rank=128)
        if attempt("LoRA of the language model: another result", "LORA=1", request):
            return found
    length = (visual + request.max_length) // 2 // 64 * 64
    if stage.longest is None and length > visual:
        request = replace(request, max_length=length)
        if attempt("shorter samples: longer answers are cut", f"MAX_LENGTH={length}", request):
            return found
    if stage.distils:
        for smaller in _smaller(request.models.teacher):
            models = request.models
            adapter = replace(models.teacher_adapter, outputs=smaller.hidden)
            changed = replace(request, models=replace(models, teacher=smaller, teacher_adapter=adapter))
            if smaller.parameters <= models.student.parameters or not _aligned(changed):
                break
            request = changed
            if attempt("a smaller teacher", f"TEACHER={checkpoint_of(smaller.name)}", request):
                return found
    for smaller in _smaller(request.models.student):
        changed = replace(request, models=replace(request.models, student=smaller))
        if stage.distils and not _aligned(changed):
            continue
        request = changed
        if attempt("a smaller student", f"STUDENT={smaller.name}", request):
            return found
    return found


def checkpoint_of(model: str) -> str:
    """Where teacher_finetune.sh puts the LLaVA that it makes of a language model."""
    return f"./checkpoints/llava-{model.rsplit('/', 1)[-1].lower()}"


def _aligned(request: Request) -> list[int]:
    """The student's aligned layers; none where the teacher's band is too small for them."""
    try:
        return memory.aligned_layers(request.models)[0]
    except ValueError:
        return []


def _smaller(model: LanguageModel | None) -> list[LanguageModel]:
    """Known models with the same vocabulary, which stands for the same tokenizer here, largest first."""
    known = [other for other in LANGUAGE_MODELS.values() if model is not None and other.family == model.family]
    fewer = [other for other in known if other.vocab == model.vocab and other.parameters < model.parameters]
    return sorted(fewer, key=lambda other: -other.parameters)
