"""A pair of models and the way a stage runs: what the formulas of memory.py and flops.py are asked about."""

from __future__ import annotations

from dataclasses import dataclass

from .configs import Adapter, LanguageModel, Tower

GIB = 2**30
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
#: What training's --teacher_dtype takes, and bytes of a weight; None: as the step computes (of float8 what is not a
#: matrix of a layer).
TEACHER_BYTES = {"auto": None, "float32": 4, "bfloat16": 2, "float16": 2, "float8": None}


@dataclass(frozen=True)
class Models:
    """The sizes of a pair.

    Attributes:
        teacher: None for a method without one.
        teacher_adapter: P_T.
        teacher_tower: the teacher's encoder where it is not the student's.
        taf: whether the student's adapter is P_T, frozen, and MLP_S; else it has one of its own, of P_T's depth.
    """

    student: LanguageModel
    tower: Tower
    teacher: LanguageModel | None = None
    teacher_adapter: Adapter | None = None
    teacher_tower: Tower | None = None
    taf: bool = True

    @property
    def fetched(self) -> int:
        """Weights of P_T in the student."""
        return self.teacher_adapter.parameters if self.taf else 0

    @property
    def trained_adapter(self) -> Adapter:
        """MLP_S, or the student's own adapter."""
        if self.taf:
            return Adapter(self.teacher_adapter.outputs, self.student.hidden, 1)
        return Adapter(self.tower.hidden, self.student.hidden, 2)


@dataclass(frozen=True)
class Setup:
    """How a stage runs.

    Attributes:
        trains_llm: whether the language model is trained, by LoRA of `lora_rank` or (0) as a whole.
        distils, aligns: whether L_KL and L_ADL are computed; either loads the teacher.
        dtype: bf16, fp16 or fp32, what the step computes in.
        teacher_dtype: of TEACHER_BYTES.
        zero: 0 for DDP or a single process, 2, 3.
        batch: samples of a micro-batch, B.
        length: tokens of its longest sample, visual ones included, N.
        rows: its answer tokens, R.
        accumulation: micro-batches of an optimizer step.
        whole_vocabulary: whether L_KL runs over all rows of the heads; as a rule the tokenizer is smaller.
        device: cuda, or cpu for measurements there, where chunks are smaller and AdamW takes one weight at a time.
        lora_dropout: LLaVA's default, which the scripts leave as it is.
    """

    trains_llm: bool
    distils: bool
    aligns: bool
    lora_rank: int = 0
    dtype: str = "bf16"
    zero: int = 2
    gpus: int = 1
    checkpointing: bool = True
    batch: int = 1
    length: int = 2048
    rows: int = 1
    accumulation: int = 2
    whole_vocabulary: bool = False
    device: str = "cuda"
    lora_dropout: float = 0.05
    teacher_dtype: str = "auto"

    @property
    def full(self) -> bool:
        return self.trains_llm and not self.lora_rank

    @property
    def has_teacher(self) -> bool:
        return self.distils or self.aligns

    @property
    def compute(self) -> int:
        """c"""
        return BYTES[self.dtype]

    @property
    def held(self) -> int:
        """Bytes of a weight of the student's language model (`student_dtype`)."""
        return self.compute if self.zero or self.lora_rank else 4

    @property
    def trained(self) -> int:
        """Bytes of a weight that is trained, and of its gradient."""
        return self.compute if self.zero else 4

    @property
    def autocast(self) -> bool:
        """Whether weights are cast on their way into products; under DeepSpeed they have the precision already."""
        return not self.zero and self.compute < 4

    @property
    def tokens(self) -> int:
        return self.batch * self.length
