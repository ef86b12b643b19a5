"""What can be said on the command line: LLaVA's own dataclasses, extended.

Every flag of `llava.train.train` keeps its name and meaning; the fields below are added. They are parsed by
`transformers.HfArgumentParser`, as LLaVA does it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from .. import compat
from ..hosts.files import parse_json
from ..hosts.llava import training as llava_training
from ..methods import METHODS, Method, find_method
from ..pair.layers import parse_band
from ..pair.sight import LEAST_SAMPLES
from .checks import ADAPTER_STAGES, STAGES, check_advantage, check_alignment, check_image_layers, check_packing
from .on_policy import check_on_policy

#: Stages of the paper that have a teacher.
DISTILLED_STAGES = ("dpt", "dft")


@dataclass
class ModelArguments(llava_training.ModelArguments):
    """LLaVA's model arguments, with the teacher and the TAF adapter (paper, Section 4.2)."""

    mm_use_im_patch_token: bool = field(default=False)
    mm_vision_select_layer: int | None = field(default=-2)
    teacher_model_path: str | None = field(
        default=None,
        metadata={
            "help": "LLaVA checkpoint of the teacher, for stages that distil; with --mm_projector_type taf its "
            "adapter P_T is used in the student."
        },
    )
    teacher_model_base: str | None = field(
        default=None, metadata={"help": "Base LLM of the teacher if its checkpoint is only a LoRA or an adapter."}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder written by `llava-compodistill cache`: the teacher's logits and attention maps are read "
            "from it, and the teacher's language model is not loaded."
        },
    )
    teacher_version: str | None = field(
        default=None,
        metadata={
            "help": "Conversation template of a teacher whose tokenizer is not the student's. Default: the template "
            "in its config.json, or that of its model type; plain if --version is plain."
        },
    )
    taf_depth: int = field(
        default=1,
        metadata={"help": "Linear layers of MLP_S with --mm_projector_type taf: 1 (paper), or 2 with a GELU between."},
    )
    unfreeze_mm_vision_tower: bool = field(
        default=False,
        metadata={"help": "Also train the vision encoder, in a stage that trains the language model (dft, sft)."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention backend of both LLMs: flash_attention_2, sdpa or eager. Default: the fastest that is "
            "available."
        },
    )


@dataclass
class DataArguments(llava_training.DataArguments):
    """LLaVA's data arguments."""

    bad_samples: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "If the image or conversation of a sample cannot be used: stop (error), or leave the sample out "
            "and log it (skip)."
        },
    )
    check_images: bool = field(default=True, metadata={"help": "Check that every image file exists before training."})
    skip_samples: str | None = field(
        default=None,
        metadata={"help": "File that lists samples to leave out, written by llava-compodistill check --write_skip."},
    )
    allow_outside_images: bool = field(
        default=False,
        metadata={"help": "Accept images outside --image_folder that samples name by an absolute path or by ../."},
    )


