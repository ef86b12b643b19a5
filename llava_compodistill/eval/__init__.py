"""Evaluation of LLaVA checkpoints. Read first: `cli` (the command, top to bottom), then `run` and `engine`.

benchmarks/     one file a benchmark, and how to add one
checkpoint      what is asked of a checkpoint's folder before anything is loaded
protocols       how a model is asked about an item; `requests` are what the engine answers
engine          shares images and prefixes; `sequences` runs whole sequences instead, `scoring` is its short form
records         records that survive a kill; `shares` divides the work among processes; `run` has both
summaries       the table beside the paper's; `compare` sets models side by side
llava_suite     LLaVA's six, through scripts/eval; `llava_answers` and `submissions` are steps of those scripts
vqa_loader      asks them through the engine, in the place of LLaVA's module; `as_llava` is that engine
lmms            a checkpoint as a model of lmms-eval
"""