@dataclass
class TrainingArguments(llava_training.TrainingArguments):
    """LLaVA's training arguments, with the stage and the loss (paper, Sections 4.1 and 4.3)."""

    stage: str = field(
        default="dft",
        metadata={
            "help": "What is trained, and the loss. pt: adapter, L_LM. dpt: adapter, L_LM + L_KL. dft: LLM and "
            "adapter, L_LM + L_KL + L_ADL. sft: LLM and adapter, L_LM, no teacher. Some methods have stages of their "
            "own (llava_mod: d2d, d2s, preference)."
        },
    )
    method: str = field(
        default="compodistill",
        metadata={
            "help": f"{', '.join(METHODS)}, or package.module:Name for one of your own; "
            "llava_compodistill/methods/README.md describes each."
        },
    )
    method_options: str = field(
        default="{}", metadata={"help": "Options of the method as JSON, such as '{\"gamma\": 1.0}' for llava_kd."}
    )
    vat: bool = field(
        default=True, metadata={"help": "Visual attention alignment (L_ADL) in the stages of --attention_stages."}
    )
    attention_stages: str = field(
        default="dft",
        metadata={
            "help": "The stages that train L_ADL, separated by commas: dpt, dft, sft. If sft is named, it loads the "
            "teacher and trains L_LM + L_ADL."
        },
    )
    lm_weight: float = field(default=1.0, metadata={"help": "Weight of L_LM."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of L_KL."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of L_ADL."})
    attention_schedule: Literal["constant", "linear", "cosine", "warmup"] = field(
        default="constant",
        metadata={
            "help": "Factor on --attention_weight over the steps of a stage: linear and cosine fall from 1 to 0, "
            "warmup rises from 0 to 1."
        },
    )
    attention_schedule_end: float | None = field(
        default=None,
        metadata={
            "help": "The share of the stage's steps after which the factor of --attention_schedule stays at 0 "
            "(linear, cosine) or 1 (warmup). Default: 1 for linear and cosine, 0.1 for warmup."
        },
    )
    kd_temperature: float = field(default=1.0, metadata={"help": "Temperature T of L_KL (times T squared) or L_ULD."})
    attention_loss: Literal["cosine", "mse", "kl"] = field(
        default="cosine", metadata={"help": "Distance between attention maps (Table 3a)."}
    )
    attention_similarity: Literal["row", "matrix"] = field(
        default="row", metadata={"help": "Compare each query's row of the map, or the flattened map of a sample."}
    )
    attention_heads: Literal["mean", "matched"] = field(
        default="mean",
        metadata={"help": "Compare the mean over heads (paper), or each head with its most similar teacher head."},
    )
    attention_rows: Literal["all", "answer", "text", "visual"] = field(
        default="all", metadata={"help": "The queries (rows of the map) that L_ADL compares."}
    )
    student_layers: str = field(
        default="intermediate",
        metadata={
            "help": "The student's layers to align: intermediate, early, later, all (Table 3b), a list such as "
            "8,9,10, or sight: layers where the student reads the image, measured before training."
        },
    )
    teacher_layers: str = field(
        default="intermediate", metadata={"help": "The teacher's layers, given in the same way."}
    )
    sight_share: float = field(
        default=0.9,
        metadata={
            "help": "For layers chosen by sight: the shortest run of consecutive layers that holds this share of the "
            "model's total sight is aligned."
        },
    )
    calibration_samples: int = field(
        default=64,
        metadata={"help": "Number of samples with an image, drawn from all data, for measuring the sight of layers."},
    )
    layer_matching: Literal["group", "simple", "adaptive"] = field(
        default="group", metadata={"help": "How teacher layers are assigned to student layers (Table 3c)."}
    )
    calibration_batches: int = field(
        default=4,
        metadata={"help": "Number of batches for measuring layers (adaptive matching) or heads (matched heads)."},
    )
    attention_map_impl: Literal["auto", "eager", "chunked", "triton"] = field(
        default="auto",
        metadata={"help": "Implementation of the attention map op. auto: triton on CUDA where it can run."},
    )
    measure_attention: bool = field(
        default=False,
        metadata={"help": "Log the attention similarity to the teacher even if L_ADL is not trained."},
    )
    shuffle_attention_targets: bool = field(
        default=False,
        metadata={
            "help": "Control experiment: give each sample the teacher attention of another image in the micro-batch. "
            "A sample has no attention loss if there is no other image."
        },
    )
    visual_advantage: Literal["none", "tokens", "rows", "both"] = field(
        default="none",
        metadata={
            "help": "Weight by how much the image helps the teacher to predict an answer token: the tokens of L_KL, "
            "the rows of L_ADL that predict an answer token, or both. Methods kd and compodistill."
        },
    )
    advantage_floor: float = field(
        default=0.1,
        metadata={
            "help": "Constant added to the visual advantage of a token, from 0 to 1, before the weights are "
            "normalised to a mean of 1 per sample. No weight is above 1 + 1 / floor."
        },
    )
    shuffle_advantage: bool = field(
        default=False,
        metadata={"help": "Control experiment: permute the weights among the answer tokens of each sample."},
    )
    on_policy: float = field(
        default=0.0,
        metadata={
            "help": "Share of the samples whose last answer is replaced by one that the student generates, with L_KL "
            "and L_ADL but no L_LM (GKD). kd and compodistill, in stages with a teacher that train the language model."
        },
    )
    on_policy_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the student's answers; 0 is greedy."}
    )
    on_policy_max_tokens: int = field(default=128, metadata={"help": "Maximum tokens of a student's answer."})
    image_layers: str = field(
        default="all",
        metadata={
            "help": "Layers in which text sees the image while a stage without a teacher trains, written as a band "
            "is; in the others text queries attend to text alone. Makes models that read the image at a given depth."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Run the layers of the language models on real tokens alone: padding costs no time. The losses "
            "are the same within rounding."
        },
    )
    pack_length: int = field(
        default=0,
        metadata={
            "help": "Train on packs of samples with at most this many tokens together, images included; "
            "--per_device_train_batch_size counts packs. Implies --padding_free. 0: no packs."
        },
    )
    mm_vision_tower_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the vision encoder under --unfreeze_mm_vision_tower; else --learning_rate."
        },
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = field(
        default="auto",
        metadata={
            "help": "Precision of the frozen teacher. auto: the student's compute precision. float8: the same, with "
            "the matrices of its layers held in 8 bits. (8bit and 4bit of bitsandbytes: --teacher_placement.)"
        },
    )
    teacher_placement: Literal["auto", "replicate", "zero3", "fsdp", "offload", "8bit", "4bit"] = field(
        default="auto",
        metadata={
            "help": "Where the frozen teacher is stored. replicate: whole on every device. zero3, fsdp: its layers "
            "sharded over all devices. offload: its layers in host memory, copied to the device one by one. 8bit, "
            "4bit: quantised (bitsandbytes), which changes its targets. auto: replicate if that leaves a quarter of "
            "the device free; else zero3 with --deepspeed or fsdp without, if that does; else offload."
        },
    )
    optim: str | None = field(
        default=None,
        metadata={
            "help": "An optimizer of transformers. Default: adamw_torch_fused on a GPU (not in fp16), otherwise "
            "adamw_torch."
        },
    )
    compile_layers: Literal["none", "student", "teacher", "both"] = field(
        default="none",
        metadata={"help": "Compile the decoder layers of these models one by one (torch.compile)."},
    )
    blind: Literal["warn", "error", "off"] = field(
        default="warn",
        metadata={"help": "If the loss does not depend on the image: log a warning, stop, or do not measure (off)."},
    )
    sight_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two measurements of sight, the increase in loss when the images of "
            "samples are swapped. Default: 200, more if an optimizer step has fewer than 10 samples."
        },
    )
    sight_samples: int = field(default=16, metadata={"help": "Samples per measurement of sight, over all ranks."})
    resume_anyway: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint in --output_dir even if it was made with other settings."},
    )
    verify_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Hash whole files, not only their first and last 64 KiB, when a checkpoint is saved or resumed."
        },
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint in --output_dir even if loading its files runs code from them."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Check after each micro-batch, which waits for the device, whether its loss is finite, and leave "
            "it out of the logged loss if not. Without it, losses are checked when logged, and end the run."
        },
    )
    #: The method that `method` and `method_options` name. No flag.
    chosen_method: ClassVar[Method]
    #: What `resume.describe` gives for this run; every checkpoint is saved with it. No flag.
    made_with: ClassVar[dict[str, Any] | None] = None
    if not compat.HAS_WARMUP_RATIO:
        warmup_ratio: float = field(
            default=0.0,
            metadata={"help": "Share of the steps for learning-rate warm-up (transformers 5: part of warmup_steps)."},
        )
    if not compat.HAS_EVALUATION_STRATEGY:
        evaluation_strategy: str | None = field(default=None, metadata={"help": "Older name of --eval_strategy."})

    def __post_init__(self) -> None:
        compat.translate_training_arguments(self)
        self.optim = self.optim or default_optimizer(self.use_cpu, self.fp16)
        super().__post_init__()
        self.chosen_method = _read_method(self.method, self.method_options)
        stages = dict.fromkeys([*STAGES, *self.chosen_method.recipe])
        if self.stage not in stages:
            raise ValueError(f"--stage {self.stage!r}: must be one of {', '.join(stages)} (--method {self.method}).")
        if self.stage in DISTILLED_STAGES and self.chosen_method.teacher_stages and not self.distilled:
            raise ValueError(
                f"--stage {self.stage}: method {self.method} distils in the stages "
                f"{', '.join(self.chosen_method.teacher_stages)} (its recipe: {', '.join(self.chosen_method.recipe)})."
            )
        check_alignment(self)
        if self.kd_temperature <= 0:
            raise ValueError(f"--kd_temperature {self.kd_temperature}: must be greater than 0.")
        for name in ("lm_weight", "kl_weight", "attention_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: a loss weight cannot be negative.")
        if self.attention_heads == "matched" and self.layer_matching == "adaptive":
            raise ValueError("--attention_heads matched needs --layer_matching group or simple, not adaptive.")
        check_advantage(self)
        if self.calibration_batches < 1:
            raise ValueError(f"--calibration_batches {self.calibration_batches}: must be at least 1.")
        if not 0 < self.sight_share <= 1:
            raise ValueError(f"--sight_share {self.sight_share}: must be above 0 and at most 1.")
        if self.calibration_samples < LEAST_SAMPLES:
            raise ValueError(f"--calibration_samples {self.calibration_samples}: must be at least {LEAST_SAMPLES}.")
        for name, least in (("sight_steps", 1), ("sight_samples", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}.")
        for name in ("student_layers", "teacher_layers"):
            parse_band(getattr(self, name), name, measured=True)
        check_image_layers(self)
        check_packing(self)
        # LLaVA's trainer, saver and loader read this switch; the stage decides it.
        self.tune_mm_mlp_adapter = self.stage in ADAPTER_STAGES
        check_on_policy(self)
        if self.gradient_checkpointing:
            # Reentrant checkpointing gives the captured maps no gradient and says nothing about it.
            self.gradient_checkpointing_kwargs = {**(self.gradient_checkpointing_kwargs or {}), "use_reentrant": False}

    @property
    def seed_of_data(self) -> int:
        """What the order of the data, and the samples of a mix, are drawn with."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def distilled(self) -> bool:
        """Whether this stage has a teacher in its loss."""
        return self.chosen_method.has_teacher(self.stage, self)

    @property
    def paired(self) -> bool:
        """Whether this stage learns from pairs of answers."""
        return self.stage in self.chosen_method.paired_stages


def default_optimizer(use_cpu: bool, fp16: bool = False) -> str:
    """AdamW in one kernel on a GPU. (LLaVA's own default, which every transformers gets from it, is adamw_torch.)

    Not in fp16: there a step that overflows is left out inside the kernel, and accelerate, which does not see that,
    would go on with the learning rate's schedule.
    """
    return "adamw_torch_fused" if torch.cuda.is_available() and not use_cpu and not fp16 else "adamw_torch"


def _read_method(name: str, options: str) -> Method:
    given = parse_json(options, f"--method_options {options[:200]}")
    if not isinstance(given, dict):
        raise ValueError(f"--method_options {options}: must be a JSON object of names and values.")
    return find_method(name, given)
